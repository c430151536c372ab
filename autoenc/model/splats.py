"""Autoencoders of splats (B, N, 8) (see autoenc.data.splats), read as one sequence along their curve; the latent is a
vector (B, D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoenc.config import Config
from autoenc.data.splat_targets import TARGETS, fit_normalisation, longer_first
from autoenc.data.splats import COLUMNS, PARTS
from autoenc.groups import GroupFigures
from autoenc.model.base import LOGVAR_RANGE, Autoencoder, LatentNormalizer, made, normalisation
from autoenc.render import render
from autoenc.settings import SPLAT_ENTRY as ENTRY
from autoenc.settings import SPLAT_HIDDEN as HIDDEN
from autoenc.settings import SPLAT_KERNEL as KERNEL
from autoenc.settings import ModelConfig

if TYPE_CHECKING:
    from autoenc.data import Dataset

CHUNK = 256          # items of a data set at a time: 8 MiB as float64 with 512 splats each

Part = Callable[..., nn.Module]      # autoenc.model.base.made for one side of a model


def _convolution(inside: int, outside: int, norm: str) -> list[nn.Module]:
    return [nn.Conv1d(inside, outside, KERNEL, padding="same"), normalisation(outside, norm)]


def dropout(features: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """The features, each 0 with probability ``rate`` and else divided by 1 - rate. (torch's own takes no generator.)"""
    drawn = torch.rand(features.shape, generator=generator, device=features.device)
    return features * (drawn >= rate) / (1 - rate)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of kernel 1 where the channels change."""

    def __init__(self, inside: int, outside: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(inside, outside, norm), nn.ELU(), *_convolution(outside, outside, norm))
        self.shortcut = nn.Identity() if inside == outside else nn.Conv1d(inside, outside, 1)

    def forward(self, features: Tensor) -> Tensor:
        return functional.elu(self.body(features) + self.shortcut(features))


def _levels(part: Part, model: ModelConfig, channels: Sequence[int]) -> nn.ModuleList:
    """One level from each number of channels to the next; none changes the sequence's length."""
    def level(inside: int, outside: int) -> nn.Module:
        if model.kind == "resnet1d":
            return ResidualBlock(inside, outside, model.norm)
        return nn.Sequential(*_convolution(inside, outside, model.norm), nn.ReLU())

    return nn.ModuleList(part("level", str(index), make=partial(level, *pair))
                         for index, pair in enumerate(pairwise(channels)))


def _activation(model: ModelConfig) -> nn.Module:
    return nn.ELU() if model.kind == "resnet1d" else nn.ReLU()


def _dense(inside: int, model: ModelConfig) -> list[nn.Module]:
    return [nn.Linear(inside, HIDDEN), normalisation(HIDDEN, model.norm), _activation(model)]


class Columns(nn.Module):
    """Raw splats (…, N, 8) to normalised columns (…, N, C) of a target (see autoenc.data.splat_targets), and back."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = TARGETS[target]
        self.register_buffer("mean", torch.zeros(len(self.target.columns)))
        self.register_buffer("std", torch.ones(len(self.target.columns)))

    def forward(self, splats: Tensor) -> Tensor:
        return (self.target.encode(splats) - self.mean) / self.std

    def inverse(self, columns: Tensor) -> Tensor:
        return self.target.decode(columns * self.std + self.mean)


class Encoder(nn.Module):
    """Raw splats to the latent, or to the posterior's mean and log-variance. Each level is followed by a max pooling of
    2 and dropout, which draws from ``generator``."""

    def __init__(self, config: Config, part: Part) -> None:
        super().__init__()
        model, filters = config.model, config.splat_filters[0]
        self.rates = model.dropout_rates if model.kind == "conv1d" else (0.0,) * len(filters)
        self.flat = model.pool == "none"
        inside = filters[-1] * (config.data.splats // 2**len(filters) if self.flat else 1)
        self.columns = Columns(model.splat_target)
        self.levels = _levels(part, model, (len(self.columns.target.columns), *filters))
        self.dense = part("dense", make=lambda: nn.Sequential(*_dense(inside, model)))
        self.mean = part("mean", make=lambda: nn.Linear(HIDDEN, model.latent_dim))
        self.logvar = part("logvar", make=lambda: nn.Linear(HIDDEN, model.latent_dim)) if model.variational else None
        self.latent_normalizer = (LatentNormalizer(model.latent_dim, model.normalizer, dimensions=0)
                                  if model.normalize_latents else None)

    def forward(self, splats: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        features = self.columns(splats).transpose(1, 2)
        for level, rate in zip(self.levels, self.rates, strict=True):
            features = functional.max_pool1d(level(features), 2)
            if self.training and rate:
                features = dropout(features, rate, generator)
        features = self.dense(features.flatten(1) if self.flat else features.mean(2))
        # exp() and squares of these overflow in half precision.
        return (self.mean(features).float(),
                None if self.logvar is None else self.logvar(features).float().clamp(*LOGVAR_RANGE))


class Decoder(nn.Module):
    """The raw latent to splats. Before each level the sequence is doubled, every number of it repeated."""

    def __init__(self, config: Config, part: Part) -> None:
        super().__init__()
        model, filters = config.model, config.splat_filters[1]
        self.size, entry = config.data.image_size, ENTRY * 2**len(filters)
        self.columns = Columns(model.splat_target)
        self.dense = part("dense", make=lambda: nn.Sequential(
            *_dense(model.latent_dim, model), nn.Linear(HIDDEN, ENTRY * config.data.splats),
            nn.Unflatten(1, (entry, -1)), normalisation(entry, model.norm), _activation(model)))
        self.levels = _levels(part, model, (entry, *filters))
        self.last = part("last", make=lambda: nn.Conv1d(filters[-1], len(self.columns.target.columns), 1))

    def forward(self, latent: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        heads = ("splats", "rgb") if heads is None else tuple(heads)
        features = self.dense(latent)
        for level in self.levels:
            features = level(functional.interpolate(features, scale_factor=2))
        return self.outputs(self.last(features).float().transpose(1, 2), heads)

    def outputs(self, columns: Tensor, heads: Iterable[str]) -> dict[str, Tensor]:
        """What normalised columns (B, N, C) stand for."""
        found = {"columns": columns}
        if "splats" in heads or "rgb" in heads:
            found["splats"] = self.columns.inverse(columns)
        if "rgb" in heads:
            found["rgb"] = render(found["splats"], self.size).clamp(-1, 1)
        return {name: found[name] for name in heads}


class SplatAutoencoder(Autoencoder):
    """Splats (B, N, 8), raw and sorted, to a latent (B, D) and back.

    conv1d: for each of ``model.encoder_filters`` a convolution of kernel 5, normalisation, ReLU, a max pooling of 2 and
    dropout; then ``model.pool`` and a dense layer of 512 before those of the latent. The decoder: a dense layer of 512,
    one to 4 numbers a splat, then for each of ``model.decoder_filters`` a doubling of the sequence, a convolution,
    normalisation and ReLU; last a convolution of kernel 1. With 512 splats, the default filters, a latent of 256 and
    pool mean a variational one has 1,589,688 parameters. resnet1d: five residual blocks (He et al. 2016) with ELU in
    place of the convolutions, and no dropout.

    Filters, kernels, dense layers and parameters (1.6 million) are those of GaussVAE
    (https://github.com/rokocuba/GaussVAE-showcase). Ours are the pooling and doubling at every level (there at all but
    the last one), ReLU (as its text says; its code has ELU), no dropout in dense layers, and the blocks' widths.

    :meth:`decode` gives, as far as asked for, ``splats`` (B, N, 8) raw and ``rgb`` (B, 3, H, W), their rendering
    clamped to [-1, 1]; and if asked for ``columns`` (B, N, C), normalised, of the target ``model.splat_target``.
    """
    takes = gives = "splats"
    measured_outputs = ("columns", "splats", "rgb")
    drawn_outputs = ("columns", "rgb")

    def __init__(self, config: Config, *, seed: int) -> None:
        super().__init__(config)
        self.encoder = Encoder(config, partial(made, config, seed, "encoder"))
        self.decoder = Decoder(config, partial(made, config, seed, "decoder"))
        self.register_buffer("mean", torch.zeros(COLUMNS))
        self.register_buffer("position_mean", torch.zeros(config.data.splats, COLUMNS))

    @property
    def column_mean(self) -> Tensor:
        """(C,): of the target's columns over the training split."""
        return self.encoder.columns.mean

    @property
    def column_std(self) -> Tensor:
        """(C,): their standard deviations."""
        return self.encoder.columns.std

    def fit(self, dataset: Dataset) -> None:
        """Set the normalisation of the columns, and ``mean`` (8,) and ``position_mean`` (N, 8): of the training split's
        raw splats with the longer axis first, all of them and those at each position. An angle's mean is that of the
        doubled angles as vectors of the anisotropy's length, halved."""
        rows = dataset.splits["train"]

        def chunks() -> Iterator[np.ndarray]:
            return (dataset.splats[rows[start:start + CHUNK]] for start in range(0, len(rows), CHUNK))

        found = fit_normalisation(self.config.model.splat_target, chunks())
        for part in (self.encoder, self.decoder):
            part.columns.mean.copy_(found.mean)
            part.columns.std.copy_(found.std)
        mean, position_mean = _means(chunks())
        self.mean.copy_(mean)
        self.position_mean.copy_(position_mean)

    def fitted(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "position_mean": self.position_mean, **{
            f"{part}.columns.{name}": getattr(getattr(self, part).columns, name)
            for part in ("encoder", "decoder") for name in ("mean", "std")}}

    def columns(self, splats: Tensor) -> Tensor:
        """The normalised columns (B, N, C) of raw splats (B, N, 8): what is learnt."""
        return self.encoder.columns(splats)

    def outputs(self, columns: Tensor) -> dict[str, Tensor]:
        """The outputs that figures are taken of, from normalised columns (B, N, C) wherever they are from."""
        return self.decoder.outputs(columns, self.measured_outputs)

    def group_figures(self) -> GroupFigures:
        """An accumulator of figures by group, over a split."""
        return GroupFigures(self.config.model.splat_target, self.mean, self.position_mean)

    def posterior(self, inputs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        return self.encoder(inputs, generator)

    def forward(self, inputs: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """As of every autoencoder; and ``target`` (B, N, C), the input's columns."""
        return {**super().forward(inputs, generator), "target": self.columns(inputs)}

    @property
    def trained_outputs(self) -> tuple[str, ...]:
        weights = self.config.loss
        return ("columns", "rgb") if weights.mse or weights.l1 or weights.custom else ("columns",)


def _means(splats: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(8,) and (N, 8), see :meth:`SplatAutoencoder.fit`, over chunks (n, N, 8) of raw splats."""
    canonical, count, summed = TARGETS["canonical"], 0, torch.zeros(())
    for chunk in splats:
        raw = torch.tensor(chunk, dtype=torch.float64)
        summed = summed + torch.cat((longer_first(raw), canonical.encode(raw)), -1).sum(0)
        count += len(raw)
    means = []
    for mean in (summed.mean(0) / count, summed / count):
        mean, turned = mean[..., :COLUMNS].clone(), canonical.decode(mean[..., COLUMNS:])
        mean[..., PARTS["rot"]] = turned[..., PARTS["rot"]]
        means.append(mean)
    return means[0], means[1]
