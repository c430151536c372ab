"""Splats as arrays: in files, and in the order of a curve."""

from __future__ import annotations

import io
import math
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from splatsets import seeds, uniform_splats

from autoenc.data.images import BrokenImage
from autoenc.data.splats import (
    CURVES,
    PARTS,
    BrokenSplats,
    curve_index,
    decode,
    in_order,
    probe,
    read_splats,
    write_splats,
)
from autoenc.errors import InputError

# Files ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    splats = uniform_splats(20)
    return {name: splats[:, part] for name, part in PARTS.items()}


def saved(path, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    splats = uniform_splats(20)
    write_splats(tmp_path / "a.npz", splats)
    read = read_splats(tmp_path / "a.npz", 20)
    assert read.dtype == np.float32 and np.array_equal(read, splats)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_files_of_other_makers(tmp_path, arrays, dtype):
    """Other floating point, compressed, rotations without a second axis, columns in Fortran's order, further arrays."""
    arrays = {name: np.asfortranarray(array.astype(dtype)) for name, array in arrays.items()}
    np.savez_compressed(tmp_path / "a.npz", **{**arrays, "rot": arrays["rot"][:, 0], "note": np.arange(3)})
    read = read_splats(tmp_path / "a.npz", 20)
    for name, part in PARTS.items():
        assert np.allclose(read[:, part], arrays[name].astype(np.float32), atol=1e-3)


def test_rotations_are_read_modulo_a_half_turn(tmp_path, arrays):
    arrays["rot"] = np.linspace(-7, 7, 20)
    arrays["rot"][:3] = -1e-12, math.pi, 0.0
    read = read_splats(saved(tmp_path / "a.npz", arrays), 20)[:, 4]
    assert (read >= 0).all() and (read < np.float32(math.pi)).all()
    assert np.allclose(np.sin(read - arrays["rot"]), 0, atol=1e-5)


def spoilt(name: str, value: float, row: int = 3):
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][row, -1] = value
    return spoil


def replaced(name: str, change):
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = change(arrays[name])
    return spoil


HEADERS = [
    (lambda arrays: arrays.pop("rot"), ["no array rot"]),
    (lambda arrays: arrays.update(feats=arrays.pop("feat")), ["no array feat", "feats"]),
    (replaced("xy", lambda xy: xy.T.copy()), ["xy has the shape (2, 20)", "(20, 2)"]),
    (replaced("feat", lambda feat: feat[:, :1]), ["feat has the shape (20, 1)"]),
    (replaced("rot", lambda rot: rot[..., None]), ["rot has the shape (20, 1, 1)", "(20,) or (20, 1)"]),
    (replaced("scale", lambda scale: scale[0]), ["scale has the shape (2,)"]),
    (replaced("xy", lambda xy: (xy * 100).astype(np.int64)), ["xy is of int64", "floating point"]),
    (replaced("feat", lambda feat: feat.astype(complex)), ["feat is of complex128"]),
    (replaced("rot", lambda rot: rot.astype(object)), ["rot is of pickled objects"]),
    (lambda arrays: arrays.update({name: array[:7] for name, array in arrays.items()}),
     ["holds 7 splats, 20 are expected", "data.splats"]),
    (replaced("rot", lambda rot: rot[:19]), ["rot holds 19 splats"]),
]
VALUES = [
    (spoilt("xy", math.nan), ["xy holds NaN", "splat 3"]),
    (spoilt("rot", math.inf), ["rot holds NaN or infinity"]),
    (spoilt("scale", 0.0), ["scale holds 0", "splat 3"]),
    (spoilt("scale", -3.2), ["scale holds -3.2", "logarithms"]),
    (spoilt("scale", 9.0), ["scale holds 9", "pixels"]),
    (spoilt("xy", 63.0), ["xy holds 63", "pixels"]),
    (spoilt("feat", 255.0), ["feat holds 255", "127.5"]),
]


@pytest.mark.parametrize("spoil, said", HEADERS + VALUES)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(tmp_path, arrays, spoil, said):
    spoil(arrays)
    path = saved(tmp_path / "a.npz", arrays)
    with pytest.raises(InputError) as caught:
        read_splats(path, 20)
    for part in [path, *said]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil, said", HEADERS)
def test_probing_finds_what_the_headers_tell(tmp_path, arrays, spoil, said):
    probe(saved(tmp_path / "a.npz", arrays), 20)
    spoil(arrays)
    with pytest.raises(BrokenSplats, match=said[0].replace("(", r"\(").replace(")", r"\)")):
        probe(saved(tmp_path / "a.npz", arrays), 20)


def test_all_faults_of_a_file_are_told_together(tmp_path, arrays):
    spoilt("xy", math.nan)(arrays)
    spoilt("feat", 200.0)(arrays)
    with pytest.raises(InputError, match=r"xy holds NaN.*; feat holds 200"):
        read_splats(saved(tmp_path / "a.npz", arrays), 20)


def test_what_is_no_npz_file(tmp_path, arrays):
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    np.save(tmp_path / "bare.npy", arrays["xy"])
    with zipfile.ZipFile(tmp_path / "text in it.npz", "w") as archive:
        for name in PARTS:
            archive.writestr(f"{name}.npy", "nothing")
    for name, said in (("absent.npz", "No such file"), ("text.npz", "no .npz file"), ("bare.npy", "no .npz file"),
                       ("text in it.npz", "broken .npz file"), ("", "directory")):
        with pytest.raises(InputError, match=said):
            read_splats(tmp_path / name, 20)


def test_an_array_that_claims_to_be_huge_is_not_allocated(tmp_path, arrays):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 2)})
    path = saved(tmp_path / "a.npz", {name: array for name, array in arrays.items() if name != "xy"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("xy.npy", header.getvalue())
    with pytest.raises(InputError, match="xy holds 1125899906842624 splats"):
        read_splats(path, 20)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_in_a_file_is_executed(tmp_path, arrays):
    path = saved(tmp_path / "a.npz", {name: array for name, array in arrays.items() if name != "rot"})
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|O", "fortran_order": False, "shape": (20, 1)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rot.npy", content.getvalue() + pickle.dumps([Evil()] * 20))
    with pytest.raises(InputError, match="pickled objects"):
        read_splats(path, 20)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_damage_is_told_or_harmless(tmp_path_factory, position, value, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    write_splats(path, uniform_splats(20))
    content = bytearray(path.read_bytes())
    position %= len(content)
    if cut:
        del content[position:]
    else:
        content[position] = value
    path.write_bytes(content)
    try:
        read = decode(str(path), 20)
    except BrokenImage:
        return
    assert read.shape == (20, 8) and np.isfinite(read).all()


# Order ----------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(seed=seeds, curve=st.sampled_from(CURVES), grid=st.booleans())
def test_sorting_depends_on_the_set_alone(seed, curve, grid):
    rng = np.random.default_rng(seed)
    splats = uniform_splats(40, seed, (2,))
    if grid:      # many splats in one cell of the curve, some of them twins in all but one number, some entirely
        splats[..., :2] = np.round(splats[..., :2])
        splats[..., 2:] = np.round(splats[..., 2:] * 2) / 2
    ordered = in_order(splats, curve)
    assert ordered.dtype == splats.dtype
    for before, after in zip(splats, ordered, strict=True):
        assert sorted(map(tuple, before)) == sorted(map(tuple, after))
        assert np.array_equal(in_order(rng.permutation(before), curve), after)
        assert (np.diff(curve_index(after[:, :2], curve)) >= 0).all()
    assert np.array_equal(in_order(ordered, curve), ordered)


@pytest.mark.parametrize("bits", [1, 2, 5, 7])
def test_the_hilbert_curve_steps_to_a_neighbour(bits):
    side = 2**bits
    axis = (2 * np.arange(side) + 1) / side - 1
    cells = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    path = cells[np.argsort(curve_index(cells))]
    assert np.allclose(np.abs(np.diff(path, axis=0)).sum(1), 2 / side)


def test_the_morton_curve_interleaves_bits():
    axis = (2 * np.arange(8) + 1) / 8 - 1
    x, y = np.meshgrid(np.arange(8), np.arange(8))
    place = curve_index(np.stack(np.meshgrid(axis, axis), -1), "morton") >> 26
    expected = sum(((x >> bit & 1) << 2 * bit) + ((y >> bit & 1) << 2 * bit + 1) for bit in range(3))
    assert np.array_equal(place, expected)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, curve=st.sampled_from(CURVES))
def test_neighbours_in_the_order_are_near(seed, curve):
    xy = in_order(uniform_splats(512, seed), curve)[:, :2]
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    # 512 points of [-1, 1]² are 2 / sqrt(512) = 0.088 apart in a grid, and 1.04 on average when not sorted.
    assert steps.mean() < 0.16
    assert np.median(steps) < 0.12


@given(hnp.arrays(np.float64, (5, 2), elements=st.floats(-1e9, 1e9)))
def test_points_outside_count_as_at_the_border(xy):
    assert np.array_equal(curve_index(xy), curve_index(np.clip(xy, -1, 1)))


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="peano"):
        in_order(uniform_splats(3), "peano")
