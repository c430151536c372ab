"""Learning rates as a function of the epoch and of what came before it: nothing to store, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoenc import figures
from autoenc.config import TrainConfig

PLATEAU_PATIENCE, PLATEAU_FACTOR = 2, 0.5


def learning_rate(settings: TrainConfig, epoch: int, values: Sequence[float]) -> float:
    """The rate of an epoch (from 1), given the monitored figure after each epoch before it.

    cosine: half a cosine from ``learning_rate`` towards 0 over ``epochs`` (Loshchilov and Hutter 2017, SGDR, without
    restarts). plateau: halved whenever two epochs in a row did not improve on the best by more than ``min_delta``.
    """
    rate = settings.learning_rate
    if settings.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * (epoch - 1) / settings.epochs)) / 2
    if settings.schedule == "plateau":
        return rate * PLATEAU_FACTOR ** _plateaus(values, figures.MODES[settings.monitor], settings.min_delta)
    return rate


def _plateaus(values: Sequence[float], mode: str, min_delta: float) -> int:
    best, waited, plateaus = math.nan, 0, 0
    for value in values:
        if figures.better(mode, value + min_delta if mode == "min" else value - min_delta, best):
            best, waited = value, 0
        else:
            waited += 1
        if waited == PLATEAU_PATIENCE:
            plateaus, waited = plateaus + 1, 0
    return plateaus
