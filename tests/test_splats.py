"""Splats as arrays, in files and as targets; and back to images."""

from __future__ import annotations

import io
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoenc.data.images import BrokenImage
from autoenc.data.splat_targets import LEAST_STD, TARGETS, fit_normalisation, longer_first
from autoenc.data.splats import (
    CURVES,
    LARGEST,
    PARTS,
    SMALLEST,
    BrokenSplats,
    curve_index,
    decode,
    in_order,
    probe,
    read_splats,
    write_splats,
)
from autoenc.errors import InputError
from autoenc.evaluation.reach import fit_pca, pca_reach
from autoenc.render import EMPTY, PIXEL_VARIANCE, gaussians, render

torch.set_num_threads(1)

seeds = st.integers(0, 2**32 - 1)


def random_splats(count: int, seed: int = 0, sets: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (*sets, count)
    parts = (rng.uniform(-1, 1, (*shape, 2)), np.exp(rng.uniform(-5, -0.5, (*shape, 2))),
             rng.uniform(0, math.pi, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3)))
    return np.concatenate(parts, -1).astype(np.float32)


def covariances(raw: torch.Tensor) -> torch.Tensor:
    """(…, N, 2, 2), written out from the definition."""
    cos, sin = raw[..., 4].cos(), raw[..., 4].sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return turn @ torch.diag_embed(raw[..., 2:4].square()) @ turn.transpose(-1, -2)


# Files

@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    splats = random_splats(20)
    return {name: splats[:, part] for name, part in PARTS.items()}


def saved(path, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    splats = random_splats(20)
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
    write_splats(path, random_splats(20))
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


# Order

@settings(max_examples=60, deadline=None)
@given(seed=seeds, curve=st.sampled_from(CURVES), grid=st.booleans())
def test_sorting_depends_on_the_set_alone(seed, curve, grid):
    rng = np.random.default_rng(seed)
    splats = random_splats(40, seed, (2,))
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
    xy = in_order(random_splats(512, seed), curve)[:, :2]
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    # 512 points of [-1, 1]² are 2 / sqrt(512) = 0.088 apart in a grid, and 1.04 on average when not sorted.
    assert steps.mean() < 0.16
    assert np.median(steps) < 0.12


@given(hnp.arrays(np.float64, (5, 2), elements=st.floats(-1e9, 1e9)))
def test_points_outside_count_as_at_the_border(xy):
    assert np.array_equal(curve_index(xy), curve_index(np.clip(xy, -1, 1)))


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="peano"):
        in_order(random_splats(3), "peano")


# Targets

raws = st.builds(lambda seed: torch.from_numpy(random_splats(9, seed, (3,))).double(), seeds)


@settings(max_examples=60, deadline=None)
@given(raw=raws, target=st.sampled_from(sorted(TARGETS)), turns=st.integers(-2, 2), swap=st.booleans())
def test_targets_come_back_as_the_same_gaussians(raw, target, turns, swap):
    kind = TARGETS[target]
    same = raw.clone()      # the same splats under another name
    same[..., 4] += turns * math.pi
    if swap:
        same[..., 2:4], same[..., 4] = same[..., [3, 2]], same[..., 4] + math.pi / 2
    columns = kind.encode(same)
    assert columns.shape == (*raw.shape[:-1], len(kind.columns))
    back = kind.decode(columns)
    assert back.shape == raw.shape
    assert torch.allclose(covariances(back), covariances(raw), rtol=1e-9, atol=1e-12)
    assert torch.equal(back[..., :2], raw[..., :2]) and torch.equal(back[..., 5:], raw[..., 5:])
    assert (back[..., 4] >= 0).all() and (back[..., 4] < math.pi).all()
    if target != "raw":      # one splat, one target, whatever it is called
        assert torch.allclose(columns, kind.encode(raw), atol=1e-9)
    assert torch.allclose(longer_first(back)[..., :4], longer_first(raw)[..., :4], rtol=1e-9)
    assert torch.allclose((longer_first(back) - longer_first(raw))[..., 4].sin(), torch.zeros(()).double(), atol=1e-7)


def test_columns_and_groups_of_each_target():
    assert {name: len(kind.columns) for name, kind in TARGETS.items()} == {"raw": 8, "canonical": 9, "logcov": 8}
    for kind in TARGETS.values():
        parts = [column for part in kind.groups.values() for column in kind.columns[part]]
        assert parts == list(kind.columns)


def test_logcov_is_the_matrix_logarithm():
    raw = torch.from_numpy(random_splats(5)).double()
    columns = TARGETS["logcov"].encode(raw)
    matrix = torch.stack((columns[..., 2:4], columns[..., 3:5]), -2)
    assert torch.allclose(torch.linalg.matrix_exp(matrix), covariances(raw))


@pytest.mark.parametrize("target", ["canonical", "logcov"])
def test_targets_do_not_jump_where_the_angle_does(target):
    raw = torch.tensor([[0.0, 0.0, 0.2, 0.05, 0.001, 0, 0, 0], [0.0, 0.0, 0.2, 0.05, math.pi - 0.001, 0, 0, 0]])
    near, far = TARGETS[target].encode(raw), TARGETS["raw"].encode(raw)
    assert (near[0] - near[1]).abs().max() < 0.02 and (far[0] - far[1]).abs().max() > 3


@settings(max_examples=60, deadline=None)
@given(target=st.sampled_from(sorted(TARGETS)), values=hnp.arrays(np.float32, (2, 4, 9), elements=st.one_of(
    st.sampled_from([0.0, -0.0, 1e-30]), st.floats(-1e4, 1e4, width=32))))
def test_any_output_decodes_to_splats_with_a_gradient(target, values):
    kind = TARGETS[target]
    columns = torch.from_numpy(values[..., :len(kind.columns)]).requires_grad_()
    raw = kind.decode(columns)
    raw.sum().backward()
    assert torch.isfinite(raw).all() and torch.isfinite(columns.grad).all()
    assert (raw[..., 2:4] >= 0.99 * SMALLEST).all() and (raw[..., 2:4] <= 1.01 * LARGEST).all()
    assert (raw[..., 4] >= 0).all() and (raw[..., 4] < math.pi).all()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_targets_have_the_right_gradients(target):
    raw = torch.from_numpy(random_splats(3, 5)).double().requires_grad_()
    kind = TARGETS[target]
    assert torch.autograd.gradcheck(kind.encode, raw)
    assert torch.autograd.gradcheck(kind.decode, kind.encode(raw).detach().requires_grad_())


# Normalisation

@settings(max_examples=30, deadline=None)
@given(seed=seeds, target=st.sampled_from(sorted(TARGETS)), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_normalised_columns_have_mean_0_and_deviation_1(seed, target, cuts):
    splats = random_splats(16, seed, (12,))
    splats[..., 7] = 0.25      # a column that does not vary
    columns = TARGETS[target].encode(torch.from_numpy(splats).double())
    norm = fit_normalisation(target, np.split(splats, sorted(cuts)))
    assert norm.mean.dtype == norm.std.dtype == torch.float32
    normal = norm.apply(columns)
    assert torch.allclose(normal.mean((0, 1)), torch.zeros(()).double(), atol=1e-3)
    assert torch.allclose(normal.std((0, 1), correction=0)[:-1], torch.ones(()).double(), atol=1e-4)
    assert norm.std[-1] == LEAST_STD
    assert torch.allclose(norm.invert(normal), columns, atol=1e-12)
    assert torch.allclose(norm.invert(norm.apply(columns.float())), columns.float(), atol=1e-5)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no splats"):
        fit_normalisation("raw", [np.empty((0, 16, 8), np.float32)])


# Rendering

def plain_render(splats: torch.Tensor, size: int) -> torch.Tensor:
    """One image (3, size, size) of splats (N, 8): the formula, pixel by pixel and splat by splat."""
    rows = []
    noise = PIXEL_VARIANCE * (2 / size) ** 2 * torch.eye(2, dtype=splats.dtype)
    inverses = [torch.linalg.inv(covariance + noise) for covariance in covariances(splats)]
    for row in range(size):
        for column in range(size):
            point = torch.tensor([(2 * column + 1) / size - 1, (2 * row + 1) / size - 1], dtype=splats.dtype)
            total, colour = torch.zeros((), dtype=splats.dtype), torch.zeros(3, dtype=splats.dtype)
            for splat, inverse in zip(splats, inverses, strict=True):
                away = point - splat[:2]
                weight = torch.exp(-0.5 * away @ inverse @ away)
                total, colour = total + weight, colour + weight * splat[5:]
            rows.append(colour / (total + EMPTY))
    return torch.stack(rows).T.reshape(3, size, size)


def test_rendering_and_its_gradient_equal_a_plain_loop():
    splats = torch.from_numpy(random_splats(4, 3, (2,))).double().requires_grad_()
    with torch.no_grad():
        splats[..., 2:4] += 0.1
    weight = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.stack([plain_render(one, 4) for one in splats])
    fast = render(splats, 4)
    assert torch.allclose(fast, plain, atol=1e-12)
    wanted, = torch.autograd.grad((plain * weight).sum(), splats)
    found, = torch.autograd.grad((fast * weight).sum(), splats)
    assert torch.allclose(found, wanted, atol=1e-10)
    assert torch.autograd.gradcheck(lambda given: render(given, 3), splats)


def test_a_splat_lies_where_the_coordinates_say():
    """x to the right, y down, the first axis turned from x towards y."""
    splat = torch.tensor([[[0.5, -0.5, 0.3, 0.05, math.pi / 4, 1.0, 1.0, 1.0]]])
    weight = gaussians(splat, 32)[0, 0]
    row, column = divmod(int(weight.argmax()), 32)
    assert abs((2 * row + 1) / 32 - 1 + 0.5) < 0.05 and abs((2 * column + 1) / 32 - 1 - 0.5) < 0.05
    assert weight[8 + 3, 24 + 3] > 10 * weight[8 + 3, 24 - 3]      # long from top left to bottom right


@pytest.mark.parametrize("chunk", [1, 3 * 7 * 64, 10**9])
def test_chunks_do_not_show(chunk):
    splats = torch.from_numpy(random_splats(7, 1, (5,))).requires_grad_()
    whole, parts = render(splats, 8), render(splats, 8, chunk)
    assert torch.allclose(whole, parts, atol=1e-6)
    gradients = [torch.autograd.grad(image.square().sum(), splats)[0] for image in (whole, parts)]
    assert torch.allclose(*gradients, atol=1e-4, rtol=1e-4)


def test_a_chunk_bounds_what_is_held_for_the_gradient():
    """Of 32 images no weights are kept between the pass and the way back."""
    kept = []
    splats = torch.from_numpy(random_splats(64, 1, (32,))).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        render(splats, 32, 64 * 32 * 32)
    assert sum(kept) < 32 * 64 * 32 * 32 / 20


def test_half_precision_does_not_reach_the_renderer():
    splats = torch.from_numpy(random_splats(32, 2, (1,)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = render(splats, 16)
    assert inside.dtype == torch.float32 and torch.equal(inside, render(splats, 16))


@settings(max_examples=30, deadline=None)
@given(values=hnp.arrays(np.float32, (1, 4, 8), elements=st.one_of(
    st.sampled_from([0.0, 1e-30]), st.floats(-100, 100, width=32))))
def test_rendering_is_finite_whatever_a_model_gives(values):
    splats = torch.from_numpy(values).requires_grad_()
    image = render(splats, 8)
    image.sum().backward()
    assert torch.isfinite(image).all() and torch.isfinite(splats.grad).all()
    assert image.abs().max() <= max(1e-6, splats[..., 5:].abs().max() * 1.001)


def test_no_splat_and_no_image():
    assert torch.equal(render(torch.empty(2, 0, 8), 4), torch.zeros(2, 3, 4, 4))
    assert render(torch.empty(0, 5, 8), 4).shape == (0, 3, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_renders_the_same():
    splats = torch.from_numpy(random_splats(512, 2, (4,)))
    images, gradients = [], []
    for device in ("cpu", "cuda"):
        there = splats.to(device).requires_grad_()
        image = render(there, 64)
        gradients.append(torch.autograd.grad(image.square().mean(), there)[0].cpu())
        images.append(image.detach().cpu())
    assert torch.allclose(*images, atol=1e-4)
    assert torch.allclose(*gradients, atol=1e-5)


# What a latent of some size can reach

def test_pca_keeps_a_share_of_noise_and_all_of_what_is_flat():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1200, 128, generator=generator)
    reach = pca_reach(noise[:1000], noise[1000:], [16, 128])
    assert reach[16].val == pytest.approx(16 / 128, abs=0.02) and reach[16].train > reach[16].val
    assert reach[128].train == pytest.approx(1, abs=1e-5) and reach[128].val == pytest.approx(1, abs=1e-5)
    flat = torch.randn(60, 4, generator=generator) @ torch.randn(4, 500, generator=generator) + 3
    reach = pca_reach(flat[:40], flat[40:], [3, 4])
    assert reach[4].val == pytest.approx(1, abs=1e-4) and reach[3].val < 0.999
    pca = fit_pca(flat[:40], 4)
    assert torch.allclose(pca.project(flat[40:]), flat[40:], atol=1e-3)
    lost = (pca.project(flat[40:], 3) - flat[40:]).square().sum() / (flat[40:] - pca.mean).square().sum()
    assert 1 - lost.item() == pytest.approx(reach[3].val, abs=1e-4)
