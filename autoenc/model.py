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

from autoenc.config import Config, ModelConfig, check_heads

LOGVAR_RANGE = (-30.0, 20.0)     # as in Stable Diffusion's autoencoder: exp() stays finite and its gradient alive

Made = TypeVar("Made")


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


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _same(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1), _norm(outside), nn.SiLU()]


def _down(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]


def _up(inside: int, outside: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1), _norm(outside), nn.SiLU()]


class Encoder(nn.Module):
    """Images to the latent, or to the posterior's mean and log-variance when variational."""

    def __init__(self, channels: list[int], latent_channels: int, variational: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for outside in channels:
            layers += [*_same(inside, outside), *_down(outside)]
            inside = outside
        self.trunk = nn.Sequential(*layers, *_same(inside, inside))
        self.mean = nn.Conv2d(inside, latent_channels, 1)
        self.logvar = nn.Conv2d(inside, latent_channels, 1) if variational else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.trunk(images)
        if self.logvar is None:
            return self.mean(features), None
        # exp() and squares of these overflow in half precision.
        return self.mean(features).float(), self.logvar(features).float().clamp(*LOGVAR_RANGE)


class DecoderTrunk(nn.Module):
    """The latent to features at the deepest level and at full size."""

    def __init__(self, channels: list[int], latent_channels: int) -> None:
        super().__init__()
        deepest = channels[-1]
        self.entry = nn.Sequential(nn.Conv2d(latent_channels, deepest, 1), *_same(deepest, deepest))
        layers: list[nn.Module] = []
        inside = deepest
        for outside in [*reversed(channels[:-1]), channels[0]]:
            layers += [*_up(inside, outside), *_same(outside, outside)]
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
        makers: dict[str, Callable[[], nn.Module]] = {
            "rgb": lambda: nn.Sequential(nn.Conv2d(channels[0], 3, 3, padding=1), nn.Tanh()),
            "segmentation": lambda: nn.Conv2d(channels[0], classes, 3, padding=1),
            "classification": lambda: Classifier(channels[-1], labels),
        }
        self.encoder = seeded(derived_seed(seed, "encoder"),
                              lambda: Encoder(channels, latent_channels, config.model.variational))
        self.decoder = Decoder(
            seeded(derived_seed(seed, "decoder"), lambda: DecoderTrunk(channels, latent_channels)),
            {head: seeded(derived_seed(seed, "head", head), makers[head]) for head in config.heads})

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``latent`` (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; for a VAE also ``mu`` and ``logvar``.

        A VAE's latent is its posterior's mean, or a draw (from ``generator``) when ``model.latent`` is sample.
        """
        mu, logvar = self.encoder(images)
        if logvar is None:
            return {"latent": mu}
        latent = draw(mu, logvar, generator) if self.config.model.latent == "sample" else mu
        return {"latent": latent, "mu": mu, "logvar": logvar}

    def decode(self, latent: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Each head's output (all heads, or those named): ``rgb`` (B, 3, H, W) in [-1, 1], ``segmentation``
        (B, K, H, W) logits, ``classification`` (B, L) logits. Always float32."""
        return self.decoder(latent, heads)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What training needs: the outputs of all heads and what :meth:`encode` returns. A VAE decodes a draw,
        whatever ``model.latent`` says, and ``latent`` is that draw."""
        mu, logvar = self.encoder(images)
        if logvar is None:
            return {**self.decode(mu), "latent": mu}
        latent = draw(mu, logvar, generator)
        return {**self.decode(latent), "latent": latent, "mu": mu, "logvar": logvar}

    @property
    def latent_size(self) -> int:
        """How many numbers the latent of one image has."""
        side = self.config.data.image_size // 2**self.config.model.downsampling_steps
        return self.config.model.latent_channels * side**2


def count_parameters(model: Autoencoder) -> int:
    """Parameters of encoder, decoder trunk and rgb head: what reconstructing takes, whatever other heads there are."""
    parts = (model.encoder, model.decoder.trunk, model.decoder.heads["rgb"])
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
