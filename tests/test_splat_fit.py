"""Splats fitted to images: where they lie, how they lie, and what they render to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from autoenc.data import compositions, layouts
from autoenc.data.splat_fit import fit, fit_all, refine
from autoenc.data.splats import read_splats, write_splats
from autoenc.render import render

torch.set_num_threads(1)


def psnr(splats: np.ndarray, image: np.ndarray) -> float:
    rendered = render(torch.from_numpy(splats)[None], len(image))[0].permute(1, 2, 0).clamp(-1, 1).numpy()
    return 10 * math.log10(4 / ((image / 127.5 - 1 - rendered) ** 2).mean())


def edge(angle: float, size: int = 64) -> np.ndarray:
    """Black and white with one pixel of grey, the border through the middle at an angle to x."""
    axis = (2 * np.arange(size) + 1) / size - 1
    side = axis[:, None] * math.cos(angle) - axis[None, :] * math.sin(angle)
    return np.repeat(np.rint(255 * np.clip(side * size / 2 + 0.5, 0, 1)).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("count, size", [(1, 16), (3, 16), (40, 8), (512, 8), (200, 33)])
def test_any_number_of_splats_for_any_size(count, size, tmp_path):
    splats = fit(compositions.generate(1, 2, size), count)
    assert splats.shape == (count, 8) and splats.dtype == np.float32
    assert (np.abs(splats[:, :2]) <= 1).all() and (np.abs(splats[:, 5:]) <= 1).all()
    write_splats(tmp_path / "a.npz", splats)      # what is fitted can be read
    assert np.array_equal(read_splats(tmp_path / "a.npz", count), splats)


def test_a_fit_depends_on_pixels_and_seed_alone():
    images = [compositions.generate(1, index, 24) for index in range(3)]
    first = list(fit_all(images, 60, seed=1))
    again = list(fit_all(iter(images[::-1]), 60, seed=1))[::-1]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(first[0], fit(images[0], 60, seed=2))
    torch.set_num_threads(2)
    try:
        assert np.array_equal(first[0], fit(images[0], 60, seed=1)) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("images, least, refined", [
    (np.stack([compositions.generate(1, index, 32) for index in range(4)]), 33, 39),
    (np.stack([layouts.PALETTE[layouts.generate(1, index, 32)[0]] for index in range(4)]), 20, 26)])
def test_rendered_splats_look_like_the_image(images, least, refined):
    """A quarter as many splats as pixels show the image, and more of it after refining."""
    splats = np.stack(list(fit_all(images, 256)))
    before = [psnr(*pair) for pair in zip(splats, images, strict=True)]
    after = [psnr(*pair) for pair in zip(refine(splats, images, 20), images, strict=True)]
    assert np.mean(before) > least and np.mean(after) > refined
    assert all(late > early for early, late in zip(before, after, strict=True))


def test_refining_by_batches_refines_each_image_alone():
    images = [compositions.generate(2, index, 16) for index in range(3)]
    together = list(fit_all(images, 30, refine_steps=5))
    for image, splats in zip(images, together, strict=True):
        alone, = fit_all([image], 30, refine_steps=5)
        assert np.allclose(alone, splats, atol=1e-3)
        assert splats.dtype == np.float32 and (np.abs(splats[:, 5:]) <= 1).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_refining_where_gradients_are_off(mode):
    image = compositions.generate(2, 0, 16)
    with mode():
        splats, = fit_all([image], 30, refine_steps=5)
    assert np.array_equal(splats, next(fit_all([image], 30, refine_steps=5)))


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 4, math.pi / 2, 2.5])
def test_splats_crowd_at_an_edge_and_lie_along_it(angle):
    splats = fit(edge(angle), 256)
    away = np.abs(splats[:, 1] * math.cos(angle) - splats[:, 0] * math.sin(angle))
    near = away < 3 / 32
    assert near.mean() > 0.5      # on less than a tenth of the area
    assert away.max() > 0.8       # and some are everywhere
    turned = np.abs(np.sin(splats[near, 4] - angle))
    assert np.median(turned) < 0.05
    ratio = splats[:, 2] / splats[:, 3]
    assert np.median(ratio[near]) > 3 and np.median(ratio[~near]) < 1.5


def test_size_follows_density():
    splats = fit(edge(0.4), 256)
    area = splats[:, 2] * splats[:, 3]
    nearest = cKDTree(splats[:, :2]).query(splats[:, :2], 4)[0][:, -1]
    assert np.corrcoef(np.log(area), np.log(nearest))[0, 1] > 0.8


def test_points_on_a_plain_image_are_blue_noise():
    """Farther from their neighbours than random ones, with nothing to render but the colour."""
    image = np.full((64, 64, 3), (200, 10, 90), np.uint8)
    splats = fit(image, 256)
    nearest = cKDTree(splats[:, :2]).query(splats[:, :2], 2)[0][:, 1] * math.sqrt(256) / 2
    assert nearest.mean() > 0.65 and nearest.min() > 0.2      # of random points: 0.5 on average, near 0 at least
    assert psnr(splats, image) > 60
