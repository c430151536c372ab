"""What several test files share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray_token(tmp_path_factory) -> Path:
    """Where the token of every Ray lies that this process starts: Ray keeps the first one that it has read."""
    return tmp_path_factory.mktemp("ray") / "token"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where data that is prepared is kept: a folder of this test's own, not there yet."""
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[..., str]:
    """Writes a module under a name of its own, on Python's path; gives the name."""
    from owncode import names  # it loads torch

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(text: str, name: str | None = None) -> str:
        name = name or next(names)
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def lab(tmp_path) -> Callable[..., Any]:
    """A sweep of simulated arms by their levels, ``lab({"A": 0.1, …}, curve, **content)``; without: five."""
    from racing import LEVELS, Lab, arms, levels

    def make(values: dict[str, float] = LEVELS, curve: Any = levels, **content: Any) -> Lab:
        return Lab(tmp_path, curve, **({"arms": arms(values)} if values else {}), **content)
    return make
