"""How busy slots are: seconds of training over slots times wall time, in the middle of a sweep.

The window is from when every slot has reported an epoch until the last trial begins its first one: the beginning, when
workers start, and the end, when slots run out of trials, are left out. An epoch's seconds are those of its training and
validation alone, so checkpoints, tables, Ray's messages and the change from trial to trial all count as idle.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import training
from commands import SLOTS, rows_of, searched, split_sizes
from measure import Options, Round, in_turn
from pictures import of_manifest, write_pictures
from place import HERE, RUNNER, Place, ended, place

EPOCHS = 10                      # of a trial, as in the phases


@dataclass(frozen=True)
class Epoch:
    """When a trial was training; seconds on any one clock."""

    trial: str
    began: float
    ended: float
    worker: str = ""             # where it is known; else the first trials count as those of different slots

    @property
    def slot(self) -> str:
        return self.worker or self.trial


def busy(epochs: Sequence[Epoch], slots: int) -> tuple[float, float]:
    """Seconds of training in the window, and slots times its length. Raises RuntimeError where there is no window: more
    trials than slots are needed."""
    begun: dict[str, float] = {}
    reported: dict[str, float] = {}
    for epoch in epochs:
        begun[epoch.trial] = min(begun.get(epoch.trial, math.inf), epoch.began)
        reported[epoch.slot] = min(reported.get(epoch.slot, math.inf), epoch.ended)
    start, end = sorted(reported.values())[slots - 1] if len(reported) >= slots else math.inf, max(begun.values())
    if end <= start:
        raise RuntimeError(f"{len(begun)} trials on {slots} slots leave no time in which all of them have work")
    trained = sum(max(0.0, min(epoch.ended, end) - max(epoch.began, start)) for epoch in epochs)
    return trained, slots * (end - start)


def shortest(epochs: Sequence[Epoch]) -> float:
    """Seconds of training of the shortest trial."""
    seconds: dict[str, float] = {}
    for epoch in epochs:
        seconds[epoch.trial] = seconds.get(epoch.trial, 0.0) + epoch.ended - epoch.began
    return min(seconds.values())


def slots_busy(options: Options) -> Iterator[Round]:
    """Slots busy in a real sweep of the command: 8 trials of 10 epochs and at least 20 s on two slots, the phases'
    model at 64 px; and in the same sweep as a plain Ray Tune script, for comparison.

    How many images make an epoch of 2.5 s is measured at the beginning, with one thread on an otherwise idle machine.
    When an epoch of ours ended is the time of the table's last write: that is after the epoch's checkpoint, so an epoch
    seems to begin later than it did, which only matters at the two ends of the window.
    """
    trials, epochs = (4, 2) if options.quick else (4 * SLOTS, EPOCHS)
    with place() as here:
        images = 40 if options.quick else math.ceil(2.5 * pace() / 0.8)
        manifest = write_pictures(here.folder / "files", images, 64)
        settings = of_manifest(manifest, 64, **{"train.epochs": epochs})
        sweep = here.sweep("busy", settings, searched(trials, epochs))
        train, val = split_sizes(here, settings)
        peer = [manifest, "--trials", trials, "--epochs", epochs, "--size", 64, "--train", train, "--val", val]
        for number in count():
            ours, theirs = in_turn(number, lambda: product(here, sweep), lambda: plain_tune(here, *peer))
            notes = {"seconds of the shortest trial": shortest(ours), "images": images}
            yield Round({"slots": busy(ours, SLOTS), "tune": busy(theirs, SLOTS)}, notes)


def pace() -> float:
    """Images a second that one thread trains, base.yaml's model at 64 px."""
    with tempfile.TemporaryDirectory() as folder, training.threads(1):
        config, dataset = training.phases_data(Path(folder), 64, 80)
        epoch = training.product(config, dataset, "cpu")
        epoch()
        return len(dataset.splits["train"]) / min(epoch(), epoch())


def product(here: Place, sweep: Path) -> list[Epoch]:
    """Run a sweep and watch its tables; when it trained."""
    output, seen, epochs = here.new("ours"), {}, []
    with ended(here.start(RUNNER, sweep, "--output", output, "--slots", SLOTS)) as process:
        while process.poll() is None:
            epochs += new_epochs(output / "store", seen)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        here.wait(process)
    return epochs


def new_epochs(store: Path, seen: dict[str, int]) -> Iterator[Epoch]:
    """The epochs that came to the tables since the last look; ``seen``: how many had."""
    for table in store.glob("*/metrics.csv"):
        rows, when = rows_of(table), table.stat().st_mtime
        for row in rows[seen.get(table.parent.name, 0):]:
            yield Epoch(table.parent.name, when - float(row[1]), when)
        seen[table.parent.name] = len(rows)


def plain_tune(here: Place, *arguments: object) -> list[Epoch]:
    """Run the plain script; when it trained, by its log."""
    output = here.new("peer")
    here.run(HERE / "peers" / "plain_tune.py", *arguments, "--output", output)
    lines = (line.split() for line in (output / "epochs.txt").read_text().splitlines())
    return [Epoch(trial, float(began), float(end)) for trial, began, end in lines]


def many_slots(options: Options) -> Iterator[Round]:
    """Slots busy with 64 slots on four nodes of a ``ray.cluster_utils.Cluster`` on this machine: 256 trials, each of 10
    epochs that sleep 1.6 to 2.4 s (16 to 24 s a trial) and write their row to the store.

    The product's own driver runs them: race, scheduler, searcher, callbacks, table and events. Only what a worker does
    in an epoch is put in its place: it sleeps, and imports no torch, so that 64 of them fit one machine. What is
    measured is whether one driver keeps up with 32 results a second. To start 64 workers takes two cores longer than a
    trial: the window begins when the last of them has reported.
    """
    nodes, slots, trials, epochs, seconds = (2, 2, 8, 2, 0.5) if options.quick else (4, 16, 256, 10, 2.0)
    with place() as here:
        for _ in count():
            output = here.new("ours")
            here.run(HERE / "children" / "sleeping.py", json.dumps({
                "output": str(output), "nodes": nodes, "slots": slots, "trials": trials, "epochs": epochs,
                "seconds": seconds}))
            lines = [line.split() for path in (output / "slept").iterdir() for line in path.read_text().splitlines()]
            found = [Epoch(trial, float(began), float(end), worker) for trial, worker, began, end in lines]
            if len(found) != trials * epochs:
                raise RuntimeError(f"{len(found)} epochs were slept, {trials * epochs} should have been")
            yield Round({"many slots": busy(found, nodes * slots)})
