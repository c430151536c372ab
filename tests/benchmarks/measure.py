"""What a benchmark is made of: rounds in which two things are measured in turn, their ratio, and its mark."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


class Skip(Exception):
    """A benchmark cannot be run here, for this reason."""


@dataclass(frozen=True)
class Mark:
    relation: Literal["at least", "at most"]
    value: float
    of: Literal["ratio", "ours"] = "ratio"

    def reached(self, value: float) -> bool:
        return value >= self.value if self.relation == "at least" else value <= self.value


@dataclass(frozen=True)
class Row:
    """One figure: ``ours`` and ``other`` measured in the same rounds, and the ratio of the two."""

    what: str
    ours: str
    other: str
    unit: str
    ratio: Literal["ours/other", "other/ours"]
    mark: Mark | None = None

    def of(self, ours: float, other: float) -> float:
        """The ratio of a round; infinite or NaN where it is one over nothing."""
        over, under = (ours, other) if self.ratio == "ours/other" else (other, ours)
        return over / under if under else math.copysign(math.inf, over) if over else math.nan


@dataclass(frozen=True)
class Options:
    """What a run of the command asks of all benchmarks."""

    quick: bool = False                          # sizes that show that it works; the figures mean nothing
    manifest: Path | None = None                 # of the epochs benchmark
    palette: Path | None = None
    image_size: int = 64
    limit: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """``rounds(options)`` of the module yields a round after another for as long as it is asked, and tidies up when it
    is closed. Modules are imported when they are run."""

    name: str
    module: str
    function: str
    rows: Mapping[str, Row]
    repeats: int = 5
    clocked: bool = True                         # False: other work on the machine does not change its figures


@dataclass
class Round:
    """Of each of the benchmark's rows (ours, other), and what is to be said beside them."""

    pairs: Mapping[str, tuple[float, float]]
    notes: Mapping[str, Any] = field(default_factory=dict)


def in_turn(number: int, *works: Callable[[], Any]) -> list[Any]:
    """What each of the works returns, in their order; called in that order in even rounds and backwards in odd ones, so
    that what changes slowly on the machine meets all alike."""
    order = list(range(len(works)))
    found = {k: works[k]() for k in (order if number % 2 == 0 else reversed(order))}
    return [found[k] for k in order]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles (linear interpolation) with the values themselves; of one value it is all three."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "values": list(values)}


def summary(row: Row, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A row over its rounds, as it stands in the JSON file."""
    ratio = spread([row.of(*pair) for pair in pairs])
    found = {"what": row.what, "unit": row.unit, "rounds": len(pairs), "ratio_of": row.ratio, "ratio": ratio,
             "ours": {"what": row.ours, **spread([ours for ours, _ in pairs])},
             "other": {"what": row.other, **spread([other for _, other in pairs])},
             "mark": asdict(row.mark) if row.mark else None, "reached": None}
    if row.mark:
        found["reached"] = row.mark.reached((ratio if row.mark.of == "ratio" else found["ours"])["median"])
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and seconds of this process's processor time, which other work on the machine hardly changes."""
    used = time.process_time()
    seconds = timed(work)
    return seconds, time.process_time() - used
