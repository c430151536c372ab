"""What several test modules need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from autoenc.config import Config, make_config
from autoenc.data import IGNORED, Dataset
from autoenc.data.splats import in_order
from autoenc.render import render

PALETTE = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230], [250, 250, 250]], dtype=np.uint8)


def small_config(**settings: Any) -> Config:
    """A configuration that trains in milliseconds; dots in keys are written ``__`` (``loss__kl=0.1``)."""
    small = {"data.image_size": 16, "model.base_channels": 8, "model.downsampling_steps": 2,
             "model.latent_channels": 2, "train.batch_size": 8, "train.epochs": 2, "train.learning_rate": 1e-3}
    return make_config({**small, **{key.replace("__", "."): value for key, value in settings.items()}}, "test")


def small_dataset(count: int = 30, size: int = 16, *, segmentation: bool = True, labels: bool = True,
                  seed: int = 0, splats: int | None = None) -> Dataset:
    """Rectangles of four classes in palette colours, a tenth of the pixels and every fifth label missing; or that many
    splats an item, in order, and their rendering."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((count, size, size), dtype=np.uint8)
    for item in classes:
        for kind in range(1, len(PALETTE)):
            top, left = rng.integers(0, size - 4, size=2)
            item[top:top + rng.integers(3, size), left:left + rng.integers(3, size)] = kind
    images = PALETTE[classes]
    classes[rng.random(classes.shape) < 0.1] = IGNORED
    kinds = rng.integers(0, 3, count).astype(np.int16)
    kinds[::5] = -1
    order = rng.permutation(count)
    cuts = np.split(order, [round(0.7 * count), round(0.9 * count)])
    sets = None
    if splats is not None:
        segmentation, sets = False, random_splats(count, splats, rng)
        rendered = render(torch.from_numpy(sets), size).permute(0, 2, 3, 1)
        images = rendered.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return Dataset(
        images=images, segmentation=classes if segmentation else None, labels=kinds if labels else None,
        classes=("red", "green", "blue", "white") if segmentation else (),
        palette=PALETTE if segmentation else None, label_names=("a", "b", "c") if labels else (),
        names=tuple(f"item {row}" for row in range(count)),
        splits={name: np.sort(part) for name, part in zip(("train", "val", "test"), cuts, strict=True)},
        fingerprint=f"small {count} {size} {seed}" + (f" {splats} splats" if splats else ""), duplicates=0,
        ignored=0.1 if splats is None else 0.0, splats=sets)


def random_splats(count: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """Sets of splats, float32 (count, each, 8), in order: varied after four patterns, which a small latent can tell."""
    shape = (4, each)
    patterns = np.concatenate((rng.uniform(-0.9, 0.9, (*shape, 2)), np.exp(rng.uniform(-3.5, -1, (*shape, 2))),
                               rng.uniform(0, 3.14, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3))), -1)
    sets = patterns[rng.integers(0, len(patterns), count)]
    sets[..., :2] += rng.normal(0, 0.05, (count, each, 2))
    sets[..., 5:] = np.clip(sets[..., 5:] + rng.normal(0, 0.2, (count, 1, 3)), -1, 1)
    return in_order(sets.astype(np.float32))
