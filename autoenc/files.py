"""Writing files so that a reader, or a kill at any moment, never meets a half-written one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and goes when it does not."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)      # mkstemp makes it private; outputs follow the person's umask
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Write a whole file beside its place, flush it to disk and rename it. Raises OSError that names the file."""
    with _named(path), replacing(path) as beside, beside.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append one line with a single write, so that lines of several writers never mix.

    A last line that lacks its end (a kill) is ended first, so that only it is lost. Raises OSError where the line does
    not fit on the disk; then the file is as it was.
    """
    with _named(path):
        _append(path, line)


def _append(path: str | os.PathLike, line: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = b"\n" * torn + line.rstrip("\n").encode() + b"\n"
        if os.write(descriptor, content) < len(content):     # a disk that fills up takes a part and says nothing
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """A full disk does not say which file it has no room for, and a temporary name tells a person nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


LEFTOVER = re.compile(r"\.\w.*\.(pt|csv|json|yaml|html|png|safetensors|npz|log)\.[a-z0-9_]{8}")   # replacing() names so


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left beside the files. Nobody else may be writing there."""
    for path in folder.glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_whole_zip(path: Path) -> bool:
    """Whether an archive, such as a checkpoint, can be read to its end and agrees with its checksums (at which torch
    does not look). Raises OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            begins = min(entry.header_offset for entry in archive.infolist()) == 0       # torch allows nothing before
            return begins and archive.testzip() is None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # these are zipfile's: an offset that leads nowhere
            raise
        return False
    except Exception:                                # what zipfile raises for a broken file is of a dozen kinds
        return False


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """The first 20 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]
