"""The loss terms and their weighted sum.

A term is a pure function of the model's outputs and the batch (``images`` (B, 3, H, W), ``segmentation``
(B, H, W) int64, ``labels`` (B,) int64) and returns the raw, unweighted scalar. An output or a batch part that
a term needs and does not find raises KeyError: a term never silently counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from autoenc.data import IGNORED

NO_LABEL = -1

Tensors = Mapping[str, Tensor]


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


def kl(outputs: Tensors, batch: Tensors) -> Tensor:
    """KL divergence from the standard normal in nats, mean over latent dimensions and batch."""
    return _divergence(outputs).mean()


def kl_nats(outputs: Tensors) -> Tensor:
    """KL divergence from the standard normal in nats, summed over dimensions, mean over the batch."""
    return _divergence(outputs).flatten(1).sum(1).mean()


def standardization(outputs: Tensors, batch: Tensors) -> Tensor:
    """How far latents are from mean 0 and standard deviation 1: per channel of ``raw_latent`` (B, C, h, w), over batch
    and positions, the squared mean plus the squared difference of the deviation from 1; mean over the channels."""
    deviation, mean = torch.var_mean(outputs["raw_latent"].float(), dim=(0, 2, 3), correction=0)
    # The root's gradient at 0, a dead channel, is infinite: below the bound it is 0.
    return (mean.square() + (deviation.clamp(min=1e-12).sqrt() - 1).square()).mean()


LOSSES: dict[str, Callable[[Tensors, Tensors], Tensor]] = {
    "mse": mse, "l1": l1, "segmentation": segmentation, "classification": classification, "kl": kl,
    "standardization": standardization}


def weighted_sum(terms: Tensors, weights: Mapping[str, float]) -> Tensor:
    """The sum of weight times term. Raises KeyError for a weight without its term."""
    return torch.stack([terms[name] * weight for name, weight in weights.items()]).sum()
