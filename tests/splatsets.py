"""Sets of splats for tests, and what Gaussians they are."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)


def uniform_splats(count: int, seed: int = 0, sets: tuple[int, ...] = ()) -> np.ndarray:
    """Splats (*sets, count, 8), float32, in no order: every parameter anywhere in its range."""
    rng = np.random.default_rng(seed)
    shape = (*sets, count)
    parts = (rng.uniform(-1, 1, (*shape, 2)), np.exp(rng.uniform(-5, -0.5, (*shape, 2))),
             rng.uniform(0, math.pi, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3)))
    return np.concatenate(parts, -1).astype(np.float32)


def covariances(raw: torch.Tensor) -> torch.Tensor:
    """(…, N, 2, 2), written out from the definition."""
    cos, sin = raw[..., 4].cos(), raw[..., 4].sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return turn @ torch.diag_embed(raw[..., 2:4].square()) @ turn.transpose(-1, -2)
