"""When a trial is stopped early: ASHA's rungs, bounded by what the decision rule could still choose.

ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", https://arxiv.org/abs/1810.05934) stops a
trial that, at a rung, is not among the best 1/factor of those that came by before. With three arms and one rung that
stops the second to report for being 0.3% worse. Here a trial is stopped only if ASHA would stop it *and* it is worse
than the rung's best by more than the margin. No Ray here: the same object judges live and recorded results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from autoenc.figures import better


@dataclass(frozen=True)
class Stop:
    """Why a trial was stopped: the rung's epoch, its value there, ASHA's cutoff, the rung's best value."""

    epoch: int
    value: float
    cutoff: float
    best: float
    beaten_by: tuple[str, ...]


def rung_epochs(grace: int, factor: int, epochs: int) -> list[int]:
    """The epochs at which trials are compared: grace · factor^k, those above epochs / factor dropped."""
    rungs = []
    epoch = min(grace, epochs)
    while epoch * factor <= epochs:
        rungs.append(epoch)
        epoch *= factor
    return rungs


def excess(value: float, best: float, mode: str) -> float:
    """How much worse than the best, as a share of the best's size: 0 where it is not worse, infinite where it is and
    the best is 0 or infinite, or the value NaN."""
    if not better(mode, best, value):
        return 0.0
    measurable = best and math.isfinite(best) and not math.isnan(value)
    return abs(value - best) / abs(best) if measurable else math.inf


def within(share: float, tolerance: float) -> bool:
    """Whether an excess lies within a tolerance. What equals it but for rounding does: 0.33 is within 10% of 0.3."""
    return share <= tolerance * (1 + 1e-9)


@dataclass
class Rungs:
    epochs: list[int]
    factor: int
    margin: float
    mode: str
    recorded: dict[int, dict[str, float]] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)       # trials that the rule could not choose: no measure for others

    def judge(self, trial: str, epoch: int, value: float, *, fit: bool = True) -> Stop | None:
        """Record a trial's value at an epoch; a :class:`Stop` where it should end there.

        ``fit``: whether the decision's requirements hold for it so far; an unfit trial never costs another its slot.
        A value that is not finite (an undefined figure) is neither judged nor a measure.
        """
        if epoch not in self.epochs or not math.isfinite(value):
            return None
        self.record(trial, epoch, value, fit=fit)
        rivals = {name: other for name, other in self.recorded[epoch].items()
                  if name != trial and name not in self.unfit}
        if not rivals:
            return None
        cutoff = self._cutoff(list(rivals.values()))
        best = (min if self.mode == "min" else max)(rivals.values())
        if better(self.mode, cutoff, value) and not within(excess(value, best, self.mode), self.margin):
            beaten_by = tuple(sorted(name for name, other in rivals.items() if better(self.mode, other, value)))
            return Stop(epoch, value, cutoff, best, beaten_by)
        return None

    def record(self, trial: str, epoch: int, value: float, *, fit: bool = True) -> None:
        """Record a value without judging it: what the store holds already."""
        if math.isfinite(value):
            self.recorded.setdefault(epoch, {})[trial] = value
        (self.unfit.discard if fit else self.unfit.add)(trial)

    def forget(self, trial: str) -> None:
        """A failed or diverged trial is no measure for the others."""
        for rung in self.recorded.values():
            rung.pop(trial, None)

    def _cutoff(self, values: list[float]) -> float:
        """The value that a trial must reach to be among the best 1/factor (linear interpolation, as in Ray's ASHA)."""
        ordered = sorted(values, reverse=self.mode == "max")
        position = (len(ordered) - 1) / self.factor
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
