"""The table of a run: printed, and put into a page between two markers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoenc.errors import InputError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADER = ("what", "ours", "beside", "ratio (quartiles)", "mark", "reached")
BEFORE = "an earlier run"


def table_of(found: Mapping[str, Any]) -> str:
    """A run (the content of a JSON file) as Markdown that can be read as it is: table, notes, machine."""
    several = any(row.get("before") for row in found["rows"])
    header = (*HEADER, BEFORE) if several else HEADER
    rows = [[*_cells(row), *([" / ".join(map(number, row["before"]))] if several else [])] for row in found["rows"]]
    lines = _aligned([header, ["-" * len(name) for name in header], *rows]) if rows else []
    said = [f"- {name}: {words}" for name, words in _notes(found)]
    machine = found["machine"]
    lines += [*([""] if said and lines else []), *said, "",
              f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB; "
              + (f"{machine['gpu']}; " if machine["gpu"] else "")
              + f"Python {machine['python']}, torch {machine['torch']}, Ray {machine['ray']}, "
              f"Optuna {machine['optuna']}; commit {machine['commit']}, {machine['date']}."]
    if found["quick"]:
        lines.append("With --quick: the sizes are too small for the figures to mean anything.")
    return "\n".join(lines) + "\n"


def write_into(page: Path, table: str) -> None:
    """Replace what stands between the markers of a page. Raises :class:`InputError` where it lacks them."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--write {page}: {getattr(error, 'strerror', None) or error}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--write {page}: lacks the lines {BEGIN} and {END} that the table goes between")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def _cells(row: Mapping[str, Any]) -> list[str]:
    ours, other, ratio, mark, unit = row["ours"], row["other"], row["ratio"], row["mark"], row["unit"]
    asked = "" if mark is None else f"{mark['relation']} {mark['value']:g}{f' {unit}' * (mark['of'] == 'ours')}"
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return [row["what"], f"{number(ours['median'])} {unit} ({ours['what']})",
            f"{number(other['median'])} {unit} ({other['what']})",
            f"{number(ratio['median'])} ({number(ratio['q1'])} to {number(ratio['q3'])})",
            asked, reached]


def _notes(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    said = []
    for name, entry in found["benchmarks"].items():
        rounds, commit = entry["rounds"], entry.get("commit", found["machine"]["commit"])
        words = [f"{rounds} round{'s' * (rounds != 1)} in {entry['seconds']:,.0f} s",
                 f", other work on {entry['load']:.1f} cores",
                 f", commit {commit}" if commit != found["machine"]["commit"] else "",
                 " (**measured under load**)" if entry["loaded"] else ""]
        words = ["".join(words)] if rounds else []
        words += [f"not run here: {entry['skipped']}"] if entry["skipped"] else []
        words += [f"failed after {entry['rounds']} rounds: {entry['failed']}"] if entry["failed"] else []
        words += [f"{key} {' / '.join(dict.fromkeys(map(_word, values)))}" for key, values in entry["notes"].items()]
        said.append((f"`{name}`", "; ".join(words)))
    return said


def _word(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """Three digits that count, all of those before the point."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.{max(0, min(6, 2 - math.floor(math.log10(abs(value)))))}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(cell.ljust(width, cell[0] if cell and set(cell) == {"-"} else " ")
                              for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
