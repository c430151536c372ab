"""Splats by what their numbers describe (position, scale, rotation, colour): the group loss, its likelihood, and the
figures of a split by group.

The loss is over the normalised columns of a target, in its groups (autoenc.data.splat_targets). Figures are of raw
splats, in the groups of autoenc.data.splats.PARTS whatever the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from autoenc.data.splat_targets import TARGETS, longer_first
from autoenc.data.splats import COLUMNS, PARTS

ANGLE = PARTS["rot"].start
ROUNDING = 1e-12                 # a variance below this share of the mean square is what float32 leaves of 0


def group_widths(kind: str) -> dict[str, int]:
    """How many columns each group of a target has."""
    return {name: part.stop - part.start for name, part in TARGETS[kind].groups.items()}


def _column_errors(columns: Tensor, target: Tensor, kind: str) -> dict[str, Tensor]:
    """The mean squared error of each column over splats and batch, (n,) by group. Raises ValueError for shapes that
    are not the target's."""
    if columns.shape != target.shape or columns.shape[2:] != (len(TARGETS[kind].columns),):
        raise ValueError(f"columns {tuple(columns.shape)} and target {tuple(target.shape)}: should both be (B, N, "
                         f"{len(TARGETS[kind].columns)}) ({kind})")
    widths = group_widths(kind)
    errors = functional.mse_loss(columns, target, reduction="none").mean((0, 1))
    return dict(zip(widths, errors.split(list(widths.values())), strict=True))


def group_errors(columns: Tensor, target: Tensor, kind: str) -> dict[str, Tensor]:
    """By group of the target ``kind``, the squared error of columns (B, N, C) summed over the group's columns, mean
    over splats and batch."""
    return {name: errors.sum() for name, errors in _column_errors(columns, target, kind).items()}


def group_loss(columns: Tensor, target: Tensor, kind: str, reduction: str = "sum") -> Tensor:
    """The sum over groups of :func:`group_errors` divided by the group's number of columns, so that every group of
    columns (B, N, C) weighs the same: xy/2 + scale/2 + rot/1 + feat/3 for raw splats.

    ``reduction`` is within a group, before that division. ``mean`` divides by the number of columns a second time
    (xy/4 + scale/4 + rot/1 + feat/9): the text that the loss is from divides channel sums by their number, its code
    takes channel means and divides as well; this is what both do together, and it favours the rotation.
    """
    means = [errors.mean() / (len(errors) if reduction == "mean" else 1)
             for errors in _column_errors(columns, target, kind).values()]
    return torch.stack(means).sum()


def group_likelihood(columns: Tensor, target: Tensor, kind: str) -> Tensor:
    """Negative log-likelihood in nats per number of columns (B, N, C), up to 1/2 ln(2 pi), under a Gaussian with one
    optimal variance for each group: sum over groups of n gaussian(mse) / C, with a group's n columns and its mean
    squared error over the batch (:func:`autoenc.losses.gaussian`; sigma-VAE, Rybkin et al. 2021)."""
    return _likelihood({name: errors.mean() for name, errors in _column_errors(columns, target, kind).items()}, kind)


def _likelihood(mse_by_group: Mapping[str, Tensor], kind: str) -> Tensor:
    from autoenc.losses import gaussian  # not above: the group loss is one of the terms there

    columns = [mse_by_group[name].expand(width) for name, width in group_widths(kind).items()]
    return gaussian(torch.cat(columns)).mean()


def splat_likelihood(mse_by_group: Mapping[str, float], kind: str) -> float:
    """:func:`group_likelihood` of a whole split, from its mean squared errors by group of the target."""
    errors = {name: torch.tensor(mse, dtype=torch.float64) for name, mse in mse_by_group.items()}
    return _likelihood(errors, kind).item()


def group_log_sigmas(mse_by_group: Mapping[str, float]) -> dict[str, float]:
    """The log standard deviation of each group's optimal Gaussian, at least -6 (:func:`autoenc.losses.log_sigma`)."""
    from autoenc.losses import log_sigma

    return {name: log_sigma(torch.tensor(mse, dtype=torch.float64)).item() for name, mse in mse_by_group.items()}


def splat_nelbo(mse_by_group: Mapping[str, float], nats: float, splats: int, kind: str) -> float:
    """Negative evidence lower bound in nats of an image of so many splats: a Gaussian decoder with the best variance
    for each group costs N n / 2 ln(2 pi e mse) for a group of n columns; ``nats`` is the KL divergence.

    ``mse_by_group``: of columns decoded from draws. -inf for a group without error, as its density is then infinite;
    NaN where anything is NaN. A density of normalised columns: no comparison of one target with another.
    """
    cost = 0.0
    for name, width in group_widths(kind).items():
        mse = mse_by_group[name]
        cost += splats * width / 2 * (math.log(2 * math.pi * math.e * mse) if mse != 0 else -math.inf)
    return cost + nats


def half_turn_apart(left: Tensor, right: Tensor) -> Tensor:
    """``left - right`` of angles modulo pi, in [-pi/2, pi/2)."""
    return (left - right + math.pi / 2).remainder(math.pi) - math.pi / 2


class GroupFigures:
    """Figures by group over a split, of raw splats compared in the form of :func:`longer_first`.

    - ``xy_fvu``, ``scale_fvu``, ``rot_fvu``, ``feat_fvu``: the fraction of variance unexplained, 1 - R²: the squared
      error over that of ``mean``. With ``_position``, over that of ``position_mean``.
    - ``xy_std_ratio``, …: the root of the decoded splats' variance over the true ones', each about its own mean.
      Variances are summed over the group's columns; that of rotations is 1 - |⟨exp(2iθ)⟩|.
    - ``rot_error``: mean absolute angular error modulo a half turn, degrees: 0 to 90, 45 by guessing.

    Whatever is of rotations is modulo pi and weighted by the true splat's anisotropy (long - short) / (long + short),
    as the angle of a round splat is none. Undefined figures are NaN, never infinite: where true values do not vary,
    where no true splat is longer than wide (rotations), and where there were no splats. Outputs that are NaN give NaN;
    only infinite outputs give an infinite figure.
    """

    def __init__(self, kind: str, mean: Tensor, position_mean: Tensor) -> None:
        """``kind``: the target of the columns. ``mean`` (8,), ``position_mean`` (N, 8): of the training split's raw
        splats, longer axis first, the angle in [0, pi)."""
        self.kind = kind
        self.mean, self.position_mean = mean.double(), position_mean.double()
        sizes = {f"square/{name}": COLUMNS for name in ("error", "position", "true", "decoded")}
        sizes |= {"sum/true": COLUMNS, "sum/decoded": COLUMNS, "turn/true": 2, "turn/decoded": 2}
        sizes |= {"magnitude": COLUMNS, "apart": 1}
        sizes |= {name: len(TARGETS[kind].columns) for name in ("columns", "sampled")}
        self.sums = {name: self.mean.new_zeros(size) for name, size in sizes.items()}
        self.on_cpu: dict[str, Tensor] = {}
        self.splats = self.drawn = 0

    @torch.no_grad()
    def update(self, decoded: Tensor, true: Tensor, columns: Tensor, target: Tensor,
               sampled_columns: Tensor | None = None) -> None:
        """One batch: raw splats (B, N, 8), decoded and true; their normalised columns (B, N, C), and for a VAE the
        columns decoded from a draw."""
        decoded, true = longer_first(decoded.double()), longer_first(true.double())
        long, short = true[..., 2], true[..., 3]
        weight = (long - short) / (long + short)
        # Of a NaN scale no axis is the longer one, whatever angle came along.
        decoded[..., ANGLE] = torch.where(decoded[..., 2] >= decoded[..., 3], decoded[..., ANGLE], torch.nan)
        for name, left, right in (("error", decoded, true), ("position", self.position_mean, true),
                                  ("true", self.mean, true), ("decoded", self.mean, decoded)):
            difference = left - right
            apart = half_turn_apart(left[..., ANGLE], right[..., ANGLE])
            squares = difference.square().sum((0, 1))
            squares[ANGLE] = (weight * apart.square()).sum()
            self._add(f"square/{name}", squares)
            if name == "error":
                self._add("apart", (weight * apart.abs()).sum())
            elif name != "position":
                doubled = 2 * right[..., ANGLE]
                self._add(f"sum/{name}", difference.sum((0, 1)))
                self._add(f"turn/{name}", torch.stack(((weight * doubled.cos()).sum(), (weight * doubled.sin()).sum())))
        magnitude = true.square().sum((0, 1))
        magnitude[ANGLE] = weight.sum()              # what squared angles are weighted with
        self._add("magnitude", magnitude)
        self._add("columns", (columns.double() - target.double()).square().sum((0, 1)))
        self.splats += weight.numel()
        if sampled_columns is not None:
            self._add("sampled", (sampled_columns.double() - target.double()).square().sum((0, 1)))
            self.drawn += weight.numel()

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value
        self.on_cpu = {}

    def _values(self) -> dict[str, Tensor]:
        """The sums on the CPU; transfers once after the last update."""
        if not self.on_cpu:
            sizes = [value.numel() for value in self.sums.values()]
            self.on_cpu = dict(zip(self.sums, torch.cat(list(self.sums.values())).cpu().split(sizes), strict=True))
        return self.on_cpu

    def compute(self) -> dict[str, float]:
        """The figures by name, without the split's."""
        values = self._values()
        weight, figures = values["magnitude"][ANGLE], {}
        for suffix, reference in (("", "true"), ("_position", "position")):
            spread = values[f"square/{reference}"]
            spread = torch.where(spread <= ROUNDING * values["magnitude"], 0.0, spread)
            for name, part in PARTS.items():
                figures[f"{name}_fvu{suffix}"] = _ratio(values["square/error"][part].sum(), spread[part].sum())
        decoded, true = self._variances("decoded"), self._variances("true")
        figures |= {f"{name}_std_ratio": math.sqrt(_ratio(decoded[name], true[name])) for name in PARTS}
        figures["rot_error"] = math.degrees(_ratio(values["apart"], weight))
        return figures

    def _variances(self, who: str) -> dict[str, Tensor]:
        """By group, the variances of its columns about their own means, summed; of rotations the circular one."""
        values = self._values()
        square, mean = values[f"square/{who}"] / self.splats, values[f"sum/{who}"] / self.splats     # about self.mean
        variance = square - mean.square()
        variance = torch.where(variance <= ROUNDING * square, 0.0, variance)
        spread = 1 - values[f"turn/{who}"].norm() / values["magnitude"][ANGLE]
        variance[ANGLE] = torch.where(spread <= ROUNDING, 0.0, spread)
        return {name: variance[part].sum() for name, part in PARTS.items()}

    @property
    def column_mse(self) -> dict[str, float]:
        """By group of the target, the mean squared error of the normalised columns over all of the group's numbers."""
        return self._column_mse("columns", self.splats)

    @property
    def column_mse_sampled(self) -> dict[str, float]:
        """The same of columns decoded from draws; NaN where there were none."""
        return self._column_mse("sampled", self.drawn)

    def _column_mse(self, name: str, splats: int) -> dict[str, float]:
        means = self._values()[name] / splats
        return {group: means[part].mean().item() for group, part in TARGETS[self.kind].groups.items()}


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole > 0 else math.nan
