"""A sweep file, parsed and checked: what varies, how much may be spent, how the winner is decided.

This module knows neither torch nor ray.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autoenc import figures
from autoenc.checks import Faults, shown
from autoenc.config import WITHOUT_EFFECT, Config, absolute_paths, check_values, flatten, make_config, own_sources
from autoenc.errors import InputError, did_you_mean
from autoenc.files import content_hash
from autoenc.interop import FORMS, Experiment, as_arm, load_experiment
from autoenc.sweep.parts import PARTS, Asha, Decision, Measured, Resources, Search, make_part
from autoenc.sweep.space import Parameter, parse_space
from autoenc.sweep.warmup import Budget, check_grace, ends_of_schedules
from autoenc.yamlfile import read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = ("store",)
FIXED = re.compile(r"data\.|train\.seed$")            # scores on different data or seeds do not compare


# Settings that came later, as they were before: at that value they make no older result stale.
LATER = {"repeats_vary": ["train.seed"]}
PARTIAL_KEYS = ("description", "config", *PARTS)                                # a preset, base.yaml
SWEEP_KEYS = ("name", "inherits", "start", "arms", "space", "export_name", *PARTIAL_KEYS)


@dataclass(frozen=True)
class Arm:
    settings: dict[str, Any]
    hypothesis: str = ""
    experiment: Experiment | None = None            # the file it is taken from
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One source of settings: a sweep file, base.yaml, a preset, the command line."""

    where: str
    config: dict[str, Any] = field(default_factory=dict)          # by dotted key
    parts: dict[str, Any] = field(default_factory=dict)           # section -> mapping, or False (asha)
    experiments: tuple[Experiment, ...] = ()                      # an experiment file's
    notices: tuple[str, ...] = ()


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
    takes_over: bool = False
    """``start: parent``: its one candidate is the parent's winner as it was trained, and nothing is trained"""
    written: int = Config().train.epochs
    """the epochs that its file, or those above, give it, whatever presets and --set make of that"""
    ancestry: dict[str, Any] = field(default_factory=dict)
    """what the sweeps above fix, and their first arms set: stands in for a parent's winner that is not there yet"""
    experiments: tuple[Experiment, ...] = ()
    """the experiment files it is made of: the class counts that they declare must be those of the data"""
    notices: tuple[str, ...] = ()
    """what a person should know of how those were read"""

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """Every key that an arm or the space sets, in the file's order."""
        return tuple(dict.fromkeys([*(key for arm in self.arms.values() for key in arm.settings), *self.space]))

    @property
    def final(self) -> bool:
        """Whether it varies nothing: what it leaves is a finished model, and the test split is read for its figures."""
        return not self.arms and not self.space

    @property
    def trials(self) -> int:
        """How many candidates are tried, arms and sampled points together."""
        return max(len(self.arms), self.search.trials or 0) if self.space else len(self.arms)

    @cached_property
    def content(self) -> dict[str, Any]:
        """Everything that can change this sweep's result, as plain values: what staleness compares."""
        config = self.config if self.inherits else {**self.base, **self.config}
        return {
            "config": {key: value for key, value in config.items() if key not in WITHOUT_EFFECT},
            "arms": [[name, arm.settings] for name, arm in self.arms.items()],
            "space": {key: parameter.model_dump() for key, parameter in self.space.items()},
            "search": self.search.model_dump(), "asha": self.asha.model_dump() if self.asha else False,
            "objective": {"metric": self.objective.metric, "mode": self.objective.direction},
            "decision": {key: value for key, value in self.decision.model_dump(mode="json").items()
                         if key not in LATER or value != LATER[key]},
            **({"start": "parent"} if self.takes_over else {}),
            **({"sources": sources} if (sources := self._sources(config)) else {}),
        }

    def _sources(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Of the models and loss terms of one's own that it names, the source texts as digests."""
        drawn = [{**parameter.when, key: value} for key, parameter in self.space.items() if parameter.type == "choice"
                 for value in parameter.choices]
        found = [own_sources(settings) for settings in (config, *(arm.settings for arm in self.arms.values()), *drawn)]
        return {target: digest for sources in found for target, digest in sources.items()}

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.content)


def read_layer(content: Any, path: Path, allowed: tuple[str, ...]) -> Layer:
    """The settings in a sweep file's mapping, each section checked on its own so that a message names this file."""
    where = str(path)
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: should be a mapping with keys like {', '.join(SWEEP_KEYS[:4])};"
                         f" it holds {shown(content)}")
    faults = Faults()
    for key in content:
        if key not in allowed:
            extra = " (a preset or base file holds no such key)" if key in SWEEP_KEYS else did_you_mean(key, allowed)
            faults.said.append(f"{where}: unknown key {shown(key)}{extra}")
    if not isinstance(content.get("description", ""), str | None):
        faults.said.append(f"{where}: description: {shown(content['description'])} should be text")
    parts = {}
    for name in PARTS:
        if name in content:
            with faults.kept():
                parts[name] = _checked_part(name, content[name], where)
    config = {}
    with faults.kept():
        config = read_settings(content.get("config"), path.resolve().parent, f"{where}: config")
    faults.tell()
    return Layer(where=where, config=config, parts=parts)


def read_settings(settings: Any, folder: Path, where: str) -> dict[str, Any]:
    """Settings by dotted key, each a possible value, paths absolute from ``folder``. Raises :class:`InputError`."""
    flat = absolute_paths(flatten(settings, where), folder, where)
    check_values(flat, where)
    return flat


def _checked_part(name: str, value: Any, where: str) -> Any:
    if name == "asha" and value is False:
        return False
    if not isinstance(value, Mapping):
        hint = " or false" if name == "asha" else ""
        raise InputError(f"{where}: {name}: {shown(value)} should be a mapping of"
                         f" {', '.join(PARTS[name].model_fields)}{hint}")
    make_part(name, value, where, alone=True)
    return dict(value)


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
               ancestry: Mapping[str, Any], written: int) -> Spec:
    """The sweep in ``content`` over ``base`` and under ``over`` (presets, then --set), checked as a whole.

    ``ancestry``: settings that the sweeps above fix or could choose, to check this one's against; ``written``: the
    epochs that it was written for. Raises :class:`InputError`.
    """
    own = read_layer(content, path, SWEEP_KEYS)
    config, _ = overlay([own, *over])
    budget = Budget(own.config.get("train.epochs", written), overlay(over)[0])
    below = {} if parent else base.config                # what a parent's winner has was fitted there
    config = {key: value for key, value in budget.fit({**below, **config}).items()
              if key in config or value != below.get(key)}
    _, parts = overlay([base, own, *over])
    # What does not go together may come from several sources: name them all.
    where = f"{path}{''.join(f', {layer.where}' for layer in over)}"
    start = make_config({**ancestry, **config}, where).flat()
    faults, found = Faults(), {}
    for part, value in parts.items():
        with faults.kept():
            found[part] = make_part(part, value, where) if value is not False else None
    for key in ("name", "export_name"):
        with faults.kept():
            found[key] = _read_name(key, content, path)
    with faults.kept():
        found["arms"] = _read_arms(content.get("arms"), start, path, where, budget)
    with faults.kept():
        found["space"] = parse_space(content.get("space"), str(path))
    start_at = content.get("start")
    if start_at not in (None, "parent"):
        faults.said.append(f"{path}: start: {shown(start_at)} should be parent, or be left out")
    elif start_at and (not parent or content.get("arms") or content.get("space")):
        faults.said.append(f"{path}: start: parent takes the winner of a sweep that it inherits, and varies nothing "
                           "(no arms, no space)")
    faults.tell()
    above = () if parent else base.experiments
    arms = found["arms"].values()
    found["experiments"] = (*above, *(arm.experiment for arm in arms if arm.experiment))
    found["notices"] = (*(() if parent else base.notices), *(notice for arm in arms for notice in arm.notices))
    spec = Spec(path=path, description=content.get("description") or "", inherits=parent, base=dict(base.config),
                takes_over=start_at == "parent", written=budget.written,
                config={key: start[key] for key in config}, ancestry=dict(ancestry), **found)
    _check(spec, start, where)
    return spec


def _read_name(key: str, content: Mapping[str, Any], path: Path) -> str:
    name = content.get(key, content.get("name"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{path}: {key}: {shown(name)} should be a word of letters, digits, '.', '_' and '-'")
    if key == "name" and not name.startswith(path.stem):
        raise InputError(f"{path}: name: {name!r} should begin with the file's own name, {path.stem!r}")
    if key == "name" and name in RESERVED:
        raise InputError(f"{path}: name: {name!r} is what the folder of all trajectories is called")
    return name


def _read_arms(raw: Any, start: Mapping[str, Any], path: Path, where: str, budget: Budget) -> dict[str, Arm]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: arms: {shown(raw)} should be a mapping of name: {{setting: value}}")
    faults, arms = Faults(), {}
    for name, content in raw.items():
        with faults.kept():
            arms[name] = _read_arm(name, content, start, path.parent, where, budget)
    faults.tell()
    return arms


def _read_arm(name: Any, content: Any, start: Mapping[str, Any], folder: Path, where: str, budget: Budget) -> Arm:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{where}: arms: {shown(name)} should be a name of letters, digits, '.', '_' and '-'")
    where = f"{where}: arms.{name}"
    if content is not None and not isinstance(content, Mapping):
        raise InputError(f"{where}: {shown(content)} should be a mapping of setting: value")
    settings = dict(content or {})
    hypothesis = settings.pop("hypothesis", "")
    if not isinstance(hypothesis, str):
        raise InputError(f"{where}: hypothesis: {shown(hypothesis)} should be text")
    experiment, taken, notices = None, {}, []
    if "from" in settings:
        experiment = _read_source(settings.pop("from"), folder, where)
        taken, notices = as_arm(experiment, start)
        notices = [*experiment.notices, *notices]
    settings = budget.fit({**taken, **flatten(settings, where)}, start["loss.kl_cycles"])
    typed = make_config({**start, **settings}, where).flat()
    return Arm({key: typed[key] for key in settings}, hypothesis, experiment, tuple(notices))


def _read_source(source: Any, folder: Path, where: str) -> Experiment:
    if not isinstance(source, str) or not source:
        raise InputError(f"{where}: from: {shown(source)} should be the path of an experiment file")
    try:
        experiment = load_experiment(folder / source)
    except InputError as error:
        raise InputError("\n".join(f"{where}: from: {line}" for line in str(error).split("\n"))) from None
    if experiment is None:
        names = " or ".join(form.NAME for form in FORMS.values())
        raise InputError(f"{where}: from: {shown(source)} is no experiment file of {names}")
    return experiment


def _check(spec: Spec, start: Mapping[str, Any], where: str) -> None:
    """What must fit together; ``start``: all settings under the arms, as far as known before a parent's winner."""
    faults = Faults()
    for key in spec.varied:
        if FIXED.match(key):
            faults.said.append(f"{spec.path}: {key} cannot be varied: scores on different data or seeds do not compare")
    for name, arm in (spec.arms or {"": Arm({})}).items():
        with faults.kept():
            check_grace(spec.asha, make_config({**start, **arm.settings}, where),
                        f"{where}: arms.{name}" if name else where)
    with faults.kept():
        for point in ends_of_schedules(spec.space, start):
            at = f"{where}: space.{', '.join(point)}"
            check_grace(spec.asha, make_config({**start, **point}, at), at)
    for key, parameter in spec.space.items():
        ends = parameter.choices if parameter.type == "choice" else (parameter.low, parameter.high)
        for value in ends:
            with faults.kept():
                make_config({**start, **parameter.when, key: value}, f"{where}: space.{key}")
    faults.said += [f"{where}: {fault}" for fault in (*_search_faults(spec), *_rule_faults(spec, start))]
    faults.tell()


def _search_faults(spec: Spec) -> Iterator[str]:
    trials = spec.search.trials
    if spec.space and not spec.arms and trials is None:
        yield "search.trials: a space without arms needs it: how many points to try"
    if trials and trials > max(1, len(spec.arms)) and not spec.space:
        yield (f"search.trials: {trials} is more than the arms ({len(spec.arms)}), and there is no space to draw"
               " further ones from")
    if spec.space and spec.search.algorithm == "grid":
        for key, parameter in spec.space.items():
            if parameter.type == "float" and parameter.steps is None:
                yield f"space.{key}: search.algorithm grid needs steps: how many values from low to high"


def _rule_faults(spec: Spec, start: Mapping[str, Any]) -> Iterator[str]:
    baseline, pick = spec.decision.baseline, spec.decision.pick
    if baseline and baseline.arm not in spec.arms:
        yield f"decision.baseline: arm: {shown(baseline.arm)} is no arm{did_you_mean(baseline.arm, spec.arms)}"
    if pick is not None and pick not in spec.arms and spec.trials <= len(spec.arms):
        yield f"decision.pick: {shown(pick)} is no arm{did_you_mean(pick, spec.arms)}"
    yield from _incomparable(spec, start)


def _incomparable(spec: Spec, start: Mapping[str, Any]) -> Iterator[str]:
    """Design 6.1: no objective, monitor or preference that the candidates themselves re-weight."""
    weighing = [key for key in spec.varied if key.startswith("loss.") or key == "model.variational"]
    if not weighing:
        return
    rule = spec.decision
    used = [("objective.metric", spec.objective.metric), ("train.monitor", start["train.monitor"]),
            *((f"arms.{name}: train.monitor", arm.settings.get("train.monitor")) for name, arm in spec.arms.items()),
            *(("space.train.monitor", name) for name in getattr(spec.space.get("train.monitor"), "choices", ())),
            *((f"decision.prefer.{i}.metric", item.metric) for i, item in enumerate(rule.prefer)),
            *((f"decision.require.{i}.metric", item.metric) for i, item in enumerate(rule.require)),
            *(("decision.baseline.gains", name) for name in (rule.baseline.gains if rule.baseline else ()))]
    for key, metric in used:
        if metric in figures.WEIGHTED:
            yield (f"{key}: {metric!r} is the weighted sum of the losses, and this sweep varies {', '.join(weighing)}:"
                   " candidates would be compared by different measures (use val/mse)")
        reducing = [name for name in weighing if name in ("loss.kl_reduction", "loss.optimal_variance")]
        if metric in ("val/kl", "train/kl") and reducing:
            yield (f"{key}: {metric!r} is in the configured reduction, and this sweep varies {', '.join(reducing)}:"
                   f" candidates would be compared by different measures (use {metric}_nats)")


def read_sweep(path: Path) -> Mapping[str, Any]:
    """The mapping in a sweep file. Raises :class:`InputError`."""
    if not os.path.lexists(path):
        near = did_you_mean(path.name, sorted(file.name for file in path.parent.glob("*.yaml")))
        raise InputError(f"{path}: no such file{near}")
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: should be a sweep: a mapping with name, inherits, config, arms, …;"
                         f" it holds {shown(content)}")
    return content
