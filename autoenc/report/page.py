"""What the pages share: their templates, their style, and how figures read. No torch, no Ray.

A page needs no network: all of it is in one file, and its content security policy forbids the rest. All text passes
through jinja2's autoescape.
"""

from __future__ import annotations

import re
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoenc.sweep.plan import duration
from autoenc.sweep.words import percent

HERE = Path(__file__).parent / "templates"
TONES = {"good": ("winner", "helps"), "fair": ("best", "as good", "rule's choice", "decided", "healthy"),
         "bad": ("diverged", "failed", "hurts", "broken", "collapsed", "decoder ignores the latent")}


def fill(template: str, **values: Any) -> str:
    """The page that a template makes of these values."""
    return _environment().get_template(template).render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")), **values)


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "signed": signed, "duration": duration,
                            "breakable": breakable, "tone": tone}
    return environment


def number(value: float | None) -> str:
    """Four digits, whole numbers in full, a dash for what is not known."""
    if value is None or value != value:
        return "—"
    if not isfinite(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")


def signed(value: float, share: bool = True) -> str:
    """A change in two digits, with its sign; a share as percent."""
    return "0" if value == 0 else f"{100 * value:+.2g}%" if share else f"{value:+.3g}"


def breakable(name: str) -> Markup:
    """A name; a long one may be broken after its slash, else after an underscore."""
    parts = re.split("(?<=/)" if "/" in name else "(?<=_)", name) if len(name) > 12 else [name]
    return Markup("<wbr>").join(parts)


def tone(verdict: str) -> str:
    """The style class of a verdict or a state."""
    return next((name for name, verdicts in TONES.items() if verdict in verdicts), "mild")
