"""A thousand trials in one sweep: what the driver needs for each, and how many go through."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from commands import SLOTS, TRIVIAL, searched, split_sizes
from measure import Options, Round, in_turn
from pictures import of_manifest, write_pictures
from place import HERE, RUNNER, Place, ended, place, private_bytes

Point = tuple[float, int, int]   # seconds, trials that have ended, bytes of the driver


def scale(options: Options) -> Iterator[Round]:
    """1,000 trials of one epoch with a trivial model (8 px, 30 files, one channel), searched by TPE, by the command;
    beside it 100 of the same by the plain Ray Tune script, whose pace does not depend on how many there are (its Optuna
    slows down with them, which is in its favour). Both run two trials at a time.

    Trials a second: from the end of the first tenth to the end of the last trial, so start and end are left out.
    Driver memory: anonymous memory of the driver's process against the trials that have ended; the slope of a straight
    line (least squares) over the same part.
    """
    trials, fewer = (20, 10) if options.quick else (1000, 100)
    with place() as here:
        manifest = write_pictures(here.folder / "files", 30, 8)
        settings = of_manifest(manifest, 8, **TRIVIAL) | {"data.limit": None}
        sweep = here.sweep("many", settings, searched(trials, 1))
        train, val = split_sizes(here, settings)
        peer = [manifest, "--trials", fewer, "--epochs", 1, "--size", 8, "--train", train, "--val", val,
                "--batch-size", TRIVIAL["train.batch_size"], "--base-channels", 1, "--steps", 1]

        def ours() -> list[Point]:
            output = here.new("ours")
            events = output / "many" / "events.jsonl"
            arguments = RUNNER, sweep, "--output", output, "--slots", SLOTS
            return watched(here, arguments, trials, lambda: completed(events))

        def theirs() -> list[Point]:
            output = here.new("peer")
            return watched(here, (HERE / "peers" / "plain_tune.py", *peer, "--output", output), fewer,
                           lambda: lines(output / "epochs.txt"))

        for number in count():
            mine, its = in_turn(number, ours, theirs)
            yield Round({"rate": (rate(mine), rate(its)), "memory": (slope(mine) / 1e3, slope(its) / 1e3)},
                        {"trials": f"{trials} against {fewer}", "driver at the end, MB": mine[-1][2] / 1e6})


def watched(here: Place, arguments: Sequence[object], trials: int, done: Callable[[], int]) -> list[Point]:
    """Run a driver to its end and look at it every half second. Raises RuntimeError where trials are missing."""
    points: list[Point] = []
    with ended(here.start(*arguments)) as process:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            with suppress(OSError, StopIteration):       # it has ended meanwhile
                points.append((time.perf_counter(), done(), private_bytes(process.pid)))
        here.wait(process)
    if done() != trials:
        raise RuntimeError(f"{done()} of {trials} trials ended:\n{here.said()[-3000:]}")
    return points


def completed(events: Path) -> int:
    """How many trials a sweep's events tell the end of."""
    if not events.is_file():
        return 0
    return sum(json.loads(line)["event"] == "completed" for line in events.read_text().split("\n")[:-1])


def lines(log: Path) -> int:
    return log.read_text().count("\n") if log.is_file() else 0


def rate(points: Sequence[Point]) -> float:
    """Trials a second after the first tenth, until no more ended."""
    (began, before, _), *_, (ended_at, after, _) = _middle(points)
    return (after - before) / (ended_at - began)


def slope(points: Sequence[Point]) -> float:
    """Bytes a trial after the first tenth, until no more ended: least squares."""
    found = _middle(points)
    trials, memory = [point[1] for point in found], [point[2] for point in found]
    mean_t, mean_m = sum(trials) / len(found), sum(memory) / len(found)
    covariance = sum((t - mean_t) * (m - mean_m) for t, m in zip(trials, memory, strict=True))
    return covariance / sum((t - mean_t) ** 2 for t in trials)


def _middle(points: Sequence[Point]) -> list[Point]:
    last = points[-1][1]
    end = next(time for time, trials, _ in points if trials == last)
    return [point for point in points if point[1] >= max(1, last / 10) and point[0] <= end]
