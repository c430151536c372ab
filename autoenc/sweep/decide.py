"""The decision: recorded trials and a written rule in, the winner and its reasons out. Pure, and blind to order.

1. Candidates are compared that completed, and met every requirement, at their best epoch within the budget.
2. The best is the one with the best mean objective over the seeds that all finalists share.
3. Every candidate within ``within`` of the best counts as just as good (``evidence: shown``: only where the upper
   confidence bound of its excess lies within).
4. Among those the preferences decide in order, each with a tolerance of its own; then the file's order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from autoenc.sweep.asha import excess, within
from autoenc.sweep.evidence import CONFIDENCE, DOUBT, Table, excess_of
from autoenc.sweep.finalists import best_of, unmet
from autoenc.sweep.parts import Decision, Measured
from autoenc.sweep.records import Candidate, Record, first_seeds, group
from autoenc.sweep.verdicts import against_baseline
from autoenc.sweep.words import number, percent

CHOOSABLE = ("winner", "best", "as good", "worse", "rule's choice")
"""how candidates stand that could have won"""


@dataclass
class Told:
    """What is said of one candidate."""

    standing: str
    reasons: list[str]
    behind: dict[str, Any] | None = None
    verdict: str | None = None                       # against the baseline
    baseline: dict[str, Any] | None = None


@dataclass
class _Case:
    """A decision in the making."""

    objective: Measured
    rule: Decision
    candidates: list[Candidate]
    told: dict[str, Told] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    shown: dict[str, Any] | None = None


def decide(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision) -> dict[str, Any]:
    """The content of decision.json. Equal records and rule give equal content, in whatever order they come."""
    case = _Case(objective, rule, group(records, order))
    able = []
    for candidate in case.candidates:
        problem = _not_able(candidate, objective.metric, rule)
        if problem:
            case.told[candidate.arm] = problem
        else:
            able.append(candidate)

    winner = None
    if able:
        winner = _choose(case, able)
    else:
        case.reasons.append("no candidate completed and met every requirement, so there is no winner")
    if rule.pick is not None:
        winner = _picked(case, winner, able)
    for arm, verdict in against_baseline(case.candidates, objective, rule).items():
        told = case.told[arm]
        told.reasons += verdict.reasons
        told.verdict, told.baseline = verdict.word, verdict.content

    return {
        "rule": {"objective": {"metric": objective.metric, "mode": objective.direction},
                 **rule.model_dump(mode="json")},
        "winner": winner.arm if winner else None,
        "candidates": [_row(case, candidate) for candidate in case.candidates],
        "reasons": case.reasons,
        "shown": case.shown,
    }


def _row(case: _Case, candidate: Candidate) -> dict[str, Any]:
    metric, told = case.objective.metric, case.told[candidate.arm]
    score, values = candidate.mean(metric), list(candidate.by_seed(metric).values())
    se = stdev(values) / math.sqrt(len(values)) if len(values) > 1 and math.isfinite(score) else None
    return {"arm": candidate.arm, "settings": dict(candidate.records[0].settings),
            "trials": [record.trial for record in candidate.records],
            "seeds": [record.seed for record in candidate.records],
            "score": score if math.isfinite(score) else None, "se": se,
            "epochs": sum(record.epochs for record in candidate.records),
            "verdict": told.verdict or told.standing, "standing": told.standing,
            "behind": told.behind, "baseline": told.baseline, "reasons": told.reasons}


def _not_able(candidate: Candidate, metric: str, rule: Decision) -> Told | None:
    broken = candidate.broken
    if broken is not None:
        standing = f"behind at epoch {broken.epochs}" if broken.status == "stopped" else broken.status
        return Told(standing, [f"{broken.trial}: {broken.note}" if broken.note else f"{broken.trial} {broken.status}"])
    if math.isnan(candidate.mean(metric)):
        return Told("not comparable", [f"has no {metric}"])
    lacking = unmet(candidate, rule)
    standing = "collapsed" if candidate.collapsed else "requirement not met"
    return Told(standing, lacking) if lacking else None


def _choose(case: _Case, able: list[Candidate]) -> Candidate:
    metric, mode = case.objective.metric, case.objective.direction
    first = first_seeds(able)
    leader = best_of(able, case.objective, first)
    # Finalists have the further seeds; should they all have failed there, the first one has to do.
    final = [candidate for candidate in able if set(leader.seeds) <= set(candidate.seeds)]
    best = best_of(final, case.objective, leader.seeds)
    for candidate in able:
        if candidate not in final:
            case.told[candidate.arm] = _left_behind(candidate, leader, case.objective)
    return _among(case, final, best, leader.seeds, mode, metric)


def _left_behind(candidate: Candidate, leader: Candidate, objective: Measured) -> Told:
    shared = [seed for seed in leader.seeds if seed in candidate.seeds]
    share = excess(candidate.mean(objective.metric, shared), leader.mean(objective.metric, shared), objective.direction)
    if len(shared) < 2:
        reason = f"{percent(share)} behind {leader.arm} on the first seed: no finalist"
    else:
        reason = (f"{percent(share)} behind {leader.arm} on seeds {', '.join(map(str, shared))}: shown to be worse, no "
                  "further seed")
    return Told("worse", [reason], _behind(leader.arm, share))


def _behind(arm: str, share: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    ends = [None if end is None or not math.isfinite(end) else end for end in (low, high)]
    return {"arm": arm, "share": share if math.isfinite(share) else None, "low": ends[0], "high": ends[1]}


def _among(case: _Case, final: list[Candidate], best: Candidate, seeds: Sequence[int], mode: str,
           metric: str) -> Candidate:
    """The finalists' comparison on the seeds that all of them have."""
    top, rule = best.mean(metric, seeds), case.rule
    over = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    case.reasons.append(f"{best.arm} has the best {metric}: {number(top)} ({over})")
    tolerance, known_as = _tolerance(case, best, seeds, top)
    behind = {c.arm: excess(c.mean(metric, seeds), top, mode) for c in final}
    bounds = _Bounds(final, best, metric, seeds, mode)
    # What is too far behind to be chosen has no say in how much evidence the others need.
    near = [c for c in final if c is best or within(behind[c.arm], tolerance)]
    narrow = _Bounds(near, best, metric, seeds, mode)
    equal = []
    for candidate in final:
        share = behind[candidate.arm]
        if candidate is best:
            equal.append(candidate)
            case.told[candidate.arm] = Told("best", [f"best {metric}: {number(top)}"], _behind(best.arm, 0.0))
            continue
        how, bound = f"{percent(share)} behind {best.arm}", share
        if rule.evidence == "shown":
            bound = narrow.upper(candidate) if candidate in near else math.inf
            if candidate in near:
                how += (f", at most {percent(bound)} with {CONFIDENCE:.0%} confidence" if math.isfinite(bound) else
                        ", and the seeds bound it nowhere")
        if within(bound, tolerance) and (tolerance > 0 or share == 0):
            equal.append(candidate)
            told = Told("as good", [f"{how}: within {known_as}"])
        else:
            told = Told("worse", [how + (f": not shown to be within {known_as}" if rule.evidence == "shown"
                                         and candidate in near else "")])
        told.behind = _behind(best.arm, share, *bounds.ends(candidate))
        case.told[candidate.arm] = told
    winner = _prefer(case, equal, best, seeds, known_as)
    # Whatever lies further behind the best than the winner does bounds it no better.
    _say_how_sure(case, final if winner is best else near, winner, seeds, tolerance, known_as)
    return winner


def _tolerance(case: _Case, best: Candidate, seeds: Sequence[int], top: float) -> tuple[float, str]:
    """What counts as just as good, as a share, and in words."""
    if case.rule.within != "1se":
        return case.rule.share, percent(case.rule.share)
    values = list(best.by_seed(case.objective.metric, seeds).values())
    known = len(values) > 1 and all(map(math.isfinite, values)) and top
    share = stdev(values) / math.sqrt(len(values)) / abs(top) if known else 0.0
    return share, f"one standard error ({percent(share)})"


class _Bounds:
    """Confidence bounds of the excess of each of some candidates over one of them, together right 95 times in 100."""

    def __init__(self, candidates: Sequence[Candidate], other: Candidate, metric: str, seeds: Sequence[int],
                 mode: str) -> None:
        self.table = Table({candidate.arm: candidate.by_seed(metric, seeds) for candidate in candidates})
        self.other, self.mode, self.tail = other.arm, mode, DOUBT / max(1, len(candidates) - 1)

    def upper(self, candidate: Candidate) -> float:
        """One-sided; infinite where the seeds bound nothing."""
        change = self.table.change(candidate.arm, self.other, self.tail)
        _, _, high = excess_of(change, self.mode)
        return math.inf if high is None or change.seeds < 2 or change.unit != "share" else max(0.0, high)

    def ends(self, candidate: Candidate) -> tuple[float | None, float | None]:
        """Two-sided; None where the seeds tell nothing."""
        change = self.table.change(candidate.arm, self.other, self.tail / 2)
        known = change is not None and change.seeds > 1 and change.unit == "share"
        return excess_of(change, self.mode)[1:] if known else (None, None)


def _prefer(case: _Case, equal: list[Candidate], best: Candidate, seeds: Sequence[int], known_as: str) -> Candidate:
    left, told, reasons = equal, case.told, case.reasons
    if len(left) > 1:
        reasons.append(f"within {known_as} of it, and so just as good by the rule: "
                       + ", ".join(candidate.arm for candidate in left if candidate is not best))
    for preference in case.rule.prefer:
        if len(left) == 1:
            break
        values = {candidate.arm: candidate.mean(preference.metric, seeds) for candidate in left}
        measured = [value for value in values.values() if not math.isnan(value)]
        if not measured:
            reasons.append(f"{preference.metric} is known of none of them")
            continue
        mode = preference.direction
        top = min(measured) if mode == "min" else max(measured)
        keep = [candidate for candidate in left if not math.isnan(values[candidate.arm])
                and within(excess(values[candidate.arm], top, mode), preference.within)]
        told_values = ", ".join(f"{arm} {number(value)}" for arm, value in values.items())
        reasons.append(f"{'smaller' if mode == 'min' else 'larger'} {preference.metric} is preferred: {told_values}")
        for candidate in left:
            if candidate not in keep:
                value = values[candidate.arm]
                known = "is not known" if math.isnan(value) else f"{number(value)} against {number(top)}"
                told[candidate.arm].reasons.append(f"{preference.metric} {known}")
        left = keep
    winner = left[0]
    if len(left) > 1:
        names = ", ".join(candidate.arm for candidate in left)
        reasons.append(f"nothing sets {names} apart by the rule: {winner.arm} comes first in the file")
    reasons.append(f"{winner.arm} wins by the rule" + ("" if winner is best else f", {told[winner.arm].reasons[0]}"))
    told[winner.arm].standing = "winner"
    return winner


def _say_how_sure(case: _Case, among: list[Candidate], winner: Candidate, seeds: Sequence[int], tolerance: float,
                  known_as: str) -> None:
    """How much worse than the best the winner may be, whichever of these that is; nothing where one seed is all."""
    if len(among) < 2 or len(seeds) < 2:
        return
    bounds = [_Bounds(among, rival, case.objective.metric, seeds, case.objective.direction).upper(winner)
              for rival in among if rival is not winner]
    most = max(bounds)
    if not math.isfinite(most):
        return
    case.shown = {"at_most": most, "within": within(most, tolerance)}
    text = f"{winner.arm} is " + (f"at most {percent(most)} worse than" if most else "shown to be") + \
        f" the best of them, with {CONFIDENCE:.0%} confidence"
    if not case.shown["within"] and case.rule.evidence == "shown":
        text += f": more than {known_as}, so no candidate is shown to be as good as the best"
    case.reasons.append(text)


def _picked(case: _Case, chosen: Candidate | None, able: list[Candidate]) -> Candidate | None:
    rule, told = case.rule, case.told
    picked = next((candidate for candidate in able if candidate.arm == rule.pick), None)
    if chosen is not None and chosen is not picked:
        told[chosen.arm].standing = "rule's choice"
    if picked is None:
        case.reasons.append(f"{rule.pick} was picked by a person, but cannot win: "
                            + (told[rule.pick].reasons[0] if rule.pick in told else "there is no such candidate"))
        return None
    instead = f" over the rule's choice, {chosen.arm}" if chosen is not None and chosen is not picked else ""
    case.reasons.append(f"{picked.arm} was picked by a person{instead}: {rule.because or 'no reason given'}")
    told[picked.arm].standing = "winner"
    return picked


def compounded(chain: Sequence[float]) -> float:
    """What concessions of several phases amount to together: 10% twice is 21%."""
    return math.prod(1 + concession for concession in chain) - 1


def concession(decision: Mapping[str, Any]) -> float:
    """How far the winner's score lies behind the best score of a candidate that could have won."""
    rows = {row["arm"]: row for row in decision["candidates"]}
    won = rows.get(decision["winner"])
    if won is None or won["score"] is None:
        return 0.0
    mode = decision["rule"]["objective"]["mode"]
    scores = [row["score"] for row in rows.values() if row["score"] is not None
              and len(row["seeds"]) == len(won["seeds"]) and row["standing"] in CHOOSABLE]
    return excess(won["score"], min(scores) if mode == "min" else max(scores), mode)
