"""What an output folder holds, on the terminal: each sweep, whether it runs, is done, or waits to be gone on with."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoenc.config import load_config
from autoenc.course import own_end
from autoenc.errors import InputError
from autoenc.report.index import Entry, entries, read_decision
from autoenc.report.page import number
from autoenc.trajectory import Trajectory

STATES = {"decided": ("done", "green"), "running": ("running", "cyan"), "unfinished": ("resumable", "yellow"),
          "no winner": ("no winner", "red"), "broken": ("broken", "red")}


def show_sweeps(console: Console, output: Path) -> None:
    """Print the sweeps of an output folder. Raises :class:`InputError` where there is no such folder."""
    if not output.is_dir():
        raise InputError(f"--output {output}: no such folder")
    sweeps = entries(output)
    if not sweeps:
        console.print(f"no sweep in {output}", markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("sweep", "left"), ("state", "left"), ("trials", "right"), ("epochs", "right"),
                            ("winner", "left"), ("score", "left"), ("last event", "left"), ("", "left")):
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "")
    for entry in sweeps:
        word, style = STATES[entry.state]
        if entry.stale and entry.state == "decided":
            word, style = "stale", "yellow"
        trials, epochs = decided(output / entry.name) if entry.state == "decided" else progress(output / entry.name)
        score = "" if entry.score is None else f"{entry.metric} {number(entry.score)}"
        table.add_row(entry.name, f"[{style}]{word}[/]", trials, epochs, "final model" if entry.final else entry.arm,
                      score, entry.last.replace("T", " ")[:16], escape(_note(entry)))
    console.print(table)


def decided(folder: Path) -> tuple[str, str]:
    """How many trials a decision rests on, and how many epochs."""
    try:
        rows = read_decision(folder).get("candidates", [])
        return str(sum(len(row["trials"]) for row in rows)), str(sum(row["epochs"] for row in rows))
    except (LookupError, TypeError):             # somebody's own idea of a decision
        return "?", "?"


def progress(folder: Path) -> tuple[str, str]:
    """How many trials of a sweep have ended, and how many of their epochs are there, each of how many (``+``: and of
    trials that were not begun)."""
    ended = trials = begun = done = planned = 0
    for link in sorted(folder.glob("trials/*")):
        trials += 1
        trajectory = Trajectory(link)
        rows = trajectory.rows()
        try:
            config = load_config(link / "config.yaml")
        except InputError:                       # not begun yet
            continue
        begun += 1
        rows = rows[:own_end(rows, config) or len(rows)]
        over = own_end(rows, config) is not None or trajectory.status().get("state") in ("diverged", "failed")
        ended += over
        done += len(rows)
        planned += len(rows) if over else config.train.epochs
    return f"{ended} of {trials}", f"{done} of {planned}{'+' if begun < trials else ''}"


def _note(entry: Entry) -> str:
    if entry.problem:
        return entry.problem
    return entry.writer or ("a winner that it builds on has changed" if entry.stale else "")
