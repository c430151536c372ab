from __future__ import annotations

import math
import warnings

import pytest
from optuna.trial import TrialState
from racing import KNOB, Killed, Lab, levels

SPACE = {KNOB: {"type": "float", "low": 0.05, "high": 0.5, "log": True}}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


@pytest.fixture
def lab(tmp_path):
    def make(curve=levels, space=SPACE, algorithm="tpe", trials=4, **content) -> Lab:
        return Lab(tmp_path, curve, space=space, search={"algorithm": algorithm, "trials": trials}, **content)
    return make


def told(race) -> list[tuple]:
    """The study's trials: parameters, state, value, intermediate values."""
    return [(trial.params, trial.state, trial.value, trial.intermediate_values)
            for trial in race.searcher.study.get_trials(deepcopy=False)]


def by_knob(race) -> dict[float, tuple]:
    return {params[KNOB]: rest for params, *rest in told(race)}


def curve_to(end: dict[float, str]):
    """Learning curves that end after three epochs in a failure, for these values of the knob."""
    return lambda config: [*levels(config)[:3], end[config.train.weight_decay], *levels(config)[4:]] \
        if config.train.weight_decay in end else levels(config)


def test_what_a_completed_a_stopped_and_a_failed_trial_leave(lab):
    arms = {"A": {KNOB: 0.1}, "B": {KNOB: 0.4}, "C": {KNOB: 0.2}, "D": {KNOB: 0.3}}
    race = lab(curve_to({0.2: "diverged", 0.3: "failed"}), arms=arms, trials=5, asha={"margin": 2.0}).run()
    study = by_knob(race)
    whole = {epoch: 0.1 * (1 + 1 / epoch) for epoch in range(1, 9)}
    assert study[0.1] == [COMPLETE, pytest.approx(0.1125), pytest.approx(whole)]
    assert study[0.4] == [PRUNED, pytest.approx(0.8), {1: pytest.approx(0.8)}]
    assert study[0.2] == [FAIL, None, {1: 0.4, 2: pytest.approx(0.3), 3: pytest.approx(0.2 * 4 / 3)}]
    assert study[0.3][0] == FAIL and list(study[0.3][2]) == [1, 2, 3]
    assert len(study) == 5 and all(state.is_finished() for _, state, *_ in told(race))


def test_a_trial_stopped_late_is_pruned_with_all_its_values(lab):
    curve = lambda config: [0.1] + [0.1 if config.train.weight_decay == 0.4 else 0.05] * 7    # noqa: E731
    race = lab(curve, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4}}, trials=3).run()
    state, value, values = by_knob(race)[0.4]
    assert state == PRUNED and list(values) == [1, 2] and value == values[2]


def test_values_are_those_that_the_decision_would_read(lab):
    """The objective at the best epoch so far; nothing is told of an epoch without one."""
    def curve(config):
        return [{"val/mse": mse, "val/ssim": ssim} for mse, ssim in
                ((0.5, math.nan), (0.4, 0.3), (0.45, 0.9), (0.2, 0.5), *[(0.3, 0.99)] * 4)]

    race = lab(curve, arms={"A": {KNOB: 0.1}}, trials=2, objective={"metric": "val/ssim"}).run()
    assert race.searcher.study.direction.name == "MAXIMIZE"
    assert by_knob(race)[0.1] == [COMPLETE, 0.5, {2: 0.3, 3: 0.3, 4: 0.5, 5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5}]


def test_an_objective_that_is_undefined_throughout_is_a_failure_to_the_study(lab):
    curve = lambda config: [{"val/mse": 0.1, "val/palette_miou": math.nan}] * 8               # noqa: E731
    race = lab(curve, arms={"A": {KNOB: 0.1}}, trials=2, objective={"metric": "val/palette_miou"}).run()
    assert by_knob(race)[0.1] == [FAIL, None, {}]


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_after_a_restart_nothing_is_suggested_again(lab, algorithm):
    """One slot: the interrupted search goes on in the same sequence as the uninterrupted one."""
    here = lab(arms={"A": {KNOB: 0.1}}, algorithm=algorithm, trials=7)
    with pytest.raises(Killed):
        here.run(kill_in=30)
    before = [event["settings"][KNOB] for event in here.events("suggested")]
    race = here.run()
    points = [event["settings"][KNOB] for event in here.events("suggested")]
    assert 1 <= len(before) < 6 and points[:len(before)] == before and len(set(points)) == len(points) == 6
    assert list(by_knob(race)) == [0.1, *points]
    others = {by_knob(race)[point][0] for point in before}
    assert others <= {COMPLETE, PRUNED}                                 # replayed: told as they ended


def test_a_replayed_trial_is_told_as_it_ended(lab):
    here = lab(arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4}}, trials=4)
    first = here.run()
    trained = dict(here.trained)
    more = lab(arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4}}, trials=5)
    again = more.run()
    assert told(again)[:4] == told(first) and len(told(again)) == 5
    assert len(more.trained) == 1 and not set(more.trained) & set(trained)


def test_a_suggestion_that_is_known_is_told_and_not_trained(lab):
    here = lab(space={KNOB: {"type": "choice", "choices": [0.1, 0.2]}}, algorithm="random", arms={"A": {KNOB: 0.1}})
    race = here.run()
    assert len(here.trained) == 2 and len(told(race)) > 2
    values = {params[KNOB]: set() for params, *_ in told(race)}
    for params, state, value, _ in told(race):
        values[params[KNOB]].add((state, value))
    assert all(len(found) == 1 for found in values.values()) and len(values) == 2


def test_a_suggestion_known_while_it_runs_is_told_when_it_ends(lab):
    here = lab(space={KNOB: {"type": "choice", "choices": [0.1, 0.2]}}, algorithm="random", arms={"A": {KNOB: 0.1}})
    race = here.race()
    running = [race.next(), race.next()]
    assert race.next() is None and not race.done
    assert [state.name for _, state, *_ in told(race)].count("RUNNING") == len(told(race)) > 2
    for run in running:
        while not here.step(race, run):
            pass
    assert all(state in (COMPLETE, PRUNED) for _, state, *_ in told(race)) and race.next() is None and race.done


def test_a_continued_trial_is_learnt_from_once_more(lab):
    curve = curve_to({0.1: "diverged"})
    race = lab(curve, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4}}, trials=3).run(slots=3, seed=2)
    states = [state for params, state, *_ in told(race) if params[KNOB] == 0.4]
    assert race.trials[1].run.state == "completed" and states in ([COMPLETE], [PRUNED, COMPLETE])


WHEN = {"model.variational": True}
CONDITIONAL = {"model.variational": {"type": "choice", "choices": [True, False]},
               "loss.kl": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "when": WHEN},
               "loss.l1": {"type": "float", "low": 0.01, "high": 1.0, "log": True, "zero": True}}


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_conditional_parameters(lab, algorithm):
    arms = {"A": {"model.variational": True, "loss.kl": 1e-4}, "B": {"loss.l1": 0.5}}
    curve = lambda config: [0.1 + config.loss.l1 + 10 * config.loss.kl] * 8                   # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = lab(curve, CONDITIONAL, algorithm, trials=24, arms=arms, asha=False)
        race = here.run(slots=2)
    study = told(race)
    assert study[0][0] == {"model.variational": True, "loss.kl": 1e-4, "loss.l1 is 0": True}
    assert study[1][0] == {"model.variational": False, "loss.l1 is 0": False, "loss.l1": 0.5}
    for params, *_ in study:
        assert ("loss.kl" in params) == params["model.variational"] and ("loss.l1" in params) != params["loss.l1 is 0"]
    points = [event["settings"] for event in here.events("suggested")]
    assert {point["loss.l1"] == 0 for point in points} == {True, False}
    assert {"loss.kl" in point for point in points} == {True, False}
    for trial in race.trials[2:]:
        assert trial.run.config.loss.kl == trial.candidate.settings.get("loss.kl", 0.0)
    assert here.race().idle


def test_an_arm_that_is_no_point_of_the_space_teaches_nothing(lab):
    """Outside of the range; setting something else, too; under a condition that the space cannot bring about."""
    space = {KNOB: SPACE[KNOB], "loss.kl": {**CONDITIONAL["loss.kl"]}}
    arms = {"in": {KNOB: 0.1}, "out": {KNOB: 0.9}, "wider": {KNOB: 0.2, "model.base_channels": 16},
            "vae": {KNOB: 0.3, "model.variational": True, "loss.kl": 1e-3}, "idle": {KNOB: 0.4, "loss.kl": 1e-3}}
    race = lab(space=space, arms=arms, trials=6).run()
    assert [params for params, *_ in told(race)][:2] == [{KNOB: 0.1}, {KNOB: 0.4}] and len(told(race)) == 3


def test_tpe_learns(lab):
    """Of twenty points on a bowl, the later ones are nearer to its bottom than random ones would be."""
    bowl = lambda config: [1 + math.log(config.train.weight_decay / 0.3) ** 2] * 8            # noqa: E731
    race = lab(bowl, {KNOB: {"type": "float", "low": 1e-4, "high": 1.0, "log": True}}, trials=24, asha=False).run()
    miss = [abs(math.log(trial.run.config.train.weight_decay / 0.3)) for trial in race.trials]
    assert sum(miss[-8:]) / 8 < 0.5 * sum(miss[:8]) / 8


def test_seeds_of_the_search(lab, tmp_path):
    points = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        here = Lab(folder, space=SPACE, search={"algorithm": "random", "trials": 3, "seed": seed})
        here.run()
        points.append([event["settings"][KNOB] for event in here.events("suggested")])
    assert points[0] == points[1] != points[2]
