"""When a trial is stopped early: where Ray's ASHA would, and worse than the rung's best by more than the margin."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.sweep.asha import Rungs, excess, rung_epochs

QUICK = settings(max_examples=150, deadline=None)
modes = st.sampled_from(["min", "max"])
factors = st.integers(2, 6)
values = st.floats(1e-6, 1e6) | st.integers(1, 8).map(float)          # small integers: ties
margins = st.floats(0, 2)


def judge_all(rung: Rungs, reports: list[float], epoch: int = 1) -> list[bool]:
    """Whether each trial is stopped, in the order in which they report."""
    return [rung.judge(f"t{i}", epoch, value) is not None for i, value in enumerate(reports)]


# Rungs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grace", "factor", "epochs", "rungs"), [
    (1, 3, 10, [1, 3]), (3, 3, 10, [3]), (1, 3, 9, [1, 3]), (1, 3, 27, [1, 3, 9]), (1, 2, 8, [1, 2, 4]),
    (1, 2, 7, [1, 2]), (3, 3, 8, []), (3, 3, 3, []), (10, 2, 4, []), (100, 3, 1, []), (2, 4, 8, [2]), (1, 3, 2, []),
])
def test_the_rungs(grace, factor, epochs, rungs):
    assert rung_epochs(grace, factor, epochs) == rungs


@QUICK
@given(st.integers(1, 200), factors, st.integers(1, 2000))
def test_rungs_lie_between_grace_and_the_budget_over_the_factor(grace, factor, epochs):
    rungs = rung_epochs(grace, factor, epochs)
    assert all(min(grace, epochs) <= rung <= epochs / factor for rung in rungs)
    assert all(later == factor * earlier for earlier, later in itertools.pairwise(rungs))
    assert bool(rungs) == (grace * factor <= epochs)
    assert not rungs or rungs[-1] * factor**2 > epochs               # none is left out


# The rule -----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(values, min_size=1, max_size=12), factors, modes, margins)
def test_stopped_where_asha_would_and_the_margin_is_exceeded(reports, factor, mode, margin):
    rung, before = Rungs([1], factor, margin, mode), []
    for i, value in enumerate(reports):
        stop = rung.judge(f"t{i}", 1, value)
        # Ray's rule: below the (1 - 1 / factor) percentile of the rewards that came by before.
        sign = -1 if mode == "min" else 1
        rewards = [sign * other for other in before]
        cutoff = np.percentile(rewards, 100 * (1 - 1 / factor)) if rewards else -math.inf
        best = sign * max(rewards) if rewards else value
        behind = sign * (best - value) / abs(best)
        close = (math.isclose(cutoff, sign * value, rel_tol=1e-9) or math.isclose(behind, margin, rel_tol=1e-9))
        assert close or (stop is not None) == (sign * value < cutoff and behind > margin)
        if stop is not None:
            assert (stop.epoch, stop.value, stop.best) == (1, value, best)
            assert math.isclose(stop.cutoff, sign * cutoff, rel_tol=1e-9)
            assert stop.beaten_by == tuple(sorted(f"t{k}" for k, other in enumerate(before)
                                                  if sign * other > sign * value))
        before.append(value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(values, min_size=1, max_size=12), factors)
def test_without_a_margin_it_is_the_asha_of_ray(reports, factor):
    from ray.tune.schedulers.async_hyperband import _Bracket
    from ray.tune.schedulers.trial_scheduler import TrialScheduler

    class Trial:
        def __init__(self, name: str) -> None:
            self.trial_id = name

    theirs = _Bracket(min_t=1, max_t=factor, reduction_factor=factor, s=0)
    ours = Rungs(rung_epochs(1, factor, factor), factor, 0.0, "max")
    for i, value in enumerate(reports):
        cutoff = theirs.cutoff(dict(enumerate(reports[:i])))
        stopped = theirs.on_result(Trial(f"t{i}"), 1, value) == TrialScheduler.STOP
        stop = ours.judge(f"t{i}", 1, value)
        if cutoff is None or not math.isclose(cutoff, value, rel_tol=1e-9):      # a tie is decided by rounding there
            assert stopped == (stop is not None)


@QUICK
@given(st.lists(values, min_size=2, max_size=12), factors, modes, margins, st.randoms(use_true_random=False))
def test_nothing_within_the_margin_is_stopped_in_any_order(reports, factor, mode, margin, order):
    order.shuffle(reports)
    best = min(reports) if mode == "min" else max(reports)
    for value, stopped in zip(reports, judge_all(Rungs([1], factor, margin, mode), reports), strict=True):
        assert not (stopped and excess(value, best, mode) <= margin)


@QUICK
@given(st.lists(values, min_size=1, max_size=12), factors, modes)
def test_the_best_of_a_rung_is_never_stopped(reports, factor, mode):
    stopped = judge_all(Rungs([1], factor, 0.0, mode), reports)
    best = min(reports) if mode == "min" else max(reports)
    assert not any(stop for value, stop in zip(reports, stopped, strict=True) if value == best)


@QUICK
@given(st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=12), factors, modes, margins)
def test_unfit_trials_cost_nobody_anything(reports, factor, mode, margin):
    """What the rule could not choose, like what failed, leaves every verdict on the others as it is without it."""
    whole, alone = Rungs([1], factor, margin, mode), Rungs([1], factor, margin, mode)
    failing = Rungs([1], factor, margin, mode)
    for i, (value, fit) in enumerate(reports):
        stop = whole.judge(f"t{i}", 1, value, fit=fit)
        if fit:
            assert stop == alone.judge(f"t{i}", 1, value) == failing.judge(f"t{i}", 1, value)
        else:
            failing.record(f"t{i}", 1, value)
            failing.forget(f"t{i}")


def test_an_unfit_trial_can_itself_be_stopped_and_become_fit():
    rung = Rungs([1, 3], 3, 0.05, "min")
    assert rung.judge("good", 1, 1.0) is None
    assert rung.judge("unfit", 1, 2.0, fit=False) is not None
    assert rung.judge("unfit", 3, 0.5, fit=True) is None
    assert rung.judge("good", 3, 1.0) is not None


@QUICK
@given(st.lists(values, min_size=1, max_size=6), factors, modes, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_neither_judged_nor_a_measure(reports, factor, mode, wild):
    rung = Rungs([1], factor, 0.0, mode)
    assert rung.judge("wild", 1, wild) is None
    rung.record("other", 1, wild)
    assert judge_all(rung, reports) == judge_all(Rungs([1], factor, 0.0, mode), reports)


@QUICK
@given(st.lists(values, min_size=1, max_size=12), factors, modes, margins)
def test_recorded_and_judged_results_measure_alike(reports, factor, mode, margin):
    """What the store holds stands as what was seen live; a trial that is judged once more is no rival of itself."""
    *before, last = reports
    live, replayed = Rungs([1], factor, margin, mode), Rungs([1], factor, margin, mode)
    judge_all(live, before)
    for i, value in enumerate(before):
        replayed.record(f"t{i}", 1, value)
    assert live.judge("last", 1, last) == replayed.judge("last", 1, last) == replayed.judge("last", 1, last)


def test_only_rungs_are_judged():
    rung = Rungs([3], 3, 0.0, "min")
    rung.record("good", 2, 1.0)
    assert rung.judge("bad", 2, 9.0) is None
    rung.record("good", 3, 1.0)
    assert rung.judge("bad", 3, 9.0) is not None
    rung.forget("good")
    assert rung.judge("bad", 3, 9.0) is None


def test_stock_asha_at_screening_budgets_stops_the_second_for_a_trifle_and_the_margin_does_not():
    rung = Rungs(rung_epochs(3, 3, 10), 3, 0.0, "min")
    assert judge_all(rung, [0.01, 0.01003], epoch=3) == [False, True]
    rung = Rungs(rung_epochs(3, 3, 10), 3, 0.05, "min")
    assert judge_all(rung, [0.01, 0.01003, 0.0106], epoch=3) == [False, False, True]


# Distances ----------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True)


@QUICK
@given(numbers, numbers, modes)
def test_an_excess_is_never_negative_nor_nan(value, best, mode):
    behind = excess(value, best, mode)
    assert behind >= 0
    worse = value > best if mode == "min" else value < best
    assert (behind > 0) >= (worse and not math.isclose(value, best)) or math.isnan(value) or math.isinf(best)
    if value == best:
        assert behind == 0


@pytest.mark.parametrize(("value", "best", "mode", "share"), [
    (1.1, 1.0, "min", 0.1), (0.9, 1.0, "min", 0), (0.9, 1.0, "max", 0.1), (30, 30, "max", 0), (-1.8, -2, "min", 0.1),
    (1, 0, "min", math.inf), (0, 0, "min", 0), (math.nan, 1, "min", math.inf), (1, math.nan, "min", 0),
    (20, math.inf, "max", math.inf), (math.inf, math.inf, "max", 0), (math.inf, 20, "max", 0),
])
def test_the_excess_is_a_share_of_the_best(value, best, mode, share):
    assert excess(value, best, mode) == pytest.approx(share)
