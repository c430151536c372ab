"""The frontier of a sweep as charts and as a table: what a smaller or faster model costs of the objective."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from autoenc.report import frontier
from autoenc.report.candidates import completed_runs, mean
from autoenc.report.chart import AXIS, OTHER, Chart, new_chart, spans_much
from autoenc.report.snapshot import Snapshot

COSTS = {"latent_size": "latent size", "parameters": "parameters", "encode_ms": "encoding, ms an image"}
MOST_NAMES = 12                      # points that have their name beside them; beyond, the winner's alone


def costs(race: Snapshot, decision: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the frontier's section shows: by cost the arms on the frontier, and a row an arm, by latent size.

    Of completed candidates, means over seeds, at their best epochs. Only costs in which the models differ; None where
    there are none.
    """
    metric, mode = race.spec.objective.metric, race.spec.objective.direction
    table = _table(race, (metric, "val/mse", *COSTS))
    if not any(frontier.differ([row[name] for row in table.values()]) for name in ("latent_size", "parameters")):
        return None                  # one architecture: its latency differs by the clock alone
    fronts = {name: frontier.pareto({arm: (row[name], row[metric]) for arm, row in table.items()}, ("min", mode))
              for name in COSTS if frontier.differ([row[name] for row in table.values()])}
    error = metric if mode == "min" else "val/mse"
    points = {arm: (row["latent_size"], row[error]) for arm, row in table.items()}
    doubling = frontier.per_doubling(points) if "latent_size" in fronts else {}
    rows = [{"arm": arm, "objective": row[metric], **{name: row[name] for name in COSTS},
             "per_dimension": frontier.per_dimension(*points[arm]), "per_doubling": doubling.get(arm),
             "on": [COSTS[name].split(",")[0] for name, front in fronts.items() if arm in front]}
            for arm, row in sorted(table.items(), key=lambda item: (item[1]["latent_size"], item[1][metric]))]
    return {"fronts": fronts, "rows": rows, "error": error, "doubling": bool(doubling)} if fronts else None


def cost_chart(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str], name: str) -> Chart:
    """The objective against one cost, a point a completed candidate, with the Pareto set as steps."""
    metric, mode = race.spec.objective.metric, race.spec.objective.direction
    table = _table(race, (metric, name))
    return _scatter({arm: (row[name], row[metric]) for arm, row in table.items()}, colours, decision["winner"],
                    (COSTS[name], metric), mode)


def rate_distortion(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str]) -> Chart | None:
    """What the variational candidates' latents tell (nats an image) against what is lost; None where fewer than two
    differ."""
    runs = [run for each in completed_runs(race).values() for run in each if run.config.model.variational]
    lost = "val/mse_sampled" if runs and all("val/mse_sampled" in race.figures_of(run) for run in runs) else "val/mse"
    table = _table(race, ("val/kl_nats", lost), variational=True)
    if not frontier.differ([row["val/kl_nats"] for row in table.values()]):
        return None
    return _scatter({arm: (row["val/kl_nats"], row[lost]) for arm, row in table.items()}, colours, decision["winner"],
                    ("rate: val/kl_nats", f"distortion: {lost}"), "min")


def _table(race: Snapshot, names: tuple[str, ...], variational: bool = False) -> dict[str, dict[str, float]]:
    """Arm -> figures, means over its completed runs; the first of ``names`` and the last must be known of each."""
    return {arm: {name: mean(race, runs, name) for name in names} for arm, runs in completed_runs(race).items()
            if (not variational or runs[0].config.model.variational) and math.isfinite(mean(race, runs, names[0]))}


def _scatter(points: Mapping[str, tuple[float, float]], colours: Mapping[str, str], winner: str | None,
             titles: tuple[str, str], mode: str) -> Chart:
    points = {arm: point for arm, point in points.items() if all(map(math.isfinite, point))}
    front = frontier.pareto(points, ("min", mode))
    chart = new_chart(320, showlegend=False, xaxis=_axis(titles[0], [x for x, _ in points.values()]),
                        yaxis=_axis(titles[1], [y for _, y in points.values()]))
    chart.add_scatter(x=[points[arm][0] for arm in front], y=[points[arm][1] for arm in front], mode="lines",
                       line={"color": OTHER, "width": 1.5, "dash": "dash", "shape": "hv"}, hoverinfo="skip")
    named = list(points) if len(points) <= MOST_NAMES else [winner]
    paints = [colours.get(arm, OTHER) for arm in points]
    filled = [paint if arm in front else "rgba(0,0,0,0)" for arm, paint in zip(points, paints, strict=True)]
    chart.add_scatter(
        x=[x for x, _ in points.values()], y=[y for _, y in points.values()], mode="markers+text",
        text=[f" {html.escape(arm)}" if arm in named else "" for arm in points], textposition="top right",
        cliponaxis=False,
        marker={"color": filled, "opacity": 1, "size": [13 if arm == winner else 10 for arm in points],
                "line": {"width": 2, "color": paints}},
        hovertext=[html.escape(arm) + (" (winner)" if arm == winner else "") for arm in points],
        hovertemplate=f"<b>%{{hovertext}}</b><br>{titles[0]} %{{x:.4~g}}<br>{html.escape(titles[1])} %{{y:.4g}}"
                      "<extra></extra>")
    return chart


def _axis(title: str, values: list[float]) -> dict[str, Any]:
    log = spans_much(values) or (len(set(values)) > 2 and min(values) > 0 and max(values) / min(values) >= 4)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        low, high = math.log10(low), math.log10(high)
    pad = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    ticks = sorted(set(values))
    few = {"tickvals": ticks} if log and len(ticks) <= 6 and title.startswith("latent") else {"nticks": 5}
    return {**AXIS, "title": {"text": html.escape(title), "standoff": 8, "font": {"size": 13}},
            "tickformat": ".3~s" if high > 1e4 else "~g",
            "type": "log" if log else "linear", "range": [low - pad, high + 1.5 * pad], **few}
