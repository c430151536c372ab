"""outputs/index.html: all sweeps of an output folder, the chain of their winners as a picture. No torch, no Ray.

Read from what the sweeps left (best_config.yaml, decision.json, events.jsonl); what is broken is shown as such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autoenc.config import make_config
from autoenc.errors import InputError
from autoenc.files import write_atomic
from autoenc.report.page import fill
from autoenc.sweep.decide import compounded
from autoenc.sweep.inherit import Winner, read_winner
from autoenc.sweep.spec import NAME, RESERVED
from autoenc.sweep.store import SweepFolder
from autoenc.table import read_text


@dataclass
class Entry:
    """A sweep as its folder tells of it."""

    name: str
    state: str                       # decided, no winner, running, unfinished, broken
    last: str = ""                   # time of the last event
    arm: str = ""
    metric: str = ""
    score: float | None = None
    se: float | None = None
    candidates: int = 0
    final: bool = False              # it varies nothing: its one candidate is the winner above
    latent: int | None = None        # elements
    conceded: float | None = None
    total: float = 0.0               # conceded along the chain up to here
    above: str | None = None         # the sweep it inherits from
    stale: bool = False              # that one's winner is another by now
    problem: str = ""
    writer: str = ""                 # who runs it
    links: dict[str, str] = field(default_factory=dict)
    below: list[Entry] = field(default_factory=list)


def write_index(output: Path, running: str | None = None) -> None:
    """Write the page over all sweeps in the folder, whole or not at all. ``running``: the one that runs now.

    Raises OSError where it cannot be written.
    """
    sweeps = entries(output, running)
    page = fill("index.html.jinja", sweeps=sweeps, roots=chains(sweeps),
                running=any(entry.state == "running" for entry in sweeps))
    write_atomic(output / "index.html", page.encode("utf-8", "replace"))


def entries(output: Path, running: str | None = None) -> list[Entry]:
    """Every sweep in the folder, by name; what was moved aside (``NAME.old1``) is left out."""
    folders = [path for path in output.iterdir() if path.is_dir() and NAME.fullmatch(path.name)
               and path.name not in RESERVED and ".old" not in path.name]
    winners: dict[str, Winner] = {}
    found = []
    for folder in sorted(folders, key=lambda path: path.name):
        events = SweepFolder(output, folder.name).events()
        if not events and not (folder / "best_config.yaml").exists() and not (folder / "decision.json").exists():
            continue
        found.append(_entry(folder, events, winners, running))
    for entry in found:
        winner = winners.get(entry.name)
        parents = dict((winner.provenance.get("parents") or {}) if winner else {})
        entry.above = _direct(parents, winners)
        entry.stale = any(name in winners and winners[name].hash != digest for name, digest in parents.items())
    return found


def chains(sweeps: list[Entry]) -> list[Entry]:
    """The sweeps with a winner as trees, by what they inherit: those without a parent here, others below them."""
    decided = {entry.name: entry for entry in sweeps if entry.arm}
    roots = []
    for entry in decided.values():
        above = decided.get(entry.above or "")
        (above.below if above else roots).append(entry)
    return roots


def _entry(folder: Path, events: list[dict[str, Any]], winners: dict[str, Winner], running: str | None) -> Entry:
    last = events[-1] if events else {}
    entry = Entry(folder.name, "unfinished", str(last.get("time") or ""))
    entry.writer = SweepFolder(folder.parent, folder.name).writer()
    if entry.writer or folder.name == running:
        entry.state = "running"
    elif last.get("event") == "decided" or not events:
        entry.state = "decided"
    try:
        winner = read_winner(folder)
        if winner is not None:
            winners[folder.name] = winner
            _tell(entry, winner)
        elif entry.state == "decided":
            entry.state = "no winner"
    except InputError as error:
        entry.state, entry.problem = "broken", str(error)
    decision = read_decision(folder)
    entry.candidates = len(decision.get("candidates", []))
    entry.links = {label: quote(f"{folder.name}/{label}") for label in ("report.html", "best_config.yaml")
                   if (folder / label).is_file()}
    return entry


def _tell(entry: Entry, winner: Winner) -> None:
    given = winner.provenance
    scores, concessions = given.get("scores") or {}, given.get("concessions") or {}
    entry.arm, entry.metric = given["arm"], str(scores.get("metric") or "")
    entry.score, entry.se = (_number(scores.get(key)) for key in ("score", "se"))
    content = given.get("content") or {}
    entry.final = not content.get("arms") and not content.get("space") and entry.arm == "parent"
    entry.conceded = concessions.get(entry.name)
    entry.total = compounded(list(concessions.values()))
    entry.latent = _latent_size(winner)


def _latent_size(winner: Winner) -> int | None:
    """Elements of the latent of an image, by the configuration's arithmetic, where that tells."""
    shape = make_config(winner.settings, winner.sweep).latent_shape
    return None if shape is None else math.prod(shape)


def _direct(parents: Mapping[str, str], winners: Mapping[str, Winner]) -> str | None:
    """Of all sweeps above, the one that is inherited from: the one that has all others above it, else the last."""
    for name in parents:
        if name in winners and {*(winners[name].provenance.get("parents") or {}), name} == set(parents):
            return name
    return next(reversed(parents), None)


def read_decision(folder: Path) -> dict[str, Any]:
    """A sweep's decision.json; {} where it is broken or not there."""
    try:
        content = json.loads(read_text(folder / "decision.json"))
    except (ValueError, RecursionError, OSError):
        return {}
    whole = isinstance(content, dict) and isinstance(content.get("candidates"), list)
    return content if whole else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
