"""Sweeps with a KL schedule: what a shorter or longer budget makes of it, and what would be compared before it ends.

Only epochs trained wholly at the KL's final weight count (:attr:`autoenc.config.Config.counted_from`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoenc.config import Config, LossConfig
from autoenc.errors import InputError
from autoenc.sweep.parts import Asha
from autoenc.sweep.space import Parameter

WARMUP, CYCLES, SCHEDULE = "loss.kl_warmup_epochs", "loss.kl_cycles", "loss.kl_schedule"
SHAPING = ("model.variational", "loss.kl", SCHEDULE, WARMUP, CYCLES, "train.epochs")     # what counted_from reads


@dataclass(frozen=True)
class Budget:
    """The epochs that a sweep was written for, and those that presets and ``--set`` give it."""

    written: int
    given: Mapping[str, Any]
    """all that those set, by dotted key"""

    @property
    def epochs(self) -> int:
        return self.given.get("train.epochs", self.written)

    def fit(self, settings: Mapping[str, Any], cycles: int = LossConfig().kl_cycles) -> dict[str, Any]:
        """Settings of the sweep or of an arm, their KL schedule fitted to the epochs given, unless that is given, too.

        The linear warm-up takes the same share of the epochs, rounded down to whole ones and at least 1, so that from 2
        epochs on one is left that counts. Cycles (``cycles`` where a cyclical schedule comes without) keep their
        number, unless the last half of the last one were shorter than an epoch: then there are half as many as epochs.
        """
        found = dict(settings)
        if self.epochs == self.written:
            return found
        if _whole(found.get(WARMUP)) and WARMUP not in self.given:
            found[WARMUP] = max(1, found[WARMUP] * self.epochs // self.written)
        own = found.get(CYCLES, cycles if found.get(SCHEDULE) == "cyclical" else None)
        if _whole(own) and own > (most := max(1, self.epochs // 2)) and CYCLES not in self.given:
            found[CYCLES] = most
        return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_grace(asha: Asha | None, config: Config, where: str) -> None:
    """Raises :class:`InputError` where trials would be compared before the first epoch that counts."""
    first = config.counted_from
    if asha is not None and asha.grace_epochs < first:
        length = WARMUP if config.kl_schedule == "linear" else CYCLES
        raise InputError(
            f"{where}: asha.grace_epochs: {asha.grace_epochs}: trials would be compared at that epoch, and the first "
            f"one trained wholly at the KL's final weight is {first} ({SCHEDULE} {config.kl_schedule}, {length} "
            f"{config.flat()[length]}, train.epochs {config.train.epochs}): set asha.grace_epochs to {first} or more, "
            "or asha: false")


def ends_of_schedules(space: Mapping[str, Parameter], start: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The extreme points of a space in all that shapes a KL schedule, each with what it is drawn under."""
    keys = [key for key in space if key in SHAPING]
    for values in itertools.product(*(_ends(space[key]) for key in keys)):
        point: dict[str, Any] = {}
        for key, value in zip(keys, values, strict=True):
            if all({**start, **point}.get(name) == wanted or name not in SHAPING
                   for name, wanted in space[key].when.items()):
                point |= {name: wanted for name, wanted in space[key].when.items() if name not in point}
                point[key] = value
        yield point


def _ends(parameter: Parameter) -> list[Any]:
    if parameter.type != "choice":
        return [parameter.low, parameter.high]
    numbers = [value for value in parameter.choices if isinstance(value, int | float) and not isinstance(value, bool)]
    others = [value for value in parameter.choices if value not in numbers]
    return [*dict.fromkeys([min(numbers), max(numbers)] if numbers else []), *others]
