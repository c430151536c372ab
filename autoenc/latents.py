"""Statistics of a model's latents: one pass over images, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoenc.metrics import to_inputs
from autoenc.model import Autoencoder, by_channel


@dataclass(frozen=True)
class LatentStatistics:
    """Of latents (N, C, h, w), or of vectors (N, C), per channel over all images and positions; float64 tensors on the
    CPU.

    Population statistics: divided by ``count``, not by one less. NaN where undefined (the shape of a constant channel,
    errors over one image).
    """

    mean: Tensor
    """(C,)"""
    std: Tensor
    """(C,)"""
    skewness: Tensor
    """(C,); 0 for a normal distribution"""
    kurtosis: Tensor
    """(C,); the excess: 0 for a normal distribution"""
    covariance: Tensor
    """(C, C)"""
    mean_error: Tensor
    """(C,); standard error of the mean over images, as positions within one image depend on each other"""
    std_error: Tensor
    """(C,); the same of the standard deviation"""
    count: int
    """N * h * w"""
    images: int
    """N"""

    @property
    def correlation(self) -> Tensor:
        """(C, C); NaN in the rows and columns of constant channels."""
        return self.covariance / torch.outer(self.std, self.std)


@torch.inference_mode()
def latent_statistics(model: Autoencoder, inputs: np.ndarray, batch_size: int = 64,
                      device: torch.device | str | None = None, *,
                      indices: np.ndarray | None = None) -> LatentStatistics:
    """Statistics of what ``model.encode(…)["latent"]`` is for a data set's inputs, uint8 images (N, H, W, 3) or splats,
    or for those that ``indices`` names. ``device``: where the model is (default: asked of it).

    Where ``model.latent`` is sample nothing is drawn: the moments are those of the mixture of all posteriors, so that
    the variance is Var(mu) + E[sigma^2]. Raises ValueError for no images.
    """
    chosen = np.arange(len(inputs)) if indices is None else indices
    if not len(chosen):
        raise ValueError("no images to take latent statistics of")
    device = next(model.parameters()).device if device is None else torch.device(device)
    total, means, variances = None, [], []
    for start in range(0, len(chosen), batch_size):
        latent, noise = _posterior(model, to_inputs(inputs[chosen[start:start + batch_size]], device))
        part = _Moments.of(latent, noise)
        total = part if total is None else total.merged(part)
        means.append(latent.mean(2))
        variances.append(latent.var(2, correction=0) + noise.mean(2))
    return _statistics(total, torch.cat(means), torch.cat(variances))


def _posterior(model: Autoencoder, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each number of the latents, both (B, C, positions) float64."""
    # Any generator: the global one must not move, and a draw is not used.
    encoded = model.encode(inputs, torch.Generator(inputs.device))
    if model.config.model.latent != "sample" or "mu" not in encoded:
        latent = by_channel(encoded["latent"]).double()
        return latent, torch.zeros_like(latent)
    normalizer = model.encoder.latent_normalizer
    variance = encoded["logvar"].double().exp()
    if normalizer is not None:
        variance = variance * torch.exp(-2 * normalizer.log_scale.double())
    return by_channel(model.mean_latent(encoded)).double(), by_channel(variance)


def _statistics(total: _Moments, means: Tensor, variances: Tensor) -> LatentStatistics:
    """From the moments of all, and each image's own means and variances, both (N, C)."""
    count, images = total.count, len(means)
    variance = total.second.diagonal() / count
    # Each image's mean squared distance from the mean of all: their average is the variance, and to first order
    # the spread of them is that of the variance (the delta method; that of its root is divided by twice the root).
    squares = variances + (means - total.mean).square()
    error = [part.std(0) / math.sqrt(images) if images > 1 else torch.full_like(variance, torch.nan)
             for part in (means, squares)]
    return LatentStatistics(**{name: value.cpu() for name, value in {
        "mean": total.mean, "std": variance.sqrt(), "covariance": total.second / count,
        "skewness": total.third / count / variance ** 1.5, "kurtosis": total.fourth / count / variance ** 2 - 3,
        "mean_error": error[0], "std_error": error[1] / (2 * variance.sqrt())}.items()}, count=count, images=images)


@dataclass(frozen=True)
class _Moments:
    """Sums of the powers of distances from the mean: ``second`` (C, C) with products across channels, else (C,)."""

    count: int
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    @staticmethod
    def of(latent: Tensor, noise: Tensor) -> _Moments:
        """Of latents (B, C, positions) to each of which independent normal noise of a variance (as large) is added:
        with E e^2 = s, E e^4 = 3 s^2 and odd moments 0, the powers of (x + e) expand to those below."""
        x, s = latent.transpose(0, 1).flatten(1), noise.transpose(0, 1).flatten(1)
        mean = x.mean(1)
        x = x - mean[:, None]
        square = x * x
        return _Moments(x.shape[1], mean, x @ x.T + torch.diag(s.sum(1)), (x * (square + 3 * s)).sum(1),
                        (square * (square + 6 * s) + 3 * s * s).sum(1))

    def merged(self, other: _Moments) -> _Moments:
        """Of both together: Chan, Golub and LeVeque 1979 for mean and covariance; Pebay 2008 (SAND2008-6212),
        equations 1.4 and 1.5, for the third and fourth power."""
        a, b = self.count, other.count
        n, delta = a + b, other.mean - self.mean
        mine, theirs = self.second.diagonal(), other.second.diagonal()
        return _Moments(
            n, self.mean + delta * (b / n),
            self.second + other.second + torch.outer(delta, delta) * (a * b / n),
            self.third + other.third + delta**3 * (a * b * (a - b) / n**2) + 3 * delta * (a * theirs - b * mine) / n,
            self.fourth + other.fourth + delta**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * delta**2 * (a * a * theirs + b * b * mine) / n**2
            + 4 * delta * (a * other.third - b * self.third) / n)
