"""Where benchmarks run other processes: a folder, an environment and a Ray of their own, all gone at the end. Linux."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUNNER = REPOSITORY / "tune_runner.py"
LIMIT = 3600.0                   # seconds after which a process counts as hung


class Place:
    """A folder with sweep files, and processes in it that find nothing of what was there before: no decoded data, no
    Ray, no token."""

    def __init__(self, folder: Path, ray: Path) -> None:
        self.folder, self.ray = folder, ray
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("RAY_", "TUNE_", "AUTOENC_", "OMP_"))}
        self.environment = kept | {
            "HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "RAY_TMPDIR": str(ray),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1"}

    def new(self, name: str) -> Path:
        """An empty folder; what it held is removed."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def sweep(self, name: str, base: Mapping[str, Any], content: Mapping[str, Any]) -> Path:
        """A sweep file over a base.yaml with these settings (by dotted key), both in a folder of their own."""
        folder = self.new(f"{name}_files")
        _write(folder / "base.yaml", {"config": nested(base)})
        return _write(folder / f"{name}.yaml", {"name": name, **content})

    def start(self, *command: object, **more: Any) -> subprocess.Popen:
        """A Python process; what it says goes to a log unless ``stdout`` is given: Ray's processes could hold a pipe
        open beyond its end."""
        log = (self.folder / "log.txt").open("w")
        with log:
            return subprocess.Popen([sys.executable, *map(str, command)], cwd=self.folder, env=self.environment,
                                    start_new_session=True,
                                    **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **more})

    def run(self, *command: object, limit: float = LIMIT) -> float:
        """Run a Python process to its end; seconds."""
        began = time.perf_counter()
        with ended(self.start(*command)) as process:
            self.wait(process, limit)
        return time.perf_counter() - began

    def wait(self, process: subprocess.Popen, limit: float = LIMIT) -> None:
        """Raises RuntimeError, with the end of what the process said, where it failed or hung."""
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            what = "did not end" if code is None else f"ended with exit code {code}"
            raise RuntimeError(f"{process.args}: {what}:\n{self.said()[-3000:]}")

    def said(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")


@contextmanager
def place(kept: Path | None = None) -> Iterator[Place]:
    """A place, removed afterwards with every process that still runs in it; ``kept``: a folder that stays."""
    if kept:
        kept.mkdir(exist_ok=True)
    folder = (kept or Path(tempfile.mkdtemp(prefix="autoenc-benchmark-"))).resolve()
    ray = Path(tempfile.mkdtemp(prefix="ab", dir="/tmp"))             # its sockets' paths may not be long
    try:
        yield Place(folder, ray)
    finally:
        for pid in processes_in(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(ray, ignore_errors=True)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A process that is ended with the block, in order first."""
    try:
        yield process
    finally:
        for ask, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            if process.poll() is None:
                process.send_signal(ask)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)


def processes_in(folder: Path) -> list[int]:
    """The processes whose working directory is the folder: those started there, and their Ray's."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
    return found


def proportional_bytes(pid: int) -> int:
    """Memory of a process (PSS): its own, and its share of what it has in common with others, the page cache of mapped
    files among it, so that the sum over processes counts each page once."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def private_bytes(pid: int) -> int:
    """Anonymous memory of a process: what it has allocated itself, without mapped files and shared memory."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "RssAnon:")


def _kilobytes(path: Path, name: str) -> int:
    return 1024 * next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))


def busy_cores(seconds: float) -> float:
    """How many cores are at work on this machine, on average over so many seconds in which this process sleeps."""
    def used() -> int:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4]                # without those idle, or waiting for a disk

    before, began = used(), time.perf_counter()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - began)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as a mapping of sections."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return path


def until(process: subprocess.Popen, true: Callable[[], bool], limit: float = LIMIT) -> float:
    """Wait for ``true()``; when that was (time.perf_counter). Raises RuntimeError where the process fails before."""
    end = time.perf_counter() + limit
    while not true():
        if time.perf_counter() > end or process.poll() not in (None, 0):
            raise RuntimeError(f"{process.args}: failed, or hung")
        time.sleep(0.005)
    return time.perf_counter()
