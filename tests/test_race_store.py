"""A race over a store that holds something already, and one that is killed and continued."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from racing import KNOB, LEVELS, Killed, Lab, arms, decision_of, failing, key_of, levels, put, row_of, states, wobbling

# The store ------------------------------------------------------------------------------------------------------------

def test_what_the_store_holds_is_not_trained(lab):
    here = lab()
    first = here.run(slots=2)
    trained = dict(here.trained)
    count = len(here.folder.events())
    again = here.race()
    assert again.idle and states(again) == states(first) and decision_of(again) == decision_of(first)
    assert here.run().done and here.trained == trained and len(here.folder.events()) == count


def test_a_stopped_trial_stays_so_when_another_sweep_trains_it_on(lab):
    here = lab()
    first = here.run()
    here.store_epochs("C", 8)
    assert states(here.race()) == states(first) and states(first)["C_seed42"][0] == "stopped"


def test_only_a_changed_arm_is_trained(lab):
    here = lab()
    here.run(slots=2)
    before = dict(here.trained)
    there = lab({**LEVELS, "B": 0.103})
    race = there.run(slots=2)
    changed = key_of(there.arms[1].config)
    assert there.trained == {changed: 8} and changed not in before
    assert {trial.name: trial.run.trained for trial in race.trials} == {
        "A_seed42": 0, "B_seed42": 8, "C_seed42": 0, "D_seed42": 0, "E_seed42": 0}


def test_a_stop_falls_with_the_arm_that_made_it(lab):
    here = lab({"A": 0.1, "C": 0.2})
    here.run()
    there = lab({"C": 0.2})
    race = there.run()
    assert states(race) == {"C_seed42": ("completed", 8)} and sum(there.trained.values()) == 7
    assert lab({"C": 0.2, "A": 0.1}).race().trials[0].run.state == "completed"


@pytest.mark.parametrize("change", [{"asha": {"margin": 2.0}}, {"asha": {"grace_epochs": 3}}, {"asha": False},
                                    {"decision": {"within": 2.0}}, {"decision": {"baseline": {"arm": "C"}}}])
def test_a_stop_that_the_sweep_would_no_longer_make_is_undone(lab, change):
    lab({"A": 0.1, "C": 0.2}).run()
    assert states(lab({"A": 0.1, "C": 0.2}, **change).run())["C_seed42"][1] > 1


def test_rows_beyond_the_budget_are_not_looked_at(lab):
    """B is the better one only after the budget."""
    sweep = {"A": 0.1999, "B": 0.01}
    here = lab(sweep, lambda config: [0.2 if config.train.weight_decay > 0.1 else 0.201] * 8 + [0.01] * 8)
    for arm in sweep:
        here.store_epochs(arm, 16)
    race = here.race()
    assert race.idle and decision_of(race)["winner"] == "A"
    assert set(states(race).values()) == {("completed", 8)} and [run.stored for run in race.runs.values()] == [8, 8]


def test_a_divergence_after_the_budget_is_none(lab):
    here = lab({"A": 0.1})
    here.store_epochs("A", 8, diverged={"epoch": 9, "step": 3, "what": "loss"})
    assert states(here.race()) == {"A_seed42": ("completed", 8)}


def test_twins_share_one_run(lab):
    """A KL weight does nothing without a variational model."""
    here = lab(None, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.1, "loss.kl": 0.5}, "C": {KNOB: 0.1001}})
    race = here.run(slots=3)
    assert len(race.runs) == 2 and race.trials[0].run is race.trials[1].run
    assert sum(here.trained.values()) == 16
    assert {row["arm"]: row["verdict"] for row in decision_of(race)["candidates"]}["A"] == "winner"


def test_a_twin_of_the_baseline_is_protected_too(lab):
    here = lab(None, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4, "loss.kl": 0.5}, "C": {KNOB: 0.4}},
               decision={"baseline": {"arm": "C"}})
    assert set(states(here.run()).values()) == {("completed", 8)}


def test_arms_that_differ_in_their_end_are_told_apart(lab):
    """They share the trajectory; what one has trained the other takes over."""
    here = lab(None, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.1, "train.epochs": 12}}, asha=False)
    race = here.run()
    assert states(race) == {"A_seed42": ("completed", 8), "B_seed42": ("completed", 12)}
    assert here.trained == {race.trials[0].run.key: 12} and race.trials[1].run.key == race.trials[0].run.key
    assert all(race.runs[race.key_of(arm.config)] for arm in here.arms)


# Kills ----------------------------------------------------------------------------------------------------------------

SWEEPS = [
    ({"arms": arms({"D": 0.3, "A": 0.1, "B": 0.101, "C": 0.2, "E": 0.104}), "asha": {"margin": 0.05}}, {}),
    ({"arms": arms({"D": 0.3, "A": 0.1, "C": 0.2, "E": 0.104}), "decision": {"repeats": 2}}, {0.1: (5, "diverged")}),
    ({"arms": arms({"C": 0.2, "A": 0.1}), "space": {KNOB: {"type": "float", "low": 0.09, "high": 0.5}},
      "search": {"algorithm": "random", "trials": 7}}, {}),
    ({"arms": arms({"C": 0.2}), "space": {KNOB: {"type": "float", "low": 0.09, "high": 0.5}},
      "search": {"algorithm": "tpe", "trials": 4}}, {}),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Each sweep as it goes when nothing happens to it, with one slot, so that there is one order of things."""
    labs = []
    for content, bad in SWEEPS:
        lab = Lab(tmp_path_factory.mktemp("whole"), failing(bad, wobbling(0.01, 1)), **content)
        labs.append((lab, lab.run()))
    return labs


@settings(max_examples=40, deadline=None)
@given(which=st.integers(0, len(SWEEPS) - 1), kills=st.lists(st.integers(0, 40), min_size=1, max_size=4))
@example(which=1, kills=[14])
def test_killed_and_continued_is_the_same_as_uninterrupted(uninterrupted, which, kills):
    """After any events and stored epochs, several times."""
    reference, wanted = uninterrupted[which]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), reference.curve, **SWEEPS[which][0])
        for kill in kills:
            try:
                lab.run(kill_in=kill)
            except Killed:
                continue
        race = lab.run()
        assert states(race) == states(wanted)
        assert lab.stops() == reference.stops()
        assert json.dumps(decision_of(race)) == json.dumps(decision_of(wanted))
        assert lab.trained == reference.trained


@settings(max_examples=25, deadline=None)
@given(kills=st.lists(st.integers(0, 60), min_size=1, max_size=4), slots=st.integers(2, 4), seed=st.integers(0, 99))
def test_killed_with_several_slots_stops_are_honoured(kills, slots, seed):
    content, _ = SWEEPS[0]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), wobbling(0.012, 1), **content)
        for number, kill in enumerate(kills):
            told = {(event["key"], event["epoch"]) for event in lab.events("stopped")}
            try:
                lab.run(slots, seed + number, kill_in=kill)
            except Killed:
                continue
        race = lab.run(slots, seed)
        ended = {(run.id, len(run.rows)) for run in race.runs.values() if run.state == "stopped"}
        assert told <= ended == {(event["key"], event["epoch"]) for event in lab.events("stopped")}
        assert decision_of(race)["winner"] == "A"
        assert all(lab.trained[run.key] == len(run.trajectory.rows()) for run in race.runs.values())


def test_a_worker_that_dies_before_its_report_loses_nothing(lab):
    """Its last epoch is stored; the next worker finds the run at its end, or goes on from there."""
    here = lab({"A": 0.1, "C": 0.2}, asha={"grace_epochs": 3})
    race = here.race()
    first, second = race.next(), race.next()
    for run, epochs in ((first, 2), (second, 2)):
        for _ in range(epochs):
            assert not here.step(race, run)
    put(first.trajectory, [row_of(epoch, value) for epoch, value in enumerate(levels(first.config), start=1)])
    assert here.step(race, first) and (first.state, len(first.rows)) == ("completed", 8)
    put(second.trajectory, [row_of(epoch, value) for epoch, value in enumerate(levels(second.config)[:3], start=1)])
    assert here.step(race, second)                           # reports epoch 4; the rung at 3 was missed
    assert (second.state, len(second.rows)) == ("stopped", 3)


KEYS = st.sampled_from(["event", "key", "epoch", "value", "cutoff", "best", "beaten_by", "metric", "settings", "space"])
PLAIN = st.one_of(st.none(), st.integers(-2, 20), st.floats(), st.text(max_size=3))
KINDS = st.sampled_from(["stopped", "continued", "passed", "suggested", "space exhausted", "val/mse"])
VALUES = st.one_of(KINDS, PLAIN, st.lists(PLAIN, max_size=2), st.dictionaries(st.sampled_from([KNOB, "x"]), PLAIN))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.dictionaries(KEYS, VALUES), VALUES), max_size=8))
def test_broken_events_are_passed_over(broken):
    space = {KNOB: {"type": "float", "low": 0.1, "high": 0.2}}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), arms=arms({"A": 0.1, "C": 0.2}), space=space, search={"trials": 3})
        key = key_of(lab.arms[1].config)
        (lab.folder.path / "events.jsonl").write_text(
            "".join(json.dumps({**event, "key": key} if isinstance(event, dict) and "key" in event else event) + "\n"
                    for event in broken) + '{"half a li')
        race = lab.race()
        assert {run.state for run in race.runs.values()} == {"waiting"} and 2 <= len(race.trials) <= 3
