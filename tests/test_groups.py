"""The loss of splats by groups, its likelihood, and the figures by group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.data.splat_targets import TARGETS, longer_first
from autoenc.groups import (
    GroupFigures,
    group_errors,
    group_likelihood,
    group_log_sigmas,
    group_loss,
    group_widths,
    half_turn_apart,
    splat_likelihood,
    splat_nelbo,
)
from autoenc.losses import LOG_SIGMA, gaussian

torch.set_num_threads(1)

KINDS = sorted(TARGETS)
GROUPS = ("xy", "scale", "rot", "feat")
NAMES = [*(f"{group}_fvu{suffix}" for suffix in ("", "_position") for group in GROUPS),
         *(f"{group}_std_ratio" for group in GROUPS), "rot_error"]
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_splats(*shape: int, seed: int = 0) -> torch.Tensor:
    """Raw splats (*shape, 8), float32."""
    draws = torch.rand(*shape, 8, generator=generator(seed))
    return torch.cat((2 * draws[..., :2] - 1, torch.exp(4 * draws[..., 2:4] - 5), math.pi * draws[..., 4:5],
                      2 * draws[..., 5:] - 1), -1)


def training_means(splats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``mean`` (8,) and ``position_mean`` (N, 8) of raw splats (B, N, 8), angles by their doubled directions."""
    splats = longer_first(splats.double())
    weight = (splats[..., 2] - splats[..., 3]) / (splats[..., 2] + splats[..., 3])
    doubled = torch.polar(weight, 2 * splats[..., 4])
    means = []
    for over in ((0, 1), (0,)):
        mean = splats.mean(over)
        mean[..., 4] = (doubled.sum(over).angle() / 2).remainder(math.pi)
        means.append(mean.float())
    return means[0], means[1]


def measured(decoded: torch.Tensor, true: torch.Tensor, train: torch.Tensor | None = None, parts: int = 1,
             kind: str = "raw") -> dict[str, float]:
    """The figures of raw splats (B, N, 8), with means of ``train``, by default of other splats than the true ones."""
    train = random_splats(5, true.shape[1], seed=99) if train is None else train
    figures = GroupFigures(kind, *training_means(train))
    for one, other in zip(decoded.tensor_split(parts), true.tensor_split(parts), strict=True):
        figures.update(one, other, TARGETS[kind].encode(one), TARGETS[kind].encode(other))
    return figures.compute()


def assert_same(left: dict[str, float], right: dict[str, float], rel: float = 1e-9) -> None:
    for name in NAMES:
        assert left[name] == pytest.approx(right[name], rel=rel, abs=1e-12, nan_ok=True), name


# The loss

def test_groups_weigh_the_same_by_hand():
    target = torch.zeros(1, 2, 8)
    columns = torch.tensor([[[1.0, 2, 3, 0, 2, 1, 1, 2], [0, 0, 1, 2, 0, 0, 3, 0]]])
    sums = {"xy": (1 + 4 + 0) / 2, "scale": (9 + 1 + 4) / 2, "rot": 4 / 2, "feat": (1 + 1 + 4 + 9) / 2}
    errors = group_errors(columns, target, "raw")
    assert {name: error.item() for name, error in errors.items()} == sums
    assert group_loss(columns, target, "raw").item() == pytest.approx(2.5 / 2 + 7 / 2 + 2 / 1 + 7.5 / 3)
    assert group_loss(columns, target, "raw", "mean").item() == pytest.approx(2.5 / 4 + 7 / 4 + 2 / 1 + 7.5 / 9)


def test_groups_of_other_targets():
    assert {kind: group_widths(kind) for kind in KINDS} == {
        "raw": {"xy": 2, "scale": 2, "rot": 1, "feat": 3}, "canonical": {"xy": 2, "scale": 2, "rot": 2, "feat": 3},
        "logcov": {"xy": 2, "logcov": 3, "feat": 3}}
    one = torch.ones(3, 4, 9)
    assert group_loss(one, 0 * one, "canonical").item() == pytest.approx(4)
    assert group_loss(one, 0 * one, "canonical", "mean").item() == pytest.approx(1 / 2 + 1 / 2 + 1 / 2 + 1 / 3)
    assert group_loss(one[..., 1:], 0 * one[..., 1:], "logcov").item() == pytest.approx(3)
    assert group_loss(one[..., 1:], 0 * one[..., 1:], "logcov", "mean").item() == pytest.approx(1 / 2 + 1 / 3 + 1 / 3)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=seeds, factor=st.floats(0.1, 10), transposed=st.booleans())
def test_the_loss_and_its_gradient(kind, seed, factor, transposed):
    """Against the formula written out; also for columns as a convolution gives them, (B, C, N) transposed."""
    width = len(TARGETS[kind].columns)
    columns = torch.randn(2, 3, width, generator=generator(seed), dtype=torch.float64)
    if transposed:
        columns = columns.mT.contiguous().mT
    columns.requires_grad_()
    target = torch.randn(2, 3, width, generator=generator(seed + 1), dtype=torch.float64)
    difference = columns.detach() - target
    for reduction, power in (("sum", 1), ("mean", 2)):
        columns.grad, expected, slope = None, 0.0, torch.zeros_like(difference)
        for name, part in TARGETS[kind].groups.items():
            share = 1 / (6 * group_widths(kind)[name] ** power)
            expected += difference[..., part].square().sum().item() * share
            slope[..., part] = 2 * difference[..., part] * share
        loss = group_loss(columns, target, kind, reduction)
        loss.backward()
        assert loss.item() == pytest.approx(expected) and torch.allclose(columns.grad, slope)
        with torch.no_grad():
            scaled = group_loss(factor * columns, factor * target, kind, reduction)
        assert scaled.item() == pytest.approx(factor**2 * expected)


@pytest.mark.parametrize("shapes", [((2, 3, 9), (2, 3, 9)), ((2, 3, 8), (3, 8)), ((2, 3, 8), (2, 1, 8)), ((3, 8),) * 2])
def test_other_shapes_are_refused_rather_than_stretched(shapes):
    columns, target = map(torch.zeros, shapes)
    for loss in (group_loss, group_likelihood, group_errors):
        with pytest.raises(ValueError, match=r"should both be \(B, N, 8\)"):
            loss(columns, target, "raw")


def test_half_precision_is_added_up_in_float32():
    columns = torch.full((40, 512, 8), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = group_loss(columns.bfloat16(), 0 * columns, "raw")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(4)


# The likelihood

@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=seeds, deviations=st.lists(st.floats(0.01, 3), min_size=4, max_size=4))
def test_the_likelihood_is_that_of_a_normal_density_at_its_best(kind, seed, deviations):
    width = len(TARGETS[kind].columns)
    target = torch.randn(2, 5, width, generator=generator(seed), dtype=torch.float64)
    columns = target.clone()
    for (_, part), deviation in zip(TARGETS[kind].groups.items(), deviations, strict=False):
        noise = torch.randn(target[..., part].shape, generator=generator(seed + 1), dtype=torch.float64)
        columns[..., part] += deviation * noise
    found = group_likelihood(columns, target, kind).item()

    def cost(stretch: float) -> float:
        """Nats a number under deviations so much larger than each group's root mean square error."""
        nats = 0.0
        for part in TARGETS[kind].groups.values():
            error = columns[..., part] - target[..., part]
            density = torch.distributions.Normal(0, stretch * error.square().mean().sqrt())
            nats -= density.log_prob(error).sum().item()
        return nats / target.numel() - math.log(2 * math.pi) / 2

    assert found == pytest.approx(cost(1.0)) and found < cost(1.1) and found < cost(0.9)


def test_the_likelihood_keeps_its_bound_and_its_gradient():
    columns, target = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(2, 3, 8)
    target[..., 5:] = 0.5
    loss = group_likelihood(columns, target, "raw")
    loss.backward()
    expected = (5 * LOG_SIGMA + 3 * (math.log(0.25) + 1) / 2) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # d/dx of n/(2C) ln mse is n/(2C) 2 (x - t) / (numbers mse) for the three columns that differ; the others rest.
    assert torch.equal(columns.grad[..., :5], torch.zeros(2, 3, 5))
    assert torch.allclose(columns.grad[..., 5:], torch.full((2, 3, 3), 3 / 8 * -0.5 / (18 * 0.25)))
    errors = {"xy": 0.0, "scale": 0.0, "rot": 0.0, "feat": 0.25}
    assert splat_likelihood(errors, "raw") == pytest.approx(expected)
    assert group_log_sigmas(errors) == pytest.approx({"xy": -6, "scale": -6, "rot": -6, "feat": math.log(0.5)})


@pytest.mark.parametrize("kind", KINDS)
def test_one_error_everywhere_needs_no_groups(kind):
    target = torch.zeros(2, 3, len(TARGETS[kind].columns))
    found = group_likelihood(target + 0.3, target, kind)
    assert found.item() == pytest.approx(gaussian(torch.tensor(0.09)).item(), rel=1e-6)


def test_nelbo_by_hand():
    errors = {"xy": 0.5, "logcov": 0.1, "feat": 2.0}
    expected = 7 + 20 * sum(n / 2 * (math.log(2 * math.pi * mse) + 1) for n, mse in ((2, 0.5), (3, 0.1), (3, 2.0)))
    assert splat_nelbo(errors, 7.0, 20, "logcov") == pytest.approx(expected)
    # Of the same errors, the likelihood of all numbers with its constant.
    assert splat_nelbo(errors, 0.0, 20, "logcov") == pytest.approx(
        20 * 8 * (splat_likelihood(errors, "logcov") + math.log(2 * math.pi) / 2))
    assert splat_nelbo({**errors, "xy": 0.0}, 7.0, 20, "logcov") == -math.inf
    assert math.isnan(splat_nelbo({**errors, "xy": math.nan, "feat": 0.0}, 7.0, 20, "logcov"))


# The figures

def test_figures_by_hand():
    mean = torch.tensor([0.0, 0, 4, 1, 0, 0, 0, 0])
    at_position = torch.tensor([[1.0, 0, 4, 1, 0, 0, 0, 0], [-1, 0, 4, 1, 0, 0, 0, 0]])
    # Anisotropies 1/2 and 3/5 (the second splat names its longer axis second), angles 30 and 120 + 90 - 180 degrees.
    true = torch.tensor([[[1.0, 2, 3, 1, math.pi / 6, 0, 0, 1], [-1, 0, 1, 4, math.pi * 2 / 3, 0, 0, -1]]])
    decoded = torch.tensor([[[0.0, 2, 3, 2, math.pi / 3, 0, 0, 0.5], [-1, 1, 5, 1, 0, 0, 0, -0.5]]])
    figures = GroupFigures("raw", mean, at_position)
    figures.update(decoded, true, decoded, true)
    found = figures.compute()
    assert list(found) == NAMES
    turn = math.pi / 6
    expected = {
        "xy_fvu": (1 + 1) / (1 + 4 + 1), "scale_fvu": (1 + 1) / 1,
        "rot_fvu": (0.5 + 0.6) / (0.5 + 0.6), "feat_fvu": 0.5 / 2,
        "xy_fvu_position": 2 / 4, "scale_fvu_position": 2 / 1, "rot_fvu_position": 1.0, "feat_fvu_position": 0.5 / 2,
        "xy_std_ratio": math.sqrt((0.25 + 0.25) / (1 + 1)), "scale_std_ratio": math.sqrt((1 + 0.25) / 0.25),
        "feat_std_ratio": 0.5, "rot_error": math.degrees(turn)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found["rot_std_ratio"])                 # both true angles are 30 degrees
    errors = {"xy": (1 + 1) / 4, "scale": (1 + 16 + 9) / 4, "rot": (turn**2 + (4 * turn) ** 2) / 2, "feat": 0.5 / 6}
    assert figures.column_mse == pytest.approx(errors, rel=1e-6)
    assert all(math.isnan(error) for error in figures.column_mse_sampled.values())


def test_angles_are_apart_by_a_quarter_turn_at_most():
    degrees = torch.tensor([[10.0, 170], [170, 10], [0, 90], [90, 0], [179, 0], [45, 45], [0, 135]])
    apart = torch.rad2deg(half_turn_apart(*torch.deg2rad(degrees).unbind(1)))
    assert apart.abs().tolist() == pytest.approx([20, 20, 90, 90, 1, 0, 45], abs=1e-4)
    assert apart[0] > 0 > apart[1]


def test_the_spread_of_angles_by_hand():
    """Directions of weight 1/2 at 0 and 45 degrees, doubled 0 and 90: 1 - |⟨exp(2iθ)⟩| is 1 - 1/√2."""
    true = torch.tensor([[[0.0, 0, 3, 1, 0, 0, 0, 0], [0, 0, 3, 1, math.pi / 4, 0, 0, 0]]]).double()
    decoded = true.clone()
    decoded[..., 4] = torch.tensor([0.0, math.pi / 6])        # doubled 0 and 60: 1 - cos 30°
    ratio = measured(decoded, true)["rot_std_ratio"]
    assert ratio == pytest.approx(math.sqrt((1 - math.cos(math.pi / 6)) / (1 - math.sqrt(0.5))))


@pytest.mark.parametrize("weights", [(1, 3), (3, 1)])
def test_rotations_weigh_by_the_true_anisotropy(weights):
    """Errors of 10 and 30 degrees on splats of anisotropy 1/5 or 3/5."""
    longs = [(5 + weight) / (5 - weight) for weight in weights]
    true = torch.tensor([[[0.0, 0, long, 1, 1, 0, 0, 0] for long in longs]]).double()
    decoded = true.clone()
    decoded[..., 4] += torch.deg2rad(torch.tensor([10.0, -30]))
    decoded[..., 2] *= 100                                    # what was decoded to be long does not count
    found = measured(decoded, true, true.roll(1, 1))
    assert found["rot_error"] == pytest.approx((10 * weights[0] + 30 * weights[1]) / 4, rel=1e-5)

    train = true.clone()
    train[..., 4] = 1 + math.radians(50)
    found = measured(decoded, true, train)
    assert found["rot_fvu"] == pytest.approx((100 * weights[0] + 900 * weights[1]) / (4 * 2500), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_what_is_perfect_and_what_is_the_mean(seed):
    true, train = random_splats(4, 6, seed=seed), random_splats(5, 6, seed=seed + 1)
    perfect = measured(true, true, train)
    mean, at_position = training_means(train)
    for suffix, prediction in (("", mean), ("_position", at_position)):
        found = measured(prediction.expand(4, 6, 8), true, train)
        for group in GROUPS:
            assert perfect[f"{group}_fvu{suffix}"] == 0 and perfect[f"{group}_std_ratio"] == 1
            assert found[f"{group}_fvu{suffix}"] == 1         # to the bit
            if not suffix:
                assert found[f"{group}_std_ratio"] == 0
    assert perfect["rot_error"] == 0


@settings(max_examples=25, deadline=None)
@given(seed=seeds, turns=st.integers(-3, 3), which=st.sampled_from(["decoded", "true", "both"]), swap=st.booleans())
def test_another_name_of_the_same_gaussian_changes_no_figure(seed, turns, which, swap):
    decoded, true = random_splats(3, 5, seed=seed).double(), random_splats(3, 5, seed=seed + 1).double()
    before = measured(decoded, true)

    def renamed(splats: torch.Tensor) -> torch.Tensor:
        splats = splats.clone()
        some = torch.rand(3, 5, generator=generator(seed)) < 0.5
        if swap:
            splats[some] = splats[some][:, [0, 1, 3, 2, 4, 5, 6, 7]]
            splats[..., 4] += math.pi / 2 * some.double()
        splats[..., 4] += math.pi * turns
        return splats

    after = measured(renamed(decoded) if which != "true" else decoded, renamed(true) if which != "decoded" else true)
    assert_same(before, after)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, parts=st.integers(1, 4), kind=st.sampled_from(KINDS))
def test_parts_add_up(seed, parts, kind):
    decoded, true = random_splats(4, 5, seed=seed), random_splats(4, 5, seed=seed + 1)
    assert_same(measured(decoded, true, parts=parts, kind=kind), measured(decoded, true, kind=kind))
    order = torch.randperm(4, generator=generator(seed))
    assert_same(measured(decoded[order], true[order], parts=parts), measured(decoded, true))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, factor=st.sampled_from([0.01, 0.5, 3.0, 20.0]), offset=st.floats(-5, 5), turn=st.floats(-4, 4))
def test_units_and_origins_do_not_matter(seed, factor, offset, turn):
    """All splats larger, moved, brighter, or turned, with those that the means are of."""
    decoded, true = random_splats(3, 5, seed=seed).double(), random_splats(3, 5, seed=seed + 1).double()
    train = random_splats(3, 5, seed=seed + 2).double()

    def changed(splats: torch.Tensor) -> torch.Tensor:
        splats = splats * torch.tensor([factor] * 4 + [1] + [factor] * 3)
        return splats + torch.tensor([offset, offset, 0, 0, turn, offset, offset, offset])

    # Means are float32, those of angles least certain where directions cancel; an offset costs variances digits.
    assert_same(measured(decoded, true, train), measured(changed(decoded), changed(true), changed(train)), rel=1e-3)


def test_angles_by_guessing():
    """Of uniform angles a uniform guess explains nothing, is 45 degrees off, and varies as they do."""
    true, decoded = random_splats(40, 512, seed=1), random_splats(40, 512, seed=2)
    found = measured(decoded, true, random_splats(40, 512, seed=3))
    assert found["rot_fvu"] == pytest.approx(1, abs=0.03) and found["rot_fvu_position"] == pytest.approx(1, abs=0.03)
    assert found["rot_error"] == pytest.approx(45, abs=1) and found["rot_std_ratio"] == pytest.approx(1, abs=0.01)
    # Where values do not repeat, a guess of the right spread has twice the error of the mean.
    assert found["xy_fvu"] == pytest.approx(2, abs=0.05) and found["xy_std_ratio"] == pytest.approx(1, abs=0.02)


def test_position_tells_what_the_order_gives_away():
    """Splats in a row with little noise: the mean at the position explains most of x, and of the rest nothing more."""
    def row(seed: int) -> torch.Tensor:
        splats = random_splats(50, 64, seed=seed)
        splats[..., 0] = torch.linspace(-1, 1, 64) + 0.01 * splats[..., 0]
        splats[..., 1] = 0.01 * splats[..., 1]
        return splats

    train, true = row(1), row(2)
    found = measured(training_means(train)[1].expand(50, 64, 8), true, train)
    assert found["xy_fvu"] < 1e-3 and found["xy_fvu_position"] == 1
    assert found["feat_fvu"] == pytest.approx(found["feat_fvu_position"], rel=0.05)


def test_what_is_undefined_is_nan():
    figures = GroupFigures("canonical", torch.zeros(8), torch.zeros(4, 8))
    assert list(figures.compute()) == NAMES and all(math.isnan(value) for value in figures.compute().values())
    assert all(math.isnan(error) for error in figures.column_mse.values())

    true = random_splats(2, 4)
    true[..., 3] = true[..., 2]                               # round: no angle
    found = measured(random_splats(2, 4, seed=1), true)
    for name in NAMES:
        assert math.isnan(found[name]) == name.startswith("rot"), name

    true = random_splats(1, 1).expand(2, 4, 8)                # nothing varies, though it differs from the mean
    found = measured(random_splats(2, 4, seed=1), true)
    for name in NAMES:
        assert math.isnan(found[name]) == name.endswith("std_ratio"), name

    true = longer_first(true.double()).float()                # nor from the mean: an error over 0 is not infinite
    figures = GroupFigures("raw", true[0, 0], true[0])
    figures.update(random_splats(2, 4, seed=1), true, true, true)
    found = figures.compute()
    assert all(math.isnan(found[name]) for name in NAMES if name != "rot_error") and found["rot_error"] > 0
    figures = GroupFigures("raw", true[0, 0] * (1 + 1e-7), true[0] * (1 - 1e-7))       # nor does rounding of the mean
    figures.update(random_splats(2, 4, seed=1), true, true, true)
    assert_same(found, figures.compute())


def test_a_constant_output_has_no_spread_whatever_rounding_leaves():
    true = random_splats(3, 50, seed=4)
    found = measured(random_splats(1, 1, seed=5).expand(3, 50, 8), true, parts=3)
    assert [found[f"{group}_std_ratio"] for group in GROUPS] == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_nan_show(kind):
    true = random_splats(2, 4)
    columns = torch.full((2, 4, len(TARGETS[kind].columns)), math.nan)
    found = measured(TARGETS[kind].decode(columns), true)
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_columns(kind):
    true, decoded, drawn = (TARGETS[kind].encode(random_splats(3, 5, seed=seed).double()) for seed in (1, 2, 3))
    figures = GroupFigures(kind, *training_means(random_splats(3, 5)))
    for item in range(3):
        some = slice(item, item + 1)
        raw = random_splats(1, 5, seed=item)
        figures.update(raw, raw, decoded[some], true[some], drawn[some])
        assert figures.compute()["xy_fvu"] == 0               # a look on the way changes nothing
    for found, columns in ((figures.column_mse, decoded), (figures.column_mse_sampled, drawn)):
        sums = group_errors(columns, true, kind)
        assert found == pytest.approx({name: sums[name].item() / width for name, width in group_widths(kind).items()})
