"""What a worker does with one trajectory: continue it in the store, an epoch at a time. No Ray here."""

from __future__ import annotations

import errno
import json
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from autoenc import figures
from autoenc.config import Config, make_config
from autoenc.course import best_row, divergence, failure, own_end
from autoenc.errors import InputError
from autoenc.files import write_atomic
from autoenc.sweep.store import Store, owner_in_words
from autoenc.trajectory import Superseded, Trajectory


@dataclass(frozen=True)
class Task:
    """Plain values only: it travels to the worker."""

    key: str
    output: str                        # the output folder, absolute
    config: dict[str, Any]             # by dotted key
    threads: int
    device: str                        # cpu or cuda
    after: tuple[str, ...] = ()        # figures to compute when it is finished
    keep: int | None = None            # an epoch whose weights must be there in the end
    data: str = ""                     # the fingerprint that its data must have; empty: any


_dataset: tuple[Any, Any] = (None, None)


def work(task: Task) -> Iterator[dict[str, Any]]:
    """Train what the store lacks of this trajectory. Yields ``{"epoch": …, "row": …}`` for each new epoch, no row
    for one that is trained once more, ``{"waiting": …}`` while another process trains it, ``{"warning": …}`` for what
    was found broken, last ``{"outcome": …}``.

    ``outcome``: completed, diverged or failed, with a ``note``; ``broken`` where the store could not be written.
    """
    import torch

    torch.set_num_threads(task.threads)
    config = make_config(task.config, "the task")
    store = Store(Path(task.output))
    trajectory = store.open(task.key)
    try:
        lock = store.lock(task.key)
        warnings: list[str] = []
        trajectory.warn, trajectory.guard = warnings.append, partial(_guard, lock)
        for said in _steps(task, lock, trajectory, config):
            while warnings:
                yield {"warning": warnings.pop(0)}
            yield said
    except OSError as error:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        yield {"outcome": "broken", "note": f"{full}{error.filename or trajectory.folder}: {error.strerror or error}"}
    except InputError as error:
        yield {"outcome": "failed", "note": str(error)}
    except Exception as error:                  # raised, it would pass for a dead worker and be tried again in silence
        write_atomic(trajectory.folder / "traceback.txt", traceback.format_exc())
        yield {"outcome": "failed", "note": f"{failure(error, config)}; see {trajectory.folder}/traceback.txt"}


def in_text(said: dict[str, Any]) -> dict[str, Any]:
    """What :func:`work` says, with an epoch's figures as one text: of every number in a trial's
    results Tune keeps a dozen statistics, hundreds of kilobytes a trial (tests/benchmarks, scale)."""
    return said | {"row": json.dumps(said["row"])} if "row" in said else said


def _steps(task: Task, lock: SoftFileLease, trajectory: Trajectory, config: Config) -> Iterator[dict[str, Any]]:
    dataset = _open_data(config)
    if task.data not in ("", dataset.fingerprint):
        raise InputError(f"data.cache_dir: on {socket.gethostname()} the data is other data than where the command "
                         "runs: files that differ, or splats fitted on another kind of processor; name a folder that "
                         "all nodes see")
    yield from _train(lock, trajectory, config, dataset, task.device)
    outcome = _outcome(trajectory, config)
    if outcome["outcome"] == "completed":
        best = best_row(trajectory.rows(), config)               # None: the monitored figure is undefined throughout
        yield from _acquire(lock)
        with _released(lock):
            if task.keep is not None:
                yield from _weights(task, trajectory, config, dataset, task.keep)
            if best:
                from autoenc.finish import finish

                epoch = int(best["epoch"])
                if task.after:
                    yield from _weights(task, trajectory, config, dataset, epoch)
                if after := {*task.after, *_in_passing(trajectory, config, epoch)}:
                    finish(trajectory, config, dataset, task.device, epoch, after)
    yield outcome


def _in_passing(trajectory: Trajectory, config: Config, epoch: int) -> set[str]:
    """What is measured without being asked for. It is no reason to train again for weights that are not kept."""
    normalized = config.model.normalize_latents
    passing = set(figures.IN_PASSING) - (set() if config.model.variational else set(figures.OF_POSTERIORS))
    missing = passing - set(trajectory.figures(epoch, normalized))
    return missing if missing and trajectory.whole_weights(epoch, normalized) else set()


def _weights(task: Task, trajectory: Trajectory, config: Config, dataset: Any, epoch: int) -> Iterator[dict[str, Any]]:
    """Have the weights of an epoch, trained once more where they are not kept."""
    normalized = config.model.normalize_latents
    if trajectory.whole_weights(epoch, normalized) is None:
        if trajectory.whole_weights(epoch) is None:
            for row in trajectory.restore_weights(config, dataset, task.device, epoch):
                yield {"epoch": row["epoch"]}
        if normalized:
            from autoenc.finish import finish

            finish(trajectory, config, dataset, task.device, epoch, ())


def _train(lock: SoftFileLease, trajectory: Trajectory, config: Config, dataset: Any,
           device: str) -> Iterator[dict[str, Any]]:
    """Each epoch under the trajectory's lock, which is free in between: a worker that is stopped there, and kept for
    the next trial, holds nobody up. Where another one has trained on meanwhile, its epochs are taken over."""
    steps, known = None, 0
    while True:
        yield from _acquire(lock)
        with _released(lock):
            before = len(trajectory.rows())
            if steps is None or before != known:
                steps = trajectory.train(config, dataset, device)
            try:
                row = next(steps, None)
            except Superseded:
                steps = None
                continue
            known = len(trajectory.rows())
        if row is None:
            return
        yield {"epoch": row["epoch"]} | ({"row": row} if row["epoch"] > before else {})


def _acquire(lock: SoftFileLease) -> Iterator[dict[str, Any]]:
    """Take a lock; yields now and then who holds it meanwhile."""
    wait, folder = 0.0, Path(lock.lock_file).parent
    while True:
        if not folder.is_dir():              # the lock would make it anew, empty
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        try:
            lock.acquire(timeout=wait)
            return
        except Timeout:
            if wait:
                yield {"waiting": owner_in_words(lock)}
            wait = 5.0


@contextmanager
def _released(lock: SoftFileLease) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):              # the folder is gone
            lock.release()


def _guard(lock: SoftFileLease) -> None:
    """A process that was stopped for longer than its lease lasts may find that another one has gone on."""
    owner = lock.owner
    if owner is None or owner.token != lock.token:
        raise Superseded


def _open_data(config: Config) -> Any:
    """The data set, opened once a worker."""
    global _dataset
    if _dataset[0] != config.data:
        from autoenc.data import prepare

        _dataset = (config.data, prepare(config.data))
    return _dataset[1]


def _outcome(trajectory: Trajectory, config: Config) -> dict[str, Any]:
    status = trajectory.status()
    if own_end(trajectory.rows(), config) is not None:
        return {"outcome": "completed"}
    if status.get("diverged"):
        return {"outcome": "diverged", "note": divergence(status["diverged"])}
    return {"outcome": "failed", "note": status.get("failed", "training ended early, no reason is known")}

