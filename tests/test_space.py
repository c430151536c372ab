"""What a sweep may vary: ranges with both ends, exact zero, conditions, and the way to an Optuna study and back."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoenc.config import Config, make_config
from autoenc.errors import InputError
from autoenc.sweep.space import draw_point, grid_points, optuna_parameters, parse_space

START = Config().flat()
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Extreme:
    """An Optuna trial that suggests the same end of everything."""

    def __init__(self, high: bool, zero: bool = False) -> None:
        self.high, self.zero = high, zero

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return high if self.high else low

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return high if self.high else low

    def suggest_categorical(self, name: str, choices: list) -> Any:
        if choices == [True, False]:                     # exact zero, or the range
            return self.zero
        return choices[-1 if self.high else 0]


def suggested(space: Mapping[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The point that a real study suggests when these parameters are enqueued, checked to be exactly those."""
    study = optuna.create_study()
    study.enqueue_trial(parameters)
    trial = study.ask()
    point = draw_point(trial, space, START)
    assert trial.params == parameters
    return point


# Strategies ---------------------------------------------------------------------------------------------------------

weight_keys = ["loss.mse", "loss.l1", "loss.segmentation", "loss.classification", "loss.kl", "train.weight_decay",
               "train.min_delta"]
int_keys = ["model.latent_channels", "model.base_channels", "train.epochs", "train.batch_size"]


@st.composite
def floats(draw: st.DrawFn) -> dict[str, Any]:
    log = draw(st.booleans())
    low = draw(st.floats(1e-12 if log else 0, 1e3))
    high = draw(st.floats(1e-12, 1e4).filter(lambda high: high > low))
    return {"type": "float", "low": low, "high": high, "log": log, "zero": draw(st.booleans()),
            "steps": draw(st.none() | st.integers(2, 6))}


@st.composite
def ints(draw: st.DrawFn) -> dict[str, Any]:
    low, log = draw(st.integers(1, 200)), draw(st.booleans())
    step = 1 if log else draw(st.integers(1, 5))
    return {"type": "int", "low": low, "high": low + step * draw(st.integers(1, 20)), "log": log, "step": step}


def choices(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(of, min_size=1, max_size=4, unique=True).map(lambda found: {"type": "choice", "choices": found})


CONDITIONS = st.none() | st.sampled_from([{"model.variational": True}, {"model.variational": False},
                                          {"train.precision": "bf16"}])
plain_spaces = st.fixed_dictionaries({}, optional={
    **{key: floats() | choices(st.integers(0, 9) | st.sampled_from([0.5, 2.5])) for key in weight_keys},
    **{key: ints() | choices(st.integers(1, 64)) for key in int_keys},
    "model.variational": choices(st.booleans()), "train.precision": choices(st.sampled_from(["fp32", "bf16"])),
}).filter(bool)


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    raw = draw(plain_spaces)
    for key in raw:
        condition = draw(CONDITIONS)
        if condition and key not in ("model.variational", "train.precision"):
            raw[key]["when"] = condition
    return raw


# Drawing and mapping back -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(spaces(), st.integers(0, 2**31))
def test_a_drawn_point_maps_back_to_itself(raw, seed):
    space = parse_space(raw, "f")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    point = draw_point(trial, space, START)
    complete = {**START, **point}
    for key, parameter in space.items():
        holds = all(complete[name] == value for name, value in parameter.when.items())
        assert (key in point) == holds                    # a parameter exists where its condition holds, and only there
    parameters = optuna_parameters(space, complete)
    assert parameters == trial.params
    assert suggested(space, parameters) == point


@settings(max_examples=100, deadline=None)
@given(spaces(), st.integers(0, 2**31))
def test_the_settings_of_a_typed_configuration_map_back(raw, seed):
    space = parse_space(raw, "f")
    point = draw_point(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask(), space, START)
    try:
        config = make_config({**START, **point}, "f")
    except InputError:
        assume(False)                                     # a combination that no model has, like no loss at all
    parameters = optuna_parameters(space, config.flat())  # where 1 is 1.0 for a weight
    assert parameters is not None
    again = suggested(space, parameters)
    assert make_config({**START, **again}, "f") == config


@settings(max_examples=100, deadline=None)
@given(spaces())
def test_both_ends_can_be_reached(raw):
    space = parse_space(raw, "f")
    for high, zero in itertools.product((False, True), (False, True)):
        point = draw_point(Extreme(high, zero), space, START)
        for key, value in point.items():
            parameter = raw[key]
            if parameter["type"] == "choice":
                assert value == parameter["choices"][-1 if high else 0] or isinstance(value, bool)
            elif parameter["type"] == "float" and parameter["zero"] and zero:
                assert value == 0.0
            else:
                assert value == parameter["high" if high else "low"]
        parameters = optuna_parameters(space, {**START, **point})
        assert suggested(space, parameters) == point


def test_sampling_reaches_zero_the_range_and_every_integer():
    space = parse_space({"loss.kl": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "zero": True},
                         "model.latent_channels": {"type": "int", "low": 2, "high": 6, "step": 2}}, "f")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [draw_point(study.ask(), space, START) for _ in range(200)]
    weights = [point["loss.kl"] for point in points]
    assert 60 < weights.count(0.0) < 140                  # zero is as likely as the range
    positive = sorted(weight for weight in weights if weight)
    assert positive[0] >= 1e-6 and positive[-1] <= 1e-2
    assert 1e-5 < positive[len(positive) // 2] < 1e-3     # logarithmic: the median near the geometric middle
    assert {point["model.latent_channels"] for point in points} == {2, 4, 6}


@pytest.mark.parametrize(("parameter", "inside", "outside"), [
    ({"type": "float", "low": 0.1, "high": 1}, [0.1, 1, 1.0, 0.5], [0, 0.0999, 1.0001, math.nan, True, "x", None]),
    ({"type": "float", "low": 0.1, "high": 1, "zero": True}, [0, 0.0, -0.0, 0.1], [0.05, -0.1, False]),
    ({"type": "int", "low": 2, "high": 8, "step": 3}, [2, 5, 8, 5.0], [1, 3, 9, 5.5, True, math.inf, math.nan, "2"]),
    ({"type": "choice", "choices": [1, 2.5, "a", True, None]}, [1.0, 1, 2.5, "a", True, None], [False, 0, 2, "b"]),
])
def test_what_lies_in_a_parameter(parameter, inside, outside):
    space = parse_space({"loss.kl": parameter}, "f")
    assert all(optuna_parameters(space, {**START, "loss.kl": value}) is not None for value in inside)
    assert all(optuna_parameters(space, {**START, "loss.kl": value}) is None for value in outside)


# Grids --------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(spaces())
def test_a_grid_has_each_point_once_and_both_ends(raw):
    for parameter in raw.values():
        if parameter["type"] == "float":
            parameter["steps"] = parameter["steps"] or 3
    space = parse_space(raw, "f")
    points = list(itertools.islice(grid_points(space, START), 500))
    assert len({repr(sorted(point.items())) for point in points}) == len(points)
    for point in points:
        assert optuna_parameters(space, {**START, **point}) is not None
        for key, parameter in space.items():
            assert (key in point) == all({**START, **point}[name] == value for name, value in parameter.when.items())
    for key, parameter in raw.items():
        values = list(space[key].values())
        assert len(set(map(repr, values))) == len(values)
        if parameter["type"] != "choice":
            assert {parameter["low"], parameter["high"]} <= set(values)
            assert all(parameter["low"] <= value <= parameter["high"] or value == 0 for value in values)
            assert (0 in values) == (parameter.get("zero", False) or parameter["low"] == 0)


def test_the_last_parameter_of_a_grid_varies_fastest():
    ladder = {"type": "float", "low": 0.1, "high": 10, "log": True, "steps": 3, "zero": True}
    space = parse_space({"train.batch_size": {"type": "choice", "choices": [8, 16]}, "loss.l1": ladder}, "f")
    found = [(point["train.batch_size"], round(point["loss.l1"], 9)) for point in grid_points(space, START)]
    assert found == list(itertools.product([8, 16], [0.0, 0.1, 1.0, 10.0]))


def test_a_conditional_parameter_has_one_point_where_it_does_not_exist():
    space = parse_space({"loss.kl": {"type": "choice", "choices": [1, 2, 3], "when": {"model.variational": True}},
                         "model.variational": {"type": "choice", "choices": [False, True]}}, "f")
    assert list(space) == ["model.variational", "loss.kl"]
    assert list(grid_points(space, START)) == [{"model.variational": False}, *(
        {"model.variational": True, "loss.kl": weight} for weight in (1, 2, 3))]


def test_conditions_are_followed_through_several_parameters():
    chain = {"loss.kl": {"type": "choice", "choices": [1, 2], "when": {"model.latent": "sample"}},
             "model.latent": {"type": "choice", "choices": ["mean", "sample"], "when": {"model.variational": True}},
             "model.variational": {"type": "choice", "choices": [True, False]}}
    keys = list(chain)
    for _ in range(5):
        random.Random(0).shuffle(keys)
        space = parse_space({key: chain[key] for key in keys}, "f")
        assert len(list(grid_points(space, START))) == 4
    points = list(grid_points(space, {**START, "model.latent": "sample"}))
    assert points[-1] == {"model.variational": False, "loss.kl": 2}


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "said"), [
    ([1], "f: space: [1] should be a mapping"),
    ({"loss.kll": {"type": "float"}}, "f: space: 'loss.kll' is no setting (did you mean 'loss.kl'?)"),
    ({"loss.kl": 3}, "f: space.loss.kl: 3 needs a type (float, int, choice)"),
    ({"loss.kl": {"low": 0, "high": 1}}, "f: space.loss.kl: {'low': 0, 'high': 1} needs a type"),
    ({"loss.kl": {"type": "flaot"}}, "f: space.loss.kl: type: 'flaot' is unknown (did you mean 'float'?)"),
    ({"loss.kl": {"type": ["float"]}}, "f: space.loss.kl: type: ['float'] is unknown"),
    ({"loss.kl": {"type": "float", "low": 1}}, "f: space.loss.kl: high is missing"),
    ({"loss.kl": {"type": "float", "low": 1, "hihg": 2}}, "f: space.loss.kl: unknown key 'hihg' (did you mean"),
    ({"loss.kl": {"type": "float", "low": 2, "high": 1}}, "f: space.loss.kl: low: 2.0 is not below high: 1.0"),
    ({"loss.kl": {"type": "float", "low": 1, "high": 1}}, "f: space.loss.kl: low: 1.0 is not below high: 1.0"),
    ({"loss.kl": {"type": "float", "low": 0, "high": 1, "log": True}}, "f: space.loss.kl: low: 0.0: a log range cannot "
                                                                       "include 0 (zero: true adds exact 0)"),
    ({"loss.kl": {"type": "float", "low": -1, "high": 1, "log": True}}, "low: -1.0: a log range must be positive"),
    ({"loss.kl": {"type": "float", "low": 0, "high": math.nan}}, "f: space.loss.kl: high: nan: input should be a"),
    ({"loss.kl": {"type": "float", "low": 0, "high": 1, "steps": 1}}, "steps: 1: input should be greater than or"),
    ({"train.epochs": {"type": "int", "low": 1, "high": 2.5}}, "f: space.train.epochs: high: 2.5: input should be"),
    ({"train.epochs": {"type": "int", "low": 1, "high": 6, "step": 2}}, "high: 6 is not reached from 1 in steps of 2"),
    ({"train.epochs": {"type": "int", "low": 1, "high": 5, "step": 2, "log": True}}, "step and log exclude each"),
    ({"loss.kl": {"type": "choice", "choices": []}}, "f: space.loss.kl: choices: []"),
    ({"loss.kl": {"type": "choice", "choices": [1, 1.0]}}, "f: space.loss.kl: choices: [1, 1.0] holds a value twice"),
    ({"loss.kl": {"type": "choice", "choices": [[1]]}}, "f: space.loss.kl: choices.0: [1]: should be a word"),
    ({"loss.kl": {"type": "choice", "choices": [1], "when": {"model.variationl": True}}},
     "f: space.loss.kl: when: 'model.variationl' is no setting (did you mean 'model.variational'?)"),
    ({"loss.kl": {"type": "choice", "choices": [1], "when": {"loss.kl": 1}}}, "(when) of loss.kl go in a circle"),
    ({"loss.kl": {"type": "choice", "choices": [1], "when": {"loss.l1": 1}},
      "loss.l1": {"type": "choice", "choices": [1], "when": {"loss.kl": 1}}}, "of loss.kl, loss.l1 go in a circle"),
])
def test_refused_with_file_key_and_value(raw, said):
    with pytest.raises(InputError) as error:
        parse_space(raw, "f")
    assert said in str(error.value)


def test_a_grid_needs_steps():
    with pytest.raises(ValueError, match="steps"):
        list(grid_points(parse_space({"loss.l1": {"type": "float", "low": 0, "high": 1}}, "f"), START))
