"""All figures of a model on one split, in one pass over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoenc.batches import Batches
from autoenc.config import Config
from autoenc.data import Dataset
from autoenc.latents import LatentStatistics
from autoenc.metrics import SplitFigures, class_iou, to_inputs
from autoenc.model import Autoencoder, derived_seed, draw
from autoenc.settings import HEADS
from autoenc.train import EVALUATION_BATCH

Figures = dict[str, Any]


@dataclass(frozen=True)
class SplitResult:
    figures: Figures
    shuffled: Figures
    """the same with every image against what was decoded from another one's latent; empty for fewer than two images"""
    errors: np.ndarray
    """float64 (N,): each image's mean squared error"""


def usable_heads(config: Config, dataset: Dataset) -> list[str]:
    """The model's heads whose figures this data can tell."""
    missing = {"segmentation": dataset.segmentation is None, "classification": dataset.labels is None}
    return [head for head in config.heads if not missing.get(head)]


def batches_of(dataset: Dataset, split: str, device: torch.device) -> Batches:
    return Batches(dataset, dataset.splits[split], device, segmentation=True, labels=True)


def batch_size(config: Config) -> int:
    """Images in a batch without gradients, as in validation."""
    return EVALUATION_BATCH * config.train.batch_size


@torch.inference_mode()
def measure_split(model: Autoencoder, dataset: Dataset, split: str, config: Config) -> SplitResult:
    """Measure in float32. A VAE decodes its posterior's mean; ``mse_sampled`` and what follows from it are of seeded
    draws."""
    device = next(model.parameters()).device
    batches, heads = batches_of(dataset, split, device), usable_heads(config, dataset)
    own, shuffled = (_accumulator(model, dataset, heads) for _ in range(2))
    noise = torch.Generator(device).manual_seed(derived_seed(config.train.seed, "evaluation noise", split))
    other, errors = _others(len(batches)), []
    for positions in np.split(np.arange(len(batches)), range(batch_size(config), len(batches), batch_size(config))):
        batch = batches.take(positions)
        encoded = model.encode(batch[model.takes], noise)
        outputs = model.decode(model.mean_latent(encoded), model.measured_outputs or heads)
        sampled = None
        if "logvar" in encoded:
            drawn = draw(encoded["mu"], encoded["logvar"], noise)
            sampled = model.decode(model.normalize(drawn), heads=model.drawn_outputs)
        own.update(batch, encoded, outputs, sampled)
        errors.append((outputs["rgb"] - batch["images"]).double().square().mean((1, 2, 3)))
        if len(batches) > 1:
            shuffled.update(batches.take(other[positions]), encoded, outputs)
    found = figures_of(own, config, dataset)
    return SplitResult(found | ({"beta": config.loss.kl} if config.model.variational else {}),
                       of_outputs(figures_of(shuffled, config, dataset)) if len(batches) > 1 else {},
                       torch.cat(errors).cpu().numpy())


def _accumulator(model: Autoencoder, dataset: Dataset, heads: list[str]) -> SplitFigures:
    accumulator = SplitFigures(model, dataset.palette if dataset.segmentation is not None else None)
    accumulator.terms = [term for term in accumulator.terms if term not in HEADS or term in heads]
    return accumulator


def _others(count: int) -> np.ndarray:
    """For each position another one, each taken once: a seeded order, every one takes the next."""
    order = np.random.default_rng(derived_seed(0, "shuffled latents")).permutation(count)
    other = np.empty(count, dtype=np.int64)
    other[order] = np.roll(order, -1)
    return other


def figures_of(measured: SplitFigures, config: Config, dataset: Dataset) -> Figures:
    """The figures by name, and each class's IoU by its name. ``loss`` only where the data has all its terms."""
    weights, terms = config.loss_weights, {*measured.means.sums, "standardization"}
    if measured.groups is None or measured.groups.splats:        # a baseline of splats has images alone
        terms.add("optimal_variance")
    known = {name: weight for name, weight in weights.items() if name in terms}
    found: Figures = measured.compute(known, config.elements)
    if known.keys() != weights.keys():
        del found["loss"]
    for name, confusion in measured.confusion.items():
        found[f"{name}_iou"] = dict(zip(dataset.classes, class_iou(confusion).tolist(), strict=True))
    return found


def of_outputs(found: Figures) -> Figures:
    """The figures that compare outputs with images; not those of latents, nor the loss, which is partly of them."""
    return {name: value for name, value in found.items()
            if name.startswith(("mse", "l1", "psnr", "ssim", "palette", "segmentation", "classification", "splats",
                                "xy_", "scale_", "rot_", "feat_")) and name != "mse_sampled"}


def latent_figures(found: LatentStatistics) -> Figures:
    """Latent statistics as plain lists, a number a channel."""
    names = ("mean", "std", "skewness", "kurtosis", "mean_error", "std_error", "covariance", "correlation")
    off = found.correlation.abs().fill_diagonal_(0)
    largest = off[off.isfinite()].max().item() if len(off) > 1 and off.isfinite().any() else math.nan
    return {**{name: getattr(found, name).tolist() for name in names}, "largest_correlation": largest,
            "count": found.count, "images": found.images}


def latent_shape(model: Autoencoder, dataset: Dataset) -> tuple[int, ...]:
    """(C, h, w) of the latents of this data, or (D,)."""
    probe = to_inputs(dataset.inputs[:1].copy(), next(model.parameters()).device)
    with torch.inference_mode():
        latent: Tensor = model.mean_latent(model.encode(probe, torch.Generator(probe.device)))
    return tuple(latent.shape[1:])


def shape_in_words(latent: Sequence[int]) -> str:
    """A latent's shape [C, h, w] or [D], as people write it: height, width, channels; or the length."""
    channels, *sides = latent
    return "×".join(map(str, (*sides, channels)))
