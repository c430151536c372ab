"""Where a space was searched: which settings mattered, and what the good points have in common."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from autoenc.report.candidates import best_first, completed_runs, mean, shown
from autoenc.report.chart import OTHER, Chart, new_chart, spans_much
from autoenc.report.intervals import ticks
from autoenc.report.page import number
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.inherit import Candidate

# From good to poor; mid tones, so that they stand out on a light page and on a dark one.
SCALE = [[0.0, "#2f9e6e"], [0.3, "#3a7bd5"], [0.65, "#a07fb8"], [1.0, "#d9772b"]]
MOST_LINES = 200
ABSENT = "—"                         # the parameter does not exist for this candidate (a condition does not hold)


def sampled(race: Snapshot) -> bool:
    """Whether any candidate was drawn from the space."""
    return any(trial.candidate.name not in race.spec.arms for trial in race.trials) and bool(race.spec.space)


def importance(race: Snapshot) -> list[tuple[str, float]]:
    """The searched parameters by how much of the objective's spread they explain, largest first; empty where the
    trials do not tell."""
    from autoenc.sweep.importance import importances

    found = importances(race.race) or {}
    return sorted(((key, share) for key, share in found.items() if math.isfinite(share)), key=lambda pair: -pair[1])


def parallel_coordinates(race: Snapshot, decision: Mapping[str, Any]) -> Chart | None:
    """A line a completed candidate across an axis for every varied setting, the objective last, coloured by it.

    Drawn as lines of an ordinary chart: plotly's own parallel coordinates need WebGL and generated code, which the
    page's security policy forbids.
    """
    metric, mode = race.spec.objective.metric, race.spec.objective.direction
    scores = {arm: mean(race, runs, metric) for arm, runs in completed_runs(race).items()}
    candidates = {trial.candidate.name: trial.candidate for trial in race.trials}
    arms = [arm for arm in best_first(race, decision) if math.isfinite(scores.get(arm, math.nan))][:MOST_LINES]
    if len(arms) < 2:
        return None
    axes = [_setting_axis(race, key, [candidates[arm] for arm in arms]) for key in race.spec.varied]
    places, marks = _axis([scores[arm] for arm in arms], spans_much([scores[arm] for arm in arms]))
    axes.append((metric, places, marks))
    quality = places if mode == "min" else [1 - place for place in places]

    across = list(range(len(axes)))
    chart = new_chart(420, showlegend=False, margin={"l": 8, "r": 8, "t": 40, "b": 8},
                        xaxis={"visible": False, "range": [-0.45, len(axes) - 0.6]},
                        yaxis={"visible": False, "range": [-0.06, 1.12]})
    for place, (title, _, marks) in enumerate(axes):
        chart.add_scatter(x=[place, place], y=[0, 1], mode="lines", line={"color": OTHER, "width": 1},
                           hoverinfo="skip")
        chart.add_annotation(x=place, y=1.12, text=f"<b>{'.<br>'.join(html.escape(title).split('.', 1))}</b>",
                              yanchor="bottom", yref="y")
        for at, text in marks:
            last = place == len(axes) - 1
            chart.add_annotation(x=place, y=at, text=html.escape(text), xanchor="left" if last else "right",
                                 xshift=8 if last else -6, font={"size": 11})
    for row in reversed(range(len(arms))):                        # the best on top
        arm, told = arms[row], candidates[arms[row]].config.flat()
        settings = "".join(f"<br>{html.escape(key)} {html.escape(shown(told[key]))}" for key in race.spec.varied)
        first = arm == decision["winner"]
        chart.add_scatter(
            x=across, y=[values[row] for _, values, _ in axes], mode="lines+markers",
            marker={"size": 7 if first else 4}, opacity=1 if first else 0.8,
            line={"color": _colour(quality[row]), "width": 3.5 if first else 1.75},
            hovertemplate=f"<b>{html.escape(arm)}</b>{' (winner)' if first else ''}<br>{html.escape(metric)} "
                          f"{scores[arm]:.4g}{settings}<extra></extra>")
    return chart


def _setting_axis(race: Snapshot, key: str, candidates: Sequence[Candidate],
                  ) -> tuple[str, list[float], list[tuple[float, str]]]:
    """Title, each candidate's place from 0 to 1, and the marks of a setting's axis."""
    parameter, values = race.spec.space.get(key), []
    for candidate in candidates:
        told = candidate.config.flat()
        there = all(told.get(other) == value for other, value in parameter.when.items()) if parameter else True
        values.append(told[key] if there else ABSENT)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len([value for value in values if value is not ABSENT]) or not numbers:
        return key, *_classes(values)
    log = getattr(parameter, "log", False) if parameter else spans_much(numbers)
    return key, *_axis([math.nan if value is ABSENT else value for value in values], log)


def _classes(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    kinds = sorted({shown(value) if value is not ABSENT else ABSENT for value in values})
    place = {kind: index / (len(kinds) - 1) if len(kinds) > 1 else 0.5 for index, kind in enumerate(kinds)}
    return ([place[shown(value) if value is not ABSENT else ABSENT] for value in values],
            [(at, kind) for kind, at in place.items()])


def _axis(values: Sequence[float], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Places and marks of numbers; a logarithmic axis shows exact 0, and any axis what has no value (NaN), below."""
    usual = [value for value in values if not math.isnan(value) and (value > 0 or not log)]
    low, high = min(usual, default=1.0), max(usual, default=1.0)
    scale = math.log10 if log else float
    floors = [(math.nan, ABSENT)] * any(map(math.isnan, values)) + [(0.0, "0")] * (log and 0 in values)
    base = 0.14 * len(floors)

    def place(value: float) -> float:
        if math.isnan(value) or (log and value <= 0):
            return 0.14 * (len(floors) - 1) if not math.isnan(value) else 0.0
        if low == high:
            return (1 + base) / 2
        return base + (1 - base) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    if log and low < high:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        inner = [10.0 ** power for power in powers]
    else:
        inner = ticks(low, high) if low < high else usual[:1]
    if low < high:
        inner = [low, *(value for value in inner if base + 0.08 < place(value) < 0.92), high]
    return ([place(value) for value in values],
            [(place(value), text) for value, text in floors] + [(place(v), _short(v)) for v in inner])


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else number(value)


def _colour(share: float) -> str:
    """A colour between those of the scale; 0 is good."""
    for (at, low), (to, high) in pairwise(SCALE):
        if share <= to:
            part = (share - at) / (to - at)
            mixed = [round(int(low[i:i + 2], 16) * (1 - part) + int(high[i:i + 2], 16) * part) for i in (1, 3, 5)]
            return "#" + "".join(f"{value:02x}" for value in mixed)
    return SCALE[-1][1]
