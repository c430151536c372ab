"""A model of one's own: an ``nn.Module`` with ``encode`` and ``decode``, adapted to what all autoencoders share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoenc.checks import shown
from autoenc.config import Config
from autoenc.custom import find_source, in_words, load_target, said_of
from autoenc.errors import InputError
from autoenc.model.base import LOGVAR_RANGE, Autoencoder, LatentNormalizer, derived_seed, seeded
from autoenc.settings import HEADS

PROBE = 2                # images that a new model is tried with
STILL = 0                # the seed of what is random in a model that does not train


class CustomAutoencoder(Autoencoder):
    """``model.target`` built from ``model.settings``, its weights from a seed of its own; torch's global random state
    is left as it was. ``module`` is what was built.

    All that is random in the module comes from torch's global generators, and they are set for it: while training from
    the generator that :meth:`forward` is given, otherwise to the same state at each call, so that encoding and decoding
    depend on their inputs alone. Afterwards they are as they were.

    Raises :class:`InputError` for a target that cannot be built or does not keep the contract (see docs/own-model.md):
    it encodes and decodes two random images to show it.
    """

    def __init__(self, config: Config, *, seed: int) -> None:
        super().__init__(config)
        settings = config.model
        # On the CPU even under load_model's meta device: a constructor may read the numbers that it makes.
        with torch.device("cpu"), said_of("model.target"):
            self.module, self._shape = seeded(derived_seed(seed, "custom"), lambda: _tried(config))
            normalizer = LatentNormalizer(self._shape[0], settings.normalizer, len(self._shape) - 1) \
                if settings.normalize_latents else None
        self.encoder = _Encoder(self.module, settings.variational, normalizer)
        self.decoder = _Decoder(self.module, config.heads)

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> CustomAutoencoder:
        """As of any module, but the weights keep their memory format: ``.view()`` in somebody's code fails on
        channels_last."""
        return super().to(*args, **kwargs)

    def forward(self, inputs: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if generator is None:
            return super().forward(inputs)
        with _global_generators(_seed_from(generator), inputs.device):
            return super().forward(inputs, generator)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._shape


class _Part(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of = (module,)              # within a tuple, as it is registered once, by the autoencoder

    def call(self, name: str, given: Tensor) -> dict[str, Any]:
        module = self.of[0]
        with nullcontext() if module.training else _global_generators(STILL, given.device):
            return getattr(module, name)(given)


class _Encoder(_Part):
    def __init__(self, module: nn.Module, variational: bool, normalizer: LatentNormalizer | None) -> None:
        super().__init__(module)
        self.variational, self.latent_normalizer = variational, normalizer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self.call("encode", images.contiguous())
        if not self.variational:
            return encoded["latent"], None
        return encoded["mu"].float(), encoded["logvar"].float().clamp(*LOGVAR_RANGE)


class _Decoder(_Part):
    def __init__(self, module: nn.Module, heads: Iterable[str]) -> None:
        super().__init__(module)
        self.idle = set(HEADS) - set(heads)          # what no loss asks for is not measured, either

    def forward(self, latent: Tensor, heads: Iterable[str] | None = None) -> dict[str, Any]:
        outputs = self.call("decode", latent)
        return {name: value.float() if isinstance(value := outputs[name], Tensor) else value
                for name in ([name for name in outputs if name not in self.idle] if heads is None else heads)}


def _seed_from(generator: torch.Generator) -> int:
    """A seed drawn from a generator. On a GPU nothing waits for it: the generator's state is the host's."""
    if generator.device.type == "cpu":
        return int(torch.randint(2**63 - 1, (), generator=generator))
    torch.empty((), device=generator.device).uniform_(generator=generator)          # moves it on
    return derived_seed(STILL, bytes(generator.get_state().tolist()).hex())


@contextmanager
def _global_generators(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators of the CPU and the device at a seed; put back afterwards."""
    index = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=index):
        torch.default_generator.manual_seed(seed)
        for each in index:
            torch.cuda.default_generators[each].manual_seed(seed)
        yield


def _tried(config: Config) -> tuple[nn.Module, tuple[int, ...]]:
    """The module, and its latent's shape without the batch. Raises :class:`InputError`."""
    target, settings = config.model.target, config.model.settings
    found, path = load_target(target), find_source(target)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"{target!r}: is no class of torch.nn.Module")
    for name in ("encode", "decode"):
        if not callable(getattr(found, name, None)):
            raise InputError(f"{target!r}: has no {name}(): see docs/own-model.md")
    try:
        module = found(**copy.deepcopy(settings))
    except Exception as error:
        raise InputError(f"{target!r}: cannot be built from model.settings {shown(dict(settings))}: "
                         f"{in_words(error, path)}") from error
    module.eval()                        # batch normalisation takes no statistics of the trial
    with said_of(repr(target)), torch.no_grad():
        shape = _try(module, config, path)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(f"{target!r}: has no parameters to train")
    return module.train(), shape


def _try(module: nn.Module, config: Config, path: Path) -> tuple[int, ...]:
    side, variational = config.data.image_size, config.model.variational
    images = torch.rand(PROBE, 3, side, side) * 2 - 1
    encoded = _called(module.encode, images, "latent", path)
    for name in ("mu", "logvar"):
        if variational and name not in encoded:
            raise InputError(f"encode() gives no {name!r} but {_names(encoded)}, and model.variational is true")
        if not variational and name in encoded:
            raise InputError(f"encode() gives {name!r}, and model.variational is false: set model.variational: true")
    latent = _checked(encoded["latent"], "encode()", "latent", "(B, C, h, w) or (B, D)",
                      lambda shape: len(shape) in (2, 4) and shape[0] == PROBE and 0 not in shape)
    for name in ("mu", "logvar") if variational else ():
        _checked(encoded[name], "encode()", name, f"{tuple(latent.shape)}, as 'latent'",
                 lambda shape: shape == tuple(latent.shape))
    outputs = _called(module.decode, encoded["mu"] if variational else latent, "rgb", path)
    expected = (PROBE, 3, side, side)
    _checked(outputs["rgb"], "decode()", "rgb", f"{expected}, as the images", lambda shape: shape == expected)
    for head in config.heads:
        if head not in outputs:
            raise InputError(f"decode() gives no {head!r} but {_names(outputs)}, and loss.{head} or model.heads asks "
                             "for it")
    return tuple(latent.shape[1:])


def _called(function: Callable[[Tensor], Any], given: Tensor, needed: str, path: Path) -> Mapping[str, Any]:
    name = f"{function.__name__}()"
    try:
        found = function(given)
    except Exception as error:
        raise InputError(f"{name} of {tuple(given.shape)}: {in_words(error, path)}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{name} gives a {type(found).__name__}, and should give a mapping with {needed!r}")
    if needed not in found:
        raise InputError(f"{name} gives no {needed!r} but {_names(found)}")
    return found


def _checked(value: Any, where: str, name: str, expected: str, fits: Callable[[tuple[int, ...]], bool]) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{where} gives {name!r} as a {type(value).__name__}, and should give a tensor {expected}")
    if not value.is_floating_point() or not fits(tuple(value.shape)):
        raise InputError(f"{where} gives {name!r} of shape {tuple(value.shape)} and {value.dtype}; it should be "
                         f"{expected}, of floating point")
    if not value.isfinite().all():
        raise InputError(f"{where} gives {name!r} that is not finite, of an untrained model and random images")
    return value


def _names(found: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, found)) or "nothing"
