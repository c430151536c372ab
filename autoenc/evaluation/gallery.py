"""The arms of a sweep on the same validation images: their pictures side by side, and histograms of their latents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from autoenc.checkpoint import load_model
from autoenc.data import Dataset
from autoenc.errors import InputError
from autoenc.evaluation.pictures import write_picture
from autoenc.files import remove_leftovers, write_atomic
from autoenc.metrics import palette_colours, psnr, to_inputs, to_uint8, to_unit
from autoenc.model import Autoencoder, derived_seed
from autoenc.samples import predicted_classes

FORMAT = 1
IMAGES = 128                     # compared at most: a CPU takes 5 to 25 ms for an image of 64 × 64
COLUMNS = 3                      # of each kind
CELL = 128                       # side of a picture, pixels, at most
BATCH_PIXELS = {"cpu": 2**15, "cuda": 2**20}         # 8 images of 64 × 64: larger batches leave a CPU's caches
BINS = 40
ENDS = (0.1, 99.9)               # percentiles of an arm's latents between which its histograms lie
IGNORED_COLOUR = (255, 0, 255)   # of pixels without class

Exhibit = tuple[str, Path, int, str, str]


@dataclass(frozen=True)
class _View:
    """What a model makes of N images."""

    mse: np.ndarray
    """float64 (N,)"""
    rgb: np.ndarray
    """uint8 (N, cell, cell, 3)"""
    classes: np.ndarray | None
    """uint8 (N, cell, cell): predicted; None for data without classes"""
    latent: dict[str, Any]
    """histograms and moments by channel"""


def write_gallery(arms: Sequence[Exhibit], dataset: Dataset, folder: Path, device: str) -> list[str]:
    """Compare arms, each an (arm, checkpoint, epoch, trajectory's key, trial), on validation images (a seeded choice of
    128 where there are more), and write pictures of them and ``gallery.json`` into ``folder``, which is made where
    there is none.

    The images shown are the best, the typical (around the median) and the worst by the mean over the arms of the log of
    their squared errors, so that every arm shows the same ones. Models run in float32; a VAE decodes its posterior's
    mean. An arm whose checkpoint is broken is left out: returns what is wrong, a line an arm; where none is left,
    nothing is written. Raises OSError.
    """
    rows = compared_images(dataset)
    views: dict[str, _View] = {}
    told: dict[str, dict[str, Any]] = {}
    problems = []
    for arm, path, epoch, key, trial in arms:
        try:
            view = _view(load_model(path, device), dataset, rows)
        except InputError as error:
            problems.append(f"{arm}: {error}")
            continue
        if view is None:
            problems.append(f"{arm}: {path}: its latents or reconstructions are not finite")
            continue
        views[arm] = view
        told[arm] = {"trial": trial, "key": key, "epoch": epoch, "weights": Path(path).name}
    if not views:
        return problems

    errors = np.stack([view.mse for view in views.values()])
    columns = chosen_columns(np.log(np.maximum(errors, np.finfo(float).tiny)).mean(0))
    shown = np.array([position for position, _ in columns])
    strips = {"inputs.png": _inputs(dataset, rows[shown])}
    for arm, view in views.items():
        name = f"{arm}.png"
        while name.casefold() in {taken.casefold() for taken in strips}:
            name = f"_{name}"
        strips[name] = _strip(view.rgb[shown], None if view.classes is None else dataset.palette[view.classes[shown]])
        mse = view.mse[shown].tolist()
        told[arm] |= {"picture": name, "mse": mse, "psnr": [_finite(psnr(error)) for error in mse],
                      "latent": view.latent}
    content = {
        "format": FORMAT, "images": len(rows), "inputs": "inputs.png", "cell": _cell(dataset),
        "rows": ["image"] if dataset.segmentation is None else ["image", "classes"],
        "columns": [{"index": int(rows[position]), "kind": kind, "mse": float(errors[:, position].mean())}
                    for position, kind in columns],
        "arms": told}
    _write(folder, strips, content)
    return problems


def compared_images(dataset: Dataset) -> np.ndarray:
    """Indices of the validation images that arms are compared on, ascending, no two of them equal; the same ones for
    the same data."""
    rows = dataset.splits["val"]
    if len(rows) > IMAGES:
        rows = np.random.default_rng(derived_seed(0, "gallery")).permutation(rows)
    distinct: dict[bytes, int] = {}
    for row in rows.tolist():
        distinct.setdefault(hashlib.sha256(np.ascontiguousarray(dataset.images[row])).digest(), row)
        if len(distinct) == IMAGES:
            break
    return np.sort(list(distinct.values()))


def chosen_columns(scores: np.ndarray) -> list[tuple[int, str]]:
    """Positions of the best (lowest), typical and worst of N scores, three of each, in ascending order, with their
    kind. Of fewer than nine all, as evenly as that goes, none twice. Equal scores go by position."""
    order = np.argsort(scores, kind="stable").tolist()
    ends = min(COLUMNS, (len(order) + 1) // 3)
    typical = min(COLUMNS, len(order) - 2 * ends)
    middle = (len(order) - typical) // 2
    return [*((position, "best") for position in order[:ends]),
            *((position, "typical") for position in order[middle:middle + typical]),
            *((position, "worst") for position in order[len(order) - ends:])]


@torch.inference_mode()
def _view(model: Autoencoder, dataset: Dataset, rows: np.ndarray) -> _View | None:
    """None where something is not finite."""
    device = next(model.parameters()).device
    channels_last = device.type == "cpu"         # takes 0.6 to 0.9 of the time there
    model = model.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    cell, size = _cell(dataset), dataset.images.shape[1]
    colours = None if dataset.segmentation is None else palette_colours(dataset.palette, device)
    heads = [head for head in model.config.heads if head != "classification"]
    batch = max(1, BATCH_PIXELS[device.type] // size**2)
    mse, rgb, classes, latents = [], [], [], []
    for indices in np.split(rows, range(batch, len(rows), batch)):
        images = to_unit(dataset.images[indices], device, channels_last)
        inputs = images if model.takes == "images" else to_inputs(dataset.inputs[indices], device)
        latent = model.normalize(model.encoder(inputs)[0])
        outputs = model.decode(latent, heads)
        mse.append((outputs["rgb"] - images).square().double().mean((1, 2, 3)).cpu())
        rgb.append(to_uint8(_reduced(outputs["rgb"], cell)))
        latents.append(latent.transpose(0, 1).flatten(1).float().cpu())
        if colours is not None:
            predicted = predicted_classes(outputs, colours).to(torch.uint8).cpu().numpy()
            classes.append(_thinned(predicted, cell))
    errors, whole = torch.cat(mse), torch.cat(latents, 1)
    if not (errors.isfinite().all() and whole.isfinite().all()):
        return None
    return _View(errors.numpy(), np.concatenate(rgb), np.concatenate(classes) if classes else None,
                 latent_histograms(whole.numpy()))


def latent_histograms(latents: np.ndarray) -> dict[str, Any]:
    """Of latents (C, numbers): ``edges`` of 40 bins, the same for all channels, ``counts`` by channel, of which the
    outer bins have what lies beyond, and each channel's ``mean`` and (population) ``std``."""
    latents = latents.astype(np.float64)
    low, high = np.percentile(latents, ENDS).tolist()
    if not low < high:                       # constant
        low, high = low - 0.5, high + 0.5
    counts = [np.histogram(channel.clip(low, high), bins=BINS, range=(low, high))[0].tolist() for channel in latents]
    return {"edges": np.linspace(low, high, BINS + 1).tolist(), "counts": counts,
            "mean": latents.mean(1).tolist(), "std": latents.std(1).tolist()}


def _inputs(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    cell = _cell(dataset)
    images = to_uint8(_reduced(to_unit(dataset.images[rows]), cell))
    if dataset.segmentation is None:
        return _strip(images, None)
    colours = np.full((256, 3), IGNORED_COLOUR, dtype=np.uint8)
    colours[:len(dataset.palette)] = dataset.palette
    return _strip(images, colours[_thinned(dataset.segmentation[rows], cell)])


def _cell(dataset: Dataset) -> int:
    return min(CELL, dataset.images.shape[1])


def _reduced(images: Tensor, cell: int) -> Tensor:
    return images if images.shape[-1] == cell else functional.adaptive_avg_pool2d(images, cell)


def _thinned(classes: np.ndarray, cell: int) -> np.ndarray:
    """Class maps (N, H, W) at every so manieth pixel: between classes there is no mean."""
    size = classes.shape[-1]
    taken = (np.arange(cell) + 0.5) * size // cell
    return classes if size == cell else classes[:, taken.astype(int)[:, None], taken.astype(int)]


def _strip(above: np.ndarray, below: np.ndarray | None) -> np.ndarray:
    """uint8 (N, cell, cell, 3) side by side, in one row or two."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (above, below) if row is not None])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(folder: Path, strips: dict[str, np.ndarray], content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / "gallery.json").unlink(missing_ok=True)        # it stands for the pictures, and they change now
    for name, strip in strips.items():
        write_picture(folder / name, Image.fromarray(strip))
    for path in folder.glob("*.png"):
        if path.name not in strips:
            path.unlink()
    write_atomic(folder / "gallery.json", json.dumps(content, allow_nan=False) + "\n")
