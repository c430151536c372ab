"""The curves and pictures of a sweep's report. plotly is imported when the first curve is drawn; no torch, no Ray."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.sweep.race import Race
from autoenc.sweep.standing import Run, Trial

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Mid tones, so that they stand out on a light page and on a dark one.
COLOURS = ("#3a7bd5", "#d9772b", "#2f9e6e", "#b5539c", "#8468d6", "#c94f4f", "#2199a8", "#97812f")
OTHER = "#8d939c"                    # arms beyond the colours
DASHES = ("solid", "dash", "dashdot", "longdash")            # by seed
MOST_TRIALS = 60
MOST_POINTS = 400                    # of one line
PICTURE_BYTES = 5_000_000            # of all pictures together; base64 makes 6.7 MB of it, plotly.js adds 4.8 MB
MOST_PICTURES = 24
LOG_FROM = 8                         # a logarithmic axis where the largest value is so many times the smallest
MARKS = {"stopped": ("stopped early", "x-thin"), "diverged": ("diverged", "asterisk"), "failed": ("failed", "hash")}


def contenders(decision: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates that could have won and whose scores compare: over as many seeds as any has."""
    rows = [row for row in decision["candidates"] if row["score"] is not None
            and row["verdict"] in ("winner", "best", "as good", "worse", "rule's choice")]
    most = max((len(row["seeds"]) for row in rows), default=0)
    return [row for row in rows if len(row["seeds"]) == most]


def best_first(race: Race, decision: Mapping[str, Any]) -> list[str]:
    """The arms: the winner, then by score, then those without one in the file's order."""
    sign = 1 if race.spec.objective.direction == "min" else -1

    def place(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        none = row["score"] is None
        return row["arm"] != decision["winner"], none, 0.0 if none else sign * row["score"]

    return [row["arm"] for row in sorted(decision["candidates"], key=place)]


def arm_colours(race: Race, decision: Mapping[str, Any]) -> dict[str, str]:
    """A colour for every arm; where there are more arms than colours, the best have them and the others are grey."""
    chosen = set(best_first(race, decision)[:len(COLOURS)])
    free = iter(COLOURS)
    return {row["arm"]: next(free) if row["arm"] in chosen else OTHER for row in decision["candidates"]}


def shown_trials(race: Race, decision: Mapping[str, Any]) -> list[Trial]:
    """The trials that have epochs to draw, the best arms' where there are too many for one chart."""
    rank = {arm: place for place, arm in enumerate(best_first(race, decision))}
    able = [trial for trial in race.trials if trial.run.rows]
    ranked = sorted(able, key=lambda trial: rank.get(trial.candidate.name, len(rank)))[:MOST_TRIALS]
    return [trial for trial in able if trial in ranked]


def curve_metric(race: Race) -> str:
    """The objective; what training monitors where the objective is only computed after training."""
    metric = race.spec.objective.metric
    if any(metric in row for run in race.runs.values() for row in run.rows):
        return metric
    return next(iter(race.runs.values())).config.train.monitor if race.runs else metric


def objective_chart(race: Race, decision: Mapping[str, Any], colours: Mapping[str, str]) -> go.Figure:
    """The objective by epoch, a line a trial; where a trial was stopped, diverged or failed, and the rule's bound."""
    metric, trials = curve_metric(race), shown_trials(race, decision)
    figure = _figure([value for trial in trials for value in _points(trial.run, metric)[1]], trials)
    for epoch in race.rungs.epochs:
        figure.add_vline(x=epoch, line={"width": 1, "dash": "dot", "color": OTHER})
    _add_bound(figure, race, decision, trials)
    named: set[str] = set()
    for trial in trials:
        figure.add_scatter(**_line(trial, metric, colours, decision["winner"], named))
    for state, (label, symbol) in MARKS.items():
        ends = [(trial, *_end(trial.run, metric)) for trial in trials if trial.run.state == state]
        ends = [end for end in ends if end[2] is not None]
        if ends:
            paints = [colours.get(trial.candidate.name, OTHER) for trial, *_ in ends]
            figure.add_scatter(
                x=[epoch for _, epoch, _ in ends], y=[value for *_, value in ends], mode="markers", name=label,
                legendrank=3, zorder=3, hovertemplate="%{customdata[0]}<extra></extra>",
                marker={"symbol": symbol, "size": 10, "color": paints, "line": {"width": 2.5, "color": paints}},
                customdata=[[html.escape(f"{trial.name}: {trial.run.note or label}")] for trial, *_ in ends])
    return figure


def split_chart(race: Race, decision: Mapping[str, Any], colours: Mapping[str, str],
                name: str = "mse") -> go.Figure | None:
    """A figure of training (dotted) and validation (solid) by epoch, each arm's first seed; None where unknown."""
    dashes = {f"val/{name}": "solid", f"train/{name}": "dot"}
    trials = [trial for trial in first_seeds(shown_trials(race, decision))
              if any(metric in row for row in trial.run.rows for metric in dashes)]
    if not trials:
        return None
    values = [value for trial in trials for metric in dashes for value in _points(trial.run, metric)[1]]
    figure = _figure(values, trials)
    named: set[str] = set()
    for trial in trials:
        for metric, dash in dashes.items():
            line = _line(trial, metric, colours, decision["winner"], named)
            figure.add_scatter(**{**line, "line": {**line["line"], "dash": dash}})
    return figure


def first_seeds(trials: Sequence[Trial]) -> list[Trial]:
    """The first seed's trial of every arm."""
    first: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        first.setdefault(trial.candidate.name, trial)
    return [trial for trial in trials if first[trial.candidate.name] is trial]


def to_json(figure: go.Figure) -> str:
    """The figure as JSON that can stand inside a ``<script>`` element; NaN and infinity become null."""
    return figure.to_json().replace("<", "\\u003c")


def _figure(values: Sequence[float | None], trials: Sequence[Trial]) -> go.Figure:
    import plotly.graph_objects as go

    known = [value for value in values if value is not None]
    log = bool(known) and min(known) > 0 and max(known) / min(known) >= LOG_FROM
    epochs = max((len(trial.run.rows) for trial in trials), default=1)
    axis = {"automargin": True, "zeroline": False, "showline": False, "ticks": "outside", "fixedrange": False}
    return go.Figure(layout={
        "template": "none", "height": 400, "hovermode": "closest", "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top"},
        "xaxis": {**axis, "range": [max(0.05, 1 - 0.03 * epochs), epochs * 1.03],
                  **({"dtick": 1} if epochs <= 12 else {})},
        "yaxis": {**axis, "tickformat": ".3~g", **({"type": "log", "dtick": "D2"} if log else {"type": "linear"})},
    })


def _add_bound(figure: go.Figure, race: Race, decision: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """A line at the worst score that the rule takes for as good as the best."""
    rule, objective = race.spec.decision, race.spec.objective
    scores = [row["score"] for row in contenders(decision)]
    if not rule.within or not scores or curve_metric(race) != objective.metric:
        return
    best = (min if objective.direction == "min" else max)(scores)
    bound = best + (1 if objective.direction == "min" else -1) * rule.within * abs(best)
    epochs = max(len(trial.run.rows) for trial in trials)
    figure.add_scatter(x=[1, epochs], y=[bound, bound], mode="lines", legendrank=4,
                       name=f"within {100 * rule.within:.3g}% of the best",
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


# Pictures ------------------------------------------------------------------------------------------------------------


def pictures(race: Race, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last sample picture of every arm's first seed, the best arms' where there are very many."""
    arms = best_first(race, decision)
    verdicts = {row["arm"]: row["verdict"] for row in decision["candidates"]}
    found = [(trial, path) for trial in first_seeds(race.trials) if (path := _last_picture(trial.run))]
    found = [pair for pair in found if pair[0].candidate.name in arms]
    found = sorted(found, key=lambda pair: arms.index(pair[0].candidate.name))[:MOST_PICTURES]
    told = []
    for trial, path in found:
        picture = embedded(path, PICTURE_BYTES // len(found))
        if picture is not None:
            arm = trial.candidate.name
            told.append({**picture, "arm": arm, "verdict": verdicts[arm],
                         "epoch": _epoch(path), "epochs": len(trial.run.rows)})
    return told


def _last_picture(run: Run) -> Path | None:
    """The latest picture within this sweep's budget: the store may hold a longer training."""
    paths = (run.trajectory.folder / "samples").glob("epoch_*.png")
    return max((path for path in paths if 0 < _epoch(path) <= len(run.rows)), key=_epoch, default=None)


def _epoch(path: Path) -> int:
    digits = path.stem.removeprefix("epoch_")
    return int(digits) if digits.isdecimal() else 0


def embedded(path: Path, limit: int) -> dict[str, Any] | None:
    """A PNG as a data URI of at most ``limit`` bytes before base64, halved until it fits; None where it is broken."""
    from PIL import Image

    try:
        content = path.read_bytes()
        picture = Image.open(io.BytesIO(content))
        picture.load()
        width, height = picture.size
        while len(content) > limit and min(picture.size) > 1:
            picture = picture.convert("RGB").reduce(2)
            file = io.BytesIO()
            picture.save(file, format="png")
            content = file.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return {"src": "data:image/png;base64," + base64.b64encode(content).decode(), "width": width, "height": height}
