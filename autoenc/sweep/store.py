"""The output folder: all trajectories ever trained, by key, and one folder a sweep."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import SoftFileLease, Timeout

from autoenc.errors import InputError
from autoenc.files import append_line, remove_leftovers, replacing, write_atomic
from autoenc.trajectory import Trajectory

if TYPE_CHECKING:
    from autoenc.sweep.race import Race
    from autoenc.sweep.standing import Trial


LEASE_SECONDS = 60       # after which the lock of another host that shows no sign of life is taken over


def lease(path: Path) -> SoftFileLease:
    """A lock between processes, also of several hosts on a shared file system, whatever locks that knows itself. A dead
    owner on this host is noticed at once; on another one when it has not renewed its claim for ``LEASE_SECONDS``."""
    return SoftFileLease(path, lease_duration=LEASE_SECONDS, poll_interval=0.2)


def owner_in_words(lock: SoftFileLease) -> str:
    """Who holds a lock: host and process."""
    owner = lock.owner
    return f"process {owner.pid} on {owner.hostname.split('?')[0]}" if owner else "another process"


def _this_host() -> str:
    """This host as a lock's owner: in a container, with its process namespace behind the name."""
    with tempfile.TemporaryDirectory() as folder, lease(Path(folder) / "lease") as lock:
        return lock.owner.hostname


class Store:
    """Trajectories under ``output/store``."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "store"

    def open(self, key: str) -> Trajectory:
        return Trajectory(self.folder / key)

    def lock(self, key: str) -> SoftFileLease:
        """Held by the one worker that trains the trajectory."""
        (self.folder / key).mkdir(parents=True, exist_ok=True)
        return lease(self.folder / key / ".lease")

    def set_aside(self, key: str) -> None:
        """Move a trajectory out of the way (``--fresh``). Raises :class:`InputError` where somebody trains it."""
        if not (self.folder / key).is_dir():
            return
        lock = self.lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{lock.lock_file}: {owner_in_words(lock)} trains here; wait until it has ended") from None
        lock.release()
        move_aside(self.folder / key)

    def seconds_per_epoch(self, keys: Sequence[str]) -> float | None:
        """Median duration of an epoch over these trajectories, seconds; None where none was trained."""
        seconds = sorted(row["seconds"] for key in keys for row in self.open(key).rows())
        return seconds[len(seconds) // 2] if seconds else None


class SweepFolder:
    """What one sweep leaves behind: ``output/<name>``. Constructing it touches nothing."""

    def __init__(self, output: Path, name: str) -> None:
        self.path = output / name
        self.name = name

    @contextmanager
    def writing(self, wait: float = 0) -> Iterator[None]:
        """One writer at a time. Raises :class:`InputError` where another run holds the folder for more than ``wait``
        seconds; one on another host may have died there without a sign, which takes its lease to show."""
        lock = lease(self.path / ".lease")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=wait)
            except Timeout:
                owner = lock.owner
                if owner is None or owner.hostname == _this_host():
                    raise
                lock.acquire(timeout=max(0, 1.25 * LEASE_SECONDS - wait))
        except Timeout:
            raise InputError(f"{self.path}: {owner_in_words(lock)} is writing here; wait until it has ended, or use "
                             "another --output") from None
        except OSError as error:
            raise InputError(f"{error.filename or self.path}: cannot be written: {error.strerror}") from None
        try:
            remove_leftovers(self.path)
            yield
        finally:
            with suppress(OSError):          # the folder may be gone, and that is what is to be told
                lock.release()

    def writer(self) -> str:
        """Which other process runs this sweep now, in words; empty for none. Reading only: a claim on another host that
        was renewed lately holds, one on this host as long as its process lives."""
        path = self.path / ".lease"
        owner = lease(path).owner
        try:
            if owner is None or time.time() - path.stat().st_mtime > 1.25 * LEASE_SECONDS:
                return ""
            if owner.hostname == _this_host():
                if owner.pid == os.getpid():
                    return ""
                os.kill(owner.pid, 0)
        except PermissionError:              # somebody else's, and alive
            pass
        except OSError:
            return ""
        return f"process {owner.pid} on {owner.hostname.split('?')[0]}"

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a broken line is passed over."""
        found = []
        try:
            lines = (self.path / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                found.append(event)
        return found

    def emit(self, **event: Any) -> None:
        """Append an event with the time (UTC)."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append_line(self.path / "events.jsonl", json.dumps({"time": stamp, **event}, allow_nan=True))

    def link_trials(self, race: Race) -> None:
        """``trials/<arm>_seed<seed>``: a link to each trial's trajectory; links of trials that are no more go."""
        folder = self.path / "trials"
        folder.mkdir(exist_ok=True)
        wanted = {trial.name for trial in race.trials}
        for link in folder.iterdir():
            if link.is_symlink() and link.name not in wanted:
                link.unlink()
        self.link(race.trials)

    def link(self, trials: Iterable[Trial]) -> None:
        """The links of these trials, which may be new."""
        folder = self.path / "trials"
        for trial in trials:
            link, target = folder / trial.name, trial.run.trajectory.folder
            relative = os.path.relpath(target, folder)
            if not link.is_symlink() or str(link.readlink()) != relative:
                link.unlink(missing_ok=True)
                link.symlink_to(relative, target_is_directory=True)

    def write_trials(self, race: Race) -> None:
        """``trials.csv``: a row a trial: every varied setting, every figure at the best epoch, and on which GPU."""
        varied = race.spec.varied
        rows, counted = [], set()
        for trial in race.trials:
            shared = trial.run.id in counted             # trained once for two candidates that come to the same
            counted.add(trial.run.id)
            run, status = trial.run, trial.run.trajectory.status()
            found = race.figures_of(run)
            rows.append({
                "trial": trial.name, "arm": trial.candidate.name, "seed": trial.seed, "status": run.state,
                "epochs": len(run.rows), "epochs_trained": 0 if shared else run.trained,
                "best_epoch": int(found.pop("epoch", 0)),
                "seconds": round(sum(row["seconds"] for row in run.rows), 3), "device": status.get("device", ""),
                **{key: _cell(trial.run.config.flat()[key]) for key in varied},
                **{key: value for key, value in found.items() if key != "seconds"},
                "device_name": status.get("device_name", "")})
        header = list(dict.fromkeys(key for row in rows for key in row if key != "device_name"))
        header += ["device_name"] if rows else []
        text = io.StringIO()
        writer = csv.DictWriter(text, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path / "trials.csv", text.getvalue())

    def write_json(self, name: str, content: Any) -> None:
        """One of the sweep's JSON files; equal content gives equal bytes."""
        write_atomic(self.path / name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def set_aside(self) -> None:
        """Move the sweep's results out of the way (``--fresh``); its links follow trajectories that were before."""
        aside = move_aside(self.path)
        for link in aside.glob("trials/*") if aside else ():
            if link.is_symlink() and not link.exists() and (moved := _asides(link.parent / link.readlink())):
                target = link.readlink().with_name(moved[-1].name)
                link.unlink()
                link.symlink_to(target, target_is_directory=True)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def move_aside(path: Path) -> Path | None:
    """Rename a folder to ``NAME.old1``, ``NAME.old2``, …, the next number, and return it; None where there is none."""
    if not path.exists():
        return None
    last = _asides(path)[-1:]
    return path.rename(path.with_name(f"{path.name}.old{_number(last[0]) + 1 if last else 1}"))


def _asides(path: Path) -> list[Path]:
    """What stood at this path and was moved aside, the latest last."""
    return sorted((aside for aside in path.parent.glob(f"{path.name}.old*") if _number(aside)), key=_number)


def _number(aside: Path) -> int:
    digits = aside.name.rpartition(".old")[2]
    return int(digits) if digits.isdecimal() else 0


def copy_into(source: Path, target: Path) -> None:
    """Copy a file beside its place and rename it."""
    with replacing(target) as beside:
        beside.write_bytes(source.read_bytes())
