"""What all autoencoders share: the latent, its normaliser, draws, and seeds of their own for everything random."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoenc.config import Config

if TYPE_CHECKING:
    from autoenc.data import Dataset

LOGVAR_RANGE = (-30.0, 20.0)     # as in Stable Diffusion's autoencoder: exp() stays finite and its gradient alive

MOMENTUM = 0.1                   # of running latent statistics, as batch normalisation's
DEVIATIONS = (1e-5, 1e5)         # standard deviations that a latent normaliser can have

Made = TypeVar("Made")
Part = TypeVar("Part", bound=nn.Module)


def derived_seed(seed: int, *names: object) -> int:
    """A seed of its own for each purpose, e.g. ``derived_seed(42, "order", epoch)``; below 2**63."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded(seed: int, make: Callable[[], Made]) -> Made:
    """What ``make()`` builds when torch's CPU generator starts from ``seed``; its state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the GPU's generators, which fork_rng does not put back here.
        torch.default_generator.manual_seed(seed)
        return make()


def draw(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from N(mu, exp(logvar)), reparameterised (Kingma and Welling 2014, section 2.4)."""
    noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
    return mu + noise * torch.exp(0.5 * logvar)


def initialized(module: Part, init: str) -> Part:
    """The module with the weights of its convolutions and linear layers drawn anew, their biases 0: ``xavier``
    (uniform; Glorot and Bengio 2010) or ``kaiming`` (normal, for ReLU; He et al. 2015). ``default``: as torch made it.
    """
    draw_weight = {"xavier": nn.init.xavier_uniform_,
                   "kaiming": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")}.get(init)
    for layer in module.modules():
        if draw_weight and isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            draw_weight(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


def made(config: Config, seed: int, *name: str, make: Callable[[], Part]) -> Part:
    """A part of a model from a seed of its own, derived from ``seed`` and its name, so that adding a part changes no
    other one's weights; initialised as ``model.init`` says. torch's global random state is left as it was."""
    return seeded(derived_seed(seed, *name), lambda: initialized(make(), config.model.init))


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of (B, C, …) that takes a batch of one, as a last one can be, by its running statistics: one
    image has none to speak of, and torch raises where it has one position."""

    def _check_input_dim(self, features: Tensor) -> None:
        """Any number of positions."""

    def forward(self, features: Tensor) -> Tensor:
        if len(features) > 1 or not self.training:
            return super().forward(features)
        return functional.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias,
                                     eps=self.eps)


def normalisation(channels: int, kind: str) -> nn.Module:
    """A layer of ``model.norm``: batch, or group with eight groups where the channels divide."""
    return BatchNorm(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def by_channel(latent: Tensor) -> Tensor:
    """A latent (B, C, h, w), or a vector (B, D), as (B, C, positions): of a vector each number is a channel."""
    return latent.reshape(*latent.shape[:2], -1)


class LatentNormalizer(nn.Module):
    """Latents to mean 0 and standard deviation 1 per channel, and back: ``(z - shift) * exp(-log_scale)``.

    ``shift`` and ``log_scale`` are (1, C, 1, 1), of vectors (1, D). ``learned`` makes them
    parameters; otherwise they are set (:meth:`set_statistics`), until then the identity, or with ``running`` follow the
    batches of a training.
    """

    def __init__(self, channels: int, mode: str, dimensions: int = 2) -> None:
        """``dimensions``: of a channel, 2 for (B, C, h, w), 0 for vectors."""
        super().__init__()
        for name in ("shift", "log_scale"):
            value = torch.zeros(1, channels, *[1] * dimensions)
            if mode == "learned":
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if mode == "running":
            self.register_buffer("seen", torch.zeros(()))        # 1 once a batch was: no look at it waits for a GPU
        self.mode = mode

    def forward(self, raw: Tensor) -> Tensor:
        return (raw.float() - self.shift) * torch.exp(-self.log_scale)

    def inverse(self, latent: Tensor) -> Tensor:
        return latent.float() * torch.exp(self.log_scale) + self.shift

    @torch.no_grad()
    def follow(self, raw: Tensor) -> None:
        """Move running statistics towards a batch's (B, C, …); the first batch sets them."""
        others = [0, *range(2, raw.dim())]
        variance, mean = torch.var_mean(raw.float(), dim=others, keepdim=True, correction=0)
        step = torch.where(self.seen > 0, MOMENTUM, 1.0)
        self.seen.fill_(1.0)
        self.shift.lerp_(mean, step)
        variance = torch.exp(2 * self.log_scale).lerp(variance, step)
        self.log_scale.copy_(0.5 * torch.log(variance.clamp(min=DEVIATIONS[0] ** 2)))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set shift and scale from means and standard deviations (C,) of raw latents. A deviation is bounded: a dead
        channel would otherwise blow up rounding errors to the size of a signal."""
        self.shift.copy_(mean.view(self.shift.shape))
        self.log_scale.copy_(deviation.clamp(*DEVIATIONS).log().view(self.shift.shape))


class Autoencoder(nn.Module):
    """What encodes and decodes: a kind of model fills ``encoder`` and ``decoder``.

    ``encoder(inputs)`` gives the latent, or the posterior's mean and log-variance, as a pair with None or the
    latter; its ``latent_normalizer`` may be None. ``decoder(raw_latent, heads)`` gives the outputs by name.
    """

    takes = "images"
    """what it encodes, of a batch; its form: images float (B, 3, H, W) in [-1, 1]"""
    gives = "rgb"
    """which of its outputs is of that form"""
    trained_outputs: tuple[str, ...] | None = None
    """the outputs that the loss is over; None: all heads"""
    measured_outputs: tuple[str, ...] | None = None
    """those that figures are taken of; None: all heads"""
    drawn_outputs: tuple[str, ...] = ("rgb",)
    """those that a VAE's figures of a draw are taken of"""
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def fit(self, dataset: Dataset) -> None:
        """Take from the training split what is not learnt but known of it, as normalisations are; nothing here."""

    def fitted(self) -> dict[str, Tensor]:
        """What :meth:`fit` took, by the names of :meth:`state_dict`."""
        return {}

    def encode(self, inputs: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``latent`` (B, C, h, w), or (B, D) where it is a vector, of images (B, 3, H, W) in [-1, 1] (or what else the
        model ``takes``), normalised when the model normalises; for a VAE also ``mu`` and ``logvar``, the raw posterior.

        A VAE's latent is its posterior's mean, or a draw (from ``generator``) when ``model.latent`` is sample.
        """
        mu, logvar = self.encoder(inputs)
        if logvar is None:
            return {"latent": self.normalize(mu)}
        latent = draw(mu, logvar, generator) if self.config.model.latent == "sample" else mu
        return {"latent": self.normalize(latent), "mu": mu, "logvar": logvar}

    def normalize(self, raw: Tensor) -> Tensor:
        """A raw latent (a VAE's mean or draw) as :meth:`encode` would return it and :meth:`decode` takes it."""
        normalizer = self.encoder.latent_normalizer
        return raw if normalizer is None else normalizer(raw)

    def mean_latent(self, encoded: dict[str, Tensor]) -> Tensor:
        """Of what :meth:`encode` gave, what to decode for a reconstruction: a VAE's posterior mean, else the latent."""
        return self.normalize(encoded["mu"]) if "mu" in encoded else encoded["latent"]

    def raw_latent(self, encoded: dict[str, Tensor]) -> Tensor:
        """Of what :meth:`encode` gave, the latent before it was normalised."""
        normalizer = self.encoder.latent_normalizer
        return encoded["latent"] if normalizer is None else normalizer.inverse(encoded["latent"])

    def decode(self, latent: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Each head's output (all heads, or those named) for latents as :meth:`encode` gives them: ``rgb``
        (B, 3, H, W) in [-1, 1], ``segmentation`` (B, K, H, W) logits, ``classification`` (B, L) logits. Always
        float32."""
        normalizer = self.encoder.latent_normalizer
        return self.decoder(latent if normalizer is None else normalizer.inverse(latent), heads)

    def forward(self, inputs: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What training needs: the outputs that it is trained on and what :meth:`encode` returns. A VAE decodes a draw,
        whatever ``model.latent`` says, and ``latent`` is that draw; ``raw_latent`` is what encode would normalise.
        Everything random comes from ``generator``."""
        mu, logvar = self.posterior(inputs, generator)
        raw = mu if logvar is None else draw(mu, logvar, generator)
        returned = raw if self.config.model.latent == "sample" else mu
        normalizer = self.encoder.latent_normalizer
        if normalizer is not None and normalizer.mode == "running" and self.training:
            normalizer.follow(returned)                  # before use: both ways take the same snapshot
        latent = self.normalize(raw)
        posterior = {} if logvar is None else {"mu": mu, "logvar": logvar}
        return {**self.decode(latent, self.trained_outputs), "latent": latent, "raw_latent": returned, **posterior}

    def posterior(self, inputs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """What the encoder gives while training; ``generator`` is for whatever else is random there."""
        return self.encoder(inputs)

    def reconstructing_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that reconstructing takes, whatever other heads there are."""
        return self.parameters()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of an image's latent, or (D,)."""
        return self.config.latent_shape

    @property
    def latent_size(self) -> int:
        """How many numbers the latent of one image has."""
        return math.prod(self.latent_shape)


def count_parameters(model: Autoencoder) -> int:
    """Parameters of encoder, decoder trunk and rgb head: what reconstructing takes, whatever other heads there are."""
    return sum(parameter.numel() for parameter in model.reconstructing_parameters())
