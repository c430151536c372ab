"""Whether deciding one thing after another missed something that searching all together finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoenc.sweep.decide import CHOOSABLE
from autoenc.sweep.evidence import CONFIDENCE, DOUBT, Table, excess_of
from autoenc.sweep.final import Remark
from autoenc.sweep.inherit import make_candidate
from autoenc.sweep.parts import Preference
from autoenc.sweep.race import Race
from autoenc.sweep.records import Candidate, group
from autoenc.sweep.verdicts import better_or_worse
from autoenc.sweep.words import number


def missed(race: Race, decision: Mapping[str, Any]) -> list[Remark]:
    """What a decided sweep that starts from the phases before, its baseline, and searches a space says of them.

    Something is missed where a candidate's objective is shown to be better (simultaneous 95% intervals over paired
    seeds) at no larger value of the first figure that the rule prefers by, or where the rule takes another one than the
    baseline. Nothing is said of other sweeps: where the baseline sets something, or no point was tried.
    """
    spec, rule = race.spec, race.spec.decision
    if not spec.inherits or not spec.space or rule.baseline is None:
        return []
    start = make_candidate(spec, race.start, "start", {})
    order = list(dict.fromkeys(trial.candidate.name for trial in race.trials))
    found = {candidate.arm: candidate for candidate in group(race.records(), order)}
    greedy = rule.baseline.arm
    same = any(trial.candidate.name == greedy and trial.candidate.config.identity() == start.config.identity()
               for trial in race.trials)
    if not same or len(order) == 1:
        return []
    able = {row["arm"] for row in decision["candidates"] if row["standing"] in CHOOSABLE}
    if greedy not in able:
        return [Remark(f"whether the greedy phases missed something is not known: {greedy}, their winner, cannot be "
                       "compared", warning=True)]
    case = _Case(race, greedy, {arm: found[arm] for arm in order if arm in able})
    return [case.remark(decision["winner"])]


class _Case:
    def __init__(self, race: Race, greedy: str, able: Mapping[str, Candidate]) -> None:
        self.metric, self.mode = race.spec.objective.metric, race.spec.objective.direction
        self.greedy, self.able = greedy, able
        self.cost: Preference | None = next(
            (item for item in race.spec.decision.prefer if item.metric != self.metric), None)
        table = Table({arm: candidate.by_seed(self.metric) for arm, candidate in able.items()})
        tail = DOUBT / 2 / max(1, len(able) - 1)
        changes = {arm: table.change(arm, greedy, tail) for arm in able if arm != greedy}
        self.changes = {arm: change for arm, change in changes.items() if change is not None}
        self.excess = {arm: excess_of(change, self.mode) for arm, change in self.changes.items()}

    def remark(self, winner: str | None) -> Remark:
        no_dearer = [arm for arm in self.excess if self.dearness(arm) <= 0]
        shown = [arm for arm in no_dearer if self.excess[arm][2] is not None and self.excess[arm][2] < 0]
        if shown:
            best = min(shown, key=lambda arm: self.excess[arm][0])
            return Remark(f"the greedy phases missed something: {self.words(best)}", warning=True)
        if winner in self.excess:
            missed = "the greedy phases missed something: " if self.dearness(winner) < 0 else ""
            return Remark(f"{missed}the rule takes {winner} over {self.greedy}: {self.words(winner)}", bool(missed))
        unsure = [arm for arm in no_dearer if self.excess[arm][2] is None and self.excess[arm][0] < 0]
        if unsure:
            best = min(unsure, key=lambda arm: self.excess[arm][0])
            return Remark(f"the greedy phases may have missed something: {self.words(best)}; one seed does not tell "
                          "that from noise (decision.repeats)")
        return Remark(f"nothing that the joint search tried beats the greedy winner ({self.greedy}) beyond the noise")

    def dearness(self, arm: str) -> int:
        """By the first figure that the rule prefers by: -1 better than the greedy winner, 0 about equal, 1 worse (or
        not known)."""
        if self.cost is None:
            return 0
        own, other = (self.able[name].mean(self.cost.metric) for name in (arm, self.greedy))
        if self.cost.direction == "max":
            own, other = -own, -other
        if abs(own - other) <= self.cost.within * abs(other):
            return 0
        return -1 if own < other else 1

    def words(self, arm: str) -> str:
        """How a candidate stands to the greedy winner."""
        value, *ends = [better_or_worse(end, self.changes[arm].unit) for end in self.excess[arm]]
        said = f"{arm} against {self.greedy}: {self.metric} {value}"
        if None not in ends:
            said += f" ({CONFIDENCE:.0%} interval: {ends[0]} to {ends[1]})"
        if self.cost is None:
            return said
        own, other = (self.able[name].mean(self.cost.metric) for name in (arm, self.greedy))
        at = f"the same {self.cost.metric} ({number(own)})" if own == other else (
            f"{self.cost.metric} {number(own)} instead of {number(other)}")
        return f"{said}, at {at}"
