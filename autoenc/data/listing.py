"""Which files a manifest or a folder names, of images or of splats, with their labels. Reads none of them."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from autoenc.checks import shown
from autoenc.data.images import EXTENSIONS
from autoenc.errors import InputError, did_you_mean
from autoenc.settings import DataConfig

SPLATS = ".npz"
FEWEST = 3            # items, one for each part of the split
_SHOWN = 10           # problems told one by one
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


class Item(NamedTuple):
    name: str             # path relative to the manifest or folder
    label: str | None
    row: int | None       # line of the manifest that ends the record; the header is line 1
    path: str
    size: int             # bytes
    mtime: int            # ns


@dataclass
class Listing:
    """The files to read, and what is wrong with others that should be read, by row or name."""

    where: str
    items: list[Item] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    holds: str = "image"
    """what one of them is called"""

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(sorted({item.label for item in self.items if item.label is not None}))

    def refuse(self) -> None:
        """Raise :class:`InputError` when anything is wrong: the first problems, and how many more."""
        if not self.problems:
            return
        lines = [text for _, text in sorted(self.problems)]
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        what = f"1 {self.holds}" if len(lines) == 1 else f"{len(lines)} {self.holds}s"
        raise InputError("\n".join([f"{self.where}: {what} cannot be used:",
                                    *(f"  {line}" for line in lines[:_SHOWN]), *more]))


def read_listing(data: DataConfig) -> Listing:
    """The files of ``data.manifest``, a CSV file or a folder by ``data.source`` (for splats by what is there), after
    filters and limit.

    Raises :class:`InputError` where the manifest itself cannot be used; faults of single rows and files are
    in the listing's ``problems``.
    """
    where = Path(data.manifest).absolute()
    listing = Listing(str(where))
    of_folder = data.source == "folder" or (data.source == "splats" and os.path.isdir(where))      # noqa: PTH112
    if of_folder:
        extensions = (*EXTENSIONS, SPLATS) if data.source == "splats" else EXTENSIONS
        folder, entries = where, _folder_entries(where, extensions)
    else:
        folder, entries = where.parent, _manifest_entries(data, where, listing)
    if data.source == "splats":
        _check_one_kind(where, entries, of_folder)
        listing.holds = "file"
    entries = _limited(entries, data)
    inside = None if data.allow_outside or of_folder else _Inside(folder)
    for name, label, row in entries:
        position = row if row is not None else len(listing.items) + len(listing.problems)
        prefix = f"row {row}: " if row is not None else ""
        path = os.path.join(folder, name)      # noqa: PTH118 - os.path is several times faster, and there are many
        try:
            if not name.strip():
                raise OSError(0, "no path given")
            if inside and not inside.holds(path):
                raise OSError(0, "leads out of the manifest's folder (data.allow_outside: true accepts it)")
            status = os.stat(path)      # noqa: PTH116
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "not a regular file")
            listing.items.append(Item(name, label, row, path, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError) as error:      # ValueError: a NUL in the path
            missing = isinstance(error, FileNotFoundError)
            said = "no such file" if missing else getattr(error, "strerror", None) or str(error)
            listing.problems.append((position, f"{prefix}{told(name)}: {said}"))
    if not listing.problems and len(listing.items) < FEWEST:
        raise InputError(f"{where}: only {len(listing.items)} {listing.holds}s to use; at least {FEWEST} are needed")
    return listing


def is_splats(name: str) -> bool:
    """Whether a path is that of a file of splats, by its ending; others are of images."""
    return name.lower().endswith(SPLATS)


def told(name: str) -> str:
    """A path as a message shows it."""
    return name if name.strip() and name.isprintable() and len(name) <= 500 else shown(name)


Entry = tuple[str, "str | None", "int | None"]      # name, label, row


def _manifest_entries(data: DataConfig, where: Path, listing: Listing) -> list[Entry]:
    rows = _csv_rows(where)
    try:
        header = next(rows, None)
        if header is None:
            raise InputError(f"{where}: is empty; it should be a CSV file with a header line")
        columns = [name.strip() for name in header[1]]
        label_column = data.label_column
        if label_column not in columns and label_column == DataConfig.model_fields["label_column"].default:
            label_column = None
        _check_columns(data, where, columns, label_column)
        image_at = columns.index(data.image_column)
        label_at = columns.index(label_column) if label_column is not None else None
        filters = [(columns.index(name), accepted) for name, accepted in data.filters.items()]

        entries, seen, values = [], 0, [Counter() for _ in filters]
        for row, cells in rows:
            if not cells:      # an empty line
                continue
            seen += 1
            if len(cells) != len(columns):
                listing.problems.append((row, f"row {row}: {len(cells)} cells, the header has {len(columns)}"))
                continue
            for count, (at, _) in zip(values, filters, strict=True):
                count[cells[at]] += 1
            if all(any(_equal(cells[at], value) for value in accepted) for at, accepted in filters):
                label = cells[label_at].strip() if label_at is not None else ""
                entries.append((cells[image_at], label or None, row))
    finally:
        rows.close()
    if seen == 0:
        raise InputError(f"{where}: has a header but no rows")
    if not entries and not listing.problems:
        held = "; ".join(f"{columns[at]} holds " + ", ".join(
            f"{shown(value)} ({n}×)" for value, n in count.most_common(5))
            for (at, _), count in zip(filters, values, strict=True))
        raise InputError(f"{where}: data.filters: {data.filters} keeps none of {seen} rows: {held}")
    return entries


def _csv_rows(where: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every record. Raises :class:`InputError` for what is no readable CSV text."""
    if os.path.isdir(where):      # noqa: PTH112 - Path's raise for names that are too long
        raise InputError(f"{where}: data.manifest is a folder; data.source: folder reads one")
    row = 0
    try:
        if os.path.exists(where) and not os.path.isfile(where):      # noqa: PTH110, PTH113
            raise InputError(f"{where}: data.manifest: not a regular file")
        with where.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for cells in reader:
                row = reader.line_num
                yield row, cells
    except FileNotFoundError:
        raise InputError(f"{where}: data.manifest: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text (after row {row})") from None
    except csv.Error as error:
        raise InputError(f"{where}: row {row + 1}: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: data.manifest: {getattr(error, 'strerror', None) or error}") from None


def _check_columns(data: DataConfig, where: Path, columns: Sequence[str], label_column: str | None) -> None:
    needed = [("data.image_column", data.image_column), *(("data.filters", name) for name in data.filters)]
    if label_column is not None:
        needed.append(("data.label_column", label_column))
    likely = [column for column in columns if len(column) <= 80 and column.isprintable()]
    faults = [f"{where}: {key}: there is no column {name!r}{did_you_mean(name, likely)}"
              for key, name in needed if name not in columns]
    faults += [f"{where}: {key}: column {name!r} is there twice" for key, name in needed if columns.count(name) > 1]
    if faults:
        raise InputError("\n".join(faults))


def _equal(cell: str, value: str | bool | int | float | None) -> bool:
    """Whether a CSV cell is the value: booleans by word, numbers by value, text to the letter, None if empty."""
    if value is None:
        return not cell.strip()
    if isinstance(value, bool):
        return cell.strip().lower() in (_TRUE if value else _FALSE)
    if isinstance(value, str):
        return cell == value
    try:
        return float(cell) == value
    except ValueError:
        return False


def _check_one_kind(where: Path, entries: Sequence[Entry], of_folder: bool) -> None:
    names = [name for name, _, _ in entries if name.strip()]
    files = [name for name in names if is_splats(name)]
    if files and len(files) < len(names):
        image = next(name for name in names if not is_splats(name))
        way = "data.manifest should be a folder of one kind, or a CSV file that names one" if of_folder else \
            "data.filters or another data.image_column can leave one kind out"
        raise InputError(f"{where}: holds both splats ({len(files)} .npz files, the first {told(files[0])}) and images "
                         f"to fit splats to ({len(names) - len(files)}, the first {told(image)}): {way}")


def _folder_entries(where: Path, extensions: tuple[str, ...]) -> list[Entry]:
    """All such files below a folder by path; the label is the sub-folder of the first level."""
    if not os.path.isdir(where):      # noqa: PTH112
        there = os.path.exists(where)      # noqa: PTH110
        what = "a file; data.source: manifest reads one" if there else "no such folder"
        raise InputError(f"{where}: data.manifest: {what}")
    unreadable: list[OSError] = []
    names = []
    for folder, folders, files in os.walk(where, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(folder, name).relative_to(where).as_posix() for name in files
                  if name.lower().endswith(extensions) and not name.startswith(".")]
    if unreadable:
        raise InputError("\n".join(f"{error.filename}: {error.strerror}" for error in unreadable))
    if not names:
        what = "images or splats" if SPLATS in extensions else "images"
        raise InputError(f"{where}: no {what} there ({', '.join(extensions)})")
    return [(name, name.split("/")[0] if "/" in name else None, None) for name in sorted(names)]


def _limited(entries: list[Entry], data: DataConfig) -> list[Entry]:
    """At most ``data.limit`` entries, those with the least hash of seed and name, in their order."""
    if data.limit is None or len(entries) <= data.limit:
        return entries
    def rank(k: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{data.seed}:{entries[k][0]}".encode(errors="surrogateescape")).digest(), k
    return [entries[k] for k in sorted(sorted(range(len(entries)), key=rank)[:data.limit])]


class _Inside:
    """Tells whether paths stay in a folder, symbolic links followed. Remembers the folders it has seen."""

    def __init__(self, folder: Path) -> None:
        self.root = os.path.realpath(folder)
        self.known: dict[str, bool] = {}

    def holds(self, path: str) -> bool:
        parent, base = os.path.split(path)
        if base == ".." or os.path.islink(path):      # noqa: PTH114
            return self._within(path)
        if parent not in self.known:
            self.known[parent] = self._within(parent)
        return self.known[parent]

    def _within(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self.root or real.startswith(self.root.rstrip(os.sep) + os.sep)
