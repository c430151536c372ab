"""Sweep files for tests, written and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from autoenc.errors import InputError
from autoenc.sweep.inherit import load_chain, parse_override
from autoenc.sweep.spec import Spec
from autoenc.yamlfile import dump_yaml

SWEEPS = Path(__file__).parents[1] / "sweeps"
ARMS = {"A": {"train.learning_rate": 1e-3}, "B": {"train.learning_rate": 1e-4}}


def write(folder: Path, stem: str, content: Any) -> Path:
    """``content`` as a YAML file; a mapping without a name gets the stem for one, unless it is ``base``."""
    if isinstance(content, dict) and stem != "base" and folder.name != "presets":
        content = {"name": stem, **content}
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.yaml"
    path.write_text(content if isinstance(content, str) else dump_yaml(content), encoding="utf-8")
    return path


def load(folder: Path, content: Any, base: Any = None, presets: Sequence[str] = (), sets: Sequence[str] = ()) -> Spec:
    """The sweep ``toy.yaml`` with this content over ``base.yaml``."""
    write(folder, "base", base or {})
    return load_chain(write(folder, "toy", content), presets, [parse_override(text) for text in sets])[-1]


def refused(folder: Path, content: Any, **more: Any) -> str:
    """The message with which the sweep is refused; every line of it begins with the file."""
    with pytest.raises(InputError) as error:
        load(folder, content, **more)
    message = str(error.value)
    assert all(line.startswith(str(folder / "toy.yaml")) for line in message.split("\n"))
    return message


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found = []
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            found += [(content, key), *places(value)]
    return found
