"""Files and settings of splat data sets for tests."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from autoenc.data import compositions
from autoenc.data.splats import write_splats
from autoenc.settings import DataConfig

EACH = 16      # splats of a set


def config(**changes) -> DataConfig:
    return DataConfig(**{"source": "splats", "splats": EACH, "image_size": 16, "limit": 40, "split": (0.5, 0.4, 0.1),
                         **changes})


def files_in(folder: Path, sets: np.ndarray, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, splats in enumerate(sets):
        write_splats(folder / f"{prefix}{k:02d}.npz", splats)
    return folder


def images_in(folder: Path, count: int, prefix: str = "", start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(compositions.generate(5, start + k, 20)).save(folder / f"{prefix}{k:02d}.png")
    return folder


def table(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["layout_path", "type"], *rows])
    return path
