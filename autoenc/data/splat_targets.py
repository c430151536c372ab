"""What a model of splats is trained to give back: other coordinates of the eight numbers, and their normalisation.

Each target turns raw splats (…, N, 8) (see autoenc.data.splats) into columns (…, N, C) and back into raw ones of the
same image: the same covariances, though perhaps with the axes named the other way round. All are batched,
differentiable and take any numbers for decoding, as a model's outputs are any numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoenc.data.splats import LARGEST, SMALLEST

LEAST_STD = 1e-3     # of a column that is (nearly) constant: dividing by less would blow rounding up


@dataclass(frozen=True)
class Target:
    """Coordinates of splats."""

    columns: tuple[str, ...]
    """name of each of the C columns"""
    groups: dict[str, slice]
    """the columns by what they describe"""
    encode: Callable[[Tensor], Tensor]
    """raw (…, N, 8) to (…, N, C)"""
    decode: Callable[[Tensor], Tensor]
    """(…, N, C) to raw (…, N, 8), scales within [SMALLEST, LARGEST], rotations in [0, π)"""


def longer_first(raw: Tensor) -> Tensor:
    """Raw splats (…, N, 8) with the longer axis first and the rotation, that of the longer axis, in [0, π): the form in
    which splats can be compared number by number."""
    swap = raw[..., 2:3] < raw[..., 3:4]
    scale = torch.where(swap, raw[..., 2:4].flip(-1), raw[..., 2:4])
    angle = torch.where(swap, raw[..., 4:5] + math.pi / 2, raw[..., 4:5])
    return torch.cat((raw[..., :2], scale, _half_turn(angle), raw[..., 5:]), -1)


def _raw_decode(columns: Tensor) -> Tensor:
    return torch.cat((columns[..., :2], columns[..., 2:4].clamp(SMALLEST, LARGEST), _half_turn(columns[..., 4:5]),
                      columns[..., 5:]), -1)


def _canonical_encode(raw: Tensor) -> Tensor:
    raw = longer_first(raw)
    long, short, angle = raw[..., 2:3], raw[..., 3:4], 2 * raw[..., 4:5]
    anisotropy = (long - short) / (long + short)
    return torch.cat((raw[..., :2], raw[..., 2:4].log(), anisotropy * angle.cos(), anisotropy * angle.sin(),
                      raw[..., 5:]), -1)


def _canonical_decode(columns: Tensor) -> Tensor:
    return torch.cat((columns[..., :2], _exp(columns[..., 2:4]), _angle(columns[..., 4:5], columns[..., 5:6]),
                      columns[..., 6:]), -1)


def _logcov_encode(raw: Tensor) -> Tensor:
    # log Σ = R diag(2 log s1, 2 log s2) Rᵀ: half its trace, and half the difference of its eigenvalues, turned by 2θ.
    first, second = raw[..., 2:4].log().split(1, -1)
    mean, half, angle = first + second, first - second, 2 * raw[..., 4:5]
    return torch.cat((raw[..., :2], mean + half * angle.cos(), half * angle.sin(), mean - half * angle.cos(),
                      raw[..., 5:]), -1)


def _logcov_decode(columns: Tensor) -> Tensor:
    xx, xy, yy = columns[..., 2:5].split(1, -1)
    mean, along = (xx + yy) / 2, (xx - yy) / 2
    squared = along.square() + xy.square()
    half = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)      # no root of 0, whose slope is infinite
    scale = _exp(torch.cat(((mean + half) / 2, (mean - half) / 2), -1))
    return torch.cat((columns[..., :2], scale, _angle(along, xy), columns[..., 5:]), -1)


def _exp(log_scale: Tensor) -> Tensor:
    return log_scale.clamp(math.log(SMALLEST), math.log(LARGEST)).exp()


def _half_turn(angle: Tensor) -> Tensor:
    """An angle modulo π, in [0, π)."""
    angle = angle.remainder(math.pi)
    return torch.where(angle >= math.pi, 0.0, angle)      # of a tiny negative angle, rounding gives π itself


def _angle(cosine: Tensor, sine: Tensor) -> Tensor:
    """Half the angle of a vector, in [0, π); 0 for the zero vector, where the gradient is 0 too."""
    zero = (cosine == 0) & (sine == 0)
    return _half_turn(torch.atan2(sine, torch.where(zero, 1.0, cosine)) / 2)


_RAW = ("x", "y", "scale_1", "scale_2", "angle", "red", "green", "blue")
TARGETS = {
    "raw": Target(_RAW, {"xy": slice(0, 2), "scale": slice(2, 4), "rot": slice(4, 5), "feat": slice(5, 8)},
                  lambda raw: raw, _raw_decode),
    "canonical": Target((*_RAW[:2], "log_long", "log_short", "anisotropy_cos", "anisotropy_sin", *_RAW[5:]),
                        {"xy": slice(0, 2), "scale": slice(2, 4), "rot": slice(4, 6), "feat": slice(6, 9)},
                        _canonical_encode, _canonical_decode),
    "logcov": Target((*_RAW[:2], "log_cov_xx", "log_cov_xy", "log_cov_yy", *_RAW[5:]),
                     {"xy": slice(0, 2), "logcov": slice(2, 5), "feat": slice(5, 8)},
                     _logcov_encode, _logcov_decode),
}
"""raw: C = 8, the numbers as they are, the angle as a number that jumps from π to 0.
canonical: C = 9, the longer axis first: the logarithms of its scale and of the shorter one's, and a cos 2θ, a sin 2θ
with the anisotropy a = (long - short) / (long + short), which vanish where a round splat has no direction.
logcov: C = 8, the three different numbers of the covariance's matrix logarithm, with the trace 2 log(s1 s2): Euclidean
coordinates of covariances without a jump anywhere (Arsigny et al. 2006, Log-Euclidean metrics)."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each column, (C,) float32: plain tensors, as a checkpoint can hold them."""

    mean: Tensor
    std: Tensor
    """at least LEAST_STD"""

    def apply(self, columns: Tensor) -> Tensor:
        """Columns (…, N, C) with mean 0 and standard deviation 1 over what this was fitted to."""
        return (columns - self.mean.to(columns)) / self.std.to(columns)

    def invert(self, normal: Tensor) -> Tensor:
        """The columns that :meth:`apply` was given, to rounding."""
        return normal * self.std.to(normal) + self.mean.to(normal)


@torch.inference_mode()
def fit_normalisation(target: str, splats: Iterable[np.ndarray]) -> Normalisation:
    """The normalisation of a target's columns over chunks (n, N, 8) of raw splats, those of the training split.

    In one pass and float64 (Chan, Golub and LeVeque 1983, the update by chunks). Raises ValueError for no splats.
    """
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    for chunk in splats:
        columns = TARGETS[target].encode(torch.tensor(np.asarray(chunk), dtype=torch.float64)).flatten(0, -2)
        if not len(columns):
            continue
        here = columns.mean(0)
        spread = spread + (columns - here).square().sum(0) + (here - mean).square() * (
            count * len(columns) / (count + len(columns)))
        mean = mean + (here - mean) * (len(columns) / (count + len(columns)))
        count += len(columns)
    if not count:
        raise ValueError("there are no splats to fit a normalisation to")
    return Normalisation(mean.float(), (spread / count).sqrt().clamp(min=LEAST_STD).float())
