"""The loss terms and their weighted sum.

A term is a pure function of the model's outputs and the batch (``images`` (B, 3, H, W), ``splats`` (B, N, 8),
``segmentation`` (B, H, W) int64, ``labels`` (B,) int64) and returns the raw, unweighted scalar. An output or a batch
part that a term needs and does not find raises KeyError: a term never silently counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autoenc.config import Config
from autoenc.data import IGNORED
from autoenc.groups import group_likelihood, group_loss

NO_LABEL = -1
LOG_SIGMA = -6.0                 # smallest log standard deviation of an optimal-variance decoder

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]


def mse(outputs: Tensors, batch: Tensors) -> Tensor:
    """Mean squared error over all elements."""
    return functional.mse_loss(outputs["rgb"], batch["images"])


def l1(outputs: Tensors, batch: Tensors) -> Tensor:
    """Mean absolute error over all elements."""
    return functional.l1_loss(outputs["rgb"], batch["images"])


def _cross_entropy(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    # The library's mean divides by the number of valid targets: NaN where there is none.
    valid = (target != ignored).sum().clamp(min=1)
    return functional.cross_entropy(logits, target, ignore_index=ignored, reduction="sum") / valid


def segmentation(outputs: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy in nats, mean over the batch's valid pixels; 0 if it has none."""
    return _cross_entropy(outputs["segmentation"], batch["segmentation"], IGNORED)


def classification(outputs: Tensors, batch: Tensors) -> Tensor:
    """Cross-entropy in nats, mean over the batch's labelled images; 0 if it has none."""
    return _cross_entropy(outputs["classification"], batch["labels"], NO_LABEL)


def _divergence(outputs: Tensors) -> Tensor:
    # KL(N(mu, sigma^2) || N(0, 1)) per dimension: Kingma and Welling 2014, appendix B.
    mu, logvar = outputs["mu"], outputs["logvar"]
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def splats(outputs: Tensors, batch: Tensors, target: str = "raw", reduction: str = "sum") -> Tensor:
    """:func:`autoenc.groups.group_loss` of the columns that were decoded."""
    return group_loss(outputs["columns"], outputs["target"], target, reduction)


def kl(outputs: Tensors, batch: Tensors, reduction: str = "mean", free_bits: float = 0.0,
       elements: int | None = None) -> Tensor:
    """KL divergence from the standard normal in nats, mean over the batch.

    ``reduction``: ``mean`` over latent dimensions, or ``sum`` over them divided by D: ``elements``, by default the
    numbers of one of the batch's images. ``free_bits``: nats that each latent channel (a dimension, where the latent is
    a vector) has at no cost: of its KL, summed over positions and averaged over the batch, the maximum with them is
    taken (Kingma et al. 2016, https://arxiv.org/abs/1606.04934, appendix "objective with free bits", with feature maps
    as the groups).
    """
    each = _divergence(outputs)
    if reduction == "mean" and not free_bits:
        return each.mean()
    nats = each.reshape(*each.shape[:2], -1).sum(2).mean(0)          # of each channel
    if free_bits:
        nats = nats.clamp(min=free_bits)
    return nats.sum() / (each[0].numel() if reduction == "mean" else elements or batch["images"][0].numel())


def kl_nats(outputs: Tensors) -> Tensor:
    """KL divergence from the standard normal in nats, summed over dimensions, mean over the batch."""
    return _divergence(outputs).flatten(1).sum(1).mean()


def log_sigma(error: Tensor) -> Tensor:
    """The log standard deviation at which a Gaussian likelihood with this mean squared error is greatest, at least -6.

    Rybkin et al. 2021, sigma-VAE, https://arxiv.org/abs/2006.13202. The bound is that of the authors' code, which makes
    it soft; a hard one leaves the optimum as it is wherever the error is larger.
    """
    return 0.5 * error.clamp(min=math.exp(2 * LOG_SIGMA)).log()


def gaussian(error: Tensor) -> Tensor:
    """Negative log-likelihood in nats per number of an image, up to 1/2 ln(2 pi), of a mean squared error under a
    Gaussian with its optimal variance s^2: (ln s^2 + error / s^2) / 2.

    That is D/2 (ln s^2 + error / s^2) an image over its D numbers, which makes it of the other terms' size. No need to
    detach s^2: at its optimum the likelihood has no gradient in it.
    """
    sigma = log_sigma(error)
    return sigma + 0.5 * error * torch.exp(-2 * sigma)


def optimal_variance(outputs: Tensors, batch: Tensors) -> Tensor:
    """:func:`gaussian` of the batch's mean squared error: one variance for all of it."""
    return gaussian(mse(outputs, batch))


def splats_likelihood(outputs: Tensors, batch: Tensors, target: str = "raw") -> Tensor:
    """:func:`autoenc.groups.group_likelihood` of the columns that were decoded: one variance for each group."""
    return group_likelihood(outputs["columns"], outputs["target"], target)


def standardization(outputs: Tensors, batch: Tensors) -> Tensor:
    """How far latents are from mean 0 and standard deviation 1: per channel of ``raw_latent`` (B, C, h, w) or (B, D),
    over batch and positions, the squared mean plus the squared difference of the deviation from 1; mean over the
    channels."""
    raw = outputs["raw_latent"].float()
    deviation, mean = torch.var_mean(raw, dim=(0, *range(2, raw.dim())), correction=0)
    # The root's gradient at 0, a dead channel, is infinite: below the bound it is 0.
    return (mean.square() + (deviation.clamp(min=1e-12).sqrt() - 1).square()).mean()


LOSSES: dict[str, Loss] = {
    "mse": mse, "l1": l1, "splats": splats, "segmentation": segmentation, "classification": classification, "kl": kl,
    "standardization": standardization, "optimal_variance": optimal_variance}


def losses_of(config: Config) -> dict[str, Loss]:
    """All terms as the configuration shapes them: what training minimises."""
    target = config.model.splat_target
    shaped = {"kl": partial(kl, reduction=config.kl_reduction, free_bits=config.loss.free_bits,
                            elements=config.elements if config.takes_splats else None),
              "splats": partial(splats, target=target, reduction=config.loss.group_reduction)}
    if config.takes_splats:
        shaped["optimal_variance"] = partial(splats_likelihood, target=target)
    if config.loss.custom:
        from autoenc.custom import load_terms

        shaped |= load_terms(config)
    return LOSSES | shaped


def weighted_sum(terms: Tensors, weights: Mapping[str, float]) -> Tensor:
    """The sum of weight times term. Raises KeyError for a weight without its term."""
    return torch.stack([terms[name] * weight for name, weight in weights.items()]).sum()
