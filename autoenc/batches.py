"""Batches of one split on a device, cut from the memory-mapped arrays of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from autoenc.data import Dataset
from autoenc.metrics import to_inputs

RESIDENT_BYTES = 2 * 10**9       # a split up to this size is kept on the GPU, as uint8


class Batches:
    """The images of one split, or their splats, with segmentation and labels where the data has them and they are asked
    for.

    ``indices`` are the split's rows in the data set's arrays. A batch is a mapping of ``images`` float32
    (B, 3, H, W) in [-1, 1], ``splats`` float32 (B, N, 8) where the data has them, ``segmentation`` int64 (B, H, W) and
    ``labels`` int64 (B,), on ``device``.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray, device: torch.device, *, segmentation: bool,
                 labels: bool, images: bool = True, channels_last: bool = False) -> None:
        wanted = {"images": dataset.images if images else None, "splats": dataset.splats,
                  "segmentation": dataset.segmentation if segmentation else None,
                  "labels": dataset.labels if labels else None}
        self.arrays = {name: array for name, array in wanted.items() if array is not None}
        self.indices, self.device, self.channels_last = indices, device, channels_last
        self.resident: dict[str, Tensor] = {}
        size = sum(array[:1].nbytes for array in self.arrays.values()) * len(indices)
        if device.type == "cuda" and size <= RESIDENT_BYTES:
            self.resident = {name: torch.from_numpy(array[indices]).to(device)
                             for name, array in self.arrays.items()}

    def __len__(self) -> int:
        return len(self.indices)

    def pass_over(self, batch_size: int, order: np.ndarray | None = None) -> Iterator[dict[str, Tensor]]:
        """All images once, in ``order`` (a permutation of the split; default: as they stand); the last batch may be
        smaller."""
        order = np.arange(len(self)) if order is None else order
        on_device = torch.from_numpy(order).to(self.device) if self.resident else None
        for start in range(0, len(self), batch_size):
            if on_device is not None:
                rows = on_device[start:start + batch_size]
                yield self._batch({name: array[rows] for name, array in self.resident.items()})
            else:
                yield self.take(order[start:start + batch_size])

    def take(self, positions: np.ndarray) -> dict[str, Tensor]:
        """The batch of these positions within the split."""
        rows = self.indices[positions]
        picked = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        if self.device.type == "cuda":       # pinned memory is copied while the GPU computes
            picked = {name: tensor.pin_memory() for name, tensor in picked.items()}
        return self._batch(picked)

    def _batch(self, picked: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True).long() if name in ("segmentation", "labels")
                else to_inputs(tensor, self.device, self.channels_last) for name, tensor in picked.items()}
