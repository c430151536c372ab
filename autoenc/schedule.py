"""Learning rates and KL weights as a function of the epoch or step and of what came before it: nothing to store,
nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoenc import figures
from autoenc.config import Config, TrainConfig

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


def kl_weight(config: Config, step: int, steps: int) -> float:
    """The weight of the KL divergence at a step, from 0 at the very first one, with so many ``steps`` an epoch.

    linear: ``loss.kl`` times the step over the steps of the warm-up, at most 1 (KL annealing: Bowman et al. 2016,
    https://arxiv.org/abs/1511.06349). cyclical: the same in each of ``loss.kl_cycles`` equal cycles over the whole
    training, whose first half is the warm-up (Fu et al. 2019, https://arxiv.org/abs/1903.10145, with R = 0.5).
    """
    if config.kl_schedule == "linear":
        share = step / (config.loss.kl_warmup_epochs * steps)
    elif config.kl_schedule == "cyclical":
        whole = config.train.epochs * steps
        share = 2 * (step * config.loss.kl_cycles % whole) / whole          # whole numbers: cycles start exactly
    else:
        share = 1.0
    return config.loss.kl * min(1.0, share)


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
