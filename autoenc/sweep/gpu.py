"""What one training takes of a GPU, measured on a worker, in a process that does nothing else. No Ray here.

How busy the GPU is and how much memory it holds is the driver's own account (nvidia-smi, which comes with it): events
that torch records around a step would count the pauses between small kernels as work, and torch knows nothing of the
memory that CUDA takes for each process.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autoenc.config import make_config
from autoenc.sweep.packing import Use

if TYPE_CHECKING:
    from autoenc.data import Dataset

LIMIT_SECONDS = 240.0           # for all of it, starting the process included
STEPS = 20                      # of training, between two validations
SECONDS = 6.0                   # that the GPU is watched for, or as long as STEPS take
SETTLE_SECONDS = 1.0            # the driver's figure is over up to a second before it is asked
PAUSE_SECONDS = 0.25
FIELDS = ("uuid", "name", "memory.total", "memory.used", "utilization.gpu", "compute_mode")
MIB = 2**20


@dataclass(frozen=True)
class Reading:
    """A GPU, as the driver tells."""

    name: str
    total: float                # bytes
    used: float                 # bytes, by all processes
    busy: float | None          # share of the last second, or part of it, in which a kernel ran; None: not told
    exclusive: bool             # does not take several processes


def read_gpus() -> dict[str, Reading]:
    """All GPUs of this machine, by UUID. Raises OSError, SubprocessError or ValueError where they are not told."""
    done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> dict[str, Reading]:
    """What nvidia-smi prints of ``FIELDS``, as CSV without header and units. Raises ValueError for anything else."""
    found = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(FIELDS):
            raise ValueError(f"nvidia-smi: {line.strip()!r}")
        uuid, name, total, used, busy, mode = words
        found[uuid] = Reading(name, float(total) * MIB, float(used) * MIB,
                              float(busy) / 100 if busy.isdecimal() else None, mode != "Default")
    return found


def reading_of(gpus: Mapping[str, Reading], uuid: str) -> tuple[str, Reading]:
    """The GPU that torch calls by this UUID, which it may do without the prefix. Raises LookupError where it is none of
    these (a slice of one, with MIG)."""
    for key, reading in gpus.items():
        if key.endswith(uuid):
            return key, reading
    raise LookupError(f"nvidia-smi knows no GPU {uuid}")


def measure(flat: Mapping[str, Any], threads: int, device: str) -> Use:
    """Train a configuration on the GPU for a few seconds, in pieces of ``STEPS`` and a validation in proportion.

    Of a training split too large to be kept on the GPU the pieces are kept there all the same: it then looks busier
    than it would be. Raises what training raises, and what :func:`read_gpus` and :func:`reading_of` do.
    """
    import torch

    from autoenc.data import prepare
    from autoenc.train import train

    torch.set_num_threads(threads)
    gpus = read_gpus()                          # before this process takes of their memory
    config = make_config(flat, "the trial that is measured")
    dataset = prepare(config.data)
    key, before = reading_of(gpus, str(torch.cuda.get_device_properties(0).uuid))
    if before.exclusive:
        return Use(before.name, 0.0, before.total, 1.0, exclusive=True)
    settings = config.train.model_copy(update={"epochs": 10**6, "patience": None})
    pieces = piece(dataset, config.train.batch_size)
    over, told, began = threading.Event(), [], None
    watch = threading.Thread(target=_watch, args=(key, over, told), daemon=True)
    try:
        for _ in train(config.model_copy(update={"train": settings}), pieces, device=device):
            if began is None:                   # libraries are loaded, memory is reserved
                began = time.monotonic()
                watch.start()
            elif time.monotonic() > began + SETTLE_SECONDS + SECONDS:
                break
    finally:
        over.set()
    watch.join()
    if not told:
        raise LookupError("nvidia-smi does not tell how busy the GPU is")
    context = max(0.0, read_gpus()[key].used - before.used - torch.cuda.memory_reserved())
    memory = torch.cuda.max_memory_reserved() + context + resident(dataset) - resident(pieces)
    return Use(before.name, memory, before.total - before.used, sum(told) / len(told))


def _watch(key: str, over: threading.Event, told: list[float]) -> None:
    over.wait(SETTLE_SECONDS)
    while not over.wait(PAUSE_SECONDS):
        if (busy := read_gpus()[key].busy) is not None:
            told.append(busy)


def piece(dataset: Dataset, batch_size: int) -> Dataset:
    """The data set with so few items to train on that ``STEPS`` go through them, and in proportion to validate with,
    but a whole batch of validation where there is one."""
    from autoenc.train import EVALUATION_BATCH

    train, val = dataset.splits["train"], dataset.splits["val"]
    count = min(len(train), STEPS * batch_size)
    measured = max(EVALUATION_BATCH * batch_size, round(len(val) * count / max(1, len(train))))
    return replace(dataset, splits={**dataset.splits, "train": train[:count], "val": val[:measured]})


def resident(dataset: Dataset) -> int:
    """Bytes that the training and the validation split take on a GPU, about: each stays there if it is small enough."""
    from autoenc.batches import RESIDENT_BYTES

    arrays = (dataset.images, dataset.splats, dataset.segmentation, dataset.labels)
    each = sum(array[:1].nbytes for array in arrays if array is not None)
    sizes = (each * len(dataset.splits[split]) for split in ("train", "val"))
    return sum(size for size in sizes if size <= RESIDENT_BYTES)
