"""The multi-head convolutional autoencoder of images (B, 3, H, W); its latent is (B, C, h, w) with h = H / 2**steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from autoenc.config import Config, ModelConfig, check_heads
from autoenc.model.base import LOGVAR_RANGE, Autoencoder, LatentNormalizer, made, normalisation


def level_channels(config: ModelConfig) -> list[int]:
    """Channels of the levels, outermost first. Encoder and decoder both follow this list."""
    return [config.base_channels * 2**level for level in range(config.downsampling_steps)]


def _same(inside: int, outside: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1), normalisation(outside, norm), nn.SiLU()]


def _down(channels: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 4, stride=2, padding=1), normalisation(channels, norm), nn.SiLU()]


def _up(inside: int, outside: int, norm: str) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1), normalisation(outside, norm), nn.SiLU()]


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



class ConvAutoencoder(Autoencoder):
    """Encoder, decoder trunk and heads as the configuration says.

    ``classes`` and ``labels`` are how many the data has (0: none). Raises :class:`~autoenc.errors.InputError` for a
    head whose data is missing.
    """

    def __init__(self, config: Config, *, classes: int, labels: int, seed: int) -> None:
        super().__init__(config)
        check_heads(config, classes, labels)
        channels, latent_channels = level_channels(config.model), config.model.latent_channels
        norm, part = config.model.norm, partial(made, config, seed)
        makers: dict[str, Callable[[], nn.Module]] = {
            "rgb": lambda: nn.Sequential(nn.Conv2d(channels[0], 3, 3, padding=1), nn.Tanh()),
            "segmentation": lambda: nn.Conv2d(channels[0], classes, 3, padding=1),
            "classification": lambda: Classifier(channels[-1], labels),
        }
        self.encoder = part("encoder", make=lambda: Encoder(
            channels, latent_channels, config.model.variational,
            config.model.normalizer if config.model.normalize_latents else None, norm))
        self.decoder = Decoder(part("decoder", make=lambda: DecoderTrunk(channels, latent_channels, norm)),
                               {head: part("head", head, make=makers[head]) for head in config.heads})

    def reconstructing_parameters(self) -> Iterator[nn.Parameter]:
        parts = (self.encoder, self.decoder.trunk, self.decoder.heads["rgb"])
        return (parameter for part in parts for parameter in part.parameters())
