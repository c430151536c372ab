"""report.html: one self-contained page that says what a sweep decided and on what grounds. No torch, no Ray.

The page needs no network: plotly.js, pictures and style are in it, and its content security policy forbids the rest.
All text passes through jinja2's autoescape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoenc.config import DataConfig, make_config
from autoenc.errors import InputError
from autoenc.files import write_atomic
from autoenc.sweep import charts
from autoenc.sweep.asha import excess
from autoenc.sweep.decide import compounded, percent
from autoenc.sweep.final import Remark
from autoenc.sweep.inherit import Winner, read_winner
from autoenc.sweep.plan import duration, improving_margin, rule_in_words
from autoenc.sweep.race import Race
from autoenc.sweep.standing import Run, Trial
from autoenc.yamlfile import dump_yaml

HERE = Path(__file__).parent


def write_report(path: Path, race: Race, decision: Mapping[str, Any], *, winner: Winner | None, dataset_words: str,
                 command: str, remarks: Sequence[Remark] = ()) -> None:
    """Write the page of a decided sweep, whole or not at all.

    ``decision``: the content of decision.json; ``winner``: what best_config.yaml holds, None where there is none;
    ``dataset_words``: counts and size of the data; ``command``: what reproduces the sweep; ``remarks``: on a finished
    model. Raises OSError where the file cannot be written.
    """
    page = render(race, decision, winner=winner if decision["winner"] is not None else None,
                  dataset_words=dataset_words, command=command, output=path.parent.parent, remarks=remarks)
    write_atomic(path, page.encode("utf-8", "replace"))


def render(race: Race, decision: Mapping[str, Any], *, winner: Winner | None, dataset_words: str, command: str,
           output: Path, remarks: Sequence[Remark] = ()) -> str:
    """The page as text. ``output``: the folder with all sweeps' folders, where the parents' winners are read."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "breakable": breakable}
    colours = charts.arm_colours(race, decision)
    drawn = charts.shown_trials(race, decision)
    return environment.get_template("report.html.jinja").render(
        spec=race.spec, decision=decision, winner=winner, command=command, data=dataset_words, colours=colours,
        remarks=remarks,
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(_plotly()) if drawn else "",
        headline=headline(race, decision), rule=rule_in_words(race.spec), seeds=_seeds(decision),
        one_seed=len(charts.contenders(decision)) > 1 and _seeds(decision) == 1,
        ended_early=[(race.name_of(run), run.note or run.state) for run in race.runs.values()
                     if run.state in charts.MARKS],
        concessions=_concessions(winner), improving=_improving(race), improving_margin=improving_margin(race.spec),
        figures=figure_names(race), candidates=_candidates(race, decision),
        drawn=len(drawn), rungs=race.rungs.epochs, curve_metric=charts.curve_metric(race),
        curves=_charts(race, decision, colours),
        pictures=charts.pictures(race, decision), epochs=epoch_counts(race), trials=_trials(race),
        provenance=_provenance(race, winner), parents=_parents(winner, output),
        config=dump_yaml({"config": make_config(winner.settings, "winner").nested()}) if winner else "",
    )


def number(value: float | None) -> str:
    """Four digits, whole numbers in full, a dash for what is not known."""
    if value is None or value != value:
        return "—"
    if not isfinite(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100_000 else f"{value:#.4g}"


def breakable(name: str) -> Markup:
    """A figure's name; a long one may be broken after its slash."""
    return Markup("/<wbr>" if len(name) > 12 else "/").join(name.split("/"))


# The decision -------------------------------------------------------------------------------------------------------


def headline(race: Race, decision: Mapping[str, Any]) -> tuple[str, str]:
    """The decision in a few words: who wins, and by how much against whom."""
    arm, metric, mode = decision["winner"], race.spec.objective.metric, race.spec.objective.direction
    if arm is None:
        return "No winner", ""
    rows = charts.contenders(decision)
    own = next((row for row in rows if row["arm"] == arm), None)
    if race.spec.final and own is not None:
        return f"Finished: {race.spec.export_name}", f"{metric} {number(own['score'])}"
    others = [row for row in rows if row["arm"] != arm]
    title = f"{arm} wins" + (", picked by a person" if race.spec.decision.pick == arm else "")
    if own is None or not others:
        return title, "The only candidate." if len(decision["candidates"]) == 1 else "No other candidate could win."
    other = (min if mode == "min" else max)(others, key=lambda row: row["score"])
    score, against = f"{metric} {number(own['score'])}", f"{other['arm']} ({number(other['score'])})"
    behind = excess(own["score"], other["score"], mode)
    if behind > 0:
        by_rule = "" if race.spec.decision.pick == arm else " It is as good by the rule, and preferred."
        return title, f"{score}, {percent(behind)} behind {against}, which has the best score.{by_rule}"
    ahead = excess(other["score"], own["score"], mode)
    if ahead == 0:
        return title, f"{score}, the same as {against}."
    return title, f"{score}, the best score. The next is {against}, {percent(ahead)} behind."


def _seeds(decision: Mapping[str, Any]) -> int:
    return max((len(row["seeds"]) for row in decision["candidates"]), default=0)


def _concessions(winner: Winner | None) -> dict[str, Any] | None:
    """What each phase conceded to its preferences, and what that amounts to; None where it is nothing."""
    given = dict(winner.provenance.get("concessions") or {}) if winner else {}
    total = compounded(list(given.values()))
    return {"each": {name: share for name, share in given.items() if share > 0}, "total": total} if total > 0 else None


def _improving(race: Race) -> list[tuple[str, float]]:
    margin = improving_margin(race.spec)
    return [(record.trial, record.improving) for record in race.records() if record.improving > margin]


# Candidates ---------------------------------------------------------------------------------------------------------


def figure_names(race: Race) -> list[str]:
    """The figures that the rule names besides the objective, PSNR beside an MSE."""
    rule, metric = race.spec.decision, race.spec.objective.metric
    names = [*(["val/psnr"] if metric == "val/mse" else []), *(item.metric for item in (*rule.prefer, *rule.require)),
             *(rule.baseline.gains if rule.baseline else ())]
    return [name for name in dict.fromkeys(names) if name != metric]


def _candidates(race: Race, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    best = charts.contenders(decision)
    mode = race.spec.objective.direction
    top = (min if mode == "min" else max)((row["score"] for row in best), default=nan)
    trials: dict[str, list[Trial]] = {}
    for trial in race.trials:
        trials.setdefault(trial.candidate.name, []).append(trial)
    rows = []
    for row in decision["candidates"]:
        own = trials.get(row["arm"], [])
        completed = [trial.run for trial in own if trial.run.state == "completed"] or [trial.run for trial in own]
        rows.append({
            **row, "partial": all(trial.run.state != "completed" for trial in own),
            "score": row["score"] if row["score"] is not None else _mean(race, completed, race.spec.objective.metric),
            "behind": excess(row["score"], top, mode) if row in best else None,
            "figures": [_mean(race, completed, name) for name in figure_names(race)],
            "budget": sum(trial.run.config.train.epochs for trial in own),
            "changes": _changes(race, own[0]) if own else [],
            "hypothesis": own[0].candidate.hypothesis if own else "",
        })
    return rows


def _mean(race: Race, runs: Sequence[Run], name: str) -> float:
    values = [race.figures_of(run).get(name, nan) for run in runs]
    return fmean(values) if values else nan


def _changes(race: Race, trial: Trial) -> list[tuple[str, str, str]]:
    """The settings that differ from the starting point: key, value there, value here."""
    return [(key, _value(race.start.get(key)), _value(value)) for key, value in trial.candidate.settings.items()
            if value != race.start.get(key)]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


# Curves -------------------------------------------------------------------------------------------------------------


def _charts(race: Race, decision: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    if not charts.shown_trials(race, decision):
        return {}
    figures = {"objective": charts.objective_chart(race, decision, colours),
               "splits": charts.split_chart(race, decision, colours)}
    return {name: {"json": Markup(charts.to_json(figure)), "log": figure.layout.yaxis.type == "log"}
            for name, figure in figures.items() if figure is not None}


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


# What was trained, and where it comes from --------------------------------------------------------------------------


def epoch_counts(race: Race) -> dict[str, int]:
    """Epochs of all trajectories together: trained by this run, from the store, spared by stops and by patience."""
    runs = race.runs.values()
    return {
        "trained": sum(run.trained for run in runs),
        "stored": sum(_stored(run) for run in runs),
        "spared": sum(run.config.train.epochs - len(run.rows) for run in runs if run.state == "stopped"),
        "patience": sum(run.config.train.epochs - len(run.rows) for run in runs if run.state == "completed"),
    }


def _stored(run: Run) -> int:
    return min(run.stored, len(run.rows))


def _trials(race: Race) -> list[dict[str, Any]]:
    """A row a trial; a trial that shares another's trajectory names it and counts no epochs of its own."""
    owners: dict[str, str] = {}
    rows = []
    for trial in race.trials:
        run = trial.run
        owner = owners.setdefault(run.key, trial.name)
        rows.append({
            "name": trial.name, "arm": trial.candidate.name, "state": run.state, "epochs": len(run.rows),
            "budget": run.config.train.epochs, "best": int(race.figures_of(run).get("epoch", 0)), "key": run.key,
            "seconds": sum(row["seconds"] for row in run.rows), "stored": _stored(run), "trained": run.trained,
            "owner": owner if owner != trial.name else "", "device": run.trajectory.status().get("device") or "",
        })
    return rows


def _provenance(race: Race, winner: Winner | None) -> dict[str, Any]:
    """Hashes, device and versions; without a winner, what the trajectories themselves say."""
    status = next((status for run in race.runs.values() if (status := run.trajectory.status())), {})
    given = winner.provenance if winner else {}
    device = given.get("device") or status
    return {
        "winner": winner.hash if winner else "", "trial": given.get("trial") or "",
        "trajectory": given.get("trajectory") or "", "best_epoch": (given.get("scores") or {}).get("best_epoch") or "",
        "content": race.spec.content_hash, "data": given.get("data") or status.get("data") or "",
        "device": ", ".join(str(device[key]) for key in ("device", "device_name") if device.get(key)),
        "versions": given.get("versions") or status.get("versions") or {},
        "source": _data_settings(race),
    }


def _data_settings(race: Race) -> dict[str, str]:
    given = {name: race.start.get(f"data.{name}") for name in DataConfig.model_fields}
    return {name: _value(value) for name, value in given.items() if value not in (None, {}, [])}


def _parents(winner: Winner | None, output: Path) -> list[dict[str, Any]]:
    """The chain of winners that this one builds on; an arm is named where its folder still holds that winner."""
    parents = []
    for name, digest in dict((winner.provenance.get("parents") or {}) if winner else {}).items():
        try:
            above = read_winner(output / name)
        except InputError:
            above = None
        known = above is not None and above.hash == digest
        parents.append({"sweep": name, "hash": digest, "arm": above.provenance.get("arm") if known else "",
                        "conceded": (winner.provenance.get("concessions") or {}).get(name)})
    return parents
