"""What a sweep may vary beyond its arms: typed parameters, conditions, and how a point is drawn.

A point is a mapping of settings by dotted key, like an arm's. Drawing goes through an Optuna trial (any object with
its ``suggest_*`` methods), so that this module imports nothing heavy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autoenc.checks import Conflict, Faults, Scalar, describe, shown
from autoenc.config import KEYS
from autoenc.errors import InputError, did_you_mean

ZERO = "{key} is 0"       # name of the choice between exact zero and the range


class _Parameter(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    when: dict[str, Scalar] = {}
    """settings under which the parameter exists at all; otherwise the starting configuration's value stays"""

    def names(self, key: str) -> list[str]:
        """The Optuna parameters that it is drawn by."""
        return [key]


class FloatParameter(_Parameter):
    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    zero: bool = False
    """exact 0 is possible, too"""
    steps: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """values on the way from low to high, both included: for search.algorithm grid"""

    @model_validator(mode="after")
    def _check(self) -> FloatParameter:
        _check_range(self.low, self.high, self.log)
        return self

    def names(self, key: str) -> list[str]:
        return [ZERO.format(key=key), key] if self.zero else [key]

    def draw(self, trial: Any, key: str, whole: bool = False) -> float:
        zero = self.zero and trial.suggest_categorical(ZERO.format(key=key), [True, False])
        if zero and not whole:
            return 0.0
        value = trial.suggest_float(key, self.low, self.high, log=self.log)
        return 0.0 if zero else value

    def middle(self, key: str) -> dict[str, Any]:
        """The Optuna parameters of its middle, which stand in where it does not exist."""
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return {name: min(max(value, self.low), self.high) if name == key else True for name in self.names(key)}

    def drawn(self, key: str, value: Any) -> dict[str, Any] | None:
        """The Optuna parameters that give this value; None where the parameter cannot."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if self.zero and value == 0:
            return {ZERO.format(key=key): True}
        if not self.low <= value <= self.high:
            return None
        return {**({ZERO.format(key=key): False} if self.zero else {}), key: float(value)}

    def values(self) -> list[float]:
        """All values of the grid, each once."""
        if self.steps is None:
            raise ValueError("search.algorithm grid needs steps: how many values from low to high")
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        inner = [low + (high - low) * (i / (self.steps - 1)) for i in range(1, self.steps - 1)]
        ladder = [self.low, *(math.exp(x) if self.log else x for x in inner), self.high]
        return list(dict.fromkeys([0.0, *ladder] if self.zero else ladder))


class IntParameter(_Parameter):
    type: Literal["int"]
    low: int
    high: int
    """included"""
    log: bool = False
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _check(self) -> IntParameter:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise Conflict("step and log exclude each other")
        if (self.high - self.low) % self.step:
            raise Conflict(f"high: {self.high} is not reached from {self.low} in steps of {self.step}")
        return self

    def draw(self, trial: Any, key: str, whole: bool = False) -> int:
        return trial.suggest_int(key, self.low, self.high, step=self.step, log=self.log)

    def middle(self, key: str) -> dict[str, Any]:
        steps = (self.high - self.low) // self.step
        return {key: math.isqrt(self.low * self.high) if self.log else self.low + self.step * (steps // 2)}

    def drawn(self, key: str, value: Any) -> dict[str, Any] | None:
        fits = (isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
                and self.low <= value <= self.high and (value - self.low) % self.step == 0)
        return {key: int(value)} if fits else None

    def values(self) -> Sequence[int]:
        return range(self.low, self.high + 1, self.step)


class ChoiceParameter(_Parameter):
    type: Literal["choice"]
    choices: Annotated[list[Scalar], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _check(self) -> ChoiceParameter:
        if any(_same(a, b) for a, b in itertools.combinations(self.choices, 2)):
            raise Conflict(f"choices: {shown(self.choices)} holds a value twice")
        return self

    def draw(self, trial: Any, key: str, whole: bool = False) -> Scalar:
        return trial.suggest_categorical(key, self.choices)

    def middle(self, key: str) -> dict[str, Any]:
        return {key: self.choices[0]}

    def drawn(self, key: str, value: Any) -> dict[str, Any] | None:
        return next(({key: choice} for choice in self.choices if _same(value, choice)), None)

    def values(self) -> list[Scalar]:
        return list(self.choices)


Parameter = FloatParameter | IntParameter | ChoiceParameter
TYPES: dict[str, type[Parameter]] = {"float": FloatParameter, "int": IntParameter, "choice": ChoiceParameter}


def _check_range(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise Conflict(f"low: {low} is not below high: {high}")
    if log and low <= 0:
        raise Conflict(f"low: {low}: a log range cannot include 0 (zero: true adds exact 0)" if low == 0
                         else f"low: {low}: a log range must be positive")


def _same(left: Any, right: Any) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def parse_space(raw: Any, where: str) -> dict[str, Parameter]:
    """The parameters of a ``space:`` mapping, those that conditions depend on first.

    Raises :class:`InputError` for unknown settings, missing or unknown types, empty ranges, conditions that name no
    setting or go in a circle.
    """
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: space: {shown(raw)} should be a mapping of setting: {{type: …}}")
    space: dict[str, Parameter] = {}
    faults = Faults()
    for key, content in raw.items():
        with faults.kept():
            space[key] = _parse_parameter(key, content, where)
    faults.tell()
    return _by_dependence(space, where)


def _parse_parameter(key: Any, content: Any, where: str) -> Parameter:
    at = f"{where}: space.{key}"
    if key not in KEYS:
        raise InputError(f"{where}: space: {shown(key)} is no setting{did_you_mean(key, KEYS)}")
    if not isinstance(content, Mapping) or "type" not in content:
        raise InputError(f"{at}: {shown(content)} needs a type ({', '.join(TYPES)}),"
                         " as in {type: float, low: 0.1, high: 1.0}")
    kind = TYPES.get(content["type"]) if isinstance(content["type"], str) else None
    if kind is None:
        raise InputError(f"{at}: type: {shown(content['type'])} is unknown{did_you_mean(content['type'], TYPES)}")
    try:
        parameter = kind.model_validate(dict(content))
    except ValidationError as error:
        raise InputError(describe(error, at, kind)) from None
    for condition in parameter.when:
        if condition not in KEYS:
            raise InputError(f"{at}: when: {shown(condition)} is no setting{did_you_mean(condition, KEYS)}")
    return parameter


def _by_dependence(space: dict[str, Parameter], where: str) -> dict[str, Parameter]:
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(space):
        ready = [key for key, parameter in space.items()
                 if key not in ordered and all(c in ordered or c not in space for c in parameter.when)]
        if not ready:
            circle = ", ".join(key for key in space if key not in ordered)
            raise InputError(f"{where}: space: the conditions (when) of {circle} go in a circle")
        ordered |= {key: space[key] for key in ready}
    return ordered


def _exists(parameter: Parameter, settings: Mapping[str, Any]) -> bool:
    return all(settings.get(key) == value for key, value in parameter.when.items())


def draw_point(trial: Any, space: Mapping[str, Parameter], start: Mapping[str, Any],
               whole: bool = False) -> dict[str, Any]:
    """One point of the space, drawn through an Optuna trial; ``start`` holds the settings that conditions see.

    ``whole``: the trial is asked for every parameter, those without effect at this point included, for samplers that
    need the same ones each time.
    """
    point: dict[str, Any] = {}
    for key, parameter in space.items():
        if _exists(parameter, {**start, **point}):
            point[key] = parameter.draw(trial, key, whole)
        elif whole:
            parameter.draw(trial, key, whole)
    return point


def optuna_parameters(space: Mapping[str, Parameter], settings: Mapping[str, Any],
                      whole: bool = False) -> dict[str, Any] | None:
    """The Optuna parameters of a candidate's complete settings; None where it lies outside of the space. ``whole``:
    with the middle of those that have no effect."""
    parameters: dict[str, Any] = {}
    for key, parameter in space.items():
        if whole:
            parameters |= parameter.middle(key)
        if _exists(parameter, settings):
            drawn = parameter.drawn(key, settings.get(key))
            if drawn is None:
                return None
            parameters |= drawn
    return parameters


def project(settings: Mapping[str, Any], space: Mapping[str, Parameter],
            start: Mapping[str, Any]) -> dict[str, Any] | None:
    """The point of the space at which these settings lie, over ``start``; other settings count for nothing. None where
    a value is outside of the space, or is set for a parameter that does not exist there."""
    point: dict[str, Any] = {}
    for key, parameter in space.items():
        if _exists(parameter, {**start, **point}):
            point[key] = settings.get(key, start[key])
            if parameter.drawn(key, point[key]) is None:
                return None
        elif key in settings:
            return None
    return point


def grid_points(space: Mapping[str, Parameter], start: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All points of the grid, the last parameter varying fastest, each once.

    Raises ValueError for a float parameter without ``steps``.
    """
    def extend(point: dict[str, Any], keys: list[str]) -> Iterator[dict[str, Any]]:
        if not keys:
            yield point
            return
        key, *rest = keys
        if not _exists(space[key], {**start, **point}):
            yield from extend(point, rest)
            return
        for value in space[key].values():
            yield from extend({**point, key: value}, rest)

    yield from extend({}, list(space))
