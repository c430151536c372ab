"""Numbers that tell what data is like before anything is trained on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from autoenc.config import Config
from autoenc.data.dataset import Dataset

MOST_ROWS, MOST_NUMBERS = 2000, 2**25      # that a PCA is fitted to: seconds, and 128 MiB
STATISTICS = ("x", "y", "longer axis", "shorter axis", "anisotropy", "red", "green", "blue")
_CHUNK = 256


class LatentPca(NamedTuple):
    """What principal components keep of the data, as many as a latent has numbers if there are items enough."""

    components: int
    numbers: int
    """of an item: pixel values, or the columns of its splats"""
    fitted_on: int
    """training items"""
    train: float
    """share of the variance that is kept of them; NaN where they do not vary"""
    val: float
    """and of held-out ones"""


def latent_pca(dataset: Dataset, config: Config) -> LatentPca | None:
    """The PCA at the size of the configured latent, over a seeded choice of the training part: of pixels, or of splats
    as a model learns them, in the columns of ``model.splat_target``, each normalised. None where the latent's size is
    not known (a model of one's own)."""
    import torch

    from autoenc.evaluation.reach import pca_reach

    if config.latent_shape is None:
        return None
    size = math.prod(config.latent_shape)
    most = max(2, min(MOST_ROWS, MOST_NUMBERS // config.elements))
    train, val = (_choice(dataset.splits[split], most // part, config.data.seed)
                  for split, part in (("train", 1), ("val", 2)))
    if dataset.splats is None:
        rows = [torch.from_numpy(dataset.images[chosen]).flatten(1) / 127.5 - 1 for chosen in (train, val)]
    else:
        rows = _columns(dataset.splats[train], dataset.splats[val], config.model.splat_target)
    components = min(size, len(train) - 1, config.elements)
    if components < 1:
        return None
    if (rows[0] == rows[0][0]).all():      # no variance; what would be found is that of rounding
        return LatentPca(components, config.elements, len(train), math.nan, math.nan)
    reach = pca_reach(*rows, [components])[components]
    return LatentPca(components, config.elements, len(train), reach.train, reach.val)


def _choice(indices: np.ndarray, most: int, seed: int) -> np.ndarray:
    most = max(1, most)
    return indices if len(indices) <= most else np.sort(np.random.default_rng(seed).choice(indices, most, False))


def _columns(train: np.ndarray, val: np.ndarray, target: str) -> list:
    import torch

    from autoenc.data.splat_targets import TARGETS, fit_normalisation

    normalisation = fit_normalisation(target, np.array_split(train, -(-len(train) // _CHUNK)))
    return [normalisation.apply(TARGETS[target].encode(torch.from_numpy(splats))).flatten(1)
            for splats in (np.array(train), np.array(val))]


def splat_statistics(splats: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each of STATISTICS over all splats of some items of (N, count, 8): centres, both
    axes (standard deviations, of an image that is 2 wide), anisotropy (longer - shorter) / (longer + shorter), colours.
    NaN for no items."""
    count, total, squares = 0, np.zeros(len(STATISTICS)), np.zeros(len(STATISTICS))
    for start in range(0, len(indices), _CHUNK):
        rows = splats[indices[start:start + _CHUNK]].reshape(-1, splats.shape[-1]).astype(np.float64)
        longer, shorter = rows[:, 2:4].max(1), rows[:, 2:4].min(1)
        values = np.column_stack((rows[:, :2], longer, shorter, (longer - shorter) / (longer + shorter), rows[:, 5:]))
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
    if not count:
        return np.full_like(total, np.nan), np.full_like(total, np.nan)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def fit_psnr(originals: np.ndarray, renderings: np.ndarray) -> float:
    """PSNR in dB of renderings against the images that splats were fitted to, both uint8 (n, H, W, 3): that of the mean
    squared error over all."""
    error = np.square(originals.astype(np.float64) - renderings).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf
