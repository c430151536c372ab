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
from autoenc.groups import group_errors, group_log_sigmas, group_widths, splat_likelihood, splat_nelbo
from autoenc.losses import NO_LABEL, Tensors, gaussian, kl, kl_nats, log_sigma, losses_of
from autoenc.model import Autoencoder, by_channel, derived_seed
from autoenc.settings import SPLAT_COLUMNS

TERM_FIGURES = {"segmentation": "segmentation_ce", "classification": "classification_ce"}   # others: same name
ACTIVE_VARIANCE = 0.01
DRAWN = "column_mse_sampled/"
COLUMNS = ("column_mse/", DRAWN)     # means that other figures are made of: of splats' columns, by group


def to_unit(images: np.ndarray | Tensor, device: torch.device | str = "cpu", channels_last: bool = False) -> Tensor:
    """uint8 images (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1] on a device."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = tensor.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return tensor.to(torch.float32, memory_format=layout).div_(127.5).sub_(1.0)


def to_inputs(values: np.ndarray | Tensor, device: torch.device | str = "cpu", channels_last: bool = False) -> Tensor:
    """What a model encodes, of a data set's ``inputs``: uint8 images as :func:`to_unit`, float32 splats as they are."""
    if values.dtype in (np.uint8, torch.uint8):
        return to_unit(values, device, channels_last)
    return torch.as_tensor(values).to(device, non_blocking=True)


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
    if mse_sampled == 0:
        return -math.inf
    return elements / 2 * math.log(2 * math.pi * math.e * mse_sampled) + nats


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
                count = len(next(iter(batch.values())))
            self.add(name, term, count)

    def add_posterior(self, encoded: Tensors, batch: Tensors, config: Config) -> None:
        """A VAE's KL divergence over a batch, in the configured reduction (``kl_free``: with free bits, as it was
        minimised) and in nats."""
        count, reduction, free_bits = len(encoded["mu"]), config.kl_reduction, config.loss.free_bits
        elements = config.elements if config.takes_splats else None
        self.add("kl", kl(encoded, batch, reduction, elements=elements), count)
        self.add("kl_nats", kl_nats(encoded), count)
        if free_bits:
            self.add("kl_free", kl(encoded, batch, reduction, free_bits, elements), count)

    def add_groups(self, name: str, columns: Tensor, target: Tensor, kind: str) -> None:
        """The mean squared error of each group of splats' columns (B, N, C), as ``name`` and the group's."""
        for group, error in group_errors(columns, target, kind).items():
            self.add(f"{name}{group}", error / group_widths(kind)[group], len(columns))

    def values(self) -> dict[str, float]:
        """The means; NaN for one of nothing. Transfers once."""
        sums = torch.stack(list(self.sums.values()))
        counts = torch.stack([count.to(sums.device) for count in self.counts.values()])
        return dict(zip(self.sums, torch.where(counts > 0, sums / counts, torch.nan).tolist(), strict=True))


def loss_figures(means: Mapping[str, float], weights: Mapping[str, float], elements: int,
                 splats: str | None = None) -> dict[str, float]:
    """The figures of a split from its mean raw terms: ``loss`` (their weighted sum, a term of nothing being 0, the KL
    with its free bits), the terms under their figures' names, ``psnr``, and with ``mse_sampled`` and ``kl_nats`` also
    ``nelbo``. An optimal variance is that of the split: its ``log_sigma``, and its likelihood in the loss.

    ``elements``: numbers in an image. ``splats``: of a model of splats its ``model.splat_target``; a likelihood then is
    over their columns, with a variance for each group."""
    found = {name: value for name, value in means.items() if name != "kl_free" and not name.startswith(COLUMNS)}
    terms = dict(found)
    if "kl_free" in means:
        terms["kl"] = means["kl_free"]
    if "optimal_variance" in weights:
        terms["optimal_variance"], found["log_sigma"] = _likelihood(means, splats)
    loss = sum(weight * terms[name] for name, weight in weights.items()
               if name not in TERM_FIGURES or not math.isnan(terms[name]))
    figures = {"loss": loss, **{TERM_FIGURES.get(name, name): value for name, value in found.items()}}
    if "mse" in means:
        figures["psnr"] = psnr(means["mse"])
    if "kl_nats" in means and splats is not None:
        drawn = _of_groups(means, DRAWN) or _of_groups(means, COLUMNS[0])        # while training all are draws
        figures["nelbo"] = splat_nelbo(drawn, means["kl_nats"], elements // SPLAT_COLUMNS[splats], splats)
    elif "mse_sampled" in means:
        figures["nelbo"] = nelbo(means["mse_sampled"], means["kl_nats"], elements)
    return figures


def _of_groups(means: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}


def _likelihood(means: Mapping[str, float], splats: str | None) -> tuple[float, float]:
    """The optimal-variance likelihood in nats a number and the log of its deviation; of splats over all groups, each
    with its own, the deviation's log as their mean over the numbers."""
    if splats is None:
        error = torch.tensor(means["mse"], dtype=torch.float64)
        return gaussian(error).item(), log_sigma(error).item()
    errors = _of_groups(means, COLUMNS[0])
    sigmas = group_log_sigmas(errors)
    shares = {group: width / SPLAT_COLUMNS[splats] for group, width in group_widths(splats).items()}
    return splat_likelihood(errors, splats), sum(share * sigmas[group] for group, share in shares.items())


def measured_terms(config: Config) -> list[str]:
    """The loss terms that are measured of a model's outputs, whatever their weights."""
    own = [term.name for term in config.loss.custom if term.weight]
    splats = ["splats"] if config.takes_splats else []
    return ["mse", "l1", *splats, *(head for head in config.heads if head != "rgb"), *own]


class SplitFigures:
    """Everything measured in one pass over a split. ``palette`` is uint8 (K, 3), or None for data without one."""

    def __init__(self, model: Autoencoder, palette: np.ndarray | None) -> None:
        self.model = model
        self.losses = losses_of(model.config)
        self.terms = measured_terms(model.config)
        self.means = Means()
        self.groups = model.group_figures() if model.config.takes_splats else None
        self.palette = None if palette is None else palette_colours(palette, next(model.parameters()).device)
        self.confusion: dict[str, Tensor] = {}
        self.latents = 0
        self.latent_sum: Tensor | float = 0.0
        self.latent_square: Tensor | float = 0.0
        self.channel_sum: Tensor | float = 0.0
        self.channel_square: Tensor | float = 0.0

    def update(self, batch: Tensors, encoded: Tensors, outputs: Tensors, sampled: Tensors | None = None) -> None:
        """One batch: what ``encode`` gave, what decoding (the posterior's mean for a VAE) gave, and for a VAE what was
        decoded from a draw."""
        images, count = batch["images"], len(batch["images"])
        if self.groups is not None and "columns" in outputs:
            outputs = {**outputs, "target": self.model.columns(batch["splats"])}
            self.groups.update(outputs["splats"], batch["splats"], outputs["columns"], outputs["target"],
                               None if sampled is None else sampled["columns"])
        found = {**encoded, **outputs}
        self.means.add_terms({name: self.losses[name](found, batch) for name in self.terms}, batch)
        self.means.add("ssim", ssim(outputs["rgb"], images).mean(), count)
        if sampled is not None:
            self.means.add_posterior(encoded, batch, self.model.config)
            self.means.add("mse_sampled", functional.mse_loss(sampled["rgb"], images), count)
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
        raw = by_channel(raw)
        self.channel_sum = self.channel_sum + raw.mean(2).sum(0)
        self.channel_square = self.channel_square + raw.square().mean(2).sum(0)
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
        config, groups = self.model.config, self.groups
        if groups is not None and groups.splats:
            means |= {COLUMNS[0] + name: error for name, error in groups.column_mse.items()}
            means |= {DRAWN + name: error for name, error in groups.column_mse_sampled.items() if groups.drawn}
        figures = loss_figures(means, weights, elements, config.model.splat_target if config.takes_splats else None)
        if groups is not None and groups.splats:
            figures |= groups.compute()
        figures["latent/std"] = math.sqrt(max(square - means["latent/mean"] ** 2, 0.0))
        return figures


@torch.inference_mode()
def smoothness(model: Autoencoder, inputs: np.ndarray, *, indices: np.ndarray | None = None, pairs: int = 64,
               points: int = 11, seed: int = 42) -> float:
    """How directly decoding follows the straight line between two latents: the mean over seeded pairs of images of
    path over endpoint distance (1: straight; both Euclidean, between decoded rgb images ``points`` apart on the line).

    ``inputs``: of a data set, uint8 images (N, H, W, 3) or splats, of which ``indices`` (default: all) may be drawn.
    Pairs whose decoded ends are identical are left out; NaN if none is left.
    """
    chosen = np.arange(len(inputs)) if indices is None else indices
    if len(chosen) < 2:
        return math.nan
    device = next(model.parameters()).device
    rng = np.random.default_rng(derived_seed(seed, "smoothness"))
    generator = torch.Generator(device).manual_seed(derived_seed(seed, "smoothness"))
    steps = torch.linspace(0, 1, points, device=device)
    ratios = []
    for _ in range(pairs):
        ends = chosen[rng.choice(len(chosen), size=2, replace=False)]
        first, last = model.encode(to_inputs(inputs[ends], device), generator)["latent"]
        between = first + steps.view(-1, *[1] * first.dim()) * (last - first)
        decoded = model.decode(between, heads=("rgb",))["rgb"].double().flatten(1)
        path = (decoded[1:] - decoded[:-1]).norm(dim=1).sum()
        ratios.append(path / (decoded[-1] - decoded[0]).norm())       # 0/0 and x/0 for identical ends
    ratio = torch.stack(ratios)
    return ratio[ratio.isfinite()].mean().item()
