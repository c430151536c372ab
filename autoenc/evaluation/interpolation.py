"""Straight lines between latents: how directly decoding follows them, and whether it finds back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoenc.data import Dataset
from autoenc.evaluation.splits import Figures
from autoenc.metrics import to_inputs, to_unit
from autoenc.model import Autoencoder, derived_seed

PAIRS, POINTS = 64, 11
SHOWN = 8
SEED = 42


@dataclass(frozen=True)
class Interpolation:
    figures: Figures
    ends: Tensor
    """(shown, 2, 3, H, W): the images of the first pairs"""
    decoded: Tensor
    """(shown, points, 3, H, W): between them"""


@torch.inference_mode()
def interpolate(model: Autoencoder, dataset: Dataset, split: str, spread: Tensor, batch: int = 64) -> Interpolation:
    """Decode :data:`POINTS` points, ends included, of the straight line between the latents of :data:`PAIRS` seeded
    pairs of different images (those that ``latent/smoothness`` takes); a VAE's are its posterior means.

    ``spread``: (C,) standard deviations of the latents, the measure of the cycle error. Figures, each a mean over pairs
    and quartiles: ``path``, path length over endpoint distance of the decoded rgb images, Euclidean (1: straight; pairs
    whose ends decode alike are left out); ``largest_step``, the longest of the steps over their mean (1: even);
    ``cycle_error``, root mean square of encode(decode(z)) - z over that of z about its mean, all points (0: found back;
    ``cycle_error_ends``: the ends alone, which are latents of images). NaN for fewer than two images.
    """
    rows = dataset.splits[split]
    device = next(model.parameters()).device
    rng = np.random.default_rng(derived_seed(SEED, "smoothness"))
    pairs = [rows[rng.choice(len(rows), size=2, replace=False)] for _ in range(PAIRS)] if len(rows) > 1 else []
    steps = torch.linspace(0, 1, POINTS, device=device)
    unit = spread.square().mean().sqrt().item()
    generator = torch.Generator(device)               # draws of a VAE, of which the means are taken
    found: dict[str, list[Tensor]] = {"path": [], "largest_step": [], "cycle_error": [], "cycle_error_ends": []}
    ends, decoded = [], []
    at_once = max(1, batch // POINTS)
    for start in range(0, len(pairs), at_once):
        several = np.stack(pairs[start:start + at_once])
        inputs = to_inputs(dataset.inputs[several.ravel()], device)
        first, last = model.mean_latent(model.encode(inputs, generator)).unflatten(0, (-1, 2)).unbind(1)
        points = first[:, None] + steps.view(-1, *[1] * (first.dim() - 1)) * (last - first)[:, None]
        outputs = model.decode(points.flatten(0, 1), heads={"rgb": None, model.gives: None})
        again = model.mean_latent(model.encode(outputs[model.gives], generator)).unflatten(0, (-1, POINTS))
        rgb = outputs["rgb"].unflatten(0, (-1, POINTS))
        lengths = (rgb[:, 1:] - rgb[:, :-1]).double().flatten(2).norm(dim=2)
        found["path"].append(lengths.sum(1) / (rgb[:, -1] - rgb[:, 0]).double().flatten(1).norm(dim=1))
        found["largest_step"].append(lengths.amax(1) / lengths.mean(1))
        squares = (again - points).double().square().flatten(2).mean(2)
        found["cycle_error"].append(squares.mean(1).sqrt() / unit)
        found["cycle_error_ends"].append(squares[:, [0, -1]].mean(1).sqrt() / unit)
        if start < SHOWN:
            ends.append(to_unit(dataset.images[several.ravel()], device).unflatten(0, (-1, 2)))
            decoded.append(rgb)
    if not pairs:
        empty = torch.zeros(0, 0, *dataset.images[0].transpose(2, 0, 1).shape)
        return Interpolation({"pairs": 0, "points": POINTS, **{name: _summary(np.empty(0)) for name in found}},
                             empty, empty)
    figures = {name: _summary(torch.cat(values).cpu().numpy()) for name, values in found.items()}
    return Interpolation({"pairs": len(pairs), "points": POINTS, **figures},
                         torch.cat(ends)[:SHOWN], torch.cat(decoded)[:SHOWN])


def _summary(values: np.ndarray) -> dict[str, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return dict.fromkeys(("mean", "q1", "median", "q3"), math.nan)
    q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
    return {"mean": float(values.mean()), "q1": q1, "median": median, "q3": q3}
