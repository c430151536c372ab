from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Sweep, rows_of

from autoenc.report.frontier import pareto, per_doubling

NUMBERS = st.floats(min_value=0.001, max_value=1000)
POINTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.tuples(NUMBERS, NUMBERS), max_size=12)


@given(POINTS, st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"]))
def test_nothing_dominates_the_frontier_and_it_dominates_the_rest(points, first, second):
    def no_worse(a, b, mode):
        return a <= b if mode == "min" else a >= b

    def dominates(a, b):
        return no_worse(a[0], b[0], first) and no_worse(a[1], b[1], second) and a != b

    front = pareto(points, (first, second))
    assert bool(front) == bool(points)
    for name, point in points.items():
        beaten = any(dominates(other, point) for other in points.values())
        assert (name in front) != beaten
        if beaten:
            assert any(dominates(points[other], point) for other in front)


def test_frontier_leaves_out_what_is_not_known_and_keeps_equals():
    assert pareto({"a": (1.0, 2.0), "b": (1.0, 2.0), "c": (math.nan, 0.0), "d": (2.0, 2.0)}) == ["a", "b"]


@given(NUMBERS, st.floats(min_value=-0.3, max_value=2.0), st.lists(st.integers(0, 12), min_size=2, unique=True))
def test_a_constant_gain_per_doubling_is_found_at_any_distance(error, gain, powers):
    points = {f"p{power}": (2.0 ** power, error * (1 + gain) ** -power) for power in powers}
    found = per_doubling(points)
    assert set(found) == {f"p{power}" for power in powers} - {f"p{min(powers)}"}
    assert all(value == pytest.approx(gain, abs=1e-6) for value in found.values())


def test_gain_is_against_the_best_of_the_next_smaller_latent():
    found = per_doubling({"a": (4.0, 0.2), "b": (4.0, 0.1), "c": (16.0, 0.025), "d": (64.0, 0.05), "e": (0.0, 1.0)})
    assert found == {"c": pytest.approx(1.0), "d": pytest.approx(0.5 ** 0.5 - 1)}


def frontier_sweep(tmp_path, **figures):
    made = Sweep(tmp_path, {name: {"model.latent_channels": channels}
                            for name, channels in {"small": 4, "large": 8, "poor": 16}.items()}, asha=False)
    for name, mse, size in (("small", 0.4, 256.0), ("large", 0.2, 512.0), ("poor", 0.3, 1024.0)):
        rows = rows_of([0.9, 0.8, 0.7, 0.6, mse], latent_size=size, **figures.get(name, {}))
        made.trained(name, rows)
    return made


def test_report_shows_the_frontier_and_what_the_latent_is_worth(tmp_path):
    page = frontier_sweep(tmp_path).page()
    assert page.row("small", table=1)[1:] == ["256", "1,234,567", "0.4000", "0.00156", "—", "latent size"]
    assert page.row("large", table=1)[1:] == ["512", "1,234,567", "0.2000", "0.000391", "+1e+02%", "latent size"]
    assert page.row("poor", table=1)[5:] == ["-33%", "—"]
    charts = [chart for chart in page.charts if chart["layout"]["xaxis"].get("title")]
    assert [chart["layout"]["xaxis"]["title"]["text"] for chart in charts] == ["latent size"]
    line, points = charts[0]["data"]
    assert (line["x"], line["y"]) == ([256, 512], [0.4, 0.2]) and len(points["x"]) == 3


def test_latency_has_a_panel_where_trials_have_it(tmp_path):
    made = frontier_sweep(tmp_path)
    for name, milliseconds in (("small", 1.5), ("large", 2.5), ("poor", 3.5)):
        run = next(trial.run for trial in made.race().trials if trial.candidate.name == name)
        run.trajectory.add_figures(5, {"encode_ms": milliseconds})
    page = made.page()
    assert page.row("large", table=1)[3] == "2.500" and page.row("large", table=1)[-1] == "latent size, encoding"
    assert "encoding: small, large" in page.text()


def test_one_architecture_has_no_frontier(tmp_path):
    made = Sweep(tmp_path, {"A": {"train.learning_rate": 0.1}, "B": {"train.learning_rate": 0.2}})
    made.trained("A", rows_of([0.5, 0.4, 0.3, 0.2, 0.1], latent_size=64.0))
    made.trained("B", rows_of([0.5, 0.4, 0.3, 0.2, 0.1], latent_size=64.0))
    assert "Frontier" not in made.page().text()


def test_variational_candidates_show_rate_against_distortion(tmp_path):
    made = Sweep(tmp_path, {"plain": {}, "weak": {"model.variational": True, "loss.kl": 1e-4},
                            "strong": {"model.variational": True, "loss.kl": 1e-2}}, asha=False)
    made.trained("plain", rows_of([0.5, 0.4, 0.3, 0.2, 0.1]))
    for name, rate, lost in (("weak", 90.0, 0.2), ("strong", 30.0, 0.4)):
        made.trained(name, rows_of([0.5, 0.4, 0.3, 0.2, 0.1], **{"val/kl_nats": rate, "val/mse_sampled": lost}))
    chart = made.page().charts[-1]
    assert chart["layout"]["yaxis"]["title"]["text"] == "distortion: val/mse_sampled"
    assert sorted(zip(chart["data"][1]["x"], chart["data"][1]["y"], strict=True)) == [(30.0, 0.4), (90.0, 0.2)]
