"""The multi-head convolutional autoencoder.

Images are float (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w) with h = H / 2**steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoenc.config import Config, ModelConfig, check_heads

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


def level_channels(config: ModelConfig) -> list[int]:
    """Channels of the levels, outermost first. Encoder and decoder both follow this list."""
    return [config.base_channels * 2**level for level in range(config.downsampling_steps)]


def draw(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from N(mu, exp(logvar)), reparameterised (Kingma and Welling 2014, section 2.4)."""
    noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
    return mu + noise * torch.exp(0.5 * logvar)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that takes a batch of one image, as a last one can be, by its running statistics: one image
    has none to speak of, and torch raises where it has one pixel."""

    def forward(self, features: Tensor) -> Tensor:
        if len(features) > 1 or not self.training:
            return super().forward(features)
        return functional.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias,
                                     eps=self.eps)


def _norm(channels: int, kind: str) -> nn.Module:
    return BatchNorm(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def _same(inside: int, outside: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1), _norm(outside, norm), nn.SiLU()]


def _down(channels: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels, norm), nn.SiLU()]


def _up(inside: int, outside: int, norm: str) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1), _norm(outside, norm), nn.SiLU()]


def initialized(module: Part, init: str) -> Part:
    """The module with the weights of its convolutions and linear layers drawn anew, their biases 0: ``xavier``
    (uniform; Glorot and Bengio 2010) or ``kaiming`` (normal, for ReLU; He et al. 2015). ``default``: as torch made it.
    """
    draw_weight = {"xavier": nn.init.xavier_uniform_,
                   "kaiming": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")}.get(init)
    for layer in module.modules():
        if draw_weight and isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            draw_weight(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


class LatentNormalizer(nn.Module):
    """Latents to mean 0 and standard deviation 1 per channel, and back: ``(z - shift) * exp(-log_scale)``.

    ``shift`` and ``log_scale`` are (1, C, 1, 1). ``learned`` makes them parameters; otherwise they are set
    (:meth:`set_statistics`), until then the identity, or with ``running`` follow the batches of a training.
    """

    def __init__(self, channels: int, mode: str) -> None:
        super().__init__()
        for name in ("shift", "log_scale"):
            value = torch.zeros(1, channels, 1, 1)
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
        """Move running statistics towards a batch's (B, C, h, w); the first batch sets them."""
        variance, mean = torch.var_mean(raw.float(), dim=(0, 2, 3), keepdim=True, correction=0)
        step = torch.where(self.seen > 0, MOMENTUM, 1.0)
        self.seen.fill_(1.0)
        self.shift.lerp_(mean, step)
        variance = torch.exp(2 * self.log_scale).lerp(variance, step)
        self.log_scale.copy_(0.5 * torch.log(variance.clamp(min=DEVIATIONS[0] ** 2)))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set shift and scale from means and standard deviations (C,) of raw latents. A deviation is bounded: a dead
        channel would otherwise blow up rounding errors to the size of a signal."""
        self.shift.copy_(mean.view(1, -1, 1, 1))
        self.log_scale.copy_(deviation.clamp(*DEVIATIONS).log().view(1, -1, 1, 1))


class Encoder(nn.Module):
    """Images to the latent, or to the posterior's mean and log-variance when variational."""

    def __init__(self, channels: list[int], latent_channels: int, variational: bool,
                 normalizer: str | None = None, norm: str = "group") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for outside in channels:
            layers += [*_same(inside, outside, norm), *_down(outside, norm)]
            inside = outside
        self.trunk = nn.Sequential(*layers, *_same(inside, inside, norm))
        self.mean = nn.Conv2d(inside, latent_channels, 1)
        self.logvar = nn.Conv2d(inside, latent_channels, 1) if variational else None
        self.latent_normalizer = LatentNormalizer(latent_channels, normalizer) if normalizer else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.trunk(images)
        if self.logvar is None:
            return self.mean(features), None
        # exp() and squares of these overflow in half precision.
        return self.mean(features).float(), self.logvar(features).float().clamp(*LOGVAR_RANGE)


class DecoderTrunk(nn.Module):
    """The latent to features at the deepest level and at full size."""

    def __init__(self, channels: list[int], latent_channels: int, norm: str = "group") -> None:
        super().__init__()
        deepest = channels[-1]
        self.entry = nn.Sequential(nn.Conv2d(latent_channels, deepest, 1), *_same(deepest, deepest, norm))
        layers: list[nn.Module] = []
        inside = deepest
        for outside in [*reversed(channels[:-1]), channels[0]]:
            layers += [*_up(inside, outside, norm), *_same(outside, outside, norm)]
            inside = outside
        self.levels = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        deep = self.entry(latent)
        return deep, self.levels(deep)


class Classifier(nn.Module):
    """Label logits from the decoder's deepest features, pooled.

    There everything has passed through the latent, so the term shapes what the latent holds; at full size it would
    rather compete with the reconstruction for the decoder's features, and pooling would cost many times as much.
    """

    def __init__(self, channels: int, labels: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features.mean(dim=(2, 3)))


class Decoder(nn.Module):
    """A shared trunk and its heads, by name."""

    def __init__(self, trunk: DecoderTrunk, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)

    def forward(self, latent: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        deep, full = self.trunk(latent)
        return {name: self.heads[name](deep if name == "classification" else full).float()
                for name in (self.heads if heads is None else heads)}


class Autoencoder(nn.Module):
    """Encoder, decoder trunk and heads as the configuration says.

    ``classes`` and ``labels`` are how many the data has (0: none). Every submodule starts from a seed of its own,
    derived from ``seed`` and its name, so that adding a head changes no other weight; torch's global random state
    is left as it was. Raises :class:`~autoenc.errors.InputError` for a head whose data is missing.
    """

    def __init__(self, config: Config, *, classes: int, labels: int, seed: int) -> None:
        super().__init__()
        check_heads(config, classes, labels)
        self.config = config
        channels, latent_channels = level_channels(config.model), config.model.latent_channels
        norm = config.model.norm

        def made(*name: str, make: Callable[[], Part]) -> Part:
            return seeded(derived_seed(seed, *name), lambda: initialized(make(), config.model.init))

        makers: dict[str, Callable[[], nn.Module]] = {
            "rgb": lambda: nn.Sequential(nn.Conv2d(channels[0], 3, 3, padding=1), nn.Tanh()),
            "segmentation": lambda: nn.Conv2d(channels[0], classes, 3, padding=1),
            "classification": lambda: Classifier(channels[-1], labels),
        }
        self.encoder = made("encoder", make=lambda: Encoder(
            channels, latent_channels, config.model.variational,
            config.model.normalizer if config.model.normalize_latents else None, norm))
        self.decoder = Decoder(made("decoder", make=lambda: DecoderTrunk(channels, latent_channels, norm)),
                               {head: made("head", head, make=makers[head]) for head in config.heads})

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``latent`` (B, C, h, w) of images (B, 3, H, W) in [-1, 1], normalised when the model normalises; for a VAE
        also ``mu`` and ``logvar``, the raw posterior.

        A VAE's latent is its posterior's mean, or a draw (from ``generator``) when ``model.latent`` is sample.
        """
        mu, logvar = self.encoder(images)
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

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What training needs: the outputs of all heads and what :meth:`encode` returns. A VAE decodes a draw,
        whatever ``model.latent`` says, and ``latent`` is that draw; ``raw_latent`` is what encode would normalise."""
        mu, logvar = self.encoder(images)
        raw = mu if logvar is None else draw(mu, logvar, generator)
        returned = raw if self.config.model.latent == "sample" else mu
        normalizer = self.encoder.latent_normalizer
        if normalizer is not None and normalizer.mode == "running" and self.training:
            normalizer.follow(returned)                  # before use: both ways take the same snapshot
        latent = self.normalize(raw)
        posterior = {} if logvar is None else {"mu": mu, "logvar": logvar}
        return {**self.decode(latent), "latent": latent, "raw_latent": returned, **posterior}

    @property
    def latent_size(self) -> int:
        """How many numbers the latent of one image has."""
        side = self.config.data.image_size // 2**self.config.model.downsampling_steps
        return self.config.model.latent_channels * side**2


def count_parameters(model: Autoencoder) -> int:
    """Parameters of encoder, decoder trunk and rgb head: what reconstructing takes, whatever other heads there are."""
    parts = (model.encoder, model.decoder.trunk, model.decoder.heads["rgb"])
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
