"""What a decision reads: trials as they ended, and all trials of one arm together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Record:
    """One trial as it ended: what the decision knows of it."""

    arm: str
    trial: str
    seed: int
    status: str                              # completed, stopped, diverged, failed
    epochs: int
    best_epoch: int
    figures: Mapping[str, float]             # at the best epoch
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""                           # why it was stopped, diverged or failed
    improving: float = 0.0                   # relative improvement of the objective over the last three epochs
    collapsed: bool = False                  # completed, but ended because its latent had collapsed for good


@dataclass(frozen=True)
class Candidate:
    """All trials of one arm."""

    arm: str
    records: tuple[Record, ...]              # by seed

    @cached_property
    def broken(self) -> Record | None:
        """A trial that did not complete, the first seed's before others."""
        return next((record for record in self.records if record.status != "completed"), None)

    @property
    def collapsed(self) -> Record | None:
        """A trial whose latent collapsed for good, where that was to end it: such a model is none to choose."""
        return next((record for record in self.records if record.collapsed), None)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records if record.status == "completed")

    def by_seed(self, metric: str, seeds: Sequence[int] | None = None) -> dict[int, float]:
        """The figure of every completed trial (of these seeds), NaN where it is lacking."""
        return {record.seed: record.figures.get(metric, math.nan) for record in self.records
                if record.status == "completed" and (seeds is None or record.seed in seeds)}

    def mean(self, metric: str, seeds: Sequence[int] | None = None) -> float:
        """NaN where a seed lacks the figure; infinite where it is (the PSNR of a perfect reconstruction)."""
        values = list(self.by_seed(metric, seeds).values())
        infinite = {value for value in values if math.isinf(value)}
        if not values or any(map(math.isnan, values)) or len(infinite) > 1:
            return math.nan
        return infinite.pop() if infinite else fmean(values)


def group(records: Sequence[Record], order: Sequence[str]) -> list[Candidate]:
    """Candidates in the file's order, their trials by seed; records of one arm and seed count once."""
    arms: dict[str, dict[int, Record]] = {arm: {} for arm in order}
    for record in sorted(records, key=lambda r: (r.seed, r.arm, r.trial, r.status, r.epochs, r.best_epoch,
                                                 repr(sorted(r.figures.items())))):
        arms.setdefault(record.arm, {})[record.seed] = record
    return [Candidate(arm, tuple(trials.values())) for arm, trials in arms.items() if trials]


def first_seeds(candidates: Sequence[Candidate]) -> list[int]:
    """The seed that all have in common before any further one."""
    return [min(seed for candidate in candidates for seed in candidate.seeds)]
