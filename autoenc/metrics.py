"""Figures of a model on one split: pure functions, and accumulators for one pass over it.

Accumulators add up on the device in float64 and transfer once, at the end. A figure that is undefined (no valid
pixel, no label) is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoenc.config import Config
from autoenc.data import IGNORED
from autoenc.losses import LOSSES, NO_LABEL, Tensors, gaussian, kl, kl_nats, log_sigma
from autoenc.model import Autoencoder, derived_seed

TERM_FIGURES = {"segmentation": "segmentation_ce", "classification": "classification_ce"}   # others: same name
ACTIVE_VARIANCE = 0.01


def to_unit(images: np.ndarray | Tensor, device: torch.device | str = "cpu", channels_last: bool = False) -> Tensor:
    """uint8 images (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1] on a device."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = tensor.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return tensor.to(torch.float32, memory_format=layout).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3), rounded."""
    scaled = images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def palette_colours(palette: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A uint8 palette (K, 3) as float32 in [-1, 1]."""
    return torch.tensor(palette, dtype=torch.float32, device=device) / 127.5 - 1


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [-1, 1]: 10 log10(2**2 / mse); inf for 0."""
    return 10 * math.log10(4 / mse) if mse > 0 else (math.inf if mse == 0 else math.nan)


def nelbo(mse_sampled: float, nats: float, elements: int) -> float:
    """Negative evidence lower bound in nats, up to the data's own quantisation: a Gaussian decoder with the best
    shared variance (Rybkin et al. 2021, sigma-VAE) costs D/2 ln(2 pi e mse), D = ``elements`` of an image."""
    return elements / 2 * math.log(2 * math.pi * math.e * mse_sampled) + nats if mse_sampled > 0 else -math.inf


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)     # kept beyond the caller's mode
def _blur(side: int, device: torch.device) -> Tensor:
    """(side, side): the 11-tap Gaussian with sigma 1.5 along one axis, borders reflected."""
    taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    padded = np.pad(np.arange(side), 5, mode="reflect")
    matrix = np.zeros((side, side))
    for offset, weight in enumerate(taps / taps.sum()):
        np.add.at(matrix, (np.arange(side), padded[offset:offset + side]), weight)
    return torch.tensor(matrix, dtype=torch.float32, device=device)


def ssim(left: Tensor, right: Tensor) -> Tensor:
    """Structural similarity of each pair, (B,), of images (B, C, H, W) in [-1, 1], mapped to [0, 1].

    Wang et al. 2004 with its constants (Gaussian window 11 pixels wide, sigma 1.5, K1 0.01, K2 0.03; data range 1),
    borders reflected as torchmetrics does. The window is applied as a matrix along each axis: exact in float32 where
    a GPU's convolutions round to TF32, and 10 times as fast on a CPU as the convolution.
    """
    left, right = (left + 1) / 2, (right + 1) / 2
    moments = torch.stack((left, right, left * left, right * right, left * right))
    rows, columns = (_blur(side, moments.device) for side in moments.shape[-2:])
    mean_l, mean_r, square_l, square_r, product = rows @ moments @ columns.T
    variances = (square_l - mean_l**2).clamp(min=0) + (square_r - mean_r**2).clamp(min=0)
    covariance = product - mean_l * mean_r
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_l * mean_r + c1) * (2 * covariance + c2)
                  / ((mean_l**2 + mean_r**2 + c1) * (variances + c2)))
    return similarity.flatten(1).mean(1)


def nearest_class(images: Tensor, palette: Tensor) -> Tensor:
    """The class (B, H, W) whose palette colour, of (K, 3), is nearest; both in [-1, 1]. Ties: the lower class."""
    pixels = images.permute(1, 0, 2, 3).reshape(3, -1)
    # |x - c|^2 without |x|^2, which is the same for every class.
    distance = torch.addmm(palette.square().sum(1, keepdim=True), palette, pixels, alpha=-2)
    return distance.min(0).indices.view(images.shape[0], *images.shape[2:])


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts, rows the target's classes, of two class maps of equal shape; ignored pixels left out."""
    cell = torch.where(target < classes, target.long() * classes + predicted, classes**2).flatten()
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:-1].view(classes, classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (K,) float64; NaN for a class that the target does not have."""
    confusion = confusion.double()
    hit, present = confusion.diagonal(), confusion.sum(1)
    return torch.where(present > 0, hit / (present + confusion.sum(0) - hit), torch.nan)


class Means:
    """Running means by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, mean: Tensor, count: int | Tensor) -> None:
        """A mean over ``count`` things more."""
        total, count = mean.detach().double() * count, torch.as_tensor(count, dtype=torch.float64)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def add_terms(self, terms: Tensors, batch: Tensors) -> None:
        """Raw loss terms, each over what it is a mean of: valid pixels, labelled images, or images."""
        for name, term in terms.items():
            if name == "segmentation":
                count: int | Tensor = (batch["segmentation"] != IGNORED).sum()
            elif name == "classification":
                count = (batch["labels"] != NO_LABEL).sum()
            else:
                count = len(batch["images"])
            self.add(name, term, count)

    def add_posterior(self, encoded: Tensors, batch: Tensors, mse_sampled: Tensor, config: Config) -> None:
        """A VAE's own figures over a batch: the KL divergence in the configured reduction (``kl_free``: with free bits,
        as it was minimised) and in nats, and the error of what was decoded from draws."""
        count, reduction, free_bits = len(encoded["mu"]), config.kl_reduction, config.loss.free_bits
        self.add("mse_sampled", mse_sampled, count)
        self.add("kl", kl(encoded, batch, reduction), count)
        self.add("kl_nats", kl_nats(encoded), count)
        if free_bits:
            self.add("kl_free", kl(encoded, batch, reduction, free_bits), count)

    def values(self) -> dict[str, float]:
        """The means; NaN for one of nothing. Transfers once."""
        sums = torch.stack(list(self.sums.values()))
        counts = torch.stack([count.to(sums.device) for count in self.counts.values()])
        return dict(zip(self.sums, torch.where(counts > 0, sums / counts, torch.nan).tolist(), strict=True))


def loss_figures(means: Mapping[str, float], weights: Mapping[str, float], elements: int) -> dict[str, float]:
    """The figures of a split from its mean raw terms: ``loss`` (their weighted sum, a term of nothing being 0, the KL
    with its free bits), the terms under their figures' names, ``psnr``, and with ``mse_sampled`` and ``kl_nats`` also
    ``nelbo``. An optimal variance is that of the split: its ``log_sigma``, and its likelihood in the loss."""
    found = {name: value for name, value in means.items() if name != "kl_free"}
    terms = dict(found)
    if "kl_free" in means:
        terms["kl"] = means["kl_free"]
    if "optimal_variance" in weights:
        error = torch.tensor(means["mse"], dtype=torch.float64)
        terms["optimal_variance"], found["log_sigma"] = gaussian(error).item(), log_sigma(error).item()
    loss = sum(weight * terms[name] for name, weight in weights.items()
               if name not in TERM_FIGURES or not math.isnan(terms[name]))
    figures = {"loss": loss, **{TERM_FIGURES.get(name, name): value for name, value in found.items()}}
    figures["psnr"] = psnr(means["mse"])
    if "mse_sampled" in means:
        figures["nelbo"] = nelbo(means["mse_sampled"], means["kl_nats"], elements)
    return figures


class SplitFigures:
    """Everything measured in one pass over a split. ``palette`` is uint8 (K, 3), or None for data without one."""

    def __init__(self, model: Autoencoder, palette: np.ndarray | None) -> None:
        self.model = model
        self.terms = ["mse", "l1", *(head for head in model.config.heads if head != "rgb")]
        self.means = Means()
        self.palette = None if palette is None else palette_colours(palette, next(model.parameters()).device)
        self.confusion: dict[str, Tensor] = {}
        self.latents = 0
        self.latent_sum: Tensor | float = 0.0
        self.latent_square: Tensor | float = 0.0
        self.channel_sum: Tensor | float = 0.0
        self.channel_square: Tensor | float = 0.0

    def update(self, batch: Tensors, encoded: Tensors, outputs: Tensors, sampled: Tensor | None = None) -> None:
        """One batch: what ``encode`` gave, what decoding (the posterior's mean for a VAE) gave, and for a VAE the
        images decoded from a draw."""
        images, count = batch["images"], len(batch["images"])
        self.means.add_terms({name: LOSSES[name](outputs, batch) for name in self.terms}, batch)
        self.means.add("ssim", ssim(outputs["rgb"], images).mean(), count)
        if sampled is not None:
            self.means.add_posterior(encoded, batch, functional.mse_loss(sampled, images), self.model.config)
        if self.palette is not None and "segmentation" in batch:
            self._compare("palette", nearest_class(outputs["rgb"], self.palette), batch["segmentation"])
        if "segmentation" in outputs:
            self._compare("segmentation", outputs["segmentation"].argmax(1), batch["segmentation"],
                          outputs["segmentation"].shape[1])
        if "classification" in outputs:
            labelled = batch["labels"] != NO_LABEL
            hits = (outputs["classification"].argmax(1) == batch["labels"]).sum()
            self.means.add("classification_accuracy", hits / labelled.sum().clamp(min=1), labelled.sum())
        self._add_latents(encoded)

    def _compare(self, name: str, predicted: Tensor, target: Tensor, classes: int | None = None) -> None:
        counts = confusion_matrix(predicted, target, classes or len(self.palette))
        self.confusion[name] = self.confusion[name] + counts if name in self.confusion else counts

    def _add_latents(self, encoded: Tensors) -> None:
        latent = encoded["latent"].double()
        raw = self.model.raw_latent(encoded).double()
        mean = encoded["mu"].double() if "mu" in encoded else raw
        self.means.add("latent/mean", latent.mean(), len(latent))
        self.means.add("latent/square", latent.square().mean(), len(latent))
        self.channel_sum = self.channel_sum + raw.mean((2, 3)).sum(0)
        self.channel_square = self.channel_square + raw.square().mean((2, 3)).sum(0)
        self.latents += len(mean)
        self.latent_sum = self.latent_sum + mean.sum(0)
        self.latent_square = self.latent_square + mean.square().sum(0)

    def compute(self, weights: Mapping[str, float], elements: int) -> dict[str, float]:
        """The figures by name, without the split's; ``latent/…`` among them. ``elements``: numbers in an image."""
        variance = self.latent_square / self.latents - (self.latent_sum / self.latents) ** 2
        self.means.add("latent/active_units", (variance > ACTIVE_VARIANCE).double().mean(), 1)
        mean, square = self.channel_sum / self.latents, self.channel_square / self.latents
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        self.means.add("standardization", (mean.square() + (deviation - 1).square()).mean(), 1)
        for name, confusion in self.confusion.items():
            ious = class_iou(confusion)
            self.means.add(f"{name}_miou", ious.nanmean(), 1)
            self.means.add(f"{name}_classes", ious.isfinite().sum(), 1)
            if name == "segmentation":
                self.means.add(f"{name}_accuracy", confusion.diagonal().sum() / confusion.sum(), 1)
        means = self.means.values()
        square = means.pop("latent/square")
        figures = loss_figures(means, weights, elements)
        figures["latent/std"] = math.sqrt(max(square - means["latent/mean"] ** 2, 0.0))
        return figures


@torch.inference_mode()
def smoothness(model: Autoencoder, images: np.ndarray, *, indices: np.ndarray | None = None, pairs: int = 64,
               points: int = 11, seed: int = 42) -> float:
    """How directly decoding follows the straight line between two latents: the mean over seeded pairs of images of
    path over endpoint distance (1: straight; both Euclidean, between decoded rgb images ``points`` apart on the line).

    ``images``: uint8 (N, H, W, 3), of which ``indices`` (default: all) may be drawn. Pairs whose decoded ends are
    identical are left out; NaN if none is left.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    if len(chosen) < 2:
        return math.nan
    device = next(model.parameters()).device
    rng = np.random.default_rng(derived_seed(seed, "smoothness"))
    generator = torch.Generator(device).manual_seed(derived_seed(seed, "smoothness"))
    steps = torch.linspace(0, 1, points, device=device)[:, None, None, None]
    ratios = []
    for _ in range(pairs):
        ends = chosen[rng.choice(len(chosen), size=2, replace=False)]
        first, last = model.encode(to_unit(images[ends], device), generator)["latent"]
        decoded = model.decode(first + steps * (last - first), heads=("rgb",))["rgb"].double().flatten(1)
        path = (decoded[1:] - decoded[:-1]).norm(dim=1).sum()
        ratios.append(path / (decoded[-1] - decoded[0]).norm())       # 0/0 and x/0 for identical ends
    ratio = torch.stack(ratios)
    return ratio[ratio.isfinite()].mean().item()
