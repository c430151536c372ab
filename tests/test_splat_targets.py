"""What a model of splats is trained on: targets and their normalisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from splatsets import covariances, seeds, uniform_splats

from autoenc.data.splat_targets import LEAST_STD, TARGETS, fit_normalisation, longer_first
from autoenc.data.splats import LARGEST, SMALLEST

torch.set_num_threads(1)

# Targets --------------------------------------------------------------------------------------------------------------

raws = st.builds(lambda seed: torch.from_numpy(uniform_splats(9, seed, (3,))).double(), seeds)


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
    raw = torch.from_numpy(uniform_splats(5)).double()
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
    raw = torch.from_numpy(uniform_splats(3, 5)).double().requires_grad_()
    kind = TARGETS[target]
    assert torch.autograd.gradcheck(kind.encode, raw)
    assert torch.autograd.gradcheck(kind.decode, kind.encode(raw).detach().requires_grad_())


# Normalisation --------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(seed=seeds, target=st.sampled_from(sorted(TARGETS)), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_normalised_columns_have_mean_0_and_deviation_1(seed, target, cuts):
    splats = uniform_splats(16, seed, (12,))
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
