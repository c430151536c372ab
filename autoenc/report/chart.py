"""A chart as plotly.js takes it, in the pages' style. Plain data: plotly's own classes check every value, and for a
hundred trials that takes seconds, during which a running sweep would wait."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OTHER = "#8d939c"                    # what has no colour of its own; a mid tone, for light pages and dark ones
LOG_FROM = 8                         # a logarithmic axis where the largest value is so many times the smallest
AXIS = {"automargin": True, "zeroline": False, "showline": False, "ticks": "outside", "fixedrange": False}


@dataclass
class Chart:
    layout: dict[str, Any]
    data: list[dict[str, Any]] = field(default_factory=list)

    @property
    def log(self) -> bool:
        return self.layout["yaxis"].get("type") == "log"

    def add_scatter(self, **trace: Any) -> None:
        self.data.append({"type": "scatter", **trace})

    def add_vline(self, x: float) -> None:
        self.layout.setdefault("shapes", []).append({
            "type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "y domain",
            "line": {"width": 1, "dash": "dot", "color": OTHER}})

    def add_annotation(self, **annotation: Any) -> None:
        self.layout.setdefault("annotations", []).append({"showarrow": False, **annotation})

    def to_json(self) -> str:
        """As JSON that can stand inside a ``<script>`` element; NaN and infinity become null."""
        content = _finite({"data": self.data, "layout": self.layout})
        return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def new_chart(height: int = 400, **layout: Any) -> Chart:
    return Chart({"height": height, "hovermode": "closest", "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
                  "legend": {"orientation": "h", "x": 0, "y": -0.1, "yanchor": "top"}, "xaxis": AXIS, "yaxis": AXIS,
                  **layout})


def spans_much(values: Sequence[float | None]) -> bool:
    """Whether a logarithmic axis shows these values better."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) / min(known) >= LOG_FROM


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
