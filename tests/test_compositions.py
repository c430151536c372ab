"""Generated compositions: deterministic, the same at every size, varied."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from autoenc.data.compositions import generate


def test_the_same_everywhere():
    """Stored results hang on these pixels. If this fails on purpose, raise compositions.VERSION."""
    digest = hashlib.sha256()
    for size in (8, 32, 50):
        for index in range(20):
            digest.update(generate(42, index, size).tobytes())
    assert digest.hexdigest() == "02800ad21e2f847e2fe88a33c31698f93672203a79a8c81784e9284df1533623"


def test_an_item_depends_on_seed_and_index_alone():
    backwards = {index: generate(7, index, 16) for index in reversed(range(6))}
    for index in range(6):
        assert np.array_equal(generate(7, index, 16), backwards[index])
    assert not np.array_equal(generate(7, 0, 16), generate(8, 0, 16))
    assert not np.array_equal(generate(7, 0, 16), generate(7, 1, 16))


@pytest.mark.parametrize("size", [8, 33, 64])
def test_images_of_any_size(size):
    image = generate(1, 2, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8


def test_every_size_shows_the_same_composition():
    """An image of 96 px, averaged over 3 by 3 pixels, is the one of 32 px but for the sub-pixels at edges."""
    for index in range(10):
        small = generate(3, index, 32).astype(float)
        large = generate(3, index, 96).reshape(32, 3, 32, 3, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 1.0


def test_compositions_vary():
    images = np.stack([generate(5, index, 24) for index in range(120)])
    assert len({image.tobytes() for image in images}) == 120
    floats = images.reshape(120, -1) / 127.5 - 1
    # Backgrounds and shapes, not noise and not plain: neighbours are alike, images are not.
    assert np.ptp(images.reshape(120, -1), axis=1).min() > 15
    steps = np.abs(np.diff(images.astype(float), axis=2)).mean((1, 2, 3))
    assert steps.max() < 60 and np.median(steps) < 20 and np.std(steps) > 2
    assert floats.var(0).mean() > 0.15
    # Hues all around, dark and light.
    means = images.reshape(120, -1, 3).mean(1)
    assert np.bincount(means.argmax(1), minlength=3).min() > 15
    assert means.mean(1).min() < 60 and means.mean(1).max() > 160
    # No single picture explains them: 16 principal components keep well below all of it.
    values = np.linalg.svd(floats - floats.mean(0), compute_uv=False) ** 2
    assert values[:16].sum() / values.sum() < 0.95
