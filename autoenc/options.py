"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from autoenc.config import Config, make_config
from autoenc.errors import InputError, did_you_mean


def device_of(text: str | None) -> torch.device:
    """``--device``: cpu, cuda, cuda:1, …; None: cuda where there is one. Raises :class:`InputError`."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"--device: {text!r}: should be cpu or cuda")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:      # an unknown name, or no such device here
        raise InputError(f"--device: {text!r}: {str(error).splitlines()[0]}") from None


def with_data_settings(config: Config, settings: Sequence[str]) -> Config:
    """The configuration with the data settings of ``--set``; paths in them are relative to the working directory.
    Raises :class:`InputError`."""
    from autoenc.sweep.inherit import parse_override

    flat = config.flat()
    for text in settings:
        override = parse_override(text)
        if override.sweep is not None or not override.key.startswith("data."):
            known = [key for key in flat if key.startswith("data.")]
            raise InputError(f"--set {text}: only data.… can be set here{did_you_mean(override.key, known)}")
        flat |= override.layer(Path.cwd()).config
    return make_config(flat, f"--set {' '.join(settings)}") if settings else config
