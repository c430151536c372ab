"""report.html: one self-contained page that says what a sweep decided and on what grounds. No torch, no Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from autoenc.config import DataConfig, make_config
from autoenc.course import collapsed_at
from autoenc.errors import InputError
from autoenc.files import write_atomic
from autoenc.report import candidates, curves, intervals, pictures, posteriors, searched, tradeoffs
from autoenc.report.page import fill, number
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.asha import excess
from autoenc.sweep.decide import compounded
from autoenc.sweep.final import Remark
from autoenc.sweep.inherit import Winner, read_winner
from autoenc.sweep.plan import improving_margin, rule_in_words
from autoenc.sweep.race import Race
from autoenc.sweep.words import percent
from autoenc.yamlfile import dump_yaml

SPLIT_WORDS = {"mse": "Mean squared error", "splats": "Error of the splats (loss.splats)"}


def write_report(path: Path, race: Race, decision: Mapping[str, Any], *, winner: Winner | None, dataset_words: str,
                 command: str, remarks: Sequence[Remark] = (), state: str = "decided") -> None:
    """Write the page of a sweep, whole or not at all.

    ``decision``: the content of decision.json; ``winner``: what best_config.yaml holds, None where there is none;
    ``dataset_words``: counts and size of the data; ``command``: what reproduces the sweep; ``remarks``: on a finished
    model; ``state``: decided, or running or interrupted, and then the decision is how things stand so far. Raises
    OSError where the file cannot be written.
    """
    page = render(race, decision, winner=winner if decision["winner"] is not None else None,
                  dataset_words=dataset_words, command=command, output=path.parent.parent, remarks=remarks, state=state)
    write_atomic(path, page.encode("utf-8", "replace"))


def render(race: Race, decision: Mapping[str, Any], *, winner: Winner | None, dataset_words: str, command: str,
           output: Path, remarks: Sequence[Remark] = (), state: str = "decided") -> str:
    """The page as text. ``output``: the folder with all sweeps' folders, where the parents' winners are read and the
    sweep's gallery is."""
    standing = Snapshot(race)
    colours = curves.arm_colours(standing, decision)
    drawn = curves.shown_trials(standing, decision)
    decided = state == "decided"
    gallery = None if not decided else pictures.gallery(standing, decision, output / standing.spec.name / "gallery")
    figures = _charts(standing, decision, colours) if drawn else {}
    return fill(
        "report.html.jinja", spec=standing.spec, decision=decision, winner=winner, command=command, data=dataset_words,
        colours=colours, plotly=Markup(_plotly()) if figures else "",
        so_far=None if decided else _progress(standing, state),
        headline=headline(standing, decision) if decided else _headline_so_far(standing, decision, state.capitalize()),
        rule=rule_in_words(standing.spec), sure=intervals.how_sure(standing, decision), remarks=remarks,
        seeds=max((len(row["seeds"]) for row in decision["candidates"]), default=0),
        improving=candidates.improving(standing, improving_margin(standing.spec)),
        improving_margin=improving_margin(standing.spec), concessions=_concessions(winner),
        best=intervals.against_best(standing, decision), baseline=intervals.against_baseline(standing, decision),
        figures=candidates.figure_names(standing), candidates=candidates.candidate_rows(standing, decision),
        drawn=len(drawn), rungs=standing.rungs.epochs, curve_metric=curves.curve_metric(standing), charts=figures,
        split_words=SPLIT_WORDS[curves.split_figure(standing)],
        costs=tradeoffs.costs(standing, decision), cost_names=tradeoffs.COSTS,
        importance=searched.importance(standing) if decided and searched.sampled(standing) else [],
        posteriors=posteriors.diagnoses(standing, decision),
        gallery=gallery, samples=[] if gallery else pictures.samples(standing, decision), first=pictures.FIRST,
        normalises=any(run.config.model.normalize_latents for run in standing.runs.values()),
        epochs=epoch_counts(standing), trials=_trials(standing), ended_early=_ended_early(standing),
        provenance=_provenance(standing, winner), parents=_parents(winner, output),
        config=dump_yaml({"config": make_config(winner.settings, "winner").nested()}) if winner else "",
    )


# The decision -------------------------------------------------------------------------------------------------------


def headline(race: Snapshot, decision: Mapping[str, Any]) -> tuple[str, str]:
    """The decision in a few words: who wins, and by how much against whom."""
    arm, metric, mode = decision["winner"], race.spec.objective.metric, race.spec.objective.direction
    if arm is None:
        return "No winner", ""
    rows = candidates.contenders(decision)
    own = next((row for row in rows if row["arm"] == arm), None)
    if race.spec.final and own is not None:
        return f"Finished: {race.spec.export_name}", f"{metric} {number(own['score'])}"
    title = f"{arm} wins" + (", picked by a person" if race.spec.decision.pick == arm else "")
    other = candidates.leader(race, [row for row in rows if row["arm"] != arm])
    score = f"{metric} {number(own['score'])}" if own else ""
    if own is None or other is None:
        alone = "the only candidate" if len(decision["candidates"]) == 1 else "no other candidate could win"
        return title, f"{score}, {alone}." if score else f"{alone}."
    against = f"{other['arm']} ({number(other['score'])})"
    behind = excess(own["score"], other["score"], mode)
    if behind > 0:
        by_rule = "" if race.spec.decision.pick == arm else " It is as good by the rule, and preferred."
        return title, f"{score}, {percent(behind)} behind {against}, which has the best score.{by_rule}"
    ahead = excess(other["score"], own["score"], mode)
    if ahead == 0:
        return title, f"{score}, the same as {against}."
    return title, f"{score}, the best score. The next is {against}, {percent(ahead)} behind."


def _headline_so_far(race: Snapshot, decision: Mapping[str, Any], state: str) -> tuple[str, str]:
    """What stands before the sweep is decided: who leads, and nothing that sounds final."""
    known = [(race.score(run), race.name_of(run)) for run in race.runs.values() if race.score(run) == race.score(run)]
    if not known:
        return f"{state}: no figures yet", ""
    score, name = (min if race.spec.objective.direction == "min" else max)(known)
    leads = f"{name} has the best {race.spec.objective.metric} so far, {number(score)}."
    if decision["winner"] is None:
        return f"{state}: {'nobody could win yet' if decision['candidates'] else 'no trial has ended yet'}", leads
    return f"{state}: {decision['winner']} would win if it ended now", leads


def _progress(race: Snapshot, state: str) -> dict[str, Any]:
    """How far a sweep is, at this moment."""
    runs = race.runs.values()
    return {"state": state, "ended": sum(run.ended for run in runs), "runs": len(runs),
            "epochs": sum(len(run.rows) for run in runs),
            "busy": [race.name_of(run) for run in runs if run.state == "running"],
            "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}


def _concessions(winner: Winner | None) -> dict[str, Any] | None:
    """What each phase conceded to its preferences, and what that amounts to; None where it is nothing."""
    given = dict(winner.provenance.get("concessions") or {}) if winner else {}
    total = compounded(list(given.values()))
    return {"each": {name: share for name, share in given.items() if share > 0}, "total": total} if total > 0 else None


# Charts -------------------------------------------------------------------------------------------------------------


def _charts(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    """Every chart of the page by its name, those that there is nothing to draw for left out."""
    costs = tradeoffs.costs(race, decision)
    figures = {
        "objective": curves.objective_chart(race, decision, colours),
        "splits": curves.split_chart(race, decision, colours),
        **{name: tradeoffs.cost_chart(race, decision, colours, name) for name in (costs["fronts"] if costs else ())},
        "rate": tradeoffs.rate_distortion(race, decision, colours),
        **posteriors.charts(race, decision, colours),
        "parallel": searched.parallel_coordinates(race, decision) if searched.sampled(race) else None,
    }
    return {name: {"json": Markup(chart.to_json()), "log": chart.log}
            for name, chart in figures.items() if chart is not None}


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


# What was trained, and where it comes from --------------------------------------------------------------------------


def epoch_counts(race: Snapshot) -> dict[str, int]:
    """Epochs of all trajectories together: trained by this run, from the store, spared by stops and by patience; how
    many further seeds took, and what it spared that some candidates were ruled out before all seeds."""
    runs = race.runs.values()
    first = {trial.run.id for trial in candidates.first_seeds(race.trials)}
    seeds: dict[str, list[int]] = {}
    for trial in race.trials:
        seeds.setdefault(trial.candidate.name, []).append(trial.run.config.train.epochs)
    repeats = race.spec.decision.repeats
    return {
        "trained": sum(run.trained for run in runs),
        "stored": sum(_stored(run) for run in runs),
        "spared": sum(run.config.train.epochs - len(run.rows) for run in runs if run.state == "stopped" or _gone(run)),
        "patience": sum(run.config.train.epochs - len(run.rows) for run in runs
                        if run.state == "completed" and not _gone(run)),
        "repeats": sum(len(run.rows) for run in runs if run.id not in first),
        "raced": sum((repeats - len(budgets)) * budgets[0] for budgets in seeds.values() if len(budgets) > 1),
    }


def _gone(run: Any) -> bool:
    """Whether its latent had collapsed for good, and that ended it."""
    return run.state == "completed" and collapsed_at(run.rows, run.config) is not None


def _stored(run: Any) -> int:
    return min(run.stored, len(run.rows))


def _ended_early(race: Snapshot) -> list[tuple[str, str]]:
    return [(race.name_of(run), run.note or run.state) for run in race.runs.values()
            if run.state in curves.MARKS or run.note]


def _trials(race: Snapshot) -> list[dict[str, Any]]:
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


def _provenance(race: Snapshot, winner: Winner | None) -> dict[str, Any]:
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


def _data_settings(race: Snapshot) -> dict[str, str]:
    given = {name: race.start.get(f"data.{name}") for name in DataConfig.model_fields}
    return {name: candidates.shown(value) for name, value in given.items() if value not in (None, {}, [])}


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
