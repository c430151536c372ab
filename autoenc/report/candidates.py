"""The candidates as the report shows them: who could have won, in what order, and the table's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean
from typing import Any

from autoenc.figures import better
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.asha import excess
from autoenc.sweep.decide import CHOOSABLE
from autoenc.sweep.standing import Run, Standing, Trial


def contenders(decision: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates that could have won and whose scores compare: over as many seeds as any has."""
    rows = [row for row in decision["candidates"] if row["score"] is not None and row["standing"] in CHOOSABLE]
    most = max((len(row["seeds"]) for row in rows), default=0)
    return [row for row in rows if len(row["seeds"]) == most]


def leader(race: Standing, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the best score."""
    pick = min if race.spec.objective.direction == "min" else max
    return pick(rows, key=lambda row: row["score"], default=None)


def tolerance(race: Standing, decision: Mapping[str, Any]) -> float:
    """What counts as just as good by the rule, as a share of the best score."""
    best = leader(race, contenders(decision))
    if race.spec.decision.within != "1se":
        return race.spec.decision.share
    return best["se"] / abs(best["score"]) if best and best["se"] and best["score"] else 0.0


def best_first(race: Standing, decision: Mapping[str, Any]) -> list[str]:
    """All arms: the winner, then by score, then by where they stand, the file's order last."""
    scores = {row["arm"]: row["score"] for row in decision["candidates"]}
    sign = 1 if race.spec.objective.direction == "min" else -1
    so_far: dict[str, float] = {}
    for trial in first_seeds(race.trials):
        so_far[trial.candidate.name] = sign * race.score(trial.run)

    def place(arm: str) -> tuple[bool, bool, bool, float]:
        score = scores.get(arm)
        value = so_far.get(arm, nan) if score is None else sign * score
        return arm != decision["winner"], score is None, value != value, 0.0 if value != value else value

    return sorted(dict.fromkeys([*scores, *so_far]), key=place)


def first_seeds(trials: Sequence[Trial]) -> list[Trial]:
    """The first seed's trial of every arm."""
    first: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        first.setdefault(trial.candidate.name, trial)
    return [trial for trial in trials if first[trial.candidate.name] is trial]


def figure_names(race: Snapshot) -> list[str]:
    """The figures that the rule names besides the objective, PSNR beside an MSE."""
    rule, metric = race.spec.decision, race.spec.objective.metric
    names = [*(["val/psnr"] if metric == "val/mse" else []), *(item.metric for item in (*rule.prefer, *rule.require)),
             *(rule.baseline.gains if rule.baseline else ())]
    return [name for name in dict.fromkeys(names) if name != metric]


def candidate_rows(race: Snapshot, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a candidate of the decision, best first, with figures (means over its seeds), changes and hypothesis."""
    rows = {row["arm"]: row for row in decision["candidates"]}
    compared = contenders(decision)
    top = leader(race, compared)
    return [_row(race, rows[arm], top if rows[arm] in compared else None)
            for arm in best_first(race, decision) if arm in rows]


def _row(race: Snapshot, row: Mapping[str, Any], top: Mapping[str, Any] | None) -> dict[str, Any]:
    trials = [trial for trial in race.trials if trial.candidate.name == row["arm"]]
    completed = [trial.run for trial in trials if trial.run.state == "completed"] or [trial.run for trial in trials]
    candidate = trials[0].candidate if trials else None
    place = row["standing"]
    return {
        **row, "partial": all(trial.run.state != "completed" for trial in trials),
        # What a verdict against the baseline says beyond the standing.
        "against": row["verdict"] if row["verdict"] not in (place, "baseline") else "",
        "is_baseline": row["verdict"] == "baseline",
        "score": row["score"] if row["score"] is not None else mean(race, completed, race.spec.objective.metric),
        "share": excess(row["score"], top["score"], race.spec.objective.direction) if top else None,
        "figures": [mean(race, completed, name) for name in figure_names(race)],
        "budget": sum(trial.run.config.train.epochs for trial in trials),
        "changes": _changes(race, trials[0]) if trials else [],
        "hypothesis": candidate.hypothesis if candidate else "",
    }


def mean(race: Snapshot, runs: Sequence[Run], name: str) -> float:
    """A figure's mean over runs at their best epochs; NaN where one lacks it."""
    values = [race.figures_of(run).get(name, nan) for run in runs]
    return fmean(values) if values else nan


def completed_runs(race: Snapshot) -> dict[str, list[Run]]:
    """Arm -> its completed runs, over its seeds; arms without any left out."""
    runs: dict[str, list[Run]] = {}
    for trial in race.trials:
        if trial.run.state == "completed":
            runs.setdefault(trial.candidate.name, []).append(trial.run)
    return runs


def _changes(race: Snapshot, trial: Trial) -> list[tuple[str, str, str]]:
    """The settings that differ from the starting point: key, value there, value here."""
    return [(key, shown(race.start.get(key)), shown(value)) for key, value in trial.candidate.settings.items()
            if value != race.start.get(key)]


def shown(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def improving(race: Snapshot, margin: float) -> dict[str, float]:
    """Arm -> the largest improvement of one of its completed trials over the last three epochs, where beyond the
    margin."""
    found: dict[str, float] = {}
    for record in race.records():
        if record.improving > margin and better("max", record.improving, found.get(record.arm, nan)):
            found[record.arm] = record.improving
    return found
