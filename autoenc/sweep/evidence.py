"""How far differences between candidates stand out from the noise of their seeds.

Seeds are paired, so candidates are compared by the logarithm of their ratio seed by seed: what a seed does to both
cancels. The spread of these is pooled over all candidates, since two or three seeds of one say little about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

CONFIDENCE = 0.95


def log_ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Per seed, the logarithm of value over other; empty unless all are positive and finite."""
    pairs = list(zip(values, others, strict=True))
    known = all(0 < figure < math.inf for pair in pairs for figure in pair)
    return [math.log(value) - math.log(other) for value, other in pairs] if known else []


def pooled(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within samples, pooled over them, and its degrees of freedom; NaN where there are none."""
    freedom = sum(len(sample) - 1 for sample in samples if sample)
    squares = sum((x - fmean(sample)) ** 2 for sample in samples if sample for x in sample)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def upper_bound(ratios: Sequence[float], samples: Sequence[Sequence[float]], mode: str) -> float:
    """One-sided upper confidence bound of a candidate's excess over the best, as a share of the best.

    ``ratios``: its log ratios to the best; ``samples``: those of every candidate compared, its own included. A t
    interval with the pooled spread, corrected (Bonferroni) for the number of comparisons; infinite where seeds lack.
    """
    spread, freedom = pooled(samples)
    if len(ratios) < 2 or not freedom:
        return math.inf
    error = t_quantile(1 - (1 - CONFIDENCE) / len(samples), freedom) * spread / math.sqrt(len(ratios))
    return max(0.0, worse(fmean(ratios) + (error if mode == "min" else -error), mode))


def interval(ratios: Sequence[float], samples: Sequence[Sequence[float]], mode: str) -> tuple[float, float] | None:
    """Two-sided simultaneous confidence interval of how much worse (negative: better) a candidate is, as a share of
    what it is compared to; None where seeds lack. Arguments as for :func:`upper_bound`."""
    spread, freedom = pooled(samples)
    if len(ratios) < 2 or not freedom:
        return None
    error = t_quantile(1 - (1 - CONFIDENCE) / 2 / len(samples), freedom) * spread / math.sqrt(len(ratios))
    low, high = sorted(worse(fmean(ratios) + end, mode) for end in (-error, error))
    return low, high


def worse(log_ratio: float, mode: str) -> float:
    """A log ratio as the share by which the value is worse than the other (negative: better)."""
    change = math.expm1(log_ratio) if log_ratio < 700 else math.inf
    return change if mode == "min" else -change


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
