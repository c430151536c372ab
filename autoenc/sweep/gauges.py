"""A sweep while it runs, as gauges for Prometheus: what each is called and means, and what a race makes them.

They go by Ray's metrics: the driver reports to the agent of its node, whose /metrics Prometheus reads. Ray reports only
what was set since its last report, and the agent forgets a value that two reports leave out. So whatever still holds is
set again every second, and what holds no longer, such as the epoch of a trial that has ended, drops out by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from autoenc.sweep.race import Race
from autoenc.sweep.standing import ENDED, Run

# Gauge -> its labels, and its meaning. Prometheus knows each with the prefix ray_.
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "autoenc_best_objective": (
        ("sweep", "metric"), "best objective that any trial has reached so far; diverged and failed ones do not count"),
    "autoenc_trial_objective": (
        ("sweep", "metric", "trial"), "objective of a running trial, at its best epoch so far"),
    "autoenc_trial_epoch": (
        ("sweep", "trial"), "epochs that a running trial has behind it"),
    "autoenc_images_per_second": (
        ("sweep", "trial"), "training images of a running trial's last epoch over its seconds, validation included"),
    "autoenc_trials": (
        ("sweep", "state"), "trials that are waiting, running, completed, stopped, diverged or failed"),
    "autoenc_slots": (("sweep",), "trainings that can run at the same time"),
    "autoenc_slots_busy": (("sweep",), "trainings that run"),
    "autoenc_epochs_trained": (("sweep",), "epochs that this run of the command has trained"),
    "autoenc_epochs_saved": (
        ("sweep", "by"), "epochs that were not trained: by asha, what stopped trials had left; by store, what it held"),
}
STATES = ("waiting", "running", *ENDED)
UNFIT = ("diverged", "failed")              # can never win
REFRESH_SECONDS = 1.0                       # the shortest interval between Ray's reports; 10 s is usual

Reading = tuple[str, dict[str, str], float]


class Gauge(Protocol):
    """What is used of ``ray.util.metrics.Gauge``."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


class Gauges:
    """Reports a race's gauges; nothing of it can fail a sweep."""

    def __init__(self, race: Race, slots: int, make: Callable[[str, str, tuple[str, ...]], Gauge], *,
                 images: int | None = None, say: Callable[[str], None] = lambda text: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """``make(name, description, labels)`` makes a gauge, ``images`` is the size of the training split (None: not
        known, and images a second are not told), ``say`` is told, once, what kept the gauges from being reported."""
        self.race, self.slots, self.images = race, slots, images
        self._make, self._say, self._clock = make, say, clock
        self._gauges: dict[str, Gauge] = {}
        self._scores: dict[str, tuple[tuple[str, int], float]] = {}
        self._due = -math.inf
        self._broken = False

    def refresh(self) -> None:
        """Report, if a second has gone by since it was done; to be called at least so often."""
        if self._clock() >= self._due:
            self.report()

    def report(self) -> None:
        """Set every gauge to what the race has reached."""
        if self._broken:
            return
        try:
            for name, labels, value in self.readings():
                if name not in self._gauges:
                    self._gauges[name] = self._make(name, GAUGES[name][1], GAUGES[name][0])
                self._gauges[name].set(value, labels)
        except Exception as error:
            self._broken = True
            self._say(f"the gauges for Prometheus are reported no more: {type(error).__name__}: {error}")
        self._due = self._clock() + REFRESH_SECONDS

    def readings(self) -> Iterator[Reading]:
        """Every gauge that holds at the moment, as (name, labels, value); values are finite."""
        race, runs = self.race, list(self.race.runs.values())
        sweep, metric = {"sweep": race.spec.name}, {"metric": race.spec.objective.metric}
        scores = [score for run in runs if run.state not in UNFIT and math.isfinite(score := self._score(run))]
        if scores:
            best = min(scores) if race.spec.objective.direction == "min" else max(scores)
            yield "autoenc_best_objective", sweep | metric, best
        running = [run for run in runs if run.state == "running"]
        for run in running:
            trial = {"trial": race.name_of(run)}
            yield "autoenc_trial_epoch", sweep | trial, float(len(run.rows))
            if math.isfinite(score := self._score(run)):
                yield "autoenc_trial_objective", sweep | metric | trial, score
            if self.images and run.trained and run.rows and run.rows[-1]["seconds"] > 0:
                yield "autoenc_images_per_second", sweep | trial, self.images / run.rows[-1]["seconds"]
        states = [trial.run.state for trial in race.trials]
        for state in STATES:
            yield "autoenc_trials", sweep | {"state": state}, float(states.count(state))
        yield "autoenc_slots", sweep, float(self.slots)
        yield "autoenc_slots_busy", sweep, float(len(running))
        yield "autoenc_epochs_trained", sweep, float(sum(run.trained for run in runs))
        yield "autoenc_epochs_saved", sweep | {"by": "asha"}, float(
            sum(run.spared for run in runs if run.state == "stopped"))
        yield "autoenc_epochs_saved", sweep | {"by": "store"}, float(
            sum(min(run.stored, len(run.rows)) for run in runs))

    def _score(self, run: Run) -> float:
        """The objective; computed anew only when the run has moved on, for some figures are read from disk."""
        at = (run.state, len(run.rows))
        if self._scores.get(run.id, (None,))[0] != at:
            self._scores[run.id] = (at, self.race.score(run))
        return self._scores[run.id][1]

