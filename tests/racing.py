"""A sweep without Ray: simulated workers put learning curves into a real store and report to a real race."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoenc.config import Config
from autoenc.course import divergence, own_end
from autoenc.sweep.decide import decide
from autoenc.sweep.inherit import arm_candidates, load_chain, starting_point
from autoenc.sweep.race import Race
from autoenc.sweep.standing import Run
from autoenc.sweep.store import Store, SweepFolder
from autoenc.table import csv_text
from autoenc.trajectory import Trajectory, trajectory_key

KNOB = "train.weight_decay"            # what the arms of these tests vary: any setting that is part of the identity
Curve = Callable[[Config], Sequence[Any]]


class Killed(Exception):
    """The driver's process is gone."""


def levels(config: Config) -> list[float]:
    """The knob is the level that the error falls to."""
    return [config.train.weight_decay * (1 + 1 / epoch) for epoch in range(1, config.train.epochs + 1)]


class Lab:
    """A sweep file, a store and its workers. ``curve(config)`` gives, per epoch, the val/mse, a row of figures, or
    ``"diverged"`` or ``"failed"``."""

    def __init__(self, folder: Path, curve: Curve = levels, **content: Any) -> None:
        (folder / "base.yaml").write_text(yaml.safe_dump(
            {"config": {"train": {"epochs": 8, "patience": None}}, "asha": {"grace_epochs": 1, "reduction_factor": 2}}))
        path = folder / "toy.yaml"
        path.write_text(yaml.safe_dump({"name": "toy", **content}, sort_keys=False))
        self.spec = load_chain(path)[-1]
        self.start = starting_point(self.spec, self.spec.base)
        self.arms = arm_candidates(self.spec, self.start)
        self.curve = curve
        self.store = Store(folder)
        self.folder = SweepFolder(folder, self.spec.name)
        self.folder.path.mkdir(exist_ok=True)
        self.kill_in: int | None = None              # so many steps (events, stored epochs) until the process dies
        self.trained: dict[str, int] = {}            # epochs put into the store, by trajectory

    def race(self, **more: Any) -> Race:
        return Race(self.spec, self.start, self.arms, key_of=key_of, open_trajectory=self.store.open,
                    past=self.folder.events(), **{"emit": self.emit, **more})

    def run(self, slots: int = 1, seed: int = 0, kill_in: int | None = None) -> Race:
        """The whole race, in a random order of what the workers do. Raises :class:`Killed` where it is."""
        self.kill_in = kill_in
        race, choose = self.race(), random.Random(seed)
        running: list[Run] = []
        while True:
            while len(running) < slots and (run := race.next()) is not None:
                running.append(run)
            if not running:
                assert race.done and race.idle
                return race
            run = choose.choice(running)
            if self.step(race, run):
                running.remove(run)

    def step(self, race: Race, run: Run) -> bool:
        """A worker's next epoch; whether it is through with the run."""
        rows = run.trajectory.rows()
        if own_end(rows, run.config) is not None:
            race.finish(run, "completed")
            return True
        what = self.curve(run.config)[len(rows)]
        if isinstance(what, str):
            about = {"epoch": len(rows) + 1, "step": 1, "what": "loss"} if what == "diverged" else "OSError: broken"
            put(run.trajectory, rows, **{what: about})
            race.finish(run, what, divergence(about) if what == "diverged" else about)
            return True
        put(run.trajectory, [*rows, row_of(len(rows) + 1, what)])
        self.trained[run.key] = self.trained.get(run.key, 0) + 1
        self.tick()
        return race.report(run, run.trajectory.rows()[-1]) is not None

    def emit(self, **event: Any) -> None:
        self.folder.emit(**event)
        self.tick()

    def tick(self) -> None:
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                raise Killed

    def store_epochs(self, arm: str, count: int, seed: int | None = None, **status: Any) -> None:
        """The first epochs of an arm, trained by some other sweep."""
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        if seed is not None:
            config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        values = self.curve(config)
        rows = [row_of(epoch, value) for epoch, value in enumerate(values[:count], start=1)]
        put(self.store.open(key_of(config)), rows, **status)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.folder.events() if event["event"] in kinds]

    def stops(self) -> list[tuple[Any, ...]]:
        return [(event["trial"], event["epoch"], event["value"], event["cutoff"], event["best"])
                for event in self.events("stopped")]


def key_of(config: Config) -> str:
    return trajectory_key(config, "the data", "cpu")


def row_of(epoch: int, what: float | dict[str, float]) -> dict[str, float]:
    return {"epoch": epoch, "seconds": 0.5, **(what if isinstance(what, dict) else {"val/mse": float(what)})}


def put(trajectory: Trajectory, rows: Sequence[dict[str, float]], **status: Any) -> None:
    """A trajectory's files as training leaves them."""
    trajectory.folder.mkdir(parents=True, exist_ok=True)
    (trajectory.folder / "metrics.csv").write_text(csv_text(rows))
    (trajectory.folder / "status.json").write_text(json.dumps({"state": "training", "epochs": len(rows), **status}))


def decision_of(race: Race) -> dict[str, Any]:
    order = list(dict.fromkeys(trial.candidate.name for trial in race.trials))
    return decide(race.records(), order, race.spec.objective, race.spec.decision)


def states(race: Race) -> dict[str, tuple[str, int]]:
    """Trial -> how it ended, with how many epochs."""
    return {trial.name: (trial.run.state, len(trial.run.rows)) for trial in race.trials}


# Sweeps that several files run ----------------------------------------------------------------------------------------

LEVELS = {"A": 0.1, "B": 0.101, "C": 0.2, "D": 0.3, "E": 0.104}


def arms(values: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {KNOB: value} for name, value in values.items()}


def wobbling(amplitude: float, seed: int) -> Curve:
    """Curves whose order changes on the way, by no more than the amplitude allows."""
    def curve(config):
        draw = random.Random(f"{seed} {config.train.weight_decay}")
        return [value * (1 + draw.uniform(-amplitude, amplitude)) for value in levels(config)]
    return curve


def failing(bad: dict[float, tuple[int, str]], curve=levels):
    """Curves some of which end in a failure after so many epochs."""
    def made(config):
        epoch, what = bad.get(config.train.weight_decay, (99, ""))
        return [*curve(config)[:epoch], what] if epoch < 8 else curve(config)
    return made
