"""Intervals that hold as often as they say, whatever the figures, and with seeds missing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.sweep.evidence import DOUBT, Table, excess_of, t_quantile

TABLE = {(0.95, 1): 6.3138, (0.975, 1): 12.7062, (0.95, 2): 2.9200, (0.975, 2): 4.3027, (0.95, 3): 2.3534,
         (0.99, 4): 3.7469, (0.975, 5): 2.5706, (0.95, 10): 1.8125, (0.995, 30): 2.7500, (0.975, 120): 1.9799,
         (0.999, 7): 4.7853, (0.5, 6): 0.0}


@pytest.mark.parametrize(("probability", "freedom"), TABLE)
def test_quantiles_of_students_t(probability, freedom):
    assert t_quantile(probability, freedom) == pytest.approx(TABLE[probability, freedom], abs=6e-5)


def simulated(draw: random.Random, means: list[float], seeds: int, noise: float, lacking: float = 0) -> Table:
    """Candidates whose seeds share a part, which pairing cancels; some seeds may lack, never the first."""
    shared = [draw.gauss(0, 0.3) for _ in range(seeds)]
    return Table({str(i): {k: math.exp(mean + shared[k] + draw.gauss(0, noise)) for k in range(seeds)
                           if k == 0 or draw.random() >= lacking} for i, mean in enumerate(means)})


@pytest.mark.parametrize(("seeds", "lacking"), [(3, 0), (5, 0.3), (2, 0)])
def test_intervals_together_hold_the_truth_as_often_as_they_say(seeds, lacking):
    draw, covered, runs, told = random.Random(seeds), 0, 1200, 0
    means = [0.0, 0.0, 0.03, 0.2]
    for _ in range(runs):
        table = simulated(draw, means, seeds, 0.04, lacking)
        ends = [table.change(str(i), "0", DOUBT / 2 / 3) for i in range(1, 4)]
        if any(change.low is None for change in ends):
            continue
        told += 1
        covered += all(change.low <= math.expm1(mean) <= change.high
                       for change, mean in zip(ends, means[1:], strict=True))
    assert told > runs / 2
    assert 0.94 < covered / told <= 0.985


def test_pairing_cancels_what_a_seed_does_to_all():
    table = simulated(random.Random(0), [0.0, math.log(1.1)], 3, 0.0)
    change = table.change("1", "0", 0.025)
    assert (change.value, change.low, change.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (change.seeds, change.unit) == (3, "share")


def test_one_seed_has_no_interval_and_one_that_others_inform_has_one():
    alone = Table({"A": {0: 1.0}, "B": {0: 1.2}})
    assert (alone.change("B", "A", 0.025).value, alone.change("B", "A", 0.025).low) == (pytest.approx(0.2), None)
    informed = Table({"A": {0: 1.0, 1: 1.05}, "B": {0: 1.1, 1: 1.12}, "C": {0: 3.0}})
    change = informed.change("C", "A", 0.025)
    assert change.seeds == 1 and change.low < 2.0 < change.high
    assert informed.change("D", "A", 0.025) is None


def test_figures_that_may_be_negative_or_zero_are_compared_as_they_are():
    negative = Table({"A": {0: -100.0, 1: -110.0}, "B": {0: -90.0, 1: -104.0}}).change("B", "A", 0.025)
    assert (negative.value, negative.unit) == (pytest.approx(8 / 105), "share")
    counts = Table({"A": {0: 0.0, 1: 0.0}, "B": {0: 2.0, 1: 3.0}}).change("B", "A", 0.025)
    assert (counts.value, counts.unit) == (2.5, "difference")
    gaps = Table({"A": {0: 1.0, 1: math.nan, 2: 1.0}, "B": {0: 2.0, 1: 1.0, 2: math.inf}}).change("B", "A", 0.025)
    assert (gaps.value, gaps.seeds) == (pytest.approx(1.0), 1)


def test_worse_is_positive_whatever_way_the_figure_counts():
    change = simulated(random.Random(0), [0.0, math.log(1.1)], 3, 0.01).change("1", "0", 0.025)
    assert excess_of(change, "min") == (change.value, change.low, change.high)
    assert excess_of(change, "max") == (-change.value, -change.high, -change.low)
    assert math.isnan(excess_of(None, "min")[0])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 4), st.floats(-1e100, 1e100) | st.floats(1e-300, 1e-200), max_size=5),
                min_size=2, max_size=5), st.integers(2, 50))
def test_bounds_are_numbers_whatever_the_figures(rows, seeds):
    table = Table({str(i): row for i, row in enumerate(rows)})
    for name in table.values:
        for count in (None, seeds):
            change = table.change(name, "0", 0.01, count)
            if change is None or change.low is None:
                continue
            assert change.low <= change.value <= change.high or math.isclose(change.low, change.value, abs_tol=1e-9)
            assert not math.isnan(change.low + change.high) or math.isinf(change.high)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.5, 2), min_size=4, max_size=4), min_size=2, max_size=5), st.floats(0.1, 10),
       st.permutations(range(4)))
def test_neither_the_unit_nor_the_order_of_seeds_matters(rows, unit, order):
    plain = Table({str(i): dict(enumerate(row)) for i, row in enumerate(rows)}).change("1", "0", 0.01)
    other = Table({str(i): {k: row[k] * unit for k in order} for i, row in enumerate(rows)}).change("1", "0", 0.01)
    assert (other.value, other.low, other.high) == pytest.approx((plain.value, plain.low, plain.high), rel=1e-6,
                                                                 abs=1e-9)
