"""What a race tries beyond its arms: points of the space."""

from __future__ import annotations

import pytest
from racing import KNOB, decision_of, states


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_space_is_searched_after_the_arms(lab, algorithm, slots):
    space = {KNOB: {"type": "float", "low": 0.05, "high": 0.5, "steps": 5}}
    here = lab({"A": 0.1, "C": 0.2}, space=space, search={"algorithm": algorithm, "trials": 6})
    race = here.run(slots)
    assert [trial.candidate.name for trial in race.trials] == ["A", "C", "S001", "S002", "S003", "S004"]
    started = [event["trial"] for event in here.events("started")]
    assert started[:2] == ["A_seed42", "C_seed42"]
    points = [event["settings"][KNOB] for event in here.events("suggested")]
    assert points == [trial.run.config.train.weight_decay for trial in race.trials[2:]] and len(set(points)) == 4
    assert all(0.05 <= point <= 0.5 for point in points)
    again = here.race()
    assert again.idle and states(again) == states(race)
    more = lab({"A": 0.1, "C": 0.2}, space=space, search={"algorithm": algorithm, "trials": 7})
    assert not more.race().idle and len(more.run(slots).runs) == 7


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_an_exhausted_space_ends(lab, algorithm):
    """Three values, one of them an arm's; ten trials asked for."""
    space = {KNOB: {"type": "choice", "choices": [0.1, 0.15, 0.2]}}
    here = lab({"A": 0.1}, space=space, search={"algorithm": algorithm, "trials": 10})
    race = here.run(slots=2)
    assert sorted(run.config.train.weight_decay for run in race.runs.values()) == [0.1, 0.15, 0.2]
    assert here.race().idle                                              # no worker is needed to find it so again
    assert len(here.events("space exhausted")) == 1
    wider = lab({"A": 0.1}, space={KNOB: {"type": "choice", "choices": [0.1, 0.15, 0.2, 0.25]}},
                search={"algorithm": algorithm, "trials": 10})
    assert not wider.race().idle and len(wider.run().trials) == 4


def test_a_grid_goes_on_behind_all_that_is_known(lab):
    space = {KNOB: {"type": "float", "low": 0.1, "high": 0.5, "steps": 130}}
    grid = {"algorithm": "grid", "trials": 120}
    assert len(lab(None, space=space, search=grid, config={"train": {"epochs": 1}}).run().trials) == 120
    race = lab(None, space=space, search={**grid, "trials": 125}, config={"train": {"epochs": 1}}).run()
    assert len(race.runs) == 125


def test_a_point_that_an_arm_is_already_is_not_trained_again(lab):
    space = {KNOB: {"type": "choice", "choices": [0.1, 0.2]}, "loss.kl": {"type": "float", "low": 0.1, "high": 1.0}}
    here = lab({"A": 0.1}, space=space, search={"algorithm": "random", "trials": 5})
    race = here.run()
    assert len(race.runs) == 2 and sum(here.trained.values()) == sum(len(run.rows) for run in race.runs.values())


def test_points_whose_settings_do_not_go_together_are_drawn_again(lab):
    """Every loss weight may be 0, but not all of them."""
    space = {key: {"type": "choice", "choices": [0.0, 1.0]} for key in ("loss.mse", "loss.l1")}
    curve = lambda config: [0.1 + config.loss.mse] * 8                                        # noqa: E731
    for algorithm in ("grid", "random", "tpe"):
        search = {"algorithm": algorithm, "trials": 9}
        race = lab(None, curve, space=space, search=search, config={"loss": {"l1": 1.0}}).run()
        assert {(run.config.loss.mse, run.config.loss.l1) for run in race.runs.values()} == {(0, 1), (1, 0), (1, 1)}


def test_points_of_another_space_are_left(lab):
    space = {KNOB: {"type": "float", "low": 0.1, "high": 0.5}}
    search = {"algorithm": "random", "trials": 3}
    lab(None, space=space, search=search).run()
    two = {**space, "loss.l1": {"type": "float", "low": 0.1, "high": 0.5}}
    race = lab(None, space=two, search=search).run()
    assert [len(trial.candidate.settings) for trial in race.trials] == [2, 2, 2]


def test_sampled_points_can_be_finalists_and_picked(lab):
    space = {KNOB: {"type": "float", "low": 0.1, "high": 0.5, "steps": 3}}
    race = lab({"A": 0.1001}, space=space, search={"algorithm": "grid", "trials": 4},
               decision={"repeats": 2, "pick": "S003", "because": "a test"}).run()
    assert [trial.name for trial in race.trials[4:]] == ["A_seed43", "S001_seed43", "S003_seed43"]
    assert decision_of(race)["winner"] == "S003"
