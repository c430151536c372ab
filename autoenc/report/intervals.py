"""The intervals of the decision as pictures: a line an arm on one scale, laid out in percent of the picture's width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoenc.figures import MODES
from autoenc.report.candidates import best_first, contenders, leader, tolerance
from autoenc.report.page import signed
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.words import percent

MOST_ROWS = 12
MOST_ON_TOP = 7                      # beside the decision
WIDEST = 4                           # an axis reaches so many times beyond what the points and the margin need, no more


def against_best(race: Snapshot, decision: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far each candidate lies behind the best, as a share, with the rule's ``within`` as the shaded band; None
    where there is nothing to compare."""
    rows = {row["arm"]: row for row in contenders(decision)}
    top = leader(race, list(rows.values()))
    if top is None or len(rows) < 2:
        return None
    lines = [_line(arm, rows[arm]["standing"], behind["share"], behind) for arm in best_first(race, decision)
             if arm in rows and _known(behind := rows[arm]["behind"], "share")]
    within = tolerance(race, decision)
    return _panel(lines, (0.0, within) if within else None, share=True, most=MOST_ON_TOP) if len(lines) > 1 else None


def against_baseline(race: Snapshot, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For the objective and every figure of ``baseline.gains``: how each candidate changes it against the baseline.
    The band is the margin that a candidate may be worse by."""
    rule, metric = race.spec.decision.baseline, race.spec.objective.metric
    rows = {row["arm"]: row for row in decision["candidates"]}
    compared = [rows[arm] for arm in best_first(race, decision) if arm in rows and rows[arm]["baseline"]]
    if rule is None or not compared:
        return []
    panels = []
    for figure in dict.fromkeys(name for row in compared for name in row["baseline"]["changes"]):
        changes = {row["arm"]: change for row in compared
                   if _known(change := row["baseline"]["changes"].get(figure), "change")}
        share = all(change["unit"] == "share" for change in changes.values())
        lines = [_line(row["arm"], row["verdict"], changes[row["arm"]]["change"], changes[row["arm"]], share)
                 for row in compared if row["arm"] in changes]
        mode = race.spec.objective.direction if figure == metric else MODES.get(figure, "min")
        margin = rule.margin if figure == metric and share else None
        band = (None if margin is None else (0.0, margin) if mode == "min" else (-margin, 0.0))
        if lines:
            panels.append({**_panel(lines, band, share=share), "figure": figure, "better": mode})
    return panels


def how_sure(race: Snapshot, decision: Mapping[str, Any]) -> str:
    """What the seeds show of the winner against the other candidates, in a sentence or two; empty where it is alone."""
    rows = contenders(decision)
    own = next((row for row in rows if row["arm"] == decision["winner"]), None)
    top = leader(race, rows)
    if own is None or top is None or len(rows) < 2:
        return ""
    seeds = len(own["seeds"])
    if seeds < 2:
        more = race.spec.decision.repeats == 1
        return "One seed each: nothing here tells a difference from noise." + (
            " More seeds for the finalists: decision.repeats." if more else "")
    found = {row["arm"]: row["behind"] for row in rows if row is not top and _known(row["behind"], "low", "high")}
    if own is not top and own["arm"] in found:
        span, within = found[own["arm"]], tolerance(race, decision)
        text = (f"Over {seeds} seeds {own['arm']} is {percent(span['share'])} behind {top['arm']}, with 95% confidence "
                f"{signed(span['low'])} to {signed(span['high'])}")
        if span["low"] <= 0:
            text += ": the seeds do not show which of the two is better"
        return text + ("." if span["high"] <= within else
                       f". That it is within the {percent(within)} that the rule allows is not shown."
                       if within else ".")
    if own is not top or not found:
        return ""
    apart = [arm for arm, span in found.items() if span["low"] > 0]
    close = [arm for arm, span in found.items() if span["low"] <= 0]
    said = [f"shown to be better than {_names(apart)}"] if apart else []
    said += [f"not shown to be better than {_names(close)}"] if close else []
    return f"Over {seeds} seeds {own['arm']} is {', and '.join(said)} (95% confidence for all together)."


def _names(arms: Sequence[str]) -> str:
    shown = ", ".join(arms[:4])
    return shown if len(arms) <= 4 else f"{shown} and {len(arms) - 4} more"


def _known(span: Mapping[str, Any] | None, *ends: str) -> bool:
    return span is not None and all(span[end] is not None for end in ends)


def _line(arm: str, verdict: str, value: float, span: Mapping[str, Any], share: bool = True) -> dict[str, Any]:
    low, high = (span["low"], span["high"]) if _known(span, "low", "high") else (None, None)
    return {"arm": arm, "verdict": verdict, "value": value, "low": low, "high": high, "text": signed(value, share),
            "span": "" if low is None else f"{signed(low, share)} to {signed(high, share)}"}


def _panel(lines: list[dict[str, Any]], band: tuple[float, float] | None, share: bool,
           most: int = MOST_ROWS) -> dict[str, Any]:
    """The lines with their places on a common axis, in percent: of the point, the interval, the band and the ticks."""
    shown = lines[:most]
    points = [abs(v) for v in (*(line["value"] for line in shown), *(band or ())) if math.isfinite(v)]
    ends = [abs(v) for line in shown for v in (line["low"], line["high"]) if v is not None and math.isfinite(v)]
    reach = min(max([*points, *ends]), WIDEST * max(points) or math.inf) or (0.01 if share else 1.0)
    values = [v for line in shown for v in (line["value"], line["low"], line["high"]) if v is not None]
    values = [max(-reach, min(reach, v)) for v in (*values, *(band or ()), 0.0)]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or reach
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return round(100 * (max(low, min(high, value)) - low) / (high - low), 2)

    for line in shown:
        line["at"] = place(line["value"])
        if line["low"] is not None:
            line["from"], line["to"] = place(line["low"]), place(line["high"])
            line["open"] = ("left " if line["low"] < low else "") + ("right" if line["high"] > high else "")
    return {"lines": shown, "more": len(lines) - len(shown), "zero": place(0.0),
            "band": (place(band[0]), place(band[1])) if band else None,
            "ticks": [(place(tick), signed(tick, share)) for tick in ticks(low, high, 3)]}


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values within a range, at most so many, 0 among them where it is within."""
    width = (high - low) / most
    if not (width > 0 and math.isfinite(width)):
        return []
    power = 10.0 ** math.floor(math.log10(width))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
