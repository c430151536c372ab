"""From sweep files to configurations: the chain of parents, the layers over each, what is stale.

A configuration is made of, later over earlier: base.yaml; the parent's winner; the sweep's ``config``; presets;
``--set``; the arm or sampled point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoenc.checks import Faults, shown
from autoenc.config import KEYS, SECTIONS, WITHOUT_EFFECT, Config, check_own, flatten, make_config
from autoenc.errors import InputError, did_you_mean
from autoenc.files import content_hash
from autoenc.interop import FORMS, form_of, read_experiment
from autoenc.sweep.parts import PARTS, make_part
from autoenc.sweep.spec import PARTIAL_KEYS, Layer, Spec, build_spec, read_layer, read_settings, read_sweep
from autoenc.sweep.warmup import check_grace
from autoenc.trajectory import FORMAT
from autoenc.yamlfile import parse_yaml, read_yaml

PROVENANCE_KINDS = {"parents": str, "content": object, "concessions": float, "device": str | int | None,
                    "scores": object, "versions": str, "sources": str}       # of the mappings in a winner's provenance
PROJECT_SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


@dataclass(frozen=True)
class Override:
    """One ``--set``: for every sweep, or for the one of that name or file stem."""

    sweep: str | None
    key: str
    value: Any
    text: str

    def layer(self, folder: Path) -> Layer:
        where = f"--set {self.text}"
        section, _, name = self.key.partition(".")
        if self.key in KEYS:
            return Layer(where, config=read_settings({self.key: self.value}, folder, where))
        if self.key == "asha":
            if self.value is not False:
                raise InputError(f"{where}: asha takes false here, or set one of its settings: --set asha.margin=10%")
            return Layer(where, parts={"asha": False})
        if section in PARTS and section != "objective" and name:
            make_part(section, {name: self.value}, where, alone=True)
            return Layer(where, parts={section: {name: self.value}})
        if section in SECTIONS:
            flatten({self.key: self.value}, where)           # raises, with the name that was probably meant
        known = [*KEYS, *(f"{part}.{key}" for part in PARTS if part != "objective" for key in PARTS[part].model_fields)]
        raise InputError(f"{where}: {self.key!r} is no setting{did_you_mean(self.key, known)}")


def parse_override(text: str) -> Override:
    """``KEY=VALUE`` or ``SWEEP:KEY=VALUE``; the value is read as YAML. Raises :class:`InputError`."""
    target, equals, value = text.partition("=")
    sweep, colon, key = target.rpartition(":")
    if not equals or not key:
        raise InputError(f"--set {text}: should be KEY=VALUE or SWEEP:KEY=VALUE, as in --set train.epochs=5")
    return Override(sweep if colon else None, key.strip(), parse_yaml(value, f"--set {text}"), text)


def find_preset(name: str, sweep: Path) -> Path:
    """The preset's file: beside the sweep, else the project's. Raises :class:`InputError`."""
    folders = [sweep.resolve().parent / "presets", PROJECT_SWEEPS / "presets"]
    for folder in folders:
        path = folder / f"{name}.yaml"
        if Path(name).name == name and os.path.isfile(path):     # noqa: PTH113 (Path.is_file raises for long names)
            return path
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise InputError(f"--preset {name}: no presets/{name}.yaml beside {sweep} or in the project"
                     f"{did_you_mean(name, known)}")


def load_chain(sweep: Path, presets: Sequence[str] = (), overrides: Sequence[Override] = ()) -> list[Spec]:
    """The sweep and all it builds on, the first phase first, every layer applied and everything checked.

    Raises :class:`InputError`: unreadable or wrong files, a circle of ``inherits``, a preset or ``--set`` that would
    overwrite what a sweep of the chain decides.
    """
    return load_chains([sweep], presets, overrides)[0]


def load_chains(sweeps: Sequence[Path], presets: Sequence[str] = (),
                overrides: Sequence[Override] = ()) -> list[list[Spec]]:
    """:func:`load_chain` of several sweeps; an override for one sweep may be meant for any of them."""
    followed = [_follow(sweep) for sweep in sweeps]
    names = {name for files, _ in followed for path, content in files for name in (path.stem, content.get("name"))
             if isinstance(name, str)}
    faults = Faults()
    for override in overrides:
        if override.sweep is not None and override.sweep not in names:
            faults.said.append(f"--set {override.text}: no sweep {shown(override.sweep)} runs here"
                               f"{did_you_mean(override.sweep, sorted(names))}")
        with faults.kept():
            override.layer(Path.cwd())
    faults.tell()
    return [_build(files, base, [find_preset(name, sweep) for name in presets], overrides)
            for sweep, (files, base) in zip(sweeps, followed, strict=True)]


def _build(files: Sequence[tuple[Path, Mapping[str, Any]]], base: Layer, presets: Sequence[Path],
           overrides: Sequence[Override]) -> list[Spec]:
    preset_layers = [read_layer(read_yaml(path), path, PARTIAL_KEYS) for path in presets]
    chain: list[Spec] = []
    ancestry, written = dict(base.config), base.config.get("train.epochs", Config().train.epochs)
    for index, (path, content) in enumerate(files):
        own = [override.layer(Path.cwd()) for override in overrides
               if override.sweep in (None, path.stem, content.get("name"))]
        parent = files[index - 1][0] if index else None
        spec = build_spec(path, content, parent, base, [*preset_layers, *own], ancestry, written)
        written = spec.written
        ancestry |= spec.config | next((arm.settings for arm in spec.arms.values()), {})
        chain.append(spec)
    faults = Faults()
    faults.said += [*_overwritten(chain, preset_layers, overrides), *_indivisible(chain)]
    names = [spec.name for spec in chain]
    if len(set(names)) < len(names):
        faults.said.append(f"{files[-1][0]}: two sweeps of its chain share a name ({', '.join(names)})")
    faults.tell()
    return chain


def _follow(sweep: Path) -> tuple[list[tuple[Path, Mapping[str, Any]]], Layer]:
    """The files from the first phase down to ``sweep``, and the base layer under all of them."""
    files: list[tuple[Path, Mapping[str, Any]]] = []
    seen: list[Path] = []
    path = sweep
    while True:
        real = Path(os.path.realpath(path))
        if real in seen:
            circle = " -> ".join(p.name for p in [*seen[seen.index(real):], path])
            raise InputError(f"{sweep}: inherits goes in a circle: {circle}")
        seen.append(real)
        content = read_sweep(path)
        if form := form_of(content):
            if not files:
                raise InputError(f"{path}: is an experiment of {FORMS[form].NAME}, not a sweep: train it with python "
                                 "-m autoenc.train, or name it in a sweep, as inherits: or as an arm (from:)")
            experiment = read_experiment(content, path)
            return files[::-1], Layer(str(path), config=experiment.settings, experiments=(experiment,),
                                      notices=experiment.notices)
        if "name" not in content and files:                          # a partial file: the base of the chain
            return files[::-1], read_layer(content, path, PARTIAL_KEYS)
        files.append((path, content))
        parent = content.get("inherits")
        if parent is None:
            break
        if not isinstance(parent, str) or not parent:
            raise InputError(f"{path}: inherits: {shown(parent)} should be the path of a sweep file")
        target = path.parent / parent
        if not os.path.isfile(target):        # noqa: PTH113 (as in find_preset)
            near = did_you_mean(parent, sorted(file.name for file in path.parent.glob("*.yaml")))
            raise InputError(f"{path}: inherits: {shown(parent)}: no such file{near}")
        path = target
    for base in (path.resolve().parent / "base.yaml", PROJECT_SWEEPS / "base.yaml"):
        if base.is_file():
            return files[::-1], read_layer(read_yaml(base), base, PARTIAL_KEYS)
    return files[::-1], Layer("defaults")


def _overwritten(chain: Sequence[Spec], presets: Sequence[Layer], overrides: Sequence[Override]) -> Iterator[str]:
    given = [(layer.where, key) for layer in presets for key in layer.config]
    given += [(f"--set {override.text}", override.key) for override in overrides]
    for where, key in given:
        for spec in chain:
            if key in spec.varied:
                yield f"{where}: {key} is what {spec.name} ({spec.path}) varies: fixing it would overwrite its decision"


def _indivisible(chain: Sequence[Spec]) -> Iterator[str]:
    """Image sizes that a sweep above may make impossible: its winner's steps are not known before it has run."""
    key = "model.downsampling_steps"
    possible: dict[int, str] = {}                        # steps that a parent's winner may have -> whose decision it is
    for spec in chain:
        start = {**Config().flat(), **spec.ancestry, **spec.config}
        size = start["data.image_size"]
        if start["model.kind"] != "conv2d":          # others have no such steps
            continue
        if key in spec.config or not possible:
            possible = {start[key]: spec.name}
        yield from (f"{spec.path}: data.image_size: {size} is not divisible by {2**steps}, and the winner of {name}"
                    f" may have {key} {steps}" for steps, name in possible.items() if size % 2**steps)
        arms = {arm.settings[key]: spec.name for arm in spec.arms.values() if key in arm.settings}
        drawn = dict.fromkeys(spec.space[key].values(), spec.name) if key in spec.space else {}
        decided = spec.arms and all(key in arm.settings for arm in spec.arms.values())
        possible = {**({} if decided else possible), **arms, **drawn}


@dataclass(frozen=True)
class Candidate:
    """One thing to try: its settings over the starting point, and the complete configuration of its first seed."""

    name: str
    settings: dict[str, Any]
    config: Config
    hypothesis: str = ""


def starting_point(spec: Spec, parent_winner: Mapping[str, Any] | None) -> dict[str, Any]:
    """All settings under the arms: the parent's winner (or base.yaml) under this sweep's ``config``.

    ``parent_winner``: None where there is no parent, or none that has run; then what the sweeps above fix, and their
    first arms set, stands in for it. Raises :class:`InputError` where the winner and this sweep do not go together.
    """
    below = spec.ancestry if parent_winner is None or not spec.inherits else parent_winner
    return make_config({**Config().flat(), **below, **spec.config}, str(spec.path)).flat()


def make_candidate(spec: Spec, start: Mapping[str, Any], name: str, settings: Mapping[str, Any],
                   hypothesis: str = "") -> Candidate:
    """Raises :class:`InputError` where the settings do not fit the starting point, would be compared before its KL has
    its final weight, or name a model or loss that is not there."""
    config = make_config({**start, **settings}, f"{spec.path}: arms.{name}")
    check_grace(spec.asha, config, f"{spec.path}: arms.{name}")
    check_own(config, f"{spec.path}: arms.{name}" if name in spec.arms else str(spec.path))
    return Candidate(name, dict(settings), config, hypothesis)


def arm_candidates(spec: Spec, start: Mapping[str, Any]) -> list[Candidate]:
    """The arms; a sweep that varies nothing has one candidate, the parent's winner under this sweep's settings."""
    if not spec.arms and not spec.space:
        return [make_candidate(spec, start, "parent", {})]
    return [make_candidate(spec, start, name, arm.settings, arm.hypothesis) for name, arm in spec.arms.items()]


def reseeded(config: Config, by: int, vary: Sequence[str]) -> Config:
    """The configuration with its seeds moved on; ``vary``: train.seed, data.seed."""
    sections = {key.partition(".")[0] for key in vary}
    return config.model_copy(update={
        name: (part := getattr(config, name)).model_copy(update={"seed": part.seed + by}) for name in sections})


@dataclass(frozen=True)
class Winner:
    """What a finished sweep left in its ``best_config.yaml``."""

    sweep: str
    settings: dict[str, Any]
    provenance: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """Of the winning configuration, paths aside: what the sweeps below build on."""
        return winner_hash(self.settings, self.provenance.get("sources", {}))


def winner_hash(settings: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Of a winning configuration; its data has a fingerprint of its own. What is as it is by default stays out, so that
    a setting that did not exist when a winner was decided makes nothing stale. ``sources``: of a model or loss of one's
    own, the texts that it was trained with, as digests."""
    default = Config().flat()
    changed = {key: value for key, value in settings.items()
               if not key.startswith("data.") and key not in WITHOUT_EFFECT and value != default[key]}
    return content_hash(changed | ({"sources": dict(sources)} if sources else {}))


def read_winner(folder: Path) -> Winner | None:
    """The winner in a sweep's output folder; None where there is none. Raises :class:`InputError` for a broken file."""
    path = folder / "best_config.yaml"
    if not path.is_file():
        return None
    content = read_yaml(path)
    provenance = content.get("provenance") if isinstance(content, Mapping) else None
    if not isinstance(provenance, Mapping) or "config" not in content:
        raise InputError(f"{path}: is no best_config.yaml (config and provenance are missing)")
    for key, kind in PROVENANCE_KINDS.items():
        part = provenance.get(key, {})
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise InputError(f"{path}: provenance: {key}: {shown(part)} should be a mapping")
        for name, value in part.items():
            if not isinstance(value, kind):
                raise InputError(f"{path}: provenance: {key}: {shown(name)}: {shown(value)} is not what belongs there")
    if not isinstance(provenance.get("arm"), str):
        raise InputError(f"{path}: provenance: arm: {shown(provenance.get('arm'))} should be the winner's name")
    settings = flatten(content["config"], f"{path}: config")
    winner = Winner(folder.name, make_config(settings, str(path)).flat(), provenance)
    if provenance.get("hash", winner.hash) != winner.hash:
        raise InputError(f"{path}: config: was changed by hand: a winner is chosen in the sweep file (decision: pick)")
    return winner


def stale_reasons(spec: Spec, winner: Winner | None, parent: Winner | None, fingerprint: str | None) -> list[str]:
    """Why this sweep must be run; empty where its result stands.

    ``fingerprint`` of its data; None where the data has not been decoded yet (then nothing is said about it).
    """
    if winner is None:
        return ["has no winner yet"]
    had = winner.provenance
    reasons = []
    if had.get("format") != FORMAT:
        reasons.append(f"was written in format {had.get('format')}, this is {FORMAT}")
    if had.get("content_hash") != spec.content_hash:
        reasons += _differences(had.get("content", {}), spec.content) or ["its content changed"]
    built_on, hashes = had.get("parents", {}), parent_hashes(parent)
    if spec.inherits and parent is None:
        reasons.append(f"its parent, {spec.inherits.name}, has no winner")
    elif built_on != hashes:
        changed = [name for name in {**hashes, **built_on} if built_on.get(name) != hashes.get(name)]
        reasons.append(f"the winner of {', '.join(changed)} changed")
    if fingerprint is not None and had.get("data") != fingerprint:
        reasons.append("its data changed")
    return reasons


def parent_hashes(parent: Winner | None) -> dict[str, str]:
    """Parent sweep -> hash of its winning configuration, up to the first phase."""
    return {} if parent is None else {**parent.provenance.get("parents", {}), parent.sweep: parent.hash}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    said = []
    for part, new in now.items():
        old = before.get(part)
        if old == new:
            continue
        if part == "arms" and isinstance(old, list):
            old, new = _by_name(old), _by_name(new)
            if old == new:
                said.append("the order of the arms changed")
        if part == "sources":
            said += dict.fromkeys(f"the source text of {target.partition(':')[0]} changed" for target in new
                                  if isinstance(old, Mapping) and old.get(target, new[target]) != new[target])
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            prefix = "" if part == "config" else f"{part}."
            said += [f"{prefix}{key}: {_short(old.get(key))} -> {_short(new.get(key))}"
                     for key in {**old, **new} if old.get(key) != new.get(key)]
        else:
            said.append(f"{part} changed")
    return said


def _by_name(arms: list[Any]) -> dict[str, Any]:
    return {str(arm[0]): arm[1] for arm in arms if isinstance(arm, list) and len(arm) == 2}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"

