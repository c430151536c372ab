"""The course of one sweep: which trial runs next, which is stopped, when all is done. No Ray, no torch, no clock.

What the store holds already is taken over before anything runs, as are the stops that earlier runs of the sweep wrote
down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from autoenc.config import Config
from autoenc.course import collapse, divergence, own_end
from autoenc.files import content_hash
from autoenc.sweep.asha import Rungs, Stop, excess, rung_epochs, within
from autoenc.sweep.finalists import finalists, next_seeds
from autoenc.sweep.inherit import Candidate, reseeded
from autoenc.sweep.parts import Asha
from autoenc.sweep.past import Past
from autoenc.sweep.points import Points
from autoenc.sweep.spec import Spec
from autoenc.sweep.standing import Run, Standing, Trial
from autoenc.table import Row
from autoenc.trajectory import Trajectory


class Race(Standing):
    """``key_of(config)`` gives a trajectory's key, ``open_trajectory(key)`` its folder, ``emit(**event)`` writes an
    event down; ``past`` are the events of earlier runs of this sweep; ``first_points``, each with where it is from, are
    settings whose points in the space are tried before any is drawn."""

    def __init__(self, spec: Spec, start: Mapping[str, Any], arms: Sequence[Candidate], *,
                 key_of: Callable[[Config], str], open_trajectory: Callable[[str], Trajectory],
                 emit: Callable[..., None] = lambda **event: None, past: Iterable[Mapping[str, Any]] = (),
                 retry: bool = True, first_points: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
        self.spec = spec
        self.start = start
        self.open_trajectory = open_trajectory
        self.emit = emit
        self.trials: list[Trial] = []
        self.runs: dict[str, Run] = {}
        self.retry = retry               # whether trajectories that failed before are tried again
        self._trajectory_key = key_of
        self._seeds = 1                  # that all who are still in the race have been given
        self._past = Past(past)
        asha = spec.asha
        self.margin = max(spec.decision.share, asha.margin if asha else 0.0)
        epochs = max((arm.config.train.epochs for arm in arms), default=start["train.epochs"])
        self.rungs = Rungs(rung_epochs(asha.grace_epochs, asha.reduction_factor, epochs) if asha else [],
                           asha.reduction_factor if asha else 2, self.margin, spec.objective.direction)
        for candidate in arms:
            self._enter(candidate)
        self.points = Points(self, start, self._past, first_points, key_of=self.key_of, emit=self.emit)
        for point in self.points.drawn_before():
            self._enter(point)
        self._take_over()

    # What runs next ------------------------------------------------------------------------------------------------

    def next(self) -> Run | None:
        """The next run that a worker should take; None while there is none, for now or (``done``) for good."""
        while True:
            run = next((run for run in self.runs.values() if run.state == "waiting"), None)
            if run is None and (point := self.points.next()) is not None:
                self._settle(self._enter(point))
                continue
            if run is None and self._repeat():
                continue
            if run is not None:
                run.state = "running"
                self._say("started", run, epoch=len(run.rows))
            return run

    @property
    def done(self) -> bool:
        """Whether nothing runs, waits, or could still be asked for."""
        return self._all_ended and self._seeds >= self.spec.decision.repeats and not self.points.wanted

    @property
    def idle(self) -> bool:
        """Whether the store already holds all that is asked for, so that no worker is needed."""
        due = self.retry and self.points.wanted
        while not due and self._all_ended and self._repeat():
            pass
        return not due and self._all_ended

    @property
    def _all_ended(self) -> bool:
        return all(run.ended for run in self.runs.values())

    def _repeat(self) -> bool:
        """Give the finalists further seeds, one after another. False when no more are due, for now."""
        base, repeats = self.start["train.seed"], self.spec.decision.repeats
        while self._seeds < repeats:
            if not all(trial.run.ended for trial in self.trials if trial.seed < base + self._seeds):
                return False
            had = {(trial.candidate.name, trial.seed - base) for trial in self.trials}
            records = [record for record in self.records() if record.seed < base + self._seeds]
            due = next_seeds(records, had, self._seeds, self._order, self.spec.objective, self.spec.decision,
                             self.reach)
            if due is None:
                self._seeds = repeats
                return False
            self._seeds += not any(k < self._seeds for _, k in due)
            for name, k in due:
                first = next(trial.candidate for trial in self.trials if trial.candidate.name == name)
                run = self._enter(first, seed=base + k)
                if not run.ended:
                    self._settle(run)
            if not self._all_ended:
                return True
        return False

    @property
    def stored_repeats(self) -> int:
        """Epochs of further seeds that the store holds already, of candidates known so far."""
        rule, base = self.spec.decision, self.start["train.seed"]
        firsts = {trial.run.id: trial.candidate.config for trial in self.trials if trial.seed == base}
        configs = [reseeded(config, k, rule.repeats_vary) for config in firsts.values() for k in range(1, rule.repeats)]
        return sum(min(len(self.open_trajectory(self._trajectory_key(config)).rows()), config.train.epochs)
                   for config in configs)

    @property
    def _order(self) -> list[str]:
        return list(dict.fromkeys(trial.candidate.name for trial in self.trials))

    @property
    def reach(self) -> float:
        """How far behind on its first seed a candidate may be to be a finalist: a rule without tolerance, and a sweep
        without early stopping, still reckon with noise."""
        return max(self.margin, Asha().margin if self.spec.asha is None else 0.0)

    def finalists(self) -> list[str]:
        """The candidates that could still win, as their trials stand."""
        return finalists(self.records(), self._order, self.spec.objective, self.spec.decision, self.reach)

    # What comes back -----------------------------------------------------------------------------------------------

    def report(self, run: Run, row: Row) -> Stop | None:
        """A worker finished an epoch; the reason where the run should stop there."""
        before = min(len(run.rows), int(row["epoch"]) - 1)
        if int(row["epoch"]) != len(run.rows) + 1:            # a worker died between the store and its report
            run.rows = run.trajectory.rows()[:int(row["epoch"]) - 1]
        run.rows.append(row)
        run.trained += 1
        for epoch in range(before + 1, len(run.rows) + 1):
            stop = self._judge(run, epoch)
            if stop is not None:
                return stop
        return self._judge_again(run)

    def finish(self, run: Run, status: str, note: str = "") -> None:
        """A run ended: ``completed``, ``diverged`` or ``failed``."""
        run.read()                               # epochs that a worker stored and died before it could report
        note = note or self._note(run, status)
        self._say(status, run, epoch=len(run.rows), **({"note": note} if note else {}))
        self._end(run, status, note)

    def pause(self, run: Run) -> None:
        """A run goes no further for now; the next run of the command goes on from here."""
        run.state = "waiting"
        self._say("paused", run, epoch=len(run.rows))

    def note(self, event: str, run: Run, **more: Any) -> None:
        """Write something down that changes nothing for the race: a worker that died, a file that was broken."""
        self._say(event, run, epoch=len(run.rows), **more)

    @staticmethod
    def _note(run: Run, status: str) -> str:
        """What is to be said of how a run completed."""
        return collapse(run.rows, run.config) if status == "completed" else ""

    def _end(self, run: Run, status: str, note: str = "") -> None:
        run.state, run.note = status, note
        if status == "completed":
            self._record_rungs(run)
            if not self._fit(run):               # only now does it show that it cannot win
                self.rungs.unfit.add(run.id)
        else:
            self.rungs.forget(run.id)
        self.points.learn(run)
        self._continue_unbeaten()

    def reopen(self, run: Run, epoch: int) -> None:
        """Send a completed run to a worker once more, for the weights of an epoch that are not kept."""
        run.state, run.keep = "waiting", epoch

    def _judge(self, run: Run, epoch: int) -> Stop | None:
        """Compare a run at a rung; at its own end it is only recorded, there is nothing left to save."""
        value = self.score(run, epoch)
        if run.protected or epoch not in self.rungs.epochs or not math.isfinite(value):
            return None
        if own_end(run.rows[:epoch], run.config) is not None:
            self.rungs.record(run.id, epoch, value, fit=self._fit(run, epoch))
            return None
        stop = self.rungs.judge(run.id, epoch, value, fit=self._fit(run, epoch))
        if stop is None:
            self._say("passed", run, epoch=epoch, value=value, metric=self.spec.objective.metric)
        else:
            self._stop_now(run, stop)
        return stop

    def _judge_again(self, run: Run) -> Stop | None:
        """Compare a run that has passed its last rung with those that have come there since: whoever is the first there
        has nobody to be compared with, however far behind it is. Earlier rungs tell less, and count no more."""
        passed = [epoch for epoch in self.rungs.epochs if epoch <= len(run.rows)]
        if not passed or run.protected or run.at_end:
            return None
        epoch = passed[-1]
        stop = self.rungs.judge(run.id, epoch, self.score(run, epoch), fit=self._fit(run, epoch))
        if stop is not None:
            self._stop_now(run, stop)
        return stop

    def _stop_now(self, run: Run, stop: Stop) -> None:
        self._stop(run, stop)
        self._say("stopped", run, epoch=stop.epoch, value=stop.value, cutoff=stop.cutoff, best=stop.best,
                  beaten_by=list(stop.beaten_by), metric=self.spec.objective.metric)

    def _stop(self, run: Run, stop: Stop) -> None:
        run.state, run.stop = "stopped", stop
        run.rows = run.rows[:stop.epoch]
        behind = excess(stop.value, stop.best, self.rungs.mode)
        run.note = (f"stopped at epoch {stop.epoch}: {self.spec.objective.metric} {stop.value:.4g}, "
                    f"{behind:.1%} behind the best there ({stop.best:.4g}), margin {self.margin:.1%}")
        self.points.learn(run)

    def _continue_unbeaten(self) -> None:
        """Stops are undone whose every better trial has failed since: nothing that stands beat those."""
        for run in list(self.runs.values()):
            if run.state == "stopped" and not self._stands(run.stop):
                self._continue(run, run.stop)

    def _continue(self, run: Run, stop: Stop) -> None:
        run.state, run.stop, run.note = "waiting", None, ""
        self._say("continued", run, epoch=stop.epoch)
        self.points.know_again(run)
        run.read()
        self._settle(run)

    def _stands(self, stop: Stop) -> bool:
        """Whether a stop is still right: something that can still win was better there by more than the margin."""
        there = self.rungs.recorded.get(stop.epoch, {})
        return any(key in there and not within(excess(stop.value, there[key], self.rungs.mode), self.margin)
                   and (self.runs[key].state != "completed" or self._fit(self.runs[key])) for key in stop.beaten_by)

    # What was there before -----------------------------------------------------------------------------------------

    def key_of(self, config: Config) -> str:
        """The id of the run that serves a configuration. Those that share a trajectory and end it by the same budget
        and patience share the run."""
        ends = [config.train.epochs, config.train.patience, config.train.min_delta]
        usual = [self.start["train.epochs"], self.start["train.patience"], self.start["train.min_delta"]]
        if config.train.stop_on_collapse != self.start["train.stop_on_collapse"]:
            ends.append(config.train.stop_on_collapse)
        return self._trajectory_key(config) + ("" if ends == usual else f"+{content_hash(ends)[:6]}")

    def _enter(self, candidate: Candidate, seed: int | None = None) -> Run:
        config = candidate.config
        rule = self.spec.decision
        if seed is not None:
            config = reseeded(config, seed - config.train.seed, rule.repeats_vary)
        name = self.key_of(config)
        if name not in self.runs:
            key = self._trajectory_key(config)
            run = self.runs[name] = Run(name, key, config, self.open_trajectory(key))
            run.read()
            run.stored = len(run.rows)
        run = self.runs[name]
        if seed is not None or candidate.name in rule.named:
            run.protected = True
        self.trials.append(Trial(candidate, config.train.seed, run))
        return run

    def _take_over(self) -> None:
        """Bring all runs to where the store and the events have them. Ends and rungs come first: by them it shows
        which stops still hold."""
        stops = {key: stop for key, stop in self._past.stops(self.spec.objective.metric).items()
                 if key in self.runs and len(self.runs[key].rows) >= stop.epoch}
        for run in list(self.runs.values()):
            if run.id in stops:
                self._record_rungs(run, stops[run.id].epoch)
            else:
                self._settle(run)
        for key, stop in stops.items():
            run = self.runs[key]
            if run.protected or stop.epoch not in self.rungs.epochs or not self._stands(stop):
                self._continue(run, stop)
            else:
                self._stop(run, stop)
        self._continue_unbeaten()
        passed = self._past.passed(self.spec.objective.metric)
        for run in list(self.runs.values()):     # killed after an epoch was stored and before it was judged
            if run.state == "waiting" and run.id not in stops and (
                    (run.id, len(run.rows)) in passed or self._judge(run, len(run.rows)) is None):
                self._judge_again(run)

    def _settle(self, run: Run) -> None:
        """Bring a run to where the store has it: its rungs, its end."""
        status = run.trajectory.status()
        diverged, failed = status.get("diverged"), status.get("failed")
        if run.at_end:
            if self.missing_figures(run):
                self._record_rungs(run)
            else:
                self._end(run, "completed", self._note(run, "completed"))
        elif diverged and diverged["epoch"] <= run.config.train.epochs:
            if not self._past.told("diverged", key=run.id, epoch=len(run.rows)):
                self._say("diverged", run, epoch=len(run.rows), note=divergence(diverged))
            self._end(run, "diverged", divergence(diverged))
        elif failed and not self.retry:
            self._end(run, "failed", failed)
        else:
            self._record_rungs(run)

    def _record_rungs(self, run: Run, epochs: int | None = None) -> None:
        if not run.protected:
            for epoch in self.rungs.epochs:
                value = self.score(run, epoch) if epoch <= len(run.rows[:epochs]) else math.nan
                if math.isfinite(value):
                    self.rungs.record(run.id, epoch, value, fit=self._fit(run, epoch))

    def _say(self, event: str, run: Run, **more: Any) -> None:
        self.emit(event=event, trial=self.name_of(run), key=run.id, **more)
