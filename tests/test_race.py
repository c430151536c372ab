"""Which trials a race stops, continues and repeats, and what it reads of them."""

from __future__ import annotations

import json
import math
import random
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from racing import LEVELS, Lab, arms, decision_of, failing, levels, states, wobbling

from autoenc.config import Config
from autoenc.sweep.asha import excess

# Which trials are stopped ---------------------------------------------------------------------------------------------

def test_arms_in_every_order_decide_the_same(tmp_path):
    """Design 6.2: several slots, curves that cross by less than the margin. Which are stopped depends on the order,
    but never who wins."""
    curve = wobbling(0.012, seed=3)
    winners, stopped = set(), set()
    for number, order in enumerate(permutations("ABCE")):
        folder = tmp_path / str(number)
        folder.mkdir()
        lab = Lab(folder, curve, arms=arms({name: LEVELS[name] for name in order}), asha={"margin": 0.05})
        race = lab.run(slots=2 + number % 3, seed=number)
        winners.add(decision_of(race)["winner"])
        stopped.add(tuple(name for name, (state, _) in states(race).items() if state == "stopped"))
    final = {name: min(curve(arm.config)) for name, arm in zip(order, lab.arms, strict=True)}
    assert winners == {min(final, key=final.get)} and stopped <= {("C_seed42",), ()}


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0.05, 1), min_size=2, max_size=6, unique=True), within=st.sampled_from([0.0, 0.05]),
       slots=st.integers(1, 4), seed=st.integers(0, 2**16), factor=st.integers(2, 4), grace=st.integers(1, 3))
def test_what_the_rule_could_choose_is_never_stopped(values, within, slots, seed, factor, grace):
    curve = wobbling(0.02, seed)
    content = {"arms": arms({f"A{i}": value for i, value in enumerate(values)}), "decision": {"within": within},
               "asha": {"margin": 0.15, "grace_epochs": grace, "reduction_factor": factor}}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), curve, **content)
        race = lab.run(slots, seed)
        final = {f"{arm.name}_seed42": min(curve(arm.config)) for arm in lab.arms}
        best = min(final.values())
        for event in lab.events("stopped"):
            assert excess(event["value"], event["best"], "min") > 0.15 and event["value"] > event["cutoff"]
            assert event["epoch"] in race.rungs.epochs and event["beaten_by"]
        for name, (state, epochs) in states(race).items():
            if excess(final[name], best, "min") <= within:
                assert (state, epochs) == ("completed", 8)
        for run in race.runs.values():
            assert [row["val/mse"] for row in run.rows] == curve(run.config)[:len(run.rows)]


def test_baseline_and_pick_are_neither_stopped_nor_measures(lab):
    rule = {"baseline": {"arm": "D"}, "pick": "C", "because": "looks better"}
    race = lab(decision=rule).run(slots=2)
    assert states(race)["D_seed42"] == states(race)["C_seed42"] == ("completed", 8)
    best = {"A": 0.1, "B": 0.5}
    here = lab(best, decision={"baseline": {"arm": "A"}})
    race = here.run()
    assert states(race) == {"A_seed42": ("completed", 8), "B_seed42": ("completed", 8)} and not here.stops()


def test_without_asha_nothing_is_stopped(lab):
    assert set(states(lab(asha=False).run(slots=3)).values()) == {("completed", 8)}


def test_a_stop_is_told_in_words_and_as_an_event(lab):
    here = lab({"A": 0.1, "C": 0.2})
    race = here.run()
    run = race.trials[1].run
    assert here.stops() == [("C_seed42", 1, 0.4, 0.2, 0.2)]
    assert run.note == "stopped at epoch 1: val/mse 0.4, 100.0% behind the best there (0.2), margin 5.0%"
    row = next(row for row in decision_of(race)["candidates"] if row["arm"] == "C")
    assert row["verdict"] == "behind at epoch 1"


def test_the_first_at_a_rung_is_compared_with_those_that_come_after(lab):
    """As long as it runs. What it has trained beyond the rung stays in the store, and is no part of this sweep."""
    here = lab({"D": 0.3, "A": 0.1}, asha={"reduction_factor": 4})
    race = here.race()
    bad, good = race.next(), race.next()
    assert [here.step(race, run) for run in (bad, bad, good)] == [False] * 3
    assert here.step(race, bad) and states(race)["D_seed42"] == ("stopped", 1)
    assert here.stops() == [("D_seed42", 1, 0.6, 0.2, 0.2)] and len(bad.trajectory.rows()) == 3
    assert (bad.trained, bad.spared) == (3, 5)
    assert states(here.race())["D_seed42"] == ("stopped", 1)         # and out of the store
    while not here.step(race, good):
        pass
    assert states(race)["A_seed42"] == ("completed", 8) and len(here.stops()) == 1


def test_killed_before_the_first_at_a_rung_was_compared_again(lab):
    here = lab({"D": 0.3, "A": 0.1}, asha={"reduction_factor": 4})
    race = here.race()
    bad, good = race.next(), race.next()
    for run in (bad, bad, good):
        assert not here.step(race, run)
    race = here.race()
    assert states(race)["D_seed42"] == ("stopped", 1) and here.stops() == [("D_seed42", 1, 0.6, 0.2, 0.2)]


def test_only_the_last_rung_that_was_passed_counts(lab):
    """D was behind at epoch 1, where it was alone; at epoch 2 it is as good as the other."""
    def curve(config):
        return levels(config) if config.train.weight_decay == 0.1 else [0.9, *levels(config)[1:]]
    here = lab({"D": 0.102, "A": 0.1}, curve)
    race = here.race()
    slow, good = race.next(), race.next()
    for run in (slow, slow, good, slow, good, slow):
        assert not here.step(race, run)
    assert not here.stops()


def test_whoever_is_through_is_not_stopped_any_more(lab):
    """Its last epoch comes when a better one has passed the rung: there is nothing left to spare."""
    here = lab({"D": 0.3, "A": 0.1}, asha={"grace_epochs": 2, "reduction_factor": 4})
    race = here.race()
    bad, good = race.next(), race.next()
    assert not any(here.step(race, run) for run in (*[bad] * 7, good, good))
    assert not here.step(race, bad) and here.step(race, bad)
    assert states(race)["D_seed42"] == ("completed", 8) and not here.stops()


def test_patience_ends_a_run_and_is_no_stop(lab):
    flat = lambda config: [config.train.weight_decay] * 8                                     # noqa: E731
    race = lab({"A": 0.1, "B": 0.102}, flat, config={"train": {"patience": 2}}).run()
    assert states(race) == {"A_seed42": ("completed", 3), "B_seed42": ("completed", 3)}


@pytest.mark.parametrize("replayed", [False, True])
def test_a_run_that_ended_by_itself_at_a_rung_is_a_measure_there(lab, replayed):
    """Live and out of the store."""
    flat = lambda config: [config.train.weight_decay] * 8                                     # noqa: E731
    here = lab({"A": 0.1, "C": 0.2}, flat, config={"train": {"patience": 1}}, asha={"grace_epochs": 2})
    if replayed:
        here.store_epochs("A", 2)
    race = here.run()
    assert race.rungs.recorded[2] == {race.trials[0].run.id: 0.1, race.trials[1].run.id: 0.2}


# Failures -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["diverged", "failed"])
def test_what_was_beaten_only_by_a_failure_is_continued(lab, what):
    here = lab({"A": 0.1, "C": 0.2, "D": 0.5}, failing({0.1: (6, what)}))
    race = here.run(slots=3, seed=1)
    assert {name: state for name, (state, _) in states(race).items()} == {
        "A_seed42": what, "C_seed42": "completed", "D_seed42": "stopped"}
    assert "C_seed42" in {event["trial"] for event in here.events("continued")}
    assert decision_of(race)["winner"] == "C"


def test_a_stop_needs_a_better_one_beyond_the_margin(lab):
    """C was stopped by A, and B beat it by less than the margin: without A the rule could choose C."""
    here = lab({"A": 0.1, "B": 0.118, "C": 0.12}, failing({0.1: (7, "diverged")}), asha={"margin": 0.19},
               decision={"within": 0.1})
    race, runs = here.race(), []
    runs = [race.next() for _ in range(3)]
    assert [here.step(race, run) for run in runs] == [False, False, True]
    assert len(race.trials[2].run.stop.beaten_by) == 2
    while not here.step(race, runs[0]):
        pass
    assert [event["trial"] for event in here.events("continued")] == ["C_seed42"] and race.next() is runs[2]


def test_beaten_by_what_does_not_meet_the_requirements_in_the_end(lab):
    """A's PSNR falls below what is required after it has cost C its slot."""
    def curve(config):
        low = config.train.weight_decay == 0.1
        return [{"val/mse": value, "val/psnr": 10.0 if low and epoch > 5 else 30.0 + low * epoch}
                for epoch, value in enumerate(levels(config))]

    here = lab({"A": 0.1, "C": 0.2}, curve, decision={"require": [{"metric": "val/psnr", "min": 20}]})
    race = here.run(slots=2, seed=4)
    assert here.stops() and states(race)["C_seed42"] == ("completed", 8) and decision_of(race)["winner"] == "C"


def test_a_failure_is_no_measure_and_its_slot_goes_on(lab):
    here = lab({"A": 0.1, "B": 0.12}, failing({0.1: (0, "diverged"), 0.12: (5, "failed")}))
    race = here.run()
    assert states(race) == {"A_seed42": ("diverged", 0), "B_seed42": ("failed", 5)}
    assert decision_of(race)["winner"] is None and not here.stops()


def test_failures_are_tried_again_and_divergences_are_not(lab):
    here = lab({"A": 0.1, "B": 0.12}, failing({0.1: (3, "diverged"), 0.12: (5, "failed")}))
    here.run()
    assert not here.race().idle and here.race(retry=False).idle
    assert states(here.race(retry=False)) == {"A_seed42": ("diverged", 3), "B_seed42": ("failed", 5)}
    here.curve = levels
    race = here.run()
    assert states(race) == {"A_seed42": ("diverged", 3), "B_seed42": ("completed", 8)}
    assert race.trials[1].run.trained == 3 and race.trials[0].run.note.startswith("diverged at epoch 4, step 1: loss")
    assert len(here.events("diverged")) == 1


# Repeats --------------------------------------------------------------------------------------------------------------

def test_finalists_get_paired_seeds(lab):
    here = lab(decision={"repeats": 3, "within": 0.02})
    race = here.run(slots=2)
    seeds = {}
    for trial in race.trials:
        seeds.setdefault(trial.candidate.name, []).append(trial.seed)
        assert trial.run.config.train.seed == trial.seed and trial.run.protected == (trial.seed != 42)
    # Without noise two seeds show that E, 4% behind, is not within 2%.
    assert seeds == {"A": [42, 43, 44], "B": [42, 43, 44], "E": [42, 43], "C": [42], "D": [42]}
    assert all(len(race.runs[key].rows) == 8 for key in race.runs if race.runs[key].protected)
    again = here.race()
    assert again.idle and states(again) == states(race) and decision_of(again) == decision_of(race)
    assert not any(name.split("seed")[1] != "42" for name, *_ in here.stops())


def test_repeats_are_neither_stopped_nor_counted(lab):
    """B's further seeds are far worse, and are trained to their end."""
    curve = lambda config: [v * (1 + 9 * (config.train.weight_decay > 0.1 and config.train.seed > 42))   # noqa: E731
                            for v in levels(config)]
    here = lab({"A": 0.1, "B": 0.101}, curve, decision={"repeats": 3})
    race = here.run(slots=4)
    assert set(states(race).values()) == {("completed", 8)} and not here.stops()
    assert set(race.rungs.recorded[1]) == {trial.run.id for trial in race.trials[:2]}
    assert decision_of(race)["winner"] == "A"


def test_who_races_on_depends_on_no_order_of_things(lab):
    """Of five finalists some leave between two seeds, and the first seed's leader falls at its third."""
    def curve(config: Config) -> list[Any]:
        knob, seed = config.train.weight_decay, config.train.seed
        noise = 1 + 0.01 * random.Random(f"{knob} {seed}").gauss(0, 1)
        return [value * noise for value in levels(config)] if (knob, seed) != (0.1, 44) else [0.5, "diverged"]

    arms = {"A": 0.1, "B": 0.103, "C": 0.106, "D": 0.14, "E": 0.15}
    told = {}
    for slots in (1, 2, 5):
        for seed in range(4):
            race = lab(arms, curve, asha=False, decision={"repeats": 5, "within": "1%", "baseline": {"arm": "E"}}).run(
                slots=slots, seed=seed)
            told[slots, seed] = (sorted(trial.name for trial in race.trials), json.dumps(decision_of(race)))
    assert len(set(map(repr, told.values()))) == 1
    names, decision = told[1, 0]
    per_arm = {arm: sum(name.startswith(arm) for name in names) for arm in arms}
    assert per_arm["E"] == 5 and per_arm["A"] == 5 and per_arm["D"] == 1         # D is behind by more than the margin
    assert json.loads(decision)["winner"] in ("B", "C") and max(per_arm["B"], per_arm["C"]) == 5


def test_the_split_may_vary_with_the_seed(lab):
    vary = ["train.seed", "data.seed"]
    here = lab({"A": 0.1, "B": 0.101}, decision={"repeats": 3, "within": "2%", "repeats_vary": vary})
    race = here.run()
    assert {(trial.seed, trial.run.config.data.seed) for trial in race.trials} == {(42, 42), (43, 43), (44, 44)}
    assert len({trial.run.key for trial in race.trials}) == 6
    same = lab({"A": 0.1, "B": 0.101}, decision={"repeats": 3, "within": "2%"}).run()
    assert {trial.run.config.data.seed for trial in same.trials} == {42}


def test_a_sole_finalist_is_not_repeated(lab):
    assert len(lab({"A": 0.1, "C": 0.2}, decision={"repeats": 3}).run().trials) == 2
    assert len(lab({"A": 0.1, "C": 0.2}, decision={"repeats": 3, "baseline": {"arm": "A"}}).run().trials) == 2
    both = lab({"A": 0.1, "C": 0.2}, decision={"repeats": 3, "baseline": {"arm": "C"}}).run()
    assert len(both.trials) == 6


# The figures ----------------------------------------------------------------------------------------------------------

def test_the_objective_is_read_at_the_best_epoch_of_the_monitor(lab):
    def curve(config):
        return [{"val/mse": 1.0, "val/ssim": 0.9}, {"val/mse": config.train.weight_decay, "val/ssim": 0.5},
                {"val/mse": 0.9, "val/ssim": 0.99}] + [{"val/mse": math.nan, "val/ssim": 1.0}] * 5

    race = lab({"A": 0.1, "B": 0.2}, curve, objective={"metric": "val/ssim"}).run()
    assert [record.figures["val/ssim"] for record in race.records()] == [0.5, 0.5]
    assert [record.best_epoch for record in race.records()] == [2, 2]


def test_figures_of_the_finished_model_are_waited_for(lab):
    here = lab({"A": 0.1}, decision={"within": 0.1, "prefer": [{"metric": "latent/smoothness"}]})
    here.store_epochs("A", 8)
    race = here.race()
    run = race.trials[0].run
    assert race.wanted_after(run) == ("latent/smoothness",) and not race.idle
    assert race.missing_figures(run) == ["latent/smoothness"]
    (run.trajectory.folder / "figures.json").write_text(json.dumps({"8": {"latent/smoothness": 1.5}}))
    race = here.race()
    assert race.idle and race.records()[0].figures["latent/smoothness"] == 1.5


def test_a_run_can_be_sent_back_for_weights(lab):
    here = lab({"A": 0.1, "C": 0.2}, decision={"repeats": 2})
    race = here.run()
    before, stops = decision_of(race), here.stops()
    race.reopen(race.trials[0].run, 5)
    assert not race.done and race.next() is race.trials[0].run and race.trials[0].run.keep == 5
    assert here.step(race, race.trials[0].run) and race.done and race.next() is None
    assert decision_of(race) == before and here.stops() == stops and states(here.race()) == states(race)


# Figures of the whole course ------------------------------------------------------------------------------------------

def test_how_steady_a_training_was_and_how_soon_it_came_near_its_best(lab):
    values = [(2.0, 0), (1.04, 3), (1.2, 1), (1.0, 0)]
    here = lab({"A": 0.1}, lambda config: [{"val/mse": v, "train/spikes": float(s)} for v, s in values],
               config={"train": {"epochs": 4}})
    found = here.run().records()[0].figures
    assert (found["stability/spikes"], found["stability/epochs"]) == (4, 2)


def test_the_store_may_hold_further_seeds(lab):
    here = lab({"A": 0.1, "B": 0.101}, decision={"repeats": 3, "within": "2%"})
    assert here.race().stored_repeats == 0
    here.store_epochs("A", 5, seed=44)
    assert here.race().stored_repeats == 5
    here.run()
    assert here.race().stored_repeats == 32
