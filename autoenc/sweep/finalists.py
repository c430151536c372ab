"""Who gets further seeds, and who leaves the race between two of them. Pure.

All candidates that the rule could still choose after their first seed are finalists. From their second seed on, one
that is shown to be worse than what the rule accepts gets no further seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autoenc.figures import better
from autoenc.sweep.asha import excess, within
from autoenc.sweep.evidence import DOUBT, Table, excess_of
from autoenc.sweep.parts import Decision, Measured
from autoenc.sweep.records import Candidate, Record, first_seeds, group
from autoenc.sweep.words import number


def finalists(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision,
              margin: float) -> list[str]:
    """The arms that further seeds could still make the winner, the baseline and a picked one included, by their first
    seeds; ``margin``: what a first seed may be behind by noise alone."""
    candidates, able = _standing(records, order, objective, rule)
    if not able:
        return []
    first = first_seeds(able)
    best = best_of(able, objective, first).mean(objective.metric, first)
    reach = max(rule.share, margin)
    return [c.arm for c in candidates if c.arm in rule.named or (
        c in able and within(excess(c.mean(objective.metric, first), best, objective.direction), reach))]


def next_seeds(records: Sequence[Record], had: Collection[tuple[str, int]], given: int, order: Sequence[str],
               objective: Measured, rule: Decision, margin: float) -> list[tuple[str, int]] | None:
    """The trials that are due when ``given`` seeds have ended: (arm, which seed, from 0), the next seed's first.

    ``records``: of these seeds alone, so that what is due depends on no order of things; ``had``: what was due before.
    Where a finalist fell, others may have to catch up, and only that is due. Who is sure of all seeds gets them at
    once, for slots that would stand idle. None where nothing is left to tell apart.
    """
    names = in_race(records, order, objective, rule, margin)
    if len(names) < 2:
        return None
    late = [(name, k) for k in range(1, given) for name in names if (name, k) not in had]
    sure = protected(records, order, objective, rule, margin)
    ahead = [(name, given) for name in names] + [(name, k) for k in range(given + 1, rule.repeats) for name in sure]
    return late or [trial for trial in ahead if trial not in had]


def in_race(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision,
            margin: float) -> list[str]:
    """The finalists that their seeds so far do not rule out: not shown to be behind the leader by more than the rule
    accepts, on the seeds that both have. The first seed's leader, the baseline and a picked one always stay."""
    names = finalists(records, order, objective, rule, margin)
    _, able = _standing(records, order, objective, rule)
    running = [candidate for candidate in able if candidate.arm in names]
    kept = protected(records, order, objective, rule, margin)
    shared = [candidate for candidate in running if len(candidate.seeds) > 1]
    if len(shared) < 2:
        return names
    table = Table({candidate.arm: candidate.by_seed(objective.metric) for candidate in shared})
    everywhere = sorted(set.intersection(*(set(candidate.seeds) for candidate in shared)))
    leader = best_of(shared, objective, everywhere)
    tail = DOUBT / ((len(names) - 1) * (rule.repeats - 1))       # every comparison, after every seed

    def out(candidate: Candidate) -> bool:
        if candidate is leader or candidate.arm in kept or candidate not in shared:
            return False
        _, low, _ = excess_of(table.change(candidate.arm, leader.arm, tail), objective.direction)
        return low is not None and not within(low, rule.share)

    gone = {candidate.arm for candidate in running if out(candidate)}
    return [name for name in names if name not in gone]


def protected(records: Sequence[Record], order: Sequence[str], objective: Measured, rule: Decision,
              margin: float) -> list[str]:
    """The finalists that are sure of all their seeds: the baseline, a picked one, the first seed's leader."""
    _, able = _standing(records, order, objective, rule)
    leader = {best_of(able, objective, first_seeds(able)).arm} if able else set()
    return [name for name in finalists(records, order, objective, rule, margin) if name in rule.named | leader]


def best_of(candidates: Sequence[Candidate], objective: Measured, seeds: Sequence[int]) -> Candidate:
    """The candidate with the best mean objective over these seeds, the first of equals."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if better(objective.direction, candidate.mean(objective.metric, seeds), best.mean(objective.metric, seeds)):
            best = candidate
    return best


def unmet(candidate: Candidate, rule: Decision) -> list[str]:
    """Which of the rule's requirements a candidate does not meet, in words; one is that its latent has not collapsed,
    where that ends a trial."""
    if gone := candidate.collapsed:
        return [f"{gone.trial}: {gone.note}"]
    said = []
    for requirement in rule.require:
        value = candidate.mean(requirement.metric)
        if math.isnan(value):
            said.append(f"has no {requirement.metric}, which is required")
        elif requirement.min is not None and value < requirement.min:
            said.append(f"{requirement.metric} {number(value)} is below the required {number(requirement.min)}")
        elif requirement.max is not None and value > requirement.max:
            said.append(f"{requirement.metric} {number(value)} is above the allowed {number(requirement.max)}")
    return said


def _standing(records: Sequence[Record], order: Sequence[str], objective: Measured,
              rule: Decision) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates none of whose trials broke, and those of them that could win."""
    candidates = [candidate for candidate in group(records, order) if not candidate.broken]
    return candidates, [candidate for candidate in candidates if not unmet(candidate, rule)
                        and not math.isnan(candidate.mean(objective.metric))]
