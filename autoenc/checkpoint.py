"""Checkpoints: one mapping of plain values and tensors, saved whole, loaded without running code from the file.

    format       1
    config       the configuration, nested
    shapes       {classes: names, labels: names, palette: [[r, g, b], …] or None}: what the heads' outputs mean
    epoch        the last epoch trained
    metrics      its figures
    model        weights by name
    raw          only with train.ema, in a checkpoint to go on from: the weights that are averaged
    optimizer, scaler    only in a checkpoint to go on from
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from autoenc.config import Config, flatten, make_config
from autoenc.custom import said_of
from autoenc.data import Dataset
from autoenc.errors import InputError
from autoenc.files import is_whole_zip, write_atomic
from autoenc.model import Autoencoder, make_model

FORMAT = 1
RESUME_KEYS = ("optimizer", "scaler", "raw", "rows", "best")
KEYS = {"format": int, "config": dict, "shapes": dict, "epoch": int, "metrics": dict, "model": dict}


def build_model(config: Config, dataset: Dataset) -> Autoencoder:
    """A fresh model for this data, on the CPU. Raises :class:`InputError` for a head whose data is missing."""
    model = make_model(config, data_shapes(dataset), seed=config.train.seed)
    model.fit(dataset)
    return model


def data_shapes(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint records about the data: the names behind the heads' outputs and the palette."""
    return {"classes": list(dataset.classes) if dataset.segmentation is not None else [],
            "labels": list(dataset.label_names) if dataset.labels is not None else [],
            "palette": None if dataset.palette is None else dataset.palette.tolist()}


def check_splats(path: str | os.PathLike, config: Config, dataset: Dataset) -> None:
    """Raise :class:`InputError` where a checkpoint's model takes other splats than the data has. ``config``: the one
    that it was trained with."""
    if config.takes_splats:
        count, size = dataset.splats.shape[1], dataset.images.shape[1]
        if (count, size) != (config.data.splats, config.data.image_size):
            raise InputError(f"{path}: the model takes {config.data.splats} splats an image and renders "
                             f"{config.data.image_size} px, and the data has {count} at {size} px (data.splats, "
                             "data.image_size)")


def checkpoint_content(config: Config, shapes: Mapping[str, Any], model: Autoencoder, *, epoch: int,
                       metrics: Mapping[str, float], copy: bool = True,
                       **resume: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of this state, copied to the CPU: training on does not change it. ``copy``: False leaves what is on
    the CPU already as it is, for who writes it before anything is trained on. ``resume``: what going on from it takes,
    of :data:`RESUME_KEYS`."""
    content = {"format": FORMAT, "config": config.nested(), "shapes": dict(shapes), "epoch": epoch,
               "metrics": dict(metrics), "model": dict(model.state_dict())}
    return _on_cpu(content | {key: dict(value) for key, value in resume.items()}, copy)


def model_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same checkpoint without what only serves to go on training."""
    return {key: value for key, value in content.items() if key not in RESUME_KEYS}


def _on_cpu(value: Any, copy: bool) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, Mapping):
        return {key: _on_cpu(item, copy) for key, item in value.items()}
    return [_on_cpu(item, copy) for item in value] if isinstance(value, list) else value


def save_checkpoint(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole. Raises OSError where it cannot be."""
    def save(file: BinaryIO) -> None:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):       # a full disk; torch tells of its own confusion over it
                raise error.__context__ from None
            raise

    write_atomic(path, save)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint's content, tensors on the CPU. Raises :class:`InputError` for a file that is none or is broken."""
    path = Path(path)
    try:
        if not is_whole_zip(path):
            raise InputError(f"{path}: no readable checkpoint, or a broken one")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:      # what torch.load raises for a broken file is of a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: no readable checkpoint, or a broken one ({reason})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise InputError(f"{path}: is no checkpoint of this program")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: format: {content['format']!r}, and this version reads {FORMAT}")
    wrong = [key for key, kind in KEYS.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong)}: missing from the checkpoint, or not what belongs there")
    return content


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> Autoencoder:
    """The model of any checkpoint, in eval mode. Raises :class:`InputError`."""
    content = read_checkpoint(path)
    config = make_config(flatten(content["config"], f"{path}: config"), f"{path}: config")
    try:
        # Neither memory nor random numbers for weights that are replaced at once.
        with torch.device("meta"), said_of(str(path)):
            model = make_model(config, content["shapes"], seed=0)
        model.load_state_dict(content["model"], assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: the weights are not those of the configuration: {error}") from None
    return model.to(device).eval()
