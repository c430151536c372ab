"""Helps, hurts, neutral, undecided: what seeds show against a baseline, and what they cannot."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.sweep.decide import decide
from autoenc.sweep.parts import Decision, Measured
from autoenc.sweep.records import Record

BASELINE = {"arm": "base", "margin": "5%", "gains": ["val/palette_miou"]}


def records(arm: str, mse: Sequence[float], miou: Sequence[float] | None = None, status: str = "completed",
            **figures: float) -> list[Record]:
    """A trial a seed."""
    return [Record(arm, f"{arm}_seed{42 + k}", 42 + k, status, 10, 8, {
        "val/mse": value, **({"val/palette_miou": miou[k]} if miou else {}), **figures})
        for k, value in enumerate(mse)]


def judged(found: Sequence[Record], objective: Measured | None = None, **rule: Any) -> Mapping[str, dict[str, Any]]:
    """The candidates' rows by arm."""
    order = list(dict.fromkeys(record.arm for record in found))
    decision = decide(found, order, objective or Measured(),
                      Decision.model_validate({"repeats": 3, "baseline": BASELINE, **rule}))
    json.dumps(decision, allow_nan=False)
    return {row["arm"]: row for row in decision["candidates"]}


QUIET = [1.000, 1.001, 0.999]


@pytest.mark.parametrize(("mse", "miou", "word"), [
    ([1.01, 1.012, 1.008], [0.55, 0.551, 0.552], "helps"),           # not worse than 5%, and a gain is shown
    ([0.80, 0.801, 0.799], [0.50, 0.501, 0.502], "helps"),           # better by more than 5%
    ([1.01, 1.012, 1.008], [0.50, 0.501, 0.502], "neutral"),
    ([1.20, 1.201, 1.199], [0.60, 0.601, 0.602], "hurts"),           # whatever it gains
    ([1.01, 1.012, 1.008], [0.45, 0.451, 0.452], "neutral"),         # no gain
    ([1.05, 0.90, 1.12], [0.50, 0.47, 0.53], "undecided")])          # noise
def test_the_words(mse, miou, word):
    found = judged([*records("base", QUIET, [0.500, 0.501, 0.502]), *records("new", mse, miou)])
    assert (found["new"]["verdict"], found["base"]["verdict"]) == (word, "baseline")
    assert found["base"]["baseline"] is None
    change = found["new"]["baseline"]["changes"]["val/mse"]
    assert change["low"] < change["change"] < change["high"] and change["unit"] == "share"
    assert found["new"]["baseline"]["changes"]["val/palette_miou"]["low"] is not None
    assert (found["new"]["baseline"]["seeds_needed"] is not None) <= (word == "undecided")


def test_without_gains_the_objective_is_the_gain():
    rule = {"baseline": {"arm": "base", "margin": "5%"}}
    found = judged([*records("base", QUIET), *records("new", [0.80, 0.801, 0.799])], **rule)
    assert found["new"]["verdict"] == "helps"
    assert found["new"]["reasons"][-1].startswith("against base: val/mse 20% better (95% interval: 20")
    larger = Measured(metric="val/psnr")
    found = judged([*records("base", QUIET, **{"val/psnr": 20.0}), *records("new", QUIET, **{"val/psnr": 30.0})],
                   larger, **rule)
    assert found["new"]["verdict"] == "helps"


def test_one_seed_says_nothing():
    found = judged([*records("base", [1.0]), *records("new", [0.5])])
    assert found["new"]["verdict"] == "undecided"
    assert found["new"]["reasons"][-1] == "against base: val/mse 50% better (one seed: says nothing about the noise)"
    assert found["new"]["baseline"]["seeds_needed"] is None


def test_a_candidate_with_one_seed_is_judged_by_the_noise_of_the_others():
    found = judged([*records("base", QUIET), *records("near", [1.0, 1.002, 1.001]), *records("far", [2.0])])
    assert found["far"]["verdict"] == "hurts" and found["far"]["baseline"]["seeds"] == 1
    assert found["far"]["standing"] == "worse"


def test_what_did_not_complete_is_no_verdict():
    found = judged([*records("base", QUIET), *records("slow", [2.0], status="stopped"),
                    *records("broken", [1.0], status="diverged")])
    assert (found["slow"]["verdict"], found["broken"]["verdict"]) == ("behind at epoch 10", "diverged")
    found = judged([*records("base", QUIET, status="diverged"), *records("new", QUIET)])
    assert (found["base"]["verdict"], found["new"]["verdict"]) == ("diverged", "winner")


def test_the_winner_has_a_verdict_of_its_own():
    found = judged([*records("base", QUIET), *records("new", [0.8, 0.801, 0.799])], baseline={"arm": "base"})
    assert (found["new"]["standing"], found["new"]["verdict"]) == ("winner", "helps")


def test_so_many_seeds_would_tell():
    """The number it names is right: with as many seeds of the same mean and noise the verdict is told."""
    def spread(mean: float, count: int) -> list[float]:
        signs = [1 if k % 2 else -1 for k in range(count)]
        return [mean * (1 + 0.02 * sign) for sign in signs]

    def verdict(count: int) -> dict[str, Any]:
        return judged([*records("base", spread(1.0, count)[::-1]), *records("new", spread(1.09, count))],
                      repeats=count, baseline={"arm": "base", "margin": "5%"})["new"]

    few = verdict(4)
    assert few["verdict"] == "undecided"
    needed = few["baseline"]["seeds_needed"]
    assert f"about {needed} seeds would tell" in few["reasons"][-1]
    assert verdict(2 * needed)["verdict"] == "hurts"          # the deviation shrinks with its own sample
    on_the_edge = judged([*records("base", [1.0, 1.0, 1.0]), *records("new", [1.05, 1.05 * 1.1, 1.05 / 1.1])],
                         baseline={"arm": "base", "margin": "5%"})["new"]
    assert on_the_edge["baseline"]["seeds_needed"] is None and "would not tell" in on_the_edge["reasons"][-1]


def test_counts_that_may_be_zero_are_gains_by_their_difference():
    rule = {"baseline": {"arm": "base", "gains": ["train/spikes"]}}
    calm, wild = [records(arm, QUIET) for arm in ("calm", "base")]
    for found, spikes in ((calm, (0, 1, 0)), (wild, (9, 8, 9))):
        for record, count in zip(found, spikes, strict=True):
            record.figures["train/spikes"] = float(count)
    row = judged([*wild, *calm], **rule)["calm"]
    assert row["verdict"] == "helps"
    assert row["baseline"]["changes"]["train/spikes"]["unit"] == "share"        # of the baseline's 8.7
    row = judged([*[r for r in wild], *calm], baseline={"arm": "calm", "gains": ["train/spikes"]})["base"]
    assert row["verdict"] != "helps"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 10) | st.sampled_from([math.nan, math.inf, 0.0]), min_size=1, max_size=4),
                min_size=2, max_size=5), st.sampled_from([[], ["val/mse"], ["val/palette_miou", "parameters"]]))
def test_every_candidate_has_a_verdict_whatever_the_figures(rows, gains):
    found = [record for name, row in zip(["base", "A", "B", "C", "D"], rows, strict=False)
             for record in records(name, row, row[::-1])]
    told = judged(found, baseline={"arm": "base", "gains": gains})
    assert {row["verdict"] for row in told.values()} <= {"baseline", "helps", "hurts", "neutral", "undecided"}


def test_verdicts_are_wrong_as_seldom_as_they_say():
    """Three arms that are truly the same, worse by half, and better in the gain: no false word in 95 of 100 runs."""
    draw, wrong, runs = random.Random(0), 0, 300
    for _ in range(runs):
        def noisy(mean: float, deviation: float) -> list[float]:
            return [mean * math.exp(draw.gauss(0, deviation)) for _ in range(4)]

        told = judged([*records("base", noisy(1, 0.03), noisy(0.5, 0.01)), *records("same", noisy(1, 0.03),
                       noisy(0.5, 0.01)), *records("worse", noisy(1.5, 0.03), noisy(0.5, 0.01)),
                       *records("sharper", noisy(1, 0.03), noisy(0.6, 0.01))], repeats=4)
        words = {arm: row["verdict"] for arm, row in told.items()}
        wrong += (words["same"] in ("helps", "hurts") or words["worse"] in ("helps", "neutral")
                  or words["sharper"] in ("hurts", "neutral"))
    assert wrong / runs <= 0.05
