"""The search beyond the arms: what Optuna is told, what it draws, and the points of sweeps before."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from racing import KNOB, Killed, Lab, decision_of, levels

from autoenc.sweep.quasi import quasi_random_points
from autoenc.sweep.search import Searcher, runners_up
from autoenc.sweep.space import grid_points, parse_space, project

SPACE = {KNOB: {"type": "float", "low": 0.05, "high": 0.5, "log": True}}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


class Searching(Lab):
    first = ()                                           # points from elsewhere

    def race(self, **more):
        return super().race(first_points=self.first, **more)


@pytest.fixture
def lab(tmp_path):
    def make(curve=levels, space=SPACE, algorithm="tpe", trials=4, **content) -> Searching:
        return Searching(tmp_path, curve, space=space, search={"algorithm": algorithm, "trials": trials}, **content)
    return make


def points_of(here: Lab) -> list[dict]:
    return [event["settings"] for event in here.events("suggested")]


def told(race) -> list[tuple]:
    """The study's trials: parameters, state, value, intermediate values."""
    return [(trial.params, trial.state, trial.value, trial.intermediate_values)
            for trial in race.points.searcher.study.get_trials(deepcopy=False)]


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
    assert race.points.searcher.study.direction.name == "MAXIMIZE"
    assert by_knob(race)[0.1] == [COMPLETE, 0.5, {2: 0.3, 3: 0.3, 4: 0.5, 5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5}]


def test_an_objective_that_is_undefined_throughout_is_a_failure_to_the_study(lab):
    curve = lambda config: [{"val/mse": 0.1, "val/palette_miou": math.nan}] * 8               # noqa: E731
    race = lab(curve, arms={"A": {KNOB: 0.1}}, trials=2, objective={"metric": "val/palette_miou"}).run()
    assert by_knob(race)[0.1] == [FAIL, None, {}]


@pytest.mark.parametrize("algorithm", ["tpe", "random", "gp"])
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
    space = {KNOB: {"type": "float", "low": 0.3, "high": 0.5}}           # what is drawn does not beat B
    race = lab(curve, space, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.3}}, trials=3).run(slots=3, seed=2)
    states = [state for params, state, *_ in told(race) if params[KNOB] == 0.3]
    assert race.trials[1].run.state == "completed" and states == [PRUNED, COMPLETE]


def test_who_is_continued_and_beaten_again_is_learnt_from_twice(lab):
    race = lab(curve_to({0.1: "diverged"}), arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.4}}, trials=3,
               asha={"reduction_factor": 4}).run(slots=3, seed=2)
    states = [state for params, state, *_ in told(race) if params[KNOB] == 0.4]
    assert race.trials[1].run.state == "stopped" and states == [PRUNED, PRUNED]


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


@pytest.mark.parametrize(("algorithm", "trials"), [("tpe", 24), pytest.param("gp", 18, marks=pytest.mark.slow)])
def test_the_search_learns(lab, algorithm, trials):
    """On a bowl, the later points are nearer to its bottom than random ones would be."""
    bowl = lambda config: [1 + math.log(config.train.weight_decay / 0.3) ** 2] * 8            # noqa: E731
    space = {KNOB: {"type": "float", "low": 1e-4, "high": 1.0, "log": True}}
    race = lab(bowl, space, algorithm, trials, asha=False).run()
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


# Drawing --------------------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def parameters(draw):
    kind = draw(st.sampled_from(["float", "int", "choice"]))
    if kind == "choice":
        return {"type": kind, "choices": draw(st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True))}
    if kind == "int":
        low, step, count = draw(st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6)))
        log = step == 1 and draw(st.booleans())
        return {"type": kind, "low": low, "high": low + step * count, "step": step, "log": log}
    low, factor = draw(st.floats(1e-6, 1)), draw(st.floats(1.001, 1e4))
    return {"type": kind, "low": low, "high": low * factor, "log": draw(st.booleans()), "zero": draw(st.booleans()),
            "steps": draw(st.integers(2, 4))}


@st.composite
def spaces(draw):
    """Parameters of every type; some only exist when the model is variational."""
    keys = {"float": ("loss.l1", "loss.segmentation", "loss.kl"), "int": ("model.base_channels",),
            "choice": ("model.latent_channels",)}
    space = {"model.variational": {"type": "choice", "choices": [True, False]}} if draw(st.booleans()) else {}
    for content in draw(st.lists(parameters(), min_size=1, max_size=4)):
        key = draw(st.sampled_from(keys[content["type"]]))
        space[key] = {**content, **({"when": {"model.variational": True}} if draw(st.booleans()) else {})}
    return space


@settings(max_examples=25, deadline=None)
@given(raw=spaces(), algorithm=st.sampled_from(["tpe", "random", "quasi_random", "grid"]), seed=SEEDS)
def test_draws_stay_in_the_space(raw, algorithm, seed):
    with tempfile.TemporaryDirectory() as folder:
        here = Lab(Path(folder), arms={"A": {}}, space=raw, search={"algorithm": algorithm, "trials": 20, "seed": seed})
        searcher = Searcher(here.spec, here.start, 0)
        for number in range(16):
            drawn = searcher.draw()
            if drawn is None:
                assert algorithm == "grid" and number == len(list(grid_points(here.spec.space, here.start)))
                break
            point, trial = drawn
            assert project(point, here.spec.space, here.start) == point
            if trial is not None:
                searcher.study.tell(trial, float(number))


@settings(max_examples=50, deadline=None)
@given(raw=spaces(), seed=SEEDS, skip=st.integers(0, 70), more=st.integers(1, 8))
def test_a_quasi_random_sequence_goes_on_where_it_was_broken_off(raw, seed, skip, more):
    space, start = parse_space(raw, "here"), {"model.variational": True}
    whole = list(itertools.islice(quasi_random_points(space, start, seed), skip + more))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(itertools.islice(quasi_random_points(space, start, seed, skip), more)) == whole[skip:]


def test_quasi_random_points_are_spread_evenly():
    """Of 64 points, each sixteenth of a logarithmic range and each value has its share, exact 0 its half."""
    space = parse_space({"loss.l1": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
                         "model.base_channels": {"type": "int", "low": 8, "high": 64, "step": 8},
                         "loss.kl": {"type": "float", "low": 0.1, "high": 1.0, "zero": True}}, "here")
    points = list(itertools.islice(quasi_random_points(space, {}, 42), 64))
    sixteenths = [int(4 * (4 + math.log10(point["loss.l1"]))) for point in points]
    assert [sixteenths.count(part) for part in range(16)] == [4] * 16
    widths = [point["model.base_channels"] for point in points]
    assert [widths.count(width) for width in range(8, 65, 8)] == [8] * 8
    assert [point["loss.kl"] for point in points].count(0.0) == 32


def test_a_quasi_random_sweep_goes_on_in_its_sequence(lab):
    here = lab(arms={"A": {KNOB: 0.1}}, algorithm="quasi-random", trials=7)          # a hyphen will do
    assert here.spec.search.algorithm == "quasi_random"
    with pytest.raises(Killed):
        here.run(kill_in=30)
    assert 1 <= len(points_of(here)) < 6
    here.run()
    assert points_of(here) == list(itertools.islice(quasi_random_points(here.spec.space, here.start, 42), 6))


@settings(max_examples=15, deadline=None)
@given(algorithm=st.sampled_from(["tpe", "random", "quasi_random", "grid"]), slots=st.integers(1, 3),
       kills=st.lists(st.integers(1, 60), max_size=3), seed=st.integers(0, 99))
def test_a_sweep_that_is_killed_and_continued_suggests_no_point_twice(algorithm, slots, kills, seed):
    space = {**CONDITIONAL, "loss.l1": {**CONDITIONAL["loss.l1"], "steps": 3},
             "loss.kl": {**CONDITIONAL["loss.kl"], "steps": 3}}
    with tempfile.TemporaryDirectory() as folder:
        here = Searching(Path(folder), lambda config: [0.1 + config.loss.l1 + config.loss.kl] * 4, space=space,
                         config={"train": {"epochs": 4}}, arms={"A": {"loss.l1": 0.5}},
                         search={"algorithm": algorithm, "trials": 7, "seed": seed})
        here.first = [("above: B", {"loss.l1": 0.25}), ("above: C", {"loss.l1": 0.0}), ("above: D", {"loss.l1": 0.5})]
        for kill_in in kills:
            with contextlib.suppress(Killed):
                here.run(slots, seed, kill_in)
        race = here.run(slots, seed)
        points, names = points_of(here), [event["name"] for event in here.events("suggested")]
        assert all(left != right for left, right in itertools.combinations(points, 2))
        assert names == [f"S{number:03d}" for number in range(1, 7)] and len(race.runs) == 7
        assert [event.get("from") for event in here.events("suggested")] == ["above: B", *[None] * 5]


# What came close before -----------------------------------------------------------------------------------------------

def test_the_runners_up_are_the_first_points(lab):
    """Projected onto the space; none that is outside of it, the start, or known."""
    here = lab(space={**SPACE, "loss.kl": {**CONDITIONAL["loss.kl"]}}, arms={"A": {KNOB: 0.1}}, trials=6,
               config={"train": {"weight_decay": 0.3}})
    here.first = [
        ("p: B", {KNOB: 0.2, "model.base_channels": 16}), ("p: outside", {KNOB: 0.9}), ("p: arm", {KNOB: 0.1}),
        ("p: start", {"model.base_channels": 64}), ("p: twice", {KNOB: 0.2}), ("p: text", {KNOB: "x"}),
        ("p: condition", {KNOB: 0.25, "loss.kl": 1e-4}), ("p: C", {KNOB: 0.4})]
    race = here.run()
    events = here.events("suggested")
    assert [(event["settings"], event.get("from")) for event in events[:3]] == [
        ({KNOB: 0.2}, "p: B"), ({KNOB: 0.4}, "p: C"), (events[2]["settings"], None)] and len(events) == 5
    told_of = [trial.candidate.hypothesis for trial in race.trials[:4]]
    assert told_of == ["", "runner-up of p: B", "runner-up of p: C", ""]
    assert {by_knob(race)[0.2][0], by_knob(race)[0.4][0]} <= {COMPLETE, PRUNED}                  # and are learnt from
    again = here.race()
    assert again.idle and [trial.candidate for trial in again.trials] == [trial.candidate for trial in race.trials]


@pytest.mark.parametrize(("trials", "most"), [(2, 1), (5, 2), (7, 2), (8, 3)])
def test_runners_up_count_among_the_trials_and_leave_two_thirds(lab, trials, most):
    here = lab(arms={"A": {KNOB: 0.1}}, trials=trials)
    here.first = [("p", {KNOB: value}) for value in (0.2, 0.4, 0.3, 0.25)]
    for kill_in in (25, 40, None):
        with contextlib.suppress(Killed):
            here.run(kill_in=kill_in)
    assert [event.get("from") for event in here.events("suggested")] == ["p"] * most + [None] * (trials - 1 - most)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_runners_up_are_those_that_could_have_won(lab, tmp_path, mode):
    curve = lambda config: ["diverged"] if config.train.weight_decay == 0.5 else [                # noqa: E731
        {"val/mse": 0.1, "val/ssim": config.train.weight_decay}] * 8
    arms = {"low": {KNOB: 0.10}, "top": {KNOB: 0.30}, "near": {KNOB: 0.29}, "broken": {KNOB: 0.5}}
    objective = {"metric": "val/ssim"} if mode == "max" else {"metric": "beta", "mode": "min"}
    if mode == "min":
        curve = lambda config: ["diverged"] if config.train.weight_decay == 0.5 else [            # noqa: E731
            {"val/mse": 0.1, "beta": -config.train.weight_decay}] * 8
    decision = decision_of(lab(curve, None, arms=arms, trials=None, asha=False, objective=objective,
                               decision={"within": 0.05}).run())
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "decision.json").write_text(json.dumps(decision))
    assert runners_up(tmp_path / "p") == [("p: near", {KNOB: 0.29}), ("p: low", {KNOB: 0.1})]


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.sampled_from(["best", "min", "A", "x"]), lambda inner:
                    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["rule", "objective", "mode", "candidates", "standing", "settings", "score", "arm", "winner"]),
                        inner, max_size=5), max_leaves=20)


@settings(max_examples=40, deadline=None)
@given(st.one_of(JSON, st.fixed_dictionaries(
    {"rule": st.just({"objective": {"mode": "min"}}), "winner": st.just("A"), "candidates": st.lists(
        st.fixed_dictionaries({"arm": JSON, "standing": st.just("best") | JSON, "settings": JSON, "score": JSON}))})))
def test_a_decision_that_is_not_as_it_was_written_has_no_runners_up_or_whole_ones(content):
    with tempfile.TemporaryDirectory() as folder:
        assert runners_up(Path(folder)) == []
        (Path(folder) / "decision.json").write_text(json.dumps(content))
        assert all(isinstance(source, str) and isinstance(point, dict) for source, point in runners_up(Path(folder)))


# Two objectives -------------------------------------------------------------------------------------------------------

BOTH = {"decision": {"within": 0.02, "prefer": [{"metric": "val/mse"}, {"metric": "val/palette_miou"}]}}


def weighed(config):
    """The larger the weight, the worse the error and the better the classes."""
    weight = config.train.weight_decay
    return [{"val/mse": (0.1 + weight) * (1 + 1 / epoch), "val/palette_miou": 0.5 + weight} for epoch in range(1, 9)]


@pytest.mark.parametrize("algorithm", ["tpe", "gp"])
def test_both_the_objective_and_what_is_preferred_are_searched(lab, algorithm):
    race = lab(weighed, arms={"A": {KNOB: 0.1}}, algorithm=algorithm, trials=3, asha=False, **BOTH).run()
    study = race.points.searcher.study
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert [trial.values for trial in study.get_trials(deepcopy=False)] == [
        pytest.approx([(0.1 + run.config.train.weight_decay) * 1.125, 0.5 + run.config.train.weight_decay])
        for run in race.runs.values()]


def test_tpe_keeps_to_the_whole_front(lab):
    """By the error alone it would go where the weight is smallest; both count, and the points stay spread."""
    where = {}
    for name, content in (("both", BOTH), ("error", {"decision": {"within": 0.02}})):
        race = lab(weighed, {KNOB: {"type": "float", "low": 0.0, "high": 1.0}}, trials=30, asha=False,
                   name=f"toy_{name}", **content).run()
        late = [trial.run.config.train.weight_decay for trial in race.trials[15:]]
        where[name] = sum(late) / len(late)
    assert where["error"] < 0.25 < 0.35 < where["both"]


def test_two_objectives_stopped_and_without_the_second_figure(lab):
    def curve(config):
        rows = weighed(config)
        return [{"val/mse": row["val/mse"]} for row in rows] if config.train.weight_decay == 0.15 else rows

    arms = {"A": {KNOB: 0.1}, "B": {KNOB: 0.12}, "stopped": {KNOB: 0.45}, "without": {KNOB: 0.15}}
    race = lab(curve, arms=arms, trials=5, asha={"margin": 0.5}, **BOTH).run()
    found = {trial.params[KNOB]: trial for trial in race.points.searcher.study.get_trials(deepcopy=False)}
    assert found[0.45].state == PRUNED and found[0.45].user_attrs["val/mse"] == [pytest.approx(1.1)]
    assert found[0.15].state == COMPLETE
    assert found[0.15].values == pytest.approx([0.25 * 1.125, 0.6])        # the worst so far, as the rule ranks it last
    assert found[0.1].user_attrs["val/mse"] == pytest.approx([0.2 * (1 + 1 / epoch) for epoch in range(1, 9)])


# Gaussian processes ---------------------------------------------------------------------------------------------------

def test_a_gaussian_process_knows_what_was_stopped_and_what_failed(lab):
    """It looks at nothing but completed trials, all with the same parameters."""
    arms = {"A": {"loss.l1": 0.1}, "B": {"loss.l1": 1.0}, "C": {"model.variational": True, "loss.kl": 1e-3}}
    curve = lambda config: ["diverged"] if config.model.variational else [0.1 + config.loss.l1] * 8   # noqa: E731
    race = lab(curve, CONDITIONAL, "gp", arms=arms, trials=4).run()
    first, second, third, _ = told(race)
    assert race.trials[1].run.state == "stopped" and race.trials[2].run.state == "diverged"
    assert first[0] == {"model.variational": False, "loss.kl": pytest.approx(1e-4),
                        "loss.l1 is 0": False, "loss.l1": 0.1}
    assert (first[1], first[2], second[1], second[2]) == (COMPLETE, 0.2, COMPLETE, 1.1)
    assert third[0]["loss.l1 is 0"] and third[1:3] == (COMPLETE, 1.1)
    assert all(len(params) == 4 for params, *_ in told(race))
