"""Numbers as a person reads them."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A figure in four digits, a large one in full."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e12 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share as three digits of percent."""
    return "∞%" if math.isinf(share) else f"{100 * share:.3g}%"
