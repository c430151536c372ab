"""A quasi-random sequence of a space's points: evenly spread, wherever it is broken off.

Optuna's QMCSampler keeps its place in the study and only learns the space from a completed trial; here the place is a
number, so that a sweep that was killed goes on in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autoenc.sweep.space import Parameter, draw_point


def quasi_random_points(space: Mapping[str, Parameter], start: Mapping[str, Any], seed: int,
                        skip: int = 0) -> Iterator[dict[str, Any]]:
    """The points of a scrambled Sobol sequence (Owen 1998), without end, but for the first ``skip`` ones.

    Every parameter has a coordinate of its own, one that may be exactly 0 two, at points where it has no effect, too.
    """
    from scipy.stats.qmc import Sobol

    names = [name for key, parameter in space.items() for name in parameter.names(key)]
    sequence = Sobol(len(names), scramble=True, rng=seed)
    if skip:
        sequence.fast_forward(skip)
    while True:
        coordinates = sequence.random(1)[0].tolist()
        yield draw_point(_Coordinates(dict(zip(names, coordinates, strict=True))), space, start)


class _Coordinates:
    """A point of the unit cube, by the name of each parameter, that is asked like an Optuna trial."""

    def __init__(self, coordinates: Mapping[str, float]) -> None:
        self.coordinates = coordinates

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        value = _between(self.coordinates[name], low, high, log)
        return min(max(value, low), high)            # exp(log(high)) may lie above it

    def suggest_int(self, name: str, low: int, high: int, step: int = 1, log: bool = False) -> int:
        """Each value has the same share of the range (of its logarithm), the ends like those between them."""
        if log:
            return min(max(round(_between(self.coordinates[name], low - 0.5, high + 0.5, log)), low), high)
        return low + step * int(self.coordinates[name] * ((high - low) // step + 1))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self.coordinates[name] * len(choices))]


def _between(share: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)
