"""Models, by kind, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoenc.config import Config, check_heads
from autoenc.model.base import (
    DEVIATIONS,
    Autoencoder,
    LatentNormalizer,
    by_channel,
    count_parameters,
    derived_seed,
    draw,
    seeded,
)
from autoenc.model.conv2d import ConvAutoencoder, level_channels
from autoenc.settings import SPLAT_KINDS

__all__ = ["DEVIATIONS", "Autoencoder", "LatentNormalizer", "by_channel", "count_parameters", "derived_seed", "draw",
           "level_channels", "make_model", "seeded"]


def make_model(config: Config, shapes: Mapping[str, Any], *, seed: int) -> Autoencoder:
    """An untrained model of the configured kind, on the CPU, for data of these shapes
    (:func:`autoenc.checkpoint.data_shapes`). Raises :class:`~autoenc.errors.InputError` for a head whose data is
    missing, and for a model of one's own that does not keep the contract."""
    if config.model.kind == "custom":
        from autoenc.model.custom import CustomAutoencoder

        check_heads(config, len(shapes["classes"]), len(shapes["labels"]))
        return CustomAutoencoder(config, seed=seed)
    if config.model.kind in SPLAT_KINDS:
        from autoenc.model.splats import SplatAutoencoder

        return SplatAutoencoder(config, seed=seed)
    return ConvAutoencoder(config, classes=len(shapes["classes"]), labels=len(shapes["labels"]), seed=seed)
