"""Whether every node of a cluster sees what its trials need: the output folder, the same as here, and the data. No Ray.

A worker on a node that does not share the folder would make one of that name on its own disk, and train into that.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autoenc.errors import InputError
from autoenc.settings import DataConfig

LIMIT_SECONDS = 60.0            # for all nodes together; each has to start a process
LATE_SECONDS = 10.0             # that a file of another host may take to show: NFS clients remember folders for a while
FILES = ("data.manifest", "data.palette")       # what the data is read from; data.cache_dir is each node's own


@dataclass(frozen=True)
class Seen:
    """What a node found."""

    host: str
    problem: str                # with the output folder; empty: none
    missing: dict[str, str]     # of the data: key -> path


def check(output: Path, data: Sequence[DataConfig],
          everywhere: Callable[..., Sequence[tuple[str, Seen | Exception]]]) -> None:
    """Raise :class:`InputError` unless every node reads in the output folder what is written here, its own file there
    is read here, and the data's files are there.

    ``everywhere(function, *task, seconds=…)`` calls a function on every node and gives, by host, what that returned or
    raised. Nothing of this stays in the folder; it is made where it is not there yet.
    """
    files = {(key, path) for settings in data for key in FILES
             if (path := getattr(settings, key.removeprefix("data.")))}
    failed, missing = {}, {}
    with _marked(output) as (mark, word):
        for host, seen in everywhere(look, str(mark), word, sorted(files), seconds=LIMIT_SECONDS):
            if isinstance(seen, Exception):
                failed.setdefault(f"cannot look ({_line(seen)})", []).append(host)
                continue
            problem = seen.problem
            if not problem and not _appears(mark / seen.host, word):
                problem = "writes there, and it does not show here"
            if problem:
                failed.setdefault(problem, []).append(seen.host)
            for key, path in seen.missing.items():
                missing.setdefault(f"{key}: {path}", []).append(seen.host)
        if failed:
            said = "; ".join(f"{_hosts(hosts)} {problem}" for problem, hosts in failed.items())
            raise InputError(f"--output {output}: {said}. Every node must see this folder under this path: name one on "
                             "storage that all nodes mount, or take the node out of the cluster")
        if missing:
            said = "; ".join(f"{what} is not there on {_hosts(hosts)}" for what, hosts in missing.items())
            raise InputError(f"{said}: put the data on storage that all nodes mount, under the same path")


def look(mark: str, word: str, files: Sequence[tuple[str, str]]) -> Seen:
    """On a node: read the driver's word, write it once more under the host's name, and look for the data."""
    host, folder, problem = socket.gethostname(), Path(mark), ""
    try:
        if not _appears(folder / "driver", word):
            problem = "does not see it"
        else:
            (folder / host).write_text(word)
    except OSError as error:
        problem = f"cannot write there ({error.strerror})"
    return Seen(host, problem, {key: path for key, path in files if not os.access(path, os.R_OK)})


def not_seen(folder: str) -> str:
    """What a worker has to say of the sweep's folder, which the driver has made, where it is not there; else nothing.
    For nodes that join later than was looked."""
    if _waited(Path(folder).is_dir):
        return ""
    return f"{folder}: {socket.gethostname()} does not see it: every node must see the output folder under this path"


@contextmanager
def _marked(output: Path) -> Iterator[tuple[Path, str]]:
    """A folder for the nodes' files, with the driver's in it."""
    word = secrets.token_hex(16)
    mark = output / f".visible-{word[:8]}"
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        mark.mkdir(parents=True)
        (mark / "driver").write_text(word)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from None
    try:
        yield mark, word
    except BaseException:
        shutil.rmtree(mark, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise
    shutil.rmtree(mark, ignore_errors=True)


def _appears(path: Path, word: str) -> bool:
    def there() -> bool:
        with suppress(OSError):
            return path.read_text() == word
        return False

    return _waited(there)


def _waited(there: Callable[[], bool]) -> bool:
    limit = time.monotonic() + LATE_SECONDS
    while not there():
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True


def _hosts(hosts: Sequence[str]) -> str:
    return ", ".join(sorted(set(hosts)))


def _line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error          # Ray's own words are a traceback
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"
