"""What a training's rows, a row an epoch, say of its course: where it ends, which epoch is its best, how it failed.

No torch, and no file: the race asks here of runs whose rows it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoenc import figures
from autoenc.config import Config
from autoenc.doctor import LASTING, lasting_collapse
from autoenc.table import Row


def own_end(rows: Sequence[Row], config: Config) -> int | None:
    """The epoch at which this configuration's budget, patience or a lasting collapse (``train.stop_on_collapse``) ends
    a training; None where the rows end earlier. Patience begins with the first epoch that counts."""
    mode, first = figures.MODES[config.train.monitor], config.counted_from
    values = _monitored(rows[:config.train.epochs], config)
    ends = [config.train.epochs, collapsed_at(rows, config),
            figures.patience_end(values, mode, config.train.patience, config.train.min_delta, first)]
    return min((end for end in ends if end is not None and end <= len(rows)), default=None)


def collapsed_at(rows: Sequence[Row], config: Config) -> int | None:
    """The epoch at which a collapse of the latent ended this training, where the configuration lets it."""
    if not (config.train.stop_on_collapse and config.model.variational):
        return None
    return lasting_collapse(rows[:config.train.epochs], config.counted_from)


def collapse(rows: Sequence[Row], config: Config) -> str:
    """Such a collapse in words; empty where there was none."""
    epoch = collapsed_at(rows, config)
    return "" if epoch is None else (f"collapsed: no dimension of the latent active in epochs {epoch - LASTING + 1} to "
                                     f"{epoch}, ended there (train.stop_on_collapse)")


def best_row(rows: Sequence[Row], config: Config) -> Row | None:
    """The row of the best epoch by the monitored figure, of those that count, within the configuration's own end."""
    rows = rows[:own_end(rows, config) or len(rows)]
    best = best_epoch(rows, config)
    return rows[best - 1] if best else None


def _monitored(rows: Sequence[Row], config: Config) -> list[float]:
    return [row.get(config.train.monitor, math.nan) for row in rows]


def best_epoch(rows: Sequence[Row], config: Config) -> int:
    """The best of all epochs that count, from 1, whatever the configuration's own end; 0 where there is none."""
    return figures.best_epoch(_monitored(rows, config), figures.MODES[config.train.monitor], config.counted_from)


def divergence(diverged: Mapping[str, Any]) -> str:
    """A divergence in words."""
    return f"diverged at epoch {diverged['epoch']}, step {diverged['step']}: {diverged['what']} not finite"


def failure(error: Exception, config: Config) -> str:
    """What the training code raised, in a line; for memory that ran out, with what to change."""
    first = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in first:
        settings, where = config.train, "GPU memory" if "CUDA" in first else "memory"
        return (f"out of {where} with train.batch_size {settings.batch_size} and model.base_channels "
                f"{config.model.base_channels}: make one of them smaller, or train.precision bf16, or let fewer trials "
                f"share a device (resources.gpus: 1) ({first})")
    return first
