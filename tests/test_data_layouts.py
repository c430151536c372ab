"""Generated layouts: deterministic, sound as plans, varied."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from autoenc.data.layouts import CLASSES, LABELS, PALETTE, generate

WALL, FLOOR, BACKGROUND = (CLASSES.index(name) for name in ("wall", "floor", "background"))
FURNITURE = [index for index, name in enumerate(CLASSES) if name not in ("wall", "floor", "background")]


def regions(mask: np.ndarray) -> int:
    """Number of 4-connected regions."""
    left = {tuple(point) for point in np.argwhere(mask).tolist()}
    count = 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge.extend(near)
    return count


def test_the_same_everywhere():
    """Stored results hang on these pixels. If this fails on purpose, raise layouts.VERSION."""
    digest = hashlib.sha256()
    for size in (16, 64, 100):
        for index in range(20):
            classes, label = generate(42, index, size)
            digest.update(classes.tobytes() + bytes([label]))
    assert digest.hexdigest() == "e04ee5d5aa239cdf77df6b46063ab4e2e4d94a860e7c51fd77e2b6aa43fb98f3"


def test_an_item_depends_on_seed_and_index_alone():
    backwards = {index: generate(7, index, 32)[0] for index in reversed(range(10))}
    for index in range(10):
        assert np.array_equal(generate(7, index, 32)[0], backwards[index])
    assert not np.array_equal(generate(7, 0, 32)[0], generate(8, 0, 32)[0])
    assert not np.array_equal(generate(7, 0, 32)[0], generate(7, 1, 32)[0])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_plan_is_sound(size):
    for index in range(120):
        classes, label = generate(1, index, size)
        assert classes.shape == (size, size) and classes.dtype == np.uint8
        assert classes.max() < len(CLASSES)
        inside = (classes != WALL) & (classes != BACKGROUND)
        assert regions(inside) == 1, "a room without a door"
        assert np.isin(classes, FURNITURE).any(), "an empty home"
        # Around furniture there is floor, furniture or wall: it never stands outside or in an entrance.
        outside = np.pad(classes == BACKGROUND, 1, constant_values=True)
        furniture = np.isin(classes, FURNITURE)
        for rows, columns in (np.s_[:-2, 1:-1], np.s_[2:, 1:-1], np.s_[1:-1, :-2], np.s_[1:-1, 2:]):
            assert not (furniture & outside[rows, columns]).any()
        # An entrance: floor that meets the outside.
        assert any(((classes == FLOOR) & outside[rows, columns]).any()
                   for rows, columns in (np.s_[:-2, 1:-1], np.s_[2:, 1:-1], np.s_[1:-1, :-2], np.s_[1:-1, 2:]))
        assert LABELS[label] in ("room", "scene")


def test_a_single_room_fills_the_image_and_a_flat_has_inner_walls():
    rooms, flats = [], []
    for index in range(200):
        classes, label = generate(3, index, 64)
        (flats if LABELS[label] == "scene" else rooms).append(classes)
    assert 60 < len(rooms) < 140
    for classes in rooms:
        ys, xs = np.nonzero(classes != BACKGROUND)
        assert max(np.ptp(ys), np.ptp(xs)) > 0.75 * 64
    # Away from the outline, walls stand in flats only.
    walls = {name: [np.count_nonzero(classes[20:44, 20:44] == WALL) for classes in items]
             for name, items in (("room", rooms), ("flat", flats))}
    assert np.mean(np.array(walls["flat"]) > 10) > 0.95
    assert np.mean(np.array(walls["room"]) > 0) < 0.3


@pytest.mark.parametrize("size", [8, 9, 200, 512])
def test_other_sizes(size):
    for index in range(20):
        classes, _ = generate(0, index, size)
        assert classes.shape == (size, size)
        assert (classes == WALL).any()


def test_every_class_occurs_and_duplicates_are_rare():
    layouts = [generate(42, index, 32)[0] for index in range(400)]
    assert set(np.unique(layouts)) == set(range(len(CLASSES)))
    assert len({layout.tobytes() for layout in layouts}) == 400


def test_fast_enough():
    generate(0, 0, 64)
    start = time.process_time()
    for index in range(100):
        PALETTE[generate(0, index, 64)[0]]
    assert 100 / (time.process_time() - start) > 200
