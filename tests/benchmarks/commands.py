"""Whole sweeps by the command, against the same sweep as a plain script."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from measure import Options, Round, in_turn
from pictures import of_manifest, write_pictures
from place import HERE, RUNNER, Place, ended, place, until

SLOTS = 2                        # trials at once, on either side, whatever the machine has
SPACE = {"model.latent_channels": {"type": "int", "low": 4, "high": 16},
         "train.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def sweep_time(options: Options) -> Iterator[Round]:
    """Seconds from the command to its end: 16 trials of 3 epochs at 32 px, on 96 images, the sizes of --preset quick.

    Ours: ``tune_runner.py`` on a sweep that searches latent channels and learning rate by TPE. It decodes the files
    (its cache is empty), trains, validates with every figure, keeps checkpoints, decides, exports, writes the report.
    Beside it: plain Ray Tune, and plain Optuna in two processes, which train on the same files, with the same model,
    batch size, numbers of images and epochs, and one thread a trial, validate by MSE and save a checkpoint an epoch.
    All are new processes that import everything and start (and end) Ray where they use it; all run two trials at a
    time. What is searched hardly changes what a trial costs, and early stopping is at hand but stops nobody in 3 epochs
    (a grace period of 3), so all train the same 48 epochs: what is saved by stopping is another benchmark's.
    """
    images, trials, epochs = (24, 3, 1) if options.quick else (96, 16, 3)
    with place() as here:
        manifest = write_pictures(here.folder / "files", images, 64)
        settings = of_manifest(manifest, 32, **{"train.epochs": epochs})
        sweep = here.sweep("timed", settings, searched(trials, epochs))
        train, val = split_sizes(here, settings)
        peer = [manifest, "--trials", trials, "--epochs", epochs, "--size", 32, "--train", train, "--val", val]
        for number in count():
            ours, tune, optuna = in_turn(
                number, lambda: command(here, sweep, trials * epochs),
                lambda: script(here, "plain_tune", *peer, epochs=trials * epochs),
                lambda: script(here, "plain_optuna", *peer, epochs=trials * epochs))
            yield Round({"tune": (ours, tune), "optuna": (ours, optuna)}, {"epochs on each side": trials * epochs})


def searched(trials: int, epochs: int, **more: Any) -> dict[str, Any]:
    """A sweep that searches, and stops nobody early."""
    return {"space": SPACE, "search": {"algorithm": "tpe", "trials": trials},
            "asha": {"grace_epochs": epochs, "reduction_factor": 3}, **more}


def command(here: Place, sweep: Path, epochs: int, slots: int = SLOTS) -> float:
    """Run a sweep from nothing; seconds. Raises RuntimeError where it has not trained so many epochs."""
    output = here.new("ours")
    here.new("cache")
    seconds = here.run(RUNNER, sweep, "--output", output, "--slots", slots)
    stored = sum(len(rows_of(path)) for path in (output / "store").glob("*/metrics.csv"))
    if stored != epochs:
        raise RuntimeError(f"{stored} epochs were trained, {epochs} were to be compared:\n{here.said()[-3000:]}")
    return seconds


def script(here: Place, name: str, *arguments: object, epochs: int) -> float:
    """Run one of the plain scripts from nothing; seconds. Raises RuntimeError where it has trained other epochs."""
    output = here.new("peer")
    seconds = here.run(HERE / "peers" / f"{name}.py", *arguments, "--output", output)
    trained = len((output / "epochs.txt").read_text().splitlines())
    if trained != epochs:
        raise RuntimeError(f"{name}: {trained} epochs were trained, {epochs} were to be compared")
    return seconds


def rows_of(table: Path) -> list[list[str]]:
    """The complete lines of a trajectory's table below its header, by cell: the epoch, its seconds, …"""
    return [line.split(",") for line in table.read_text().split("\n")[1:-1]] if table.is_file() else []


def split_sizes(here: Place, settings: dict[str, Any]) -> tuple[int, int]:
    """How many images the product trains on and validates with: the plain scripts take as many."""
    from autoenc.config import make_config
    from autoenc.data import prepare

    settings = {**settings, "data.cache_dir": str(here.folder / "counted")}
    splits = prepare(make_config(settings, "the benchmark").data).splits
    return len(splits["train"]), len(splits["val"])


EMPTY = """
import torch, ray
ray.init(address="local")
ray.get(ray.remote(lambda: None).remote())
print("ready", flush=True)
"""


def start(options: Options) -> Iterator[Round]:
    """Seconds from the command to the first epoch in the store, of one trial of the smallest model on 30 generated
    images of 8 px, which trains in milliseconds. The sweep file is read, data is made, Ray started, the plan shown.

    Beside it: a process that imports torch and ray, starts Ray and waits for one empty task. Both are new processes;
    the end of neither counts. Whoever trains with Ray has to do as much.
    """
    with place() as here:
        sweep = here.sweep("started", TRIVIAL, {"arms": {"A": {"model.latent_channels": 2}}})
        empty = here.folder / "empty.py"
        empty.write_text(EMPTY)

        def ours() -> float:
            store = here.new("ours") / "store"
            here.new("cache")
            return waited(here, (RUNNER, sweep, "--output", store.parent),
                          lambda: any(rows_of(path) for path in store.glob("*/metrics.csv")))

        for number in count():
            yield Round({"start": tuple(in_turn(number, ours, lambda: waited(
                here, (empty,), lambda: "ready" in here.said())))})


def waited(here: Place, arguments: tuple, true: Callable[[], bool]) -> float:
    """Seconds from the start of a Python process until ``true()``; the process then comes to its end."""
    began = time.perf_counter()
    with ended(here.start(*arguments)) as process:
        seconds = until(process, true) - began
        here.wait(process)
    return seconds


TRIVIAL = {"data.image_size": 8, "data.limit": 30, "model.latent_channels": 1, "model.base_channels": 1,
           "model.downsampling_steps": 1, "train.epochs": 1, "train.batch_size": 32, "train.patience": None,
           "train.sample_every": 0}
