"""A training's table, metrics.csv: a row an epoch, appended; read back up to where it breaks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from autoenc.files import append_line, write_atomic

Row = dict[str, float]


def read_text(path: Path) -> str:
    """A file's text, with a mark for each byte that is none; empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def parse_rows(text: str) -> list[Row]:
    """The rows of all epochs, in order from 1; what follows a broken line is left out."""
    header = _header(text)
    rows: list[Row] = []
    if header[:2] != ["epoch", "seconds"] or len(set(header)) < len(header):
        return rows
    try:
        for cells in csv.reader(text.split("\n")[1:-1]):     # a last line without its end may lack digits: it is none
            row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell != ""}
            if row.get("epoch") != len(rows) + 1 or not 0 <= row.get("seconds", -1) < math.inf:
                break
            rows.append(row | {"epoch": len(rows) + 1})
    except (ValueError, csv.Error):
        pass
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """The whole table; a figure that a row lacks is an empty cell."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    return "\n".join([",".join(header), *(_line(row, header) for row in rows), ""]) if rows else ""


def append_row(path: Path, row: Row) -> None:
    """Append an epoch; the first row, or one with figures that the header lacks, writes the table anew. Raises OSError.
    """
    text = read_text(path)
    header = _header(text)
    if header and set(row) <= set(header):
        append_line(path, _line(row, header))
    else:
        write_atomic(path, csv_text([*parse_rows(text), row]))


def _header(text: str) -> list[str]:
    try:
        return next(csv.reader([text.split("\n", 1)[0]]), [])
    except csv.Error:
        return []


def _line(row: Row, header: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([repr(row[name]) if name in row else "" for name in header])
    return text.getvalue()
