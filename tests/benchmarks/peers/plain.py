"""What both plain scripts share: files decoded by Pillow in a DataLoader, and a training loop as in the tutorials.

The model is the product's own (autoenc.model), so that what is compared is what is around it.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from autoenc.config import make_config
from autoenc.model import make_model


class Pictures(Dataset):
    """Images of a manifest, decoded whenever they are asked for."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def paths_of(manifest: Path) -> list[Path]:
    with manifest.open(newline="") as file:
        return [manifest.parent / row["layout_path"] for row in csv.DictReader(file)]


def loaders(options: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Of the training and the validation images: the manifest's first ones, and those after them."""
    paths, train = paths_of(options.manifest), options.train
    return (DataLoader(Pictures(paths[:train], options.size), batch_size=options.batch_size, shuffle=True),
            DataLoader(Pictures(paths[train:train + options.val], options.size), batch_size=options.batch_size))


def build(options: argparse.Namespace, latent_channels: int) -> torch.nn.Module:
    config = make_config({"data.image_size": options.size, "model.latent_channels": latent_channels,
                          "model.base_channels": options.base_channels, "model.downsampling_steps": options.steps},
                         "the peer")
    return make_model(config, {"classes": (), "labels": ()}, seed=42)


def train_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    for images in loader:
        optimizer.zero_grad()
        functional.mse_loss(model(images)["rgb"], images).backward()
        optimizer.step()


@torch.no_grad()
def validate(model: torch.nn.Module, loader: DataLoader) -> float:
    """Mean squared error over the split."""
    model.eval()
    return sum(functional.mse_loss(model(images)["rgb"], images, reduction="sum").item() / images[0].numel()
               for images in loader) / len(loader.dataset)


def told(options: argparse.Namespace, trial: object, began: float) -> None:
    """An epoch's line in the log, from which the benchmark reads when slots were busy."""
    with (options.output / "epochs.txt").open("a") as log:
        log.write(f"{trial} {began} {time.time()}\n")


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="pixels a side that images are trained at")
    parser.add_argument("--train", type=int, required=True, help="training images")
    parser.add_argument("--val", type=int, required=True, help="validation images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--base-channels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="downsampling steps")
    parser.add_argument("--slots", type=int, default=2, help="trials at once")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return options
