"""What a smaller latent, a smaller network or a faster encoder costs: the arithmetic of the trade-off. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping


def pareto(points: Mapping[str, tuple[float, float]], modes: tuple[str, str] = ("min", "min")) -> list[str]:
    """The names that no other point dominates (is at least as good in both and better in one), by the first value.

    Points that lack a value (NaN) are never among them; of equal points all are.
    """
    known = {name: tuple(value if mode == "min" else -value for value, mode in zip(point, modes, strict=True))
             for name, point in points.items() if not any(map(math.isnan, point))}
    kept = [name for name, (x, y) in known.items()
            if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in known.values())]
    return sorted(kept, key=lambda name: known[name])


def per_doubling(points: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """By what share the error falls for each doubling of the latent.

    ``points``: name -> (latent size, error). Each is compared with the best of the next smaller latents:
    (error_small / error_large)^(1 / log2(size_large / size_small)) − 1. Negative where the larger latent is worse;
    names for which there is nothing to compare are left out.
    """
    known = {name: point for name, point in points.items() if all(math.isfinite(v) and v > 0 for v in point)}
    best: dict[float, float] = {}
    for size, error in known.values():
        best[size] = min(error, best.get(size, math.inf))
    found = {}
    for name, (size, error) in known.items():
        smaller = max((other for other in best if other < size), default=None)
        if smaller is not None:
            found[name] = (best[smaller] / error) ** (1 / math.log2(size / smaller)) - 1
    return found


def per_dimension(size: float, error: float) -> float:
    """The error that a latent dimension has to show for itself: error / latent size."""
    return error / size if size > 0 else math.nan


def differ(values: list[float]) -> bool:
    """Whether the values that are known are not all the same."""
    return len({value for value in values if not math.isnan(value)}) > 1
