"""What a latent of some size can reach without learning: principal components of any data as rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autoenc.evaluation.baselines import principal_components


@dataclass(frozen=True)
class Pca:
    """Principal components of a training split's rows."""

    mean: Tensor
    """(D,)"""
    components: Tensor
    """(k, D), orthonormal rows, the most telling first"""

    def project(self, rows: Tensor, dimensions: int | None = None) -> Tensor:
        """Rows (m, D) through the first so many components (default: all) and back."""
        basis = self.components[:dimensions]
        return self.mean + ((rows - self.mean) @ basis.T) @ basis


class Reach(NamedTuple):
    """Shares of the squared deviation from the training rows' mean that a projection keeps: 1 is everything."""

    train: float
    val: float
    """R² on held-out rows"""


@torch.inference_mode()
def fit_pca(train: Tensor, dimensions: int) -> Pca:
    """The PCA of rows (n, D), n >= 2; fewer components than ``dimensions`` where n - 1 or D is less.

    See :func:`principal_components`: for 2,000 rows of 4,096 numbers and 512 dimensions it is the randomised method,
    which never forms a matrix of D by D.
    """
    mean = train.mean(0)
    return Pca(mean, principal_components(train - mean, dimensions))


@torch.inference_mode()
def pca_reach(train: Tensor, val: Tensor, dimensions: Sequence[int]) -> dict[int, Reach]:
    """What a PCA fitted to rows (n, D) keeps of them and of held-out rows (m, D), by number of dimensions.

    Fitted once, for the most dimensions. Splats go in as their normalised columns, flattened (n, N C). NaN where the
    rows do not vary.
    """
    pca = fit_pca(train, max(dimensions))
    parts = [_kept(pca, rows) for rows in (train, val)]
    return {k: Reach(*(float(kept[:k].sum() / total) for kept, total in parts)) for k in dimensions}


def _kept(pca: Pca, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared deviation along each component, float64 (k,), and in all."""
    centred = rows - pca.mean
    return (centred @ pca.components.T).double().square().sum(0), centred.double().square().sum()
