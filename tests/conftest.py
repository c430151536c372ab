"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_token(tmp_path_factory) -> Path:
    """Where the token of every Ray lies that this process starts: Ray keeps the first one that it has read."""
    return tmp_path_factory.mktemp("ray") / "token"
