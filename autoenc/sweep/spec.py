"""A sweep file, parsed and checked: what varies, how much may be spent, how the winner is decided.

The sections are typed like the configuration; this module knows neither torch nor ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from autoenc import figures
from autoenc.config import Section, absolute_paths, describe, flatten, make_config
from autoenc.errors import InputError, did_you_mean
from autoenc.files import content_hash
from autoenc.sweep.space import Parameter, parse_space
from autoenc.yamlfile import read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FIXED = re.compile(r"data\.|train\.seed$")            # scores on different data or seeds do not compare


def _share(value: Any) -> Any:
    """``5%`` or ``0.05`` as a float."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*%\s*", value)
        if not match:
            raise ValueError("should be a share like 5% or 0.05")
        return float(match.group(1)) / 100
    return value


def _figure(value: Any) -> Any:
    if value not in figures.MODES:
        raise ValueError(f"is no figure{did_you_mean(value, figures.MODES)}")
    return value


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=10)]
Figure = Annotated[str, BeforeValidator(_figure)]


class Measured(Section):
    """A figure and the direction that is better."""

    metric: Figure = "val/mse"
    mode: Literal["min", "max"] | None = None
    """none: the figure's own"""

    @model_validator(mode="after")
    def _check(self) -> Measured:
        own = figures.MODES[self.metric]
        if self.mode not in (None, own) and self.metric not in figures.EITHER_WAY:
            raise ValueError(f"mode: {self.mode!r}: {self.metric} is better when {'larger' if own == 'max' else 'smaller'}"
                             f" (mode: {own})")
        return self

    @property
    def direction(self) -> str:
        return self.mode or figures.MODES[self.metric]


class Preference(Measured):
    metric: Figure
    within: Share = 0.0
    """values this near the best one count as equal"""


class Requirement(Section):
    metric: Figure
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Requirement:
        if self.min is None and self.max is None:
            raise ValueError(f"a requirement on {self.metric} needs min or max")
        return self


class Baseline(Section):
    arm: str
    margin: Share = 0.05
    gains: Annotated[tuple[Figure, ...], BeforeValidator(_list)] = ()


class Decision(Section):
    within: Share | None = None
    """relative distance from the best score that counts as just as good; none: only the best itself"""
    evidence: Literal["observed", "shown"] = "observed"
    prefer: Annotated[tuple[Preference, ...], BeforeValidator(_list)] = ()
    require: Annotated[tuple[Requirement, ...], BeforeValidator(_list)] = ()
    baseline: Baseline | None = None
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    pick: str | None = None
    because: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Decision:
        if self.evidence == "shown" and self.repeats < 2:
            raise ValueError("evidence: shown needs repeats of at least 2: one seed shows nothing about the noise")
        if self.because is not None and self.pick is None:
            raise ValueError("because: gives a reason, but nothing is picked (pick)")
        return self


class Search(Section):
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """arms and sampled points together; none: as many as arms"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Asha(Section):
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    margin: Share = 0.05


class Resources(Section):
    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Resources:
        if self.gpus != "auto" and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus: {self.gpus}: a fraction of one GPU, or whole ones")
        return self


PARTS: dict[str, type[Section]] = {"search": Search, "asha": Asha, "objective": Measured, "decision": Decision,
                                   "resources": Resources}
PARTIAL_KEYS = ("description", "config", *PARTS)                                # a preset, base.yaml
SWEEP_KEYS = ("name", "inherits", "arms", "space", "export_name", *PARTIAL_KEYS)


@dataclass(frozen=True)
class Arm:
    settings: dict[str, Any]
    hypothesis: str = ""


@dataclass(frozen=True)
class Layer:
    """One source of settings: a sweep file, base.yaml, a preset, the command line."""

    where: str
    config: dict[str, Any] = field(default_factory=dict)          # by dotted key
    parts: dict[str, Any] = field(default_factory=dict)           # section -> mapping, or False (asha)


@dataclass(frozen=True)
class Spec:
    """A sweep with all its layers applied."""

    path: Path
    name: str
    description: str
    inherits: Path | None                  # the parent sweep's file; None: the starting point is ``base``
    export_name: str
    base: dict[str, Any]                   # base.yaml's settings, the starting point where there is no parent
    config: dict[str, Any]                 # fixed settings over the starting point, presets and --set included
    arms: dict[str, Arm]
    space: dict[str, Parameter]
    search: Search
    asha: Asha | None
    objective: Measured
    decision: Decision
    resources: Resources

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """Every key that an arm or the space sets, in the file's order."""
        return tuple(dict.fromkeys([*(key for arm in self.arms.values() for key in arm.settings), *self.space]))

    @property
    def trials(self) -> int:
        """How many candidates are tried, arms and sampled points together."""
        return max(len(self.arms), self.search.trials or 0) if self.space else len(self.arms)

    @cached_property
    def content(self) -> dict[str, Any]:
        """Everything that can change this sweep's result, as plain values: what staleness compares."""
        return {
            "config": {key: value for key, value in (self.config if self.inherits else {**self.base, **self.config}).items()
                       if key != "data.cache_dir"},
            "arms": [[name, arm.settings] for name, arm in self.arms.items()],
            "space": {key: parameter.model_dump() for key, parameter in self.space.items()},
            "search": self.search.model_dump(), "asha": self.asha.model_dump() if self.asha else False,
            "objective": {"metric": self.objective.metric, "mode": self.objective.direction},
            "decision": self.decision.model_dump(mode="json"),
        }

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.content)


def read_layer(content: Any, path: Path, allowed: tuple[str, ...]) -> Layer:
    """The settings in a sweep file's mapping, each section checked on its own so that a message names this file."""
    where = str(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: should be a mapping with keys like {', '.join(SWEEP_KEYS[:4])}; it holds {content!r:.60}")
    for key in content:
        if key not in allowed:
            extra = " (a preset or base file holds no such key)" if key in SWEEP_KEYS else did_you_mean(key, allowed)
            raise InputError(f"{where}: unknown key {key!r}{extra}")
    if not isinstance(content.get("description") or "", str):
        raise InputError(f"{where}: description: {content['description']!r} should be text")
    parts = {}
    for name in PARTS:
        if name in content:
            parts[name] = _checked_part(name, content[name], where)
    config = absolute_paths(flatten(content.get("config"), f"{where}: config"), path.resolve().parent)
    return Layer(where=where, config=config, parts=parts)


def _checked_part(name: str, value: Any, where: str) -> Any:
    if name == "asha" and value is False:
        return False
    if not isinstance(value, Mapping):
        hint = " or false" if name == "asha" else ""
        raise InputError(f"{where}: {name}: {value!r} should be a mapping of {', '.join(PARTS[name].model_fields)}{hint}")
    make_part(name, value, where, alone=True)
    return dict(value)


def make_part(name: str, value: Mapping[str, Any], where: str, *, alone: bool = False) -> Any:
    """The typed section. ``alone``: only the types; what must fit together is checked when all layers are applied."""
    try:
        return PARTS[name].model_validate(dict(value))
    except ValidationError as error:
        if alone and all(item["type"] == "value_error" and not item["loc"] for item in error.errors()):
            return None
        raise InputError(describe(error, f"{where}: {name}", PARTS[name].model_fields)) from None


def overlay(layers: list[Layer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and sections of all layers, later over earlier."""
    config: dict[str, Any] = {}
    parts: dict[str, Any] = {name: {} for name in PARTS}
    for layer in layers:
        config |= layer.config
        for name, value in layer.parts.items():
            parts[name] = False if value is False else {**(parts[name] or {}), **value}
    return config, parts


def build_spec(path: Path, content: Mapping[str, Any], parent: Path | None, base: Layer, over: list[Layer],
               ancestry: Mapping[str, Any]) -> Spec:
    """The sweep in ``content`` over ``base`` and under ``over`` (presets, then --set), checked as a whole.

    ``ancestry``: the settings that the sweeps above fix, to check this one's against. Raises :class:`InputError`.
    """
    where = str(path)
    own = read_layer(content, path, SWEEP_KEYS)
    name = content.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{where}: name: {name!r} should be a word of letters, digits, '.', '_' and '-'")
    if not name.startswith(path.stem):
        raise InputError(f"{where}: name: {name!r} should begin with the file's own name, {path.stem!r}")
    export_name = content.get("export_name", name)
    if not isinstance(export_name, str) or not NAME.fullmatch(export_name):
        raise InputError(f"{where}: export_name: {export_name!r} should be a word of letters, digits, '.', '_' and '-'")
    config, _ = overlay([own, *over])
    _, parts = overlay([base, own, *over])
    spec = Spec(
        path=path, name=name, description=content.get("description") or "", inherits=parent, export_name=export_name,
        base=dict(base.config), config=config, arms=_parse_arms(content.get("arms"), where),
        space=parse_space(content.get("space"), where),
        asha=make_part("asha", parts["asha"], where) if parts["asha"] is not False else None,
        **{part: make_part(part, parts[part], where) for part in PARTS if part != "asha"},
    )
    _check(spec, {**ancestry, **config})
    return spec


def _parse_arms(raw: Any, where: str) -> dict[str, Arm]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: arms: {raw!r} should be a mapping of name: {{setting: value}}")
    arms = {}
    for name, content in raw.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"{where}: arms: {name!r} should be a name of letters, digits, '.', '_' and '-'")
        if content is not None and not isinstance(content, Mapping):
            raise InputError(f"{where}: arms.{name}: {content!r} should be a mapping of setting: value")
        settings = dict(content or {})
        hypothesis = settings.pop("hypothesis", "")
        if not isinstance(hypothesis, str):
            raise InputError(f"{where}: arms.{name}: hypothesis: {hypothesis!r} should be text")
        arms[name] = Arm(flatten(settings, f"{where}: arms.{name}"), hypothesis)
    return arms


def _check(spec: Spec, fixed: Mapping[str, Any]) -> None:
    """What must fit together; ``fixed``: all settings under the arms as far as they are known before a parent's winner."""
    where = str(spec.path)
    start = make_config(fixed, where).flat()
    for key in spec.varied:
        if FIXED.match(key):
            raise InputError(f"{where}: {key} cannot be varied: scores on different data or seeds do not compare")
    for name, arm in spec.arms.items():
        make_config({**start, **arm.settings}, f"{where}: arms.{name}")
    for key, parameter in spec.space.items():
        ends = parameter.choices if parameter.type == "choice" else (parameter.low, parameter.high)
        for value in ends:
            make_config({**start, **parameter.when, key: value}, f"{where}: space.{key}")
    if spec.space and not spec.arms and spec.search.trials is None:
        raise InputError(f"{where}: search.trials: a space without arms needs it: how many points to try")
    if spec.search.trials and spec.search.trials > max(1, len(spec.arms)) and not spec.space:
        raise InputError(f"{where}: search.trials: {spec.search.trials} is more than the arms ({len(spec.arms)}),"
                         " and there is no space to draw further ones from")
    if spec.space and spec.search.algorithm == "grid":
        for key, parameter in spec.space.items():
            if parameter.type == "float" and parameter.steps is None:
                raise InputError(f"{where}: space.{key}: search.algorithm grid needs steps: how many values from low to high")
    _check_comparable(spec, start)
    names = ", ".join(spec.arms)
    baseline = spec.decision.baseline
    if baseline and baseline.arm not in spec.arms:
        raise InputError(f"{where}: decision.baseline: arm: {baseline.arm!r} is no arm{did_you_mean(baseline.arm, spec.arms)}")
    pick = spec.decision.pick
    if pick is not None and pick not in spec.arms and spec.trials <= len(spec.arms):
        raise InputError(f"{where}: decision.pick: {pick!r} is none of the arms ({names})")


def _check_comparable(spec: Spec, start: Mapping[str, Any]) -> None:
    """Design 6.1: no objective, monitor or preference that the candidates themselves re-weight."""
    weighing = [key for key in spec.varied if key.startswith("loss.") or key == "model.variational"]
    if not weighing:
        return
    used = {"objective.metric": spec.objective.metric, "train.monitor": start["train.monitor"],
            **{f"decision.prefer.{i}.metric": item.metric for i, item in enumerate(spec.decision.prefer)},
            **{f"decision.require.{i}.metric": item.metric for i, item in enumerate(spec.decision.require)}}
    for key, metric in used.items():
        if metric in figures.WEIGHTED:
            raise InputError(f"{spec.path}: {key}: {metric!r} is the weighted sum of the losses, and this sweep varies "
                             f"{', '.join(weighing)}: candidates would be compared by different measures (use val/mse)")


def read_sweep(path: Path) -> Mapping[str, Any]:
    """The mapping in a sweep file. Raises :class:`InputError`."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: should be a sweep: a mapping with name, inherits, config, arms, …; it holds {content!r:.60}")
    return content
