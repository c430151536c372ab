"""Models and losses of one's own, tried on a worker before a sweep trains anything. No torch and no Ray here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoenc.config import make_config
from autoenc.errors import InputError
from autoenc.sweep.race import Race

SECONDS = 120.0              # that it may take, waiting for its worker included


def check(race: Race, call: Callable[..., list[str]]) -> None:
    """Raise :class:`InputError`, a line a candidate, where what a candidate names as its own cannot be built, or does
    not keep its contract.

    ``call(function, *task, seconds=…)`` calls a function on a worker. Where none can be had in time, or it dies,
    nothing is said: every trial tries its own model once more.
    """
    spec = race.spec
    configs = {f"{spec.path}: arms.{trial.candidate.name}" if trial.candidate.name in spec.arms else str(spec.path):
               trial.run.config.flat() for trial in race.trials if trial.run.config.own and not trial.run.ended}
    if not configs:
        return
    try:
        said = call(problems, configs, seconds=SECONDS)
    except Exception:                       # of Ray's many kinds
        return
    if said:
        raise InputError("\n".join(said))


def problems(configs: Mapping[str, Mapping[str, Any]], threads: int, device: str) -> list[str]:
    """On a worker: what is wrong with the models and losses of one's own in these configurations."""
    import torch

    from autoenc.custom import load_terms
    from autoenc.model.custom import CustomAutoencoder

    torch.set_num_threads(threads)
    said = []
    for where, flat in configs.items():
        config = make_config(flat, where)
        try:
            load_terms(config)
            if config.model.kind == "custom":
                CustomAutoencoder(config, seed=config.train.seed)
        except InputError as error:
            said.append(f"{where}: {error}")
    return said
