"""Verdicts against a baseline: does an arm help, hurt, or make no difference that matters? Pure.

helps       the objective is not worse than ``margin``, and a gain is shown in one of ``gains`` (none named: in the
            objective); or the objective is better by more than ``margin``
hurts       the objective is worse by more than ``margin``
neutral     the objective differs by no more than ``margin``, either way, and no gain is larger than that
undecided   the seeds do not tell; with how many it would take if the means stayed as they are

Each by simultaneous confidence intervals over paired seeds (see :mod:`~autoenc.sweep.evidence`), corrected for the
number of arms, and of gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoenc import figures
from autoenc.sweep.evidence import CONFIDENCE, DOUBT, Change, Table, excess_of
from autoenc.sweep.parts import Baseline, Decision, Measured
from autoenc.sweep.records import Candidate
from autoenc.sweep.words import number, percent

MOST_SEEDS = 1000            # beyond which nobody is told how many it would take


@dataclass(frozen=True)
class Verdict:
    word: str
    content: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)


def against_baseline(candidates: Sequence[Candidate], objective: Measured, rule: Decision) -> dict[str, Verdict]:
    """A verdict on every candidate that completed, the baseline included; {} where there is no baseline, or none that
    completed."""
    baseline = rule.baseline and next((c for c in candidates if c.arm == rule.baseline.arm), None)
    if not baseline or baseline.broken:
        return {}
    others = [candidate for candidate in candidates if candidate is not baseline and not candidate.broken]
    case = _Case(baseline.arm, rule.baseline, objective, others, {
        metric: Table({c.arm: c.by_seed(metric) for c in [baseline, *others]})
        for metric in dict.fromkeys([objective.metric, *rule.baseline.gains])})
    return {baseline.arm: Verdict("baseline"), **{candidate.arm: case.verdict(candidate.arm) for candidate in others}}


@dataclass(frozen=True)
class _Case:
    baseline: str
    rule: Baseline
    objective: Measured
    others: Sequence[Candidate]
    tables: Mapping[str, Table]

    @property
    def gains(self) -> Sequence[str]:
        return self.rule.gains or (self.objective.metric,)

    def mode(self, metric: str) -> str:
        return self.objective.direction if metric == self.objective.metric else figures.MODES[metric]

    def tail(self, metric: str) -> float:
        """The objective is judged once an arm, a gain is looked for in each of the gains."""
        looks = len(self.gains) if metric in self.rule.gains else 1
        return DOUBT / 2 / len(self.others) / looks

    def changes(self, arm: str, seeds: int | None = None) -> dict[str, Change | None]:
        return {metric: table.change(arm, self.baseline, self.tail(metric), seeds)
                for metric, table in self.tables.items()}

    def verdict(self, arm: str) -> Verdict:
        changes = self.changes(arm)
        change = changes[self.objective.metric]
        if change is None:
            return Verdict("undecided", None, [f"nothing to compare with {self.baseline} by"])
        word = self.word(changes)
        needed = self.seeds_needed(arm, change.seeds) if word == "undecided" else None
        content = {"arm": self.baseline, "seeds": change.seeds, "seeds_needed": needed,
                   "changes": {metric: _plain(found) for metric, found in changes.items() if found is not None}}
        told = (change_in_words(metric, found, self.mode(metric))
                for metric, found in changes.items() if found is not None)
        reasons = [f"against {self.baseline}: {'; '.join(told)}"]
        if change.low is None:
            reasons[0] += " (one seed: says nothing about the noise)"
        elif word == "undecided":
            reasons.append(f"undecided: about {needed} seeds would tell, if the means stay as they are" if needed else
                           f"undecided: more than {MOST_SEEDS:,} seeds would not tell, if the means stay as they are")
        return Verdict(word, content, reasons)

    def word(self, changes: Mapping[str, Change | None]) -> str:
        """helps, hurts, neutral or undecided."""
        margin = self.rule.margin
        _, low, high = self.excess(self.objective.metric, changes)
        if low is None or high is None:
            return "undecided"
        if low > margin:
            return "hurts"
        gains = [self.excess(metric, changes) for metric in self.gains]
        gained = any(most is not None and most < 0 for _, _, most in gains)
        if high < -margin or (high <= margin and gained):
            return "helps"
        bounded = all(least is not None and least >= -margin for _, least, _ in gains)
        return "neutral" if -margin <= low and high <= margin and bounded else "undecided"

    def excess(self, metric: str, changes: Mapping[str, Change | None]) -> tuple[float, float | None, float | None]:
        return excess_of(changes[metric], self.mode(metric))

    def seeds_needed(self, arm: str, seeds: int) -> int | None:
        """The fewest seeds that would decide, if means and noise stayed as they are; None where they are too many."""
        def tells(count: int) -> bool:
            return self.word(self.changes(arm, count)) != "undecided"

        high = max(2, seeds + 1)
        while not tells(high):
            if high >= MOST_SEEDS:
                return None
            high = min(MOST_SEEDS, 2 * high)
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if tells(middle) else (middle, high)
        return max(high, seeds + 1)


def _plain(change: Change) -> dict[str, Any]:
    """As JSON: what is not finite is null."""
    told = {name: getattr(change, name) for name in ("value", "low", "high")}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in told.items()}
    return {"change": finite["value"], "low": finite["low"], "high": finite["high"], "unit": change.unit}


def change_in_words(metric: str, change: Change, mode: str) -> str:
    """A change with its interval, each end as better or worse."""
    value, *ends = [better_or_worse(end, change.unit) for end in excess_of(change, mode)]
    if None in ends:
        return f"{metric} {value}"
    count = f"{change.seeds} seed{'s' if change.seeds != 1 else ''}"
    return f"{metric} {value} ({CONFIDENCE:.0%} interval: {ends[0]} to {ends[1]}, {count})"


def better_or_worse(excess: float | None, unit: str) -> str | None:
    """How much worse (negative: better) something is, in words; None where that is not known."""
    if not excess:
        return None if excess is None else "the same"
    size = percent(abs(excess)) if unit == "share" else number(abs(excess))
    return f"{size} {'worse' if excess > 0 else 'better'}"
