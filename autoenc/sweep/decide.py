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
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from autoenc.figures import better
from autoenc.sweep.asha import excess, within
from autoenc.sweep.evidence import CONFIDENCE, interval, log_ratios, upper_bound, worse
from autoenc.sweep.parts import Decision, Measured


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


@dataclass(frozen=True)
class Candidate:
    """All trials of one arm."""

    arm: str
    records: tuple[Record, ...]              # by seed

    @cached_property
    def broken(self) -> Record | None:
        """A trial that did not complete, the first seed's before others."""
        return next((record for record in self.records if record.status != "completed"), None)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records if record.status == "completed")

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> list[float]:
        return [record.figures.get(metric, math.nan) for record in self.records
                if record.status == "completed" and (seeds is None or record.seed in seeds)]

    def mean(self, metric: str, seeds: Sequence[int] | None = None) -> float:
        """NaN where a seed lacks the figure; infinite where it is (the PSNR of a perfect reconstruction)."""
        values = self.values(metric, seeds)
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


def finalists(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision,
              margin: float) -> list[str]:
    """The arms that further seeds could still make the winner, the baseline and a picked one included."""
    candidates = [c for c in group(records, order) if not c.broken]
    able = [c for c in candidates if not _unmet(c, rule) and not math.isnan(c.mean(objective.metric))]
    if not able:
        return []
    best = _best(able, objective, _first_seeds(able))
    reach = max(rule.within or 0.0, margin)
    named = {rule.pick, rule.baseline.arm if rule.baseline else None}
    first = _first_seeds(able)
    return [c.arm for c in candidates if c.arm in named or (
        c in able and within(excess(c.mean(objective.metric, first), best.mean(objective.metric, first),
                                    objective.direction), reach))]


def decide(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision) -> dict[str, Any]:
    """The content of decision.json. Equal records and rule give equal content, in whatever order they come."""
    candidates = group(records, order)
    metric = objective.metric
    told: dict[str, tuple[str, list[str]]] = {}            # arm -> verdict, reasons
    reasons: list[str] = []
    able = []
    for candidate in candidates:
        problem = _not_able(candidate, metric, rule)
        if problem:
            told[candidate.arm] = problem
        else:
            able.append(candidate)

    winner = None
    if able:
        winner = _choose(able, objective, rule, told, reasons)
    else:
        reasons.append("no candidate completed and met every requirement, so there is no winner")
    if rule.pick is not None:
        winner = _picked(rule, winner, able, told, reasons)
    _against_baseline(candidates, objective, rule, told)

    return {
        "rule": {"objective": {"metric": metric, "mode": objective.direction}, **rule.model_dump(mode="json")},
        "winner": winner.arm if winner else None,
        "candidates": [_row(candidate, metric, *told[candidate.arm]) for candidate in candidates],
        "reasons": reasons,
    }


def _row(candidate: Candidate, metric: str, verdict: str, reasons: list[str]) -> dict[str, Any]:
    score = candidate.mean(metric)
    values = candidate.values(metric)
    se = stdev(values) / math.sqrt(len(values)) if len(values) > 1 and math.isfinite(score) else None
    return {"arm": candidate.arm, "trials": [record.trial for record in candidate.records],
            "seeds": [record.seed for record in candidate.records],
            "score": score if math.isfinite(score) else None, "se": se,
            "epochs": sum(record.epochs for record in candidate.records), "verdict": verdict, "reasons": reasons}


def _not_able(candidate: Candidate, metric: str, rule: Decision) -> tuple[str, list[str]] | None:
    broken = candidate.broken
    if broken is not None:
        verdict = f"behind at epoch {broken.epochs}" if broken.status == "stopped" else broken.status
        return verdict, [f"{broken.trial}: {broken.note}" if broken.note else f"{broken.trial} {broken.status}"]
    if math.isnan(candidate.mean(metric)):
        return "not comparable", [f"has no {metric}"]
    unmet = _unmet(candidate, rule)
    return ("requirement not met", unmet) if unmet else None


def _unmet(candidate: Candidate, rule: Decision) -> list[str]:
    unmet = []
    for requirement in rule.require:
        value = candidate.mean(requirement.metric)
        if math.isnan(value):
            unmet.append(f"has no {requirement.metric}, which is required")
        elif requirement.min is not None and value < requirement.min:
            unmet.append(f"{requirement.metric} {number(value)} is below the required {number(requirement.min)}")
        elif requirement.max is not None and value > requirement.max:
            unmet.append(f"{requirement.metric} {number(value)} is above the allowed {number(requirement.max)}")
    return unmet


def _first_seeds(candidates: Sequence[Candidate]) -> list[int]:
    return [min(seed for candidate in candidates for seed in candidate.seeds)]


def _shared_seeds(candidates: Sequence[Candidate]) -> list[int]:
    return sorted(set.intersection(*(set(candidate.seeds) for candidate in candidates)))


def _best(candidates: Sequence[Candidate], objective: Measured, seeds: Sequence[int]) -> Candidate:
    best = candidates[0]
    for candidate in candidates[1:]:
        if better(objective.direction, candidate.mean(objective.metric, seeds), best.mean(objective.metric, seeds)):
            best = candidate
    return best


def _choose(able: list[Candidate], objective: Measured, rule: Decision, told: dict[str, tuple[str, list[str]]],
            reasons: list[str]) -> Candidate:
    metric, mode = objective.metric, objective.direction
    first = _first_seeds(able)
    leader = _best(able, objective, first)
    # Finalists have the further seeds; should they all have failed there, the first one has to do.
    seeds = leader.seeds
    final = [candidate for candidate in able if set(seeds) <= set(candidate.seeds)]
    best = _best(final, objective, seeds)
    top = best.mean(metric, seeds)
    over = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    reasons.append(f"{best.arm} has the best {metric}: {number(top)} ({over})")

    equal = []
    tolerance, samples = rule.within or 0.0, _paired(final, best, metric, seeds)
    for candidate in able:
        if candidate not in final:
            behind = excess(candidate.mean(metric, first), leader.mean(metric, first), mode)
            told[candidate.arm] = ("worse", [f"{percent(behind)} behind {leader.arm} on the first seed: no finalist"])
            continue
        value = candidate.mean(metric, seeds)
        behind = excess(value, top, mode)
        if candidate is best:
            equal.append(candidate)
            told[candidate.arm] = ("best", [f"best {metric}: {number(value)}"])
            continue
        how, bound = f"{percent(behind)} behind {best.arm}", behind
        if rule.evidence == "shown":
            bound = upper_bound(samples[candidate.arm], list(samples.values()), mode)
            how += (f", at most {percent(bound)} with {CONFIDENCE:.0%} confidence" if math.isfinite(bound) else
                    ", and the seeds bound it nowhere")
        if within(bound, tolerance) and (tolerance > 0 or behind == 0):
            equal.append(candidate)
            told[candidate.arm] = ("as good", [f"{how}: within {percent(tolerance)}"])
        else:
            told[candidate.arm] = ("worse", [how + (f": not shown to be within {percent(tolerance)}"
                                                    if rule.evidence == "shown" and within(behind, tolerance) else "")])
    return _prefer(equal, best, rule, seeds, told, reasons)


def _paired(candidates: Sequence[Candidate], other: Candidate, metric: str,
            seeds: Sequence[int]) -> dict[str, list[float]]:
    """The log ratios to ``other``, seed by seed, of every other candidate."""
    values = other.values(metric, seeds)
    return {candidate.arm: log_ratios(candidate.values(metric, seeds), values)
            for candidate in candidates if candidate is not other}


def _prefer(equal: list[Candidate], best: Candidate, rule: Decision, seeds: Sequence[int],
            told: dict[str, tuple[str, list[str]]], reasons: list[str]) -> Candidate:
    left = equal
    if len(left) > 1:
        reasons.append(f"within {percent(rule.within or 0.0)} of it, and so just as good by the rule: "
                       + ", ".join(candidate.arm for candidate in left if candidate is not best))
    for preference in rule.prefer:
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
                told[candidate.arm][1].append(f"{preference.metric} {known}")
        left = keep
    winner = left[0]
    if len(left) > 1:
        names = ", ".join(candidate.arm for candidate in left)
        reasons.append(f"nothing sets {names} apart by the rule: {winner.arm} comes first in the file")
    reasons.append(f"{winner.arm} wins by the rule" + ("" if winner is best else f", {told[winner.arm][1][0]}"))
    told[winner.arm] = ("winner", told[winner.arm][1])
    return winner


def _picked(rule: Decision, chosen: Candidate | None, able: list[Candidate], told: dict[str, tuple[str, list[str]]],
            reasons: list[str]) -> Candidate | None:
    picked = next((candidate for candidate in able if candidate.arm == rule.pick), None)
    if chosen is not None and chosen is not picked:
        told[chosen.arm] = ("rule's choice", told[chosen.arm][1])
    if picked is None:
        reasons.append(f"{rule.pick} was picked by a person, but cannot win: "
                       + (told[rule.pick][1][0] if rule.pick in told else "there is no such candidate"))
        return None
    instead = f" over the rule's choice, {chosen.arm}" if chosen is not None and chosen is not picked else ""
    reasons.append(f"{picked.arm} was picked by a person{instead}: {rule.because or 'no reason given'}")
    told[picked.arm] = ("winner", told[picked.arm][1])
    return picked


def _against_baseline(candidates: list[Candidate], objective: Measured, rule: Decision,
                      told: dict[str, tuple[str, list[str]]]) -> None:
    """Say of every completed arm how its objective stands to the baseline's, with an interval where seeds allow one."""
    baseline = rule.baseline and next((c for c in candidates if c.arm == rule.baseline.arm), None)
    if not baseline or baseline.broken:
        return
    mode = objective.direction
    others = [candidate for candidate in candidates if candidate is not baseline and not candidate.broken]
    for candidate in others:
        seeds = _shared_seeds([candidate, baseline])
        samples = _paired([c for c in others if set(seeds) <= set(c.seeds)], baseline, objective.metric, seeds)
        ratios = samples[candidate.arm]
        if not ratios:
            continue
        change = worse(fmean(ratios), mode)
        text = f"against {baseline.arm}: {percent(abs(change))} {'worse' if change > 0 else 'better'}"
        ends = interval(ratios, list(samples.values()), mode)
        told[candidate.arm][1].append(text + (
            f" ({CONFIDENCE:.0%} interval {ends[0]:+.1%} to {ends[1]:+.1%}, {len(ratios)} seeds)" if ends else
            " (one seed: says nothing about the noise)"))


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
    scores = [row["score"] for row in rows.values()
              if row["score"] is not None and len(row["seeds"]) == len(won["seeds"])
              and row["verdict"] in ("winner", "best", "as good", "worse", "rule's choice")]
    return excess(won["score"], min(scores) if mode == "min" else max(scores), mode)


def number(value: float) -> str:
    """A figure in four digits, a large one in full."""
    return f"{value:,.0f}" if 100_000 <= abs(value) < 1e12 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share as three digits of percent."""
    return "∞%" if math.isinf(share) else f"{100 * share:.3g}%"
