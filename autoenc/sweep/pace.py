"""How long an epoch takes where no store tells: measured on a worker before a sweep that is long enough for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from autoenc.config import make_config
from autoenc.sweep import plan
from autoenc.sweep.gpu import piece
from autoenc.sweep.race import Race

LIMIT_SECONDS = 60.0            # for all of it, starting the process included
SECONDS = 3.0                   # of training after the first piece, or one more piece
LONG = {"cpu": 2e8, "cuda": 1e10}
"""pixels to train on, over all epochs, from which a sweep is measured: about a quarter of an hour with base.yaml's
model on one core, or on one GPU"""


def worth_measuring(race: Race, images: int, device: str) -> bool:
    """Whether a sweep with so many training images is long beside the seconds that measuring takes."""
    known = [(run.config.train.epochs - len(run.rows)) for run in race.runs.values() if not run.ended]
    drawn = max(0, race.spec.trials - len(race.runs)) * race.start["train.epochs"]
    return (sum(known) + drawn) * images * race.start["data.image_size"] ** 2 >= LONG[device]


def largest(race: Race) -> dict[str, Any]:
    """The settings of the largest model that waits; the sweep's start where points are still to be drawn."""
    waiting = [run.config for run in race.runs.values() if not run.ended] or [make_config(race.start, "start")]
    return max(waiting, key=lambda config: (plan.parameters(config), config.train.batch_size)).flat()


def measure(flat: Mapping[str, Any], threads: int, device: str) -> float:
    """Seconds that an epoch of this configuration takes, validation included: from training for a few seconds on a
    piece of the data, and so within a fifth or so. Raises what training raises."""
    import torch

    from autoenc.data import prepare
    from autoenc.train import train

    torch.set_num_threads(threads)
    config = make_config(flat, "the trial that is measured")
    dataset = prepare(config.data)
    settings = config.train.model_copy(update={"epochs": 10**6, "patience": None})
    part = piece(dataset, config.train.batch_size)
    began, ended, pieces = None, 0.0, 0
    for _ in train(config.model_copy(update={"train": settings}), part, device=device):
        ended = time.monotonic()
        if began is None:                       # libraries are loaded, memory is reserved
            began = ended
        else:
            pieces += 1
            if ended > began + SECONDS:
                break
    return (ended - began) / pieces * len(dataset.splits["train"]) / len(part.splits["train"])
