"""The learning curves of a sweep's report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoenc.report.candidates import best_first, contenders, first_seeds, improving, tolerance
from autoenc.report.chart import AXIS, OTHER, Chart, new_chart, spans_much
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.plan import improving_margin
from autoenc.sweep.standing import Run, Trial

# Mid tones, so that they stand out on a light page and on a dark one.
COLOURS = ("#3a7bd5", "#d9772b", "#2f9e6e", "#b5539c", "#8468d6", "#c94f4f", "#2199a8", "#97812f")
DASHES = ("solid", "dash", "dashdot", "longdash")            # by seed
MOST_TRIALS = 60
MOST_POINTS = 400                    # of one line
MARKS = {"stopped": ("stopped early", "x-thin"), "diverged": ("diverged", "asterisk"), "failed": ("failed", "hash")}


def arm_colours(race: Snapshot, decision: Mapping[str, Any]) -> dict[str, str]:
    """A colour for every arm; where there are more arms than colours, the best have them and the others are grey."""
    chosen = set(best_first(race, decision)[:len(COLOURS)])
    free = iter(COLOURS)
    arms = dict.fromkeys([*(row["arm"] for row in decision["candidates"]),
                          *(trial.candidate.name for trial in race.trials)])
    return {arm: next(free) if arm in chosen else OTHER for arm in arms}


def shown_trials(race: Snapshot, decision: Mapping[str, Any]) -> list[Trial]:
    """The trials that have epochs to draw, the best arms' where there are too many for one chart."""
    rank = {arm: place for place, arm in enumerate(best_first(race, decision))}
    able = [trial for trial in race.trials if trial.run.rows]
    ranked = sorted(able, key=lambda trial: rank.get(trial.candidate.name, len(rank)))[:MOST_TRIALS]
    return [trial for trial in able if trial in ranked]


def curve_metric(race: Snapshot) -> str:
    """The objective; what training monitors where the objective is only computed after training."""
    metric = race.spec.objective.metric
    if any(metric in row for run in race.runs.values() for row in run.rows):
        return metric
    return next(iter(race.runs.values())).config.train.monitor if race.runs else metric


def objective_chart(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str]) -> Chart:
    """The objective by epoch, a line a trial; where a trial was stopped, diverged or failed, and the rule's bound."""
    metric, trials = curve_metric(race), shown_trials(race, decision)
    chart = _by_epoch([value for trial in trials for value in _points(trial.run, metric)[1]], trials)
    for epoch in race.rungs.epochs:
        chart.add_vline(epoch)
    _add_bound(chart, race, decision, trials)
    named: set[str] = set()
    for trial in trials:
        chart.add_scatter(**_line(trial, metric, colours, decision["winner"], named))
    for state, (label, symbol) in MARKS.items():
        ends = [(trial, *_end(trial.run, metric)) for trial in trials if trial.run.state == state]
        ends = [end for end in ends if end[2] is not None]
        if ends:
            paints = [colours.get(trial.candidate.name, OTHER) for trial, *_ in ends]
            _add_marks(chart, ends, label, {"symbol": symbol, "size": 10, "line": {"width": 2.5, "color": paints}},
                       paints, [trial.run.note or label for trial, *_ in ends])
    late = improving(race, improving_margin(race.spec))
    ends = [(trial, *_end(trial.run, metric)) for trial in first_seeds(trials)
            if trial.candidate.name in late and trial.run.state == "completed"]
    ends = [end for end in ends if end[2] is not None]
    if ends:
        _add_marks(chart, ends, "still improving", {"symbol": "triangle-down-open", "size": 12, "line": {"width": 2}},
                   [colours.get(trial.candidate.name, OTHER) for trial, *_ in ends],
                   [f"still improving, by {100 * late[trial.candidate.name]:.3g}% over the last 3 epochs"
                    for trial, *_ in ends])
    return chart


def _add_marks(chart: Chart, ends: Sequence[tuple[Trial, int, float | None]], name: str, marker: dict[str, Any],
               paints: list[str], notes: Sequence[str]) -> None:
    chart.add_scatter(
        x=[epoch for _, epoch, _ in ends], y=[value for *_, value in ends], mode="markers", name=name, legendrank=3,
        zorder=3, hovertemplate="%{customdata[0]}<extra></extra>", marker={**marker, "color": paints},
        customdata=[[html.escape(f"{trial.name}: {note}")]
                    for (trial, *_), note in zip(ends, notes, strict=True)])


def split_figure(race: Snapshot) -> str:
    """The error that training and validation both report: ``mse``; ``splats`` where nothing is rendered to train."""
    return "splats" if any("train/splats" in row for run in race.runs.values() for row in run.rows[:1]) else "mse"


def split_chart(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str]) -> Chart | None:
    """The error of training (dotted) and validation (solid) by epoch, each arm's first seed; None where unknown."""
    name = split_figure(race)
    dashes = {f"val/{name}": "solid", f"train/{name}": "dot"}
    trials = [trial for trial in first_seeds(shown_trials(race, decision))
              if any(metric in row for row in trial.run.rows for metric in dashes)]
    if not trials:
        return None
    values = [value for trial in trials for metric in dashes for value in _points(trial.run, metric)[1]]
    chart = _by_epoch(values, trials)
    named: set[str] = set()
    for trial in trials:
        for metric, dash in dashes.items():
            line = _line(trial, metric, colours, decision["winner"], named)
            chart.add_scatter(**{**line, "line": {**line["line"], "dash": dash}})
    return chart


def figure_chart(trials: Sequence[Trial], metric: str, colours: Mapping[str, str], winner: str | None) -> Chart | None:
    """One figure by epoch, a line a trial; None where no epoch has it."""
    values = [value for trial in trials for value in _points(trial.run, metric)[1]]
    if all(value is None for value in values):
        return None
    chart, named = _by_epoch(values, trials), set()
    for trial in trials:
        chart.add_scatter(**_line(trial, metric, colours, winner, named))
    return chart


def _by_epoch(values: Sequence[float | None], trials: Sequence[Trial]) -> Chart:
    epochs = max((len(trial.run.rows) for trial in trials), default=1)
    scale = {"type": "log", "dtick": "D2"} if spans_much(values) else {"type": "linear"}
    return new_chart(
        xaxis={**AXIS, "range": [max(0.05, 1 - 0.03 * epochs), epochs * 1.03],
               **({"dtick": 1} if epochs <= 12 else {})},
        yaxis={**AXIS, "tickformat": ".3~g", **scale})


def _add_bound(chart: Chart, race: Snapshot, decision: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """A line at the worst score that the rule takes for as good as the best."""
    objective, share = race.spec.objective, tolerance(race, decision)
    scores = [row["score"] for row in contenders(decision)]
    if not share or not scores or curve_metric(race) != objective.metric:
        return
    best = (min if objective.direction == "min" else max)(scores)
    bound = best + (1 if objective.direction == "min" else -1) * share * abs(best)
    epochs = max(len(trial.run.rows) for trial in trials)
    chart.add_scatter(x=[1, epochs], y=[bound, bound], mode="lines", legendrank=4,
                       name=f"within {100 * share:.3g}% of the best",
                       line={"color": OTHER, "width": 1.5, "dash": "dash"}, hoverinfo="skip")


def _line(trial: Trial, metric: str, colours: Mapping[str, str], winner: str | None, named: set[str]) -> dict[str, Any]:
    """A trial's curve. ``named``: the legend's entries so far, one an arm and one for all grey arms together."""
    arm = trial.candidate.name
    colour = colours.get(arm, OTHER)
    entry = "other arms" if colour == OTHER else arm
    first, seeds = entry not in named, trial.seed - trial.candidate.config.train.seed
    named.add(entry)
    epochs, values = _points(trial.run, metric)
    text = html.escape(f"{arm}, seed {trial.seed}")
    return {
        "x": epochs, "y": values, "mode": "lines+markers" if len(epochs) <= 20 else "lines",
        "name": html.escape(entry) + (" (winner)" if arm == winner else ""), "legendgroup": html.escape(entry),
        "showlegend": first, "legendrank": 2 if colour == OTHER else 1, "zorder": 2 if arm == winner else 1,
        "opacity": 0.55 if colour == OTHER else 1,
        "line": {"color": colour, "width": 3 if arm == winner else 1.75, "dash": DASHES[seeds % len(DASHES)]},
        "marker": {"size": 6 if arm == winner else 4, "color": colour},
        "hovertemplate": f"<b>{text}</b><br>epoch %{{x}}: {html.escape(metric)} %{{y:.4g}}<extra></extra>",
    }


def _points(run: Run, metric: str) -> tuple[list[int], list[float | None]]:
    """Epochs and values, with None for what is missing or not finite; long curves are thinned, their end is kept."""
    step = math.ceil(len(run.rows) / MOST_POINTS) or 1
    rows = run.rows[::-1][::step][::-1]
    values = [row.get(metric, math.nan) for row in rows]
    return [int(row["epoch"]) for row in rows], [value if math.isfinite(value) else None for value in values]


def _end(run: Run, metric: str) -> tuple[int, float | None]:
    """The last epoch whose value is known: where a mark can stand."""
    epochs, values = _points(run, metric)
    known = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    return known[-1] if known else (0, None)
