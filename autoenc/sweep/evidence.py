"""How far differences between candidates stand out from the noise of their seeds.

Seeds are paired: what a seed does to all candidates alike cancels. The model is that of randomised complete blocks
(Box, Hunter & Hunter 2005, "Statistics for Experimenters", ch. 4): value = candidate + seed + noise, on a scale on
which noise adds. The noise is estimated over all candidates together, since three seeds of one say little about it;
intervals are Student's, corrected for the number of comparisons (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

CONFIDENCE = 0.95
DOUBT = 1 - CONFIDENCE
ROUNDS = 200                 # of fitting a table with gaps; a whole one takes one


@dataclass(frozen=True)
class Change:
    """How much larger (negative: smaller) a figure is than another one's."""

    value: float
    low: float | None        # None: the seeds do not tell
    high: float | None
    seeds: int               # that both have
    unit: str                # share (of the other's size), or difference where shares make no sense


class Table:
    """A figure of several candidates by seed: ``values[name][seed]``. What is not finite is left out."""

    def __init__(self, values: Mapping[str, Mapping[int, float]]) -> None:
        self.values = {name: {seed: value for seed, value in sorted(row.items()) if math.isfinite(value)}
                       for name, row in values.items()}
        every = [value for row in self.values.values() for value in row.values()]
        self.log = all(value > 0 for value in every)
        self._cells = {name: {seed: math.log(value) if self.log else value for seed, value in row.items()}
                       for name, row in self.values.items()}
        self.deviation, self.freedom = _noise(self._cells)

    def shared(self, name: str, other: str) -> list[int]:
        """The seeds that both have."""
        return [seed for seed in self._cells.get(name, {}) if seed in self._cells.get(other, {})]

    def change(self, name: str, other: str, tail: float, seeds: int | None = None) -> Change | None:
        """From ``other`` to ``name`` over the seeds they share, with an interval that leaves ``tail`` (probability) on
        either side; None where they share none. ``seeds``: the interval that so many seeds would be expected to give.
        """
        pairs = self.shared(name, other)
        if not pairs:
            return None
        middle = fmean(self._cells[name][seed] - self._cells[other][seed] for seed in pairs)
        error = self._error(tail, len(pairs), seeds)
        told, unit = self._scale(other, pairs)
        ends = (None, None) if error is None else (told(middle - error), told(middle + error))
        return Change(told(middle), *ends, len(pairs), unit)

    def _error(self, tail: float, pairs: int, seeds: int | None) -> float | None:
        if not self.freedom:
            return None
        freedom = self.freedom
        if seeds is not None:
            rows = sum(len(row) > 1 for row in self._cells.values())
            pairs, freedom = seeds, (rows - 1) * (seeds - 1)
        return t_quantile(1 - tail, min(freedom, 1000)) * self.deviation * math.sqrt(2 / pairs)

    def _scale(self, other: str, pairs: list[int]) -> tuple:
        """From the table's own scale to what a person reads."""
        if self.log:
            return (lambda x: math.expm1(x) if x < 700 else math.inf), "share"
        size = abs(fmean(self._cells[other][seed] for seed in pairs))
        return (lambda x: x / size, "share") if size > 0 else (lambda x: x, "difference")


def _noise(cells: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """Standard deviation of one value about candidate + seed, and its degrees of freedom; NaN and 0 where there are
    none. Tables with gaps are fitted by turns (all candidates are taken to share a seed)."""
    rows = [dict(row) for row in cells.values() if len(row) > 1]
    while True:                                              # a seed that one candidate alone has tells nothing
        counts: dict[int, int] = {}
        for row in rows:
            for seed in row:
                counts[seed] = counts.get(seed, 0) + 1
        kept = [{seed: value for seed, value in row.items() if counts[seed] > 1} for row in rows]
        kept = [row for row in kept if len(row) > 1]
        if kept == rows:
            break
        rows = kept
    freedom = sum(map(len, rows)) - len(rows) - len(counts) + 1
    if not rows or freedom < 1:
        return math.nan, 0
    for _ in range(1 if len({len(row) for row in rows}) == 1 and len(counts) == len(rows[0]) else ROUNDS):
        rows = [{seed: value - middle for seed, value in row.items()}
                for row in rows for middle in [fmean(row.values())]]
        means = {seed: fmean(row[seed] for row in rows if seed in row) for seed in counts}
        rows = [{seed: value - means[seed] for seed, value in row.items()} for row in rows]
    squares = math.fsum(value * value for row in rows for value in row.values())
    return math.sqrt(squares / freedom), freedom


def excess_of(change: Change | None, mode: str) -> tuple[float, float | None, float | None]:
    """A change as how much worse (negative: better) it makes: value, low and high; NaN where there is none."""
    if change is None:
        return math.nan, None, None
    if mode == "min":
        return change.value, change.low, change.high
    return -change.value, *(None if end is None else -end for end in (change.high, change.low))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a probability from 0.5 to below 1 and whole degrees of freedom.

    Bisection of the distribution in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2                          # of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """The probability that t lies within ± sqrt(freedom) · tan(angle)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(odd + 2, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
