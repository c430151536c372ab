"""Image files that both sides of a benchmark read: generated layouts as PNG files with a manifest."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image

from autoenc.data import layouts


def write_pictures(folder: Path, count: int, size: int) -> Path:
    """Layouts as PNG files of that many pixels a side, and ``layouts.csv``, which names them; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "layouts.csv"
    with manifest.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("layout_path", "type"))
        for index in range(count):
            classes, label = layouts.generate(0, index, size)
            Image.fromarray(layouts.PALETTE[classes]).save(folder / f"{index:05d}.png")
            table.writerow((f"{index:05d}.png", layouts.LABELS[label]))
    return manifest


def of_manifest(manifest: Path, size: int, **more: Any) -> dict[str, Any]:
    """Settings (by dotted key) of the phases' model on these files: base.yaml's, trained by the RGB error alone, which
    is all that the plain scripts train by. No palette: then there are no classes to measure either."""
    return {"data.source": "manifest", "data.manifest": str(manifest), "data.image_size": size, "data.limit": None,
            **PHASES, **more}


def mostly_training(images: int) -> list[float]:
    """A split with as little to validate with as the chance of a split by hash allows: 1% of many images."""
    share = min(0.25, max(0.01, 6 / images))
    return [1 - share, share, 0.0]


# As in sweeps/base.yaml.
PHASES = {"model.latent_channels": 8, "model.base_channels": 32, "model.downsampling_steps": 4,
          "train.batch_size": 16, "train.learning_rate": 1e-4, "train.weight_decay": 0.01, "train.patience": None}
