"""Sweeps with a KL schedule: which epochs they see, what is refused, and what a shorter budget makes of a warm-up."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from racing import KNOB, Lab, decision_of, states
from sweepfiles import load, refused, write

from autoenc.config import make_config
from autoenc.course import best_row, own_end
from autoenc.errors import InputError
from autoenc.figures import best_epoch
from autoenc.sweep.inherit import arm_candidates, load_chain, parse_override, starting_point
from autoenc.sweep.spec import Spec
from autoenc.sweep.warmup import Budget
from autoenc.train import train
from autoenc.trajectory import Trajectory

VAE = {"model": {"variational": True}, "loss": {"kl": 1e-3}}
LINEAR = {"loss.kl_schedule": "linear", "loss.kl_warmup_epochs": 5}
CYCLICAL = {"loss.kl_schedule": "cyclical", "loss.kl_cycles": 2}


def content(arms: dict, epochs: int = 10, **more) -> dict:
    return {"config": {**VAE, "train": {"epochs": epochs}}, "arms": arms, "asha": False, **more}


def lengths(spec: Spec) -> dict[str, tuple[int, int]]:
    """Arm -> warm-up, cycles."""
    return {arm.name: (arm.config.loss.kl_warmup_epochs, arm.config.loss.kl_cycles)
            for arm in arm_candidates(spec, starting_point(spec, None))}


# What is refused when the file is read --------------------------------------------------------------------------------

def test_a_grace_period_inside_a_warm_up(tmp_path):
    grace = {"asha": {"grace_epochs": 5}}
    said = refused(tmp_path, content({"plain": {}, "long": LINEAR}, **grace))
    assert said.startswith(f"{tmp_path}/toy.yaml: arms.long: asha.grace_epochs: 5: trials would be compared")
    assert "loss.kl_warmup_epochs 5" in said and "to 6 or more" in said and "plain" not in said
    assert load(tmp_path, content({"long": LINEAR}, asha={"grace_epochs": 6})).asha.grace_epochs == 6
    assert load(tmp_path, content({"long": LINEAR})).asha is None
    plain = {**content({"long": LINEAR}, **grace), "config": {"train": {"epochs": 10}}}
    assert load(tmp_path, plain)                                                    # no VAE, nothing to warm up


def test_a_budget_inside_a_warm_up(tmp_path):
    said = refused(tmp_path, content({"plain": {}, "long": LINEAR}, epochs=5))
    assert "arms.long: train.epochs: 5:" in said and "loss.kl_warmup_epochs 5" in said
    said = refused(tmp_path, content({"round": {"loss.kl_schedule": "cyclical"}}, epochs=7))
    assert "train.epochs: 7:" in said and "loss.kl_cycles 4" in said


def test_a_sweep_without_arms_is_looked_at_too(tmp_path):
    fixed = {**content({}, asha={"grace_epochs": 2}), "arms": None}
    fixed["config"]["loss"] = {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 2}
    assert "asha.grace_epochs: 2" in refused(tmp_path, fixed)


@pytest.mark.parametrize("space, named", [
    ({"loss.kl_warmup_epochs": {"type": "int", "low": 1, "high": 4}}, "loss.kl_warmup_epochs 4"),
    ({"loss.kl_schedule": {"type": "choice", "choices": ["constant", "cyclical"]}}, "loss.kl_schedule cyclical"),
    ({"loss.kl_schedule": {"type": "choice", "choices": ["constant", "linear"]},
      "loss.kl_warmup_epochs": {"type": "choice", "choices": [2, 5], "when": {"loss.kl_schedule": "linear"}}},
     "loss.kl_warmup_epochs 5"),
    ({"model.variational": {"type": "choice", "choices": [False, True]}}, "loss.kl_schedule linear")])
def test_the_ends_of_a_space(tmp_path, space, named):
    """Each end of one parameter alone, and together with the ends of those it depends on."""
    sweep = content({"plain": {"loss.kl_schedule": "constant"}}, asha={"grace_epochs": 3}, space=space,
                    search={"trials": 4})
    sweep["config"]["loss"] = {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 3}
    if "loss.kl_schedule" in space:
        sweep["config"]["loss"] = {"kl": 1e-3, "kl_warmup_epochs": 1}
    if "model.variational" in space:
        sweep["config"]["model"], sweep["arms"] = {}, {"plain": {}}
    said = refused(tmp_path, sweep)
    assert "space." in said and "asha.grace_epochs: 3" in said and named in said
    assert load(tmp_path, {**sweep, "asha": False}).space


def test_a_parents_winner_may_bring_the_warm_up(tmp_path):
    write(tmp_path, "base", {})
    write(tmp_path, "above", content({"plain": {}, "warm": LINEAR}))
    below = load_chain(write(tmp_path, "toy", {"inherits": "above.yaml", "asha": {"grace_epochs": 2},
                                               "arms": {"A": {}, "B": {KNOB: 0.1}}}))[-1]
    start = starting_point(below, {**starting_point(below, None), **LINEAR})
    with pytest.raises(InputError, match=r"arms\.A: asha\.grace_epochs: 2"):
        arm_candidates(below, start)


@pytest.mark.parametrize("used", [{"objective": {"metric": "val/kl"}},
                                  {"decision": {"prefer": [{"metric": "train/kl"}]}}])
def test_a_kl_in_several_units_compares_nothing(tmp_path, used):
    arms = {"mean": {}, "sum": {"loss.kl_reduction": "sum"}}
    assert "varies loss.kl_reduction" in refused(tmp_path, content(arms, **used))
    assert load(tmp_path, content({"small": {"loss.kl": 0.1}, "large": {"loss.kl": 1.0}}, **used))


# Presets and --set ----------------------------------------------------------------------------------------------------

def test_a_preset_scales_the_warm_up_with_the_epochs(tmp_path):
    write(tmp_path / "presets", "short", {"config": {"train": {"epochs": 3}}})
    arms = {"five": LINEAR, "nine": {**LINEAR, "loss.kl_warmup_epochs": 9}, "round": CYCLICAL, "plain": {}}
    assert lengths(load(tmp_path, content(arms))) == {"five": (5, 4), "nine": (9, 4), "round": (0, 2), "plain": (0, 4)}
    short = load(tmp_path, content(arms), presets=["short"])
    assert lengths(short) == {"five": (1, 4), "nine": (2, 4), "round": (0, 1), "plain": (0, 4)}
    assert {arm.config.counted_from for arm in arm_candidates(short, starting_point(short, None))} == {1, 2, 3}
    assert lengths(load(tmp_path, content(arms), sets=["train.epochs=40"])) == {
        "five": (20, 4), "nine": (36, 4), "round": (0, 2), "plain": (0, 4)}
    assert lengths(load(tmp_path, content({"round": {"loss.kl_schedule": "cyclical"}}), sets=["train.epochs=5"])) == {
        "round": (0, 2)}                                                            # the default's four cycles


def test_a_preset_that_sets_the_warm_up_is_taken_as_it_is(tmp_path):
    fixed = content({"A": {}, "B": {KNOB: 0.1}})
    fixed["config"]["loss"] = {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 5}
    sets = ["train.epochs=6", "loss.kl_warmup_epochs=4"]
    assert set(lengths(load(tmp_path, fixed, sets=sets)).values()) == {(4, 4)}
    assert set(lengths(load(tmp_path, fixed, sets=sets[:1])).values()) == {(3, 4)}
    assert "train.epochs: 1" in refused_set(tmp_path, fixed, "train.epochs=1")          # no epoch would be left


def refused_set(folder: Path, sweep: dict, text: str) -> str:
    with pytest.raises(InputError) as error:
        load(folder, sweep, sets=[text])
    return str(error.value)


def test_along_a_chain_each_sweep_scales_what_it_sets(tmp_path):
    base = {"config": {**VAE, "train": {"epochs": 20}}, "asha": False}
    base["config"]["loss"] = {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 8}
    write(tmp_path, "base", base)
    write(tmp_path, "above", {"arms": {"A": {}, "B": {KNOB: 0.1}}})
    write(tmp_path, "middle", {"inherits": "above.yaml", "config": {"train": {"epochs": 40}}, "arms": {"A": LINEAR}})
    last = write(tmp_path, "toy", {"inherits": "middle.yaml", "arms": {"A": {}, "B": {KNOB: 0.1}}})

    def warm_ups(*sets: str) -> list[int]:
        chain = load_chain(last, overrides=[parse_override(text) for text in sets])
        return [arm_candidates(spec, starting_point(spec, None))[0].config.loss.kl_warmup_epochs for spec in chain]

    assert warm_ups() == [8, 5, 5]
    assert warm_ups("train.epochs=10") == [4, 1, 1]      # 8 of 20, 5 of 40, inherited as it was scaled
    assert warm_ups("middle:train.epochs=20") == [8, 2, 2]


@given(st.integers(1, 200), st.integers(0, 200), st.integers(2, 200))
def test_a_scaled_warm_up_leaves_epochs_that_count(written, warmup, epochs):
    warmup = min(warmup, written - 1)
    found = Budget(written, {"train.epochs": epochs}).fit({"loss.kl_warmup_epochs": warmup})["loss.kl_warmup_epochs"]
    assert (found == 0) == (warmup == 0)
    assert found < epochs and found == (warmup if epochs == written else min(1, warmup) and max(
        1, math.floor(warmup * epochs / written + 1e-9)))


@given(st.integers(1, 60), st.integers(1, 30), st.integers(2, 60))
def test_scaled_cycles_leave_epochs_that_count(written, cycles, epochs):
    fitted = Budget(written, {"train.epochs": epochs}).fit({"loss.kl_schedule": "cyclical", "loss.kl_cycles": cycles})
    if epochs != written:
        config = make_config({"model.variational": True, "loss.kl": 1.0, "train.epochs": epochs, **fitted}, "test")
        assert config.counted_from <= epochs and fitted["loss.kl_cycles"] <= cycles


@given(st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(max_value=0)))
def test_what_is_no_length_is_left_to_be_refused(value):
    given_ = {"loss.kl_warmup_epochs": value, "loss.kl_cycles": value}
    assert Budget(10, {"train.epochs": 3}).fit(given_) is not given_
    assert repr(Budget(10, {"train.epochs": 3}).fit(given_)) == repr(given_)


# Only epochs that count are seen --------------------------------------------------------------------------------------

MSE = st.lists(st.floats(0.01, 1), min_size=8, max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(MSE, min_size=2, max_size=4), st.integers(0, 6), st.integers(1, 3),
       st.one_of(st.none(), st.integers(1, 3)), st.integers(1, 3), st.integers(0, 99))
def test_rungs_best_epochs_and_patience_see_counted_epochs_only(curves, warmup, more, patience, slots, seed):
    """Whatever the curves do before: with those epochs at any other values, everything comes out the same."""
    shape = {"kl_schedule": "linear", "kl_warmup_epochs": warmup} if warmup else {}
    grace = min(8, warmup + more)

    def outcome(early: float | None):
        def curve(config):
            values = curves[round(config.train.weight_decay * 100)]
            return values if early is None else [early] * warmup + values[warmup:]

        with tempfile.TemporaryDirectory() as folder:
            lab = Lab(Path(folder), curve, arms={f"A{i}": {KNOB: i / 100} for i in range(len(curves))},
                      config={"model": {"variational": True}, "loss": {"kl": 1e-3, **shape},
                              "train": {"patience": patience}},
                      asha={"grace_epochs": grace, "reduction_factor": 2})
            race = lab.run(slots, seed)
            for run in race.runs.values():
                values = [row["val/mse"] for row in run.rows]
                best = best_epoch(values, "min", warmup + 1)
                assert race.figures_of(run).get("epoch", 0) == best
                assert all(math.isnan(race.score(run, epoch)) for epoch in range(1, warmup + 1))
                end = own_end(run.rows, run.config)
                assert end is None or end > warmup
                if patience and end is not None and run.state == "completed":
                    assert len(run.rows) >= min(8, warmup + patience)
            assert all(event["epoch"] > warmup for event in lab.events("passed", "stopped"))
            told = [(event["trial"], event["event"], event["epoch"]) for event in lab.events("passed", "stopped")]
            return states(race), decision_of(race), told

    assert outcome(None) == outcome(0.001) == outcome(5.0)


def test_the_searcher_learns_counted_epochs_only(tmp_path):
    lab = Lab(tmp_path, lambda config: [0.001] * 3 + [config.train.weight_decay] * 5, arms={"A": {KNOB: 0.1}},
              space={KNOB: {"type": "float", "low": 0.01, "high": 0.5}}, search={"trials": 4, "algorithm": "random"},
              config={"model": {"variational": True},
                      "loss": {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 3}}, asha=False)
    race = lab.run()
    told = race.points.searcher.study.get_trials(deepcopy=False)
    assert len(told) >= 4
    for trial in told:
        assert trial.value == pytest.approx(trial.params[KNOB])
        assert set(trial.intermediate_values) == set(range(4, 9))


def test_how_soon_an_arm_is_near_its_best_counts_from_there(tmp_path):
    curve = [0.1, 0.1, 0.1, 0.5, 0.3, 0.2, 0.2, 0.2]
    lab = Lab(tmp_path, lambda config: curve, arms={"A": {}}, asha=False, config={
        "model": {"variational": True}, "loss": {"kl": 1e-3, "kl_schedule": "linear", "kl_warmup_epochs": 3}})
    assert lab.run().records()[0].figures["stability/epochs"] == 6


@pytest.mark.parametrize("schedule", [{"loss__kl_schedule": "cyclical", "loss__kl_cycles": 2},
                                      {"loss__kl_schedule": "linear", "loss__kl_warmup_epochs": 2},
                                      {"train__schedule": "cosine"}])
def test_weights_that_were_lost_are_had_again_under_a_schedule(tmp_path, schedule):
    """The first epochs of a training again: at the weights and rates that they had."""
    dataset = small_dataset(40)
    config = small_config(model__variational=True, loss__kl=1.0, train__epochs=4, train__patience=None, **schedule)
    third = next(result.state()["model"] for result in train(config, dataset) if result.epoch == 3)
    third = {name: value.clone() for name, value in third.items()}
    trajectory = Trajectory(tmp_path / "t")
    rows = list(trajectory.train(config, dataset, "cpu"))
    assert trajectory.status()["best_epoch"] == best_row(rows, config)["epoch"] >= config.counted_from
    assert len(list(trajectory.restore_weights(config, dataset, "cpu", 3))) == 3
    again = torch.load(trajectory.weights(3), weights_only=True)["model"]
    assert all(torch.equal(third[name], again[name]) for name in third)
