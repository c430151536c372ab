"""Splats fitted to images: placed, shaped and coloured from the image at once, and refined by gradient if wanted."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch.nn import functional

from autoenc.data.splat_targets import TARGETS
from autoenc.data.splats import COUNT, curve_index
from autoenc.render import EMPTY, gaussians, render

# With every change of what is fitted, autoenc.data.splats.FITTING is raised.

UNIFORM = 0.2            # share of the splats that is spread evenly, as in Image-GS (Zhang et al. 2025)
MOST_DENSE = 1.0         # splats a pixel: more of them would show nothing that one does not
BLUR = 0.6               # pixels: standard deviation of what gradients, and then their products, are smoothed by
LLOYD_STEPS = 3
WIDTH = 0.6              # standard deviation of a splat by the distance at which it has its share of the plane
LONGEST = 5.0            # ratio of a splat's axes along a straight edge
NEIGHBOURS = 4
COLOUR_STEPS = 4
BATCH = 16               # images refined at a time
RATES = {"xy": 0.004, "logcov": 0.04, "feat": 0.02}      # of Adam, by group of the target logcov


def fit(image: np.ndarray, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Splats float32 (count, 8) (see autoenc.data.splats) of an image, uint8 (S, S, 3), in no order.

    The result depends on the image's pixels and the seed alone; to the bit, also on the processor. More splats crowd
    where the image changes: a share of them is spread evenly, the density of the others follows the gradient's
    magnitude. They are placed at equal steps of that density along a Hilbert curve (Steigleder and McCool 2003) and
    moved apart by a few steps of weighted Lloyd relaxation (Secord 2002, Weighted Voronoi Stippling). The structure
    tensor, summed over the colours (Di Zenzo 1986), turns and stretches them along edges; their size follows the
    distance of their neighbours; their colour is the mean of the image under their footprint, sharpened by a few steps
    of back-projection (Irani and Peleg 1991): what is drawn with means of colours would be blurred a second time.
    """
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big")])
    size, pixels = len(image), image.astype(np.float32) / 127.5 - 1
    magnitude, tensor = _structure(pixels)
    xy = _spread(_density(magnitude, count), count, rng)
    along, straight = _orientation(tensor, xy, size)
    # The disc around a splat that reaches k neighbours holds about k splats and a half: that is the splat's own area.
    reach = cKDTree(xy).query(xy, NEIGHBOURS + 1)[0][:, -1] / math.sqrt(NEIGHBOURS + 0.5)
    width = WIDTH * np.clip(reach, 0.5 / size, 1.0)
    stretch = np.sqrt(1 + (LONGEST - 1) * straight)
    splats = np.column_stack((xy, width * stretch, width / stretch, along, np.zeros((count, 3)))).astype(np.float32)
    with one_thread():
        splats[:, 5:] = _colours(splats, pixels.reshape(-1, 3), size)
    return splats


def fit_all(images: Iterable[np.ndarray], count: int = COUNT, seed: int = 0, refine_steps: int = 0,
            device: torch.device | str = "cpu") -> Iterator[np.ndarray]:
    """The splats of one image after the other, those of :func:`fit`; with ``refine_steps`` they are refined, a batch at
    a time on the device. Images are uint8 (S, S, 3), all of one size."""
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == (BATCH if refine_steps else 1):
            yield from _fitted(batch, count, seed, refine_steps, device)
            batch = []
    if batch:
        yield from _fitted(batch, count, seed, refine_steps, device)


def _fitted(images: list[np.ndarray], count: int, seed: int, steps: int, device: torch.device | str) -> np.ndarray:
    splats = np.stack([fit(image, count, seed) for image in images])
    return refine(splats, np.stack(images), steps, device) if steps else splats


@torch.inference_mode(False)
@torch.enable_grad()
def refine(splats: np.ndarray, images: np.ndarray, steps: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Splats (B, N, 8) after some steps of Adam on the squared error of their rendering against the images, uint8
    (B, S, S, 3). Centres and the logarithm of the covariance move freely, colours stay within [-1, 1]."""
    target, logcov = torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 127.5 - 1, TARGETS["logcov"]
    start = logcov.encode(torch.from_numpy(splats).to(device))
    moved = {name: start[..., part].clone().requires_grad_() for name, part in logcov.groups.items()}
    optimizer = torch.optim.Adam([{"params": [moved[name]], "lr": rate} for name, rate in RATES.items()],
                                 betas=(0.9, 0.99))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.zero_grad()
        rendered = render(logcov.decode(torch.cat(list(moved.values()), -1)), images.shape[1])
        # A sum over images: each moves as it would alone.
        (functional.mse_loss(rendered, target) * len(images)).backward()
        optimizer.step()
        with torch.no_grad():
            moved["feat"].clamp_(-1, 1)
            moved["xy"].clamp_(-1.05, 1.05)
    with torch.no_grad():
        return logcov.decode(torch.cat(list(moved.values()), -1)).cpu().numpy()


def _structure(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of an image (S, S, 3): the gradient's magnitude (S, S) in the neighbourhood, so that a thin line has it on the
    line, too; and the structure tensor's xx, yy and xy, (3, S, S)."""
    blur, slope = _filters(len(pixels))
    channels = pixels.transpose(2, 0, 1)
    dx, dy = blur @ channels @ slope.T, slope @ channels @ blur.T
    tensor = blur @ np.stack(((dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0))) @ blur.T
    return np.sqrt(tensor[0] + tensor[1]), tensor


@functools.lru_cache(maxsize=8)
def _filters(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian and its derivative along one axis as matrices (size, size), the border pixels repeated."""
    offsets = np.arange(-4, 5)
    taps = np.exp(-offsets**2 / (2 * BLUR**2))
    taps /= taps.sum()
    matrices = np.zeros((2, size, size), dtype=np.float32)
    for offset, tap in zip(offsets, taps, strict=True):
        where = np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)
        np.add.at(matrices[0], where, tap)
        np.add.at(matrices[1], where, tap * offset / BLUR**2)
    return matrices[0], matrices[1]


def _density(magnitude: np.ndarray, count: int) -> np.ndarray:
    """Splats a pixel, (S, S), ``count`` in all."""
    even = np.full_like(magnitude, count / magnitude.size)
    if magnitude.max() < 1e-4:      # a plain image: what is there is rounding
        return even
    most = max(MOST_DENSE, 2 * count / magnitude.size)
    density = magnitude * (count / magnitude.sum())
    for _ in range(3):      # what is cut off at the peaks goes to the slopes
        density = np.minimum(density, most)
        density *= count / density.sum()
    return UNIFORM * even + (1 - UNIFORM) * density


def _spread(density: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points (count, 2) in [-1, 1]², distributed by the density and apart from each other."""
    size = len(density)
    centres, order, weight = _pixels(size), _along_curve(size), density.ravel().astype(np.float64)
    reached = np.cumsum(weight[order])
    steps = (np.arange(count) + rng.random(count)) * (reached[-1] / count)
    points = centres[order[np.minimum(np.searchsorted(reached, steps, side="right"), len(order) - 1)]]
    points = points + (2 * rng.random((count, 2)) - 1) / size
    for _ in range(LLOYD_STEPS):
        owner = cKDTree(points).query(centres)[1]
        mass = np.bincount(owner, weight, count)
        moved = np.column_stack([np.bincount(owner, weight * centres[:, axis], count) for axis in (0, 1)])
        points = np.where(mass[:, None] > 0, moved / np.maximum(mass, 1e-12)[:, None], points)
    return points


@functools.lru_cache(maxsize=8)
def _pixels(size: int) -> np.ndarray:
    """The centres (S², 2) of the pixels, row by row."""
    axis = (2 * np.arange(size) + 1) / size - 1
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


@functools.lru_cache(maxsize=8)
def _along_curve(size: int) -> np.ndarray:
    return np.argsort(curve_index(_pixels(size)))


def _orientation(tensor: np.ndarray, xy: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At each point the direction of the edge, in [0, π), and how much it is one: the coherence in [0, 1] of the
    structure tensor, which loses its say where there is no more than noise."""
    column, row = np.clip(((xy.T + 1) * size / 2).astype(int), 0, size - 1)
    xx, yy, mixed = tensor[:, row, column].astype(np.float64)
    across = np.arctan2(2 * mixed, xx - yy) / 2
    coherence = np.hypot(xx - yy, 2 * mixed) / (xx + yy + 1e-4)
    along = np.mod(across + math.pi / 2, math.pi)
    return np.where(along.astype(np.float32) < np.float32(math.pi), along, 0.0), coherence


@contextmanager
def one_thread() -> Iterator[None]:
    """An image is too little work for more: threads that wait for each other make it several times as slow on a busy
    machine. And sums come out the same with however many torch may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _colours(splats: np.ndarray, pixels: np.ndarray, size: int) -> np.ndarray:
    """The colours (N, 3) of splats whose other columns stand, from the image's pixels (S², 3)."""
    weights = gaussians(torch.from_numpy(splats)[None], size)[0].flatten(1)      # (N, S²)
    target = torch.from_numpy(pixels).T.contiguous()
    each, footprint = weights.sum(0) + EMPTY, weights.sum(1)           # of a pixel (S²,), of a splat (N,)
    colours = target @ weights.T / footprint
    for _ in range(COLOUR_STEPS):
        rendered = colours @ weights / each
        colours = (colours + (target - rendered) @ weights.T / footprint).clamp_(-1, 1)
    return colours.T.numpy()
