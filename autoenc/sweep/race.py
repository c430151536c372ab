"""The course of one sweep: which trial runs next, which is stopped, when all is done. No Ray, no torch, no clock.

A :class:`Run` is a trajectory that this sweep needs, a :class:`Trial` a candidate with a seed that rests on one; two
candidates that come to the same training share it. What the store holds already is taken over before anything runs,
as are the stops that earlier runs of the sweep wrote down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoenc import figures
from autoenc.config import Config
from autoenc.sweep.asha import Rungs, Stop, excess, rung_epochs
from autoenc.sweep.decide import Record, finalists
from autoenc.sweep.inherit import Candidate, make_candidate
from autoenc.sweep.search import Searcher, sampled_names
from autoenc.sweep.spec import Spec
from autoenc.trajectory import Row, Trajectory, best_row, divergence, own_end

ENDED = ("completed", "stopped", "diverged", "failed")
DRAWS = 100                          # points drawn in vain (all known already) before a space counts as exhausted


@dataclass(eq=False)
class Run:
    """A trajectory, as far as this sweep needs it."""

    key: str
    config: Config
    trajectory: Trajectory
    rows: list[Row] = field(default_factory=list)
    state: str = "waiting"           # waiting, running, or one of ENDED
    trained: int = 0                 # epochs that this run of the command trained
    stored: int = 0                  # epochs that were there before
    protected: bool = False          # never stopped, never a measure: the baseline, a person's pick, repeats
    stop: Stop | None = None
    note: str = ""
    keep: int | None = None          # an epoch whose weights are needed, and must be trained once more if not kept

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def end(self) -> int:
        """The epoch at which it ended or will end at the latest."""
        return len(self.rows) if self.ended else self.config.train.epochs


@dataclass(frozen=True, eq=False)
class Trial:
    candidate: Candidate
    seed: int
    run: Run

    @property
    def name(self) -> str:
        return f"{self.candidate.name}_seed{self.seed}"


class Race:
    """``key_of(config)`` gives a trajectory's key, ``open_trajectory(key)`` its folder, ``emit(**event)`` writes an
    event down; ``past`` are the events of earlier runs of this sweep."""

    def __init__(self, spec: Spec, start: Mapping[str, Any], arms: Sequence[Candidate], *,
                 key_of: Callable[[Config], str], open_trajectory: Callable[[str], Trajectory],
                 emit: Callable[..., None] = lambda **event: None, past: Iterable[Mapping[str, Any]] = (),
                 retry: bool = True) -> None:
        self.spec = spec
        self.start = start
        self.key_of = key_of
        self.open_trajectory = open_trajectory
        self.emit = emit
        self.trials: list[Trial] = []
        self.runs: dict[str, Run] = {}
        self.retry = retry               # whether trajectories that failed before are tried again
        self.exhausted = False
        self._repeated = spec.decision.repeats == 1
        self._past = list(past)
        asha = spec.asha
        self.margin = max(spec.decision.within or 0.0, asha.margin if asha else 0.0)
        epochs = max((arm.config.train.epochs for arm in arms), default=start["train.epochs"])
        self.rungs = Rungs(rung_epochs(asha.grace_epochs, asha.reduction_factor, epochs) if asha else [],
                           asha.reduction_factor if asha else 2, self.margin, spec.objective.direction)
        suggested = self._suggested_before()
        self.searcher = (Searcher(spec, start, len(suggested))
                         if spec.trials > len(arms) and spec.space else None)
        self._names = sampled_names([arm.name for arm in arms])
        for candidate in arms:
            self._enter(candidate)
        for settings in suggested:
            self._enter(make_candidate(spec, start, next(self._names), settings))
        self._honour_stops()
        for run in self.runs.values():
            self._settle_stored(run)

    # What runs next ------------------------------------------------------------------------------------------------

    def next(self) -> Run | None:
        """The next run that a worker should take; None while there is none, for now or (``done``) for good."""
        while True:
            run = next((run for run in self.runs.values() if run.state == "waiting"), None)
            if run is None and self._draw():
                continue
            if run is None and self._repeat():
                continue
            if run is not None:
                run.state = "running"
                self.emit(event="started", trial=self.name_of(run), key=run.key, epoch=len(run.rows))
            return run

    @property
    def done(self) -> bool:
        """Whether nothing runs, waits, or could still be asked for."""
        return (all(run.ended for run in self.runs.values()) and self._repeated
                and (self.searcher is None or self.exhausted or self._sampled_all))

    @property
    def idle(self) -> bool:
        """Whether the store already holds all that is asked for, so that no worker is needed."""
        due = self.retry and self.searcher is not None and not self._sampled_all
        while not due and all(run.ended for run in self.runs.values()) and self._repeat():
            pass
        return not due and all(run.ended for run in self.runs.values())

    @property
    def _sampled_all(self) -> bool:
        return len({trial.candidate.name for trial in self.trials}) >= self.spec.trials

    def _draw(self) -> bool:
        """Enter one sampled point; False when no more are due."""
        if self.searcher is None or self.exhausted or self._sampled_all:
            return False
        for _ in range(DRAWS):
            drawn = self.searcher.draw()
            if drawn is None:
                break
            point, optuna_trial = drawn
            candidate = make_candidate(self.spec, self.start, next(self._names), point)
            twin = self.runs.get(self.key_of(candidate.config))
            if twin is not None:                 # known already: its result is learnt from, not trained again
                known = next(trial.candidate for trial in self.trials if trial.run is twin)
                self.searcher.assign(known, optuna_trial)
                if twin.ended:
                    self._tell(known, twin)
                self._names = sampled_names([trial.candidate.name for trial in self.trials])
                continue
            self.searcher.assign(candidate, optuna_trial)
            self.emit(event="suggested", name=candidate.name, settings=point)
            self._enter(candidate, known=False)
            self._settle_stored(self.trials[-1].run)
            return True
        self.exhausted = True
        self.emit(event="space exhausted", candidates=len(self.runs))
        return False

    def _repeat(self) -> bool:
        """Give the finalists their further seeds, once all first seeds have ended."""
        if self._repeated or not all(run.ended for run in self.runs.values()):
            return False
        self._repeated = True
        first = {trial.candidate.name: trial.candidate for trial in self.trials}
        names = finalists(self.records(), list(first), self.spec.objective, self.spec.decision, self.margin)
        if len(names) < 2 and not self.spec.decision.baseline:
            return False                         # nothing to tell apart
        base = self.start["train.seed"]
        for k in range(1, self.spec.decision.repeats):
            for name in names:
                self._enter(first[name], seed=base + k, known=False)
                self._settle_stored(self.trials[-1].run)
        return True

    # What comes back -----------------------------------------------------------------------------------------------

    def report(self, run: Run, row: Row) -> Stop | None:
        """A worker finished an epoch; the reason where the run should stop there."""
        if int(row["epoch"]) != len(run.rows) + 1:            # a worker died between the store and its report
            run.rows = run.trajectory.rows()[:int(row["epoch"]) - 1]
        run.rows.append(row)
        run.trained += 1
        return self._judge(run)

    def finish(self, run: Run, status: str, note: str = "") -> None:
        """A run ended: ``completed``, ``diverged`` or ``failed``."""
        run.state, run.note = status, note
        self.emit(event=status, trial=self.name_of(run), key=run.key, epoch=len(run.rows), **({"note": note} if note else {}))
        if status in ("diverged", "failed"):
            self.rungs.forget(run.key)
            self._continue_unbeaten()
        self._learn(run)

    def reopen(self, run: Run, epoch: int) -> None:
        """Send a completed run to a worker once more, for the weights of an epoch that are not kept."""
        run.state, run.keep = "waiting", epoch

    def _judge(self, run: Run) -> Stop | None:
        value = self.score(run)
        if run.protected or not math.isfinite(value) or own_end(run.rows, run.config) is not None:
            return None
        stop = self.rungs.judge(run.key, len(run.rows), value, fit=self._fit(run))
        if stop is not None:
            self._stop(run, stop)
            self.emit(event="stopped", trial=self.name_of(run), key=run.key, epoch=stop.epoch, value=stop.value,
                      cutoff=stop.cutoff, best=stop.best, beaten_by=list(stop.beaten_by),
                      metric=self.spec.objective.metric)
            self._learn(run)
        return stop

    def _stop(self, run: Run, stop: Stop) -> None:
        run.state, run.stop = "stopped", stop
        run.rows = run.rows[:stop.epoch]
        behind = excess(stop.value, stop.best, self.rungs.mode)
        run.note = (f"stopped at epoch {stop.epoch}: {self.spec.objective.metric} {stop.value:.4g}, {behind:.1%} behind "
                    f"the best there ({stop.best:.4g}), margin {self.margin:.1%}")

    def _continue_unbeaten(self) -> None:
        """Stops are undone whose every better trial has failed since: nothing that stands beat those."""
        for run in self.runs.values():
            if run.stop is not None and run.state == "stopped" and not self._stands(run.stop):
                run.state, run.stop, run.note = "waiting", None, ""
                self.emit(event="continued", trial=self.name_of(run), key=run.key, epoch=len(run.rows))

    def _stands(self, stop: Stop) -> bool:
        return any(key in self.runs and self.runs[key].state not in ("diverged", "failed") for key in stop.beaten_by)

    # What was there before -----------------------------------------------------------------------------------------

    def _enter(self, candidate: Candidate, seed: int | None = None, known: bool = True) -> None:
        config = candidate.config
        if seed is not None:
            config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        key = self.key_of(config)
        rule = self.spec.decision
        if key not in self.runs:
            trajectory = self.open_trajectory(key)
            rows = trajectory.rows()
            rows = rows[:own_end(rows, config) or len(rows)]
            self.runs[key] = Run(key, config, trajectory, rows=rows, stored=len(rows))
        run = self.runs[key]
        if seed is not None or candidate.name in (rule.pick, rule.baseline.arm if rule.baseline else None):
            run.protected = True
        self.trials.append(Trial(candidate, config.train.seed, run))
        if known and self.searcher is not None:
            self.searcher.know(candidate)

    def _honour_stops(self) -> None:
        """Stops that earlier runs wrote down and that this sweep would still make."""
        if self.spec.asha is None:
            return
        for event in self._past:
            run = self.runs.get(event.get("key", ""))
            if run is None or run.protected:
                continue
            if event.get("event") == "continued":
                run.stop = None
            elif event.get("event") == "stopped" and event.get("metric") == self.spec.objective.metric:
                stop = Stop(event["epoch"], event["value"], event["cutoff"], event["best"], tuple(event["beaten_by"]))
                still = excess(stop.value, stop.best, self.rungs.mode) > self.margin and stop.epoch in self.rungs.epochs
                run.stop = stop if still and len(run.rows) >= stop.epoch else None

    def _settle_stored(self, run: Run) -> None:
        """Bring a run to where the store has it: its rungs, its end, a stop that was written down."""
        if run.stop is not None and self._stands(run.stop) and run.state == "waiting":
            self._record_rungs(run, run.stop.epoch)
            self._stop(run, run.stop)
            self._learn(run)
            return
        run.stop = None
        status = run.trajectory.status()
        diverged = status.get("diverged")
        if diverged and diverged["epoch"] <= run.config.train.epochs and own_end(run.rows, run.config) is None:
            self.finish(run, "diverged", divergence(diverged))
            return
        if status.get("failed") and not self.retry and own_end(run.rows, run.config) is None:
            self.finish(run, "failed", status["failed"])
            return
        self._record_rungs(run, len(run.rows))
        if own_end(run.rows, run.config) is not None and not self.missing_figures(run):
            run.state = "completed"
            self._learn(run)
        elif run.rows and run.state == "waiting":
            self._judge(run)                     # killed after the epoch was stored and before it was judged

    def _record_rungs(self, run: Run, epochs: int) -> None:
        if not run.protected:
            for epoch in self.rungs.epochs:
                value = self.score(run, epoch) if epoch <= epochs else math.nan
                if math.isfinite(value):
                    self.rungs.record(run.key, epoch, value, fit=self._fit(run, epoch))

    def _suggested_before(self) -> list[dict[str, Any]]:
        """The settings of points that earlier runs drew from the same space, as many as this sweep still wants."""
        room = max(0, self.spec.trials - len(self.spec.arms))
        drawn = [event["settings"] for event in self._past
                 if event.get("event") == "suggested" and isinstance(event.get("settings"), dict)]
        return [point for point in drawn if self._in_space(point)][:room]

    def _in_space(self, point: Mapping[str, Any]) -> bool:
        return all(key in self.spec.space and self.spec.space[key].drawn(key, value) is not None
                   for key, value in point.items())

    # What is known -------------------------------------------------------------------------------------------------

    def score(self, run: Run, epoch: int | None = None) -> float:
        """The objective at the best epoch so far, which is what the decision would read if the run ended here."""
        return self.figures_of(run, epoch).get(self.spec.objective.metric, math.nan)

    def figures_of(self, run: Run, epoch: int | None = None) -> Row:
        """All figures at the best epoch (among the first ``epoch`` ones)."""
        row = best_row(run.rows[:epoch], run.config)
        if row is None:
            return {}
        return {**row, **run.trajectory.figures(int(row["epoch"]))} if epoch is None else row

    def missing_figures(self, run: Run) -> list[str]:
        """Figures that the rule reads and that are computed after training, where they have not been yet."""
        rule = self.spec.decision
        asked = {self.spec.objective.metric, *(item.metric for item in (*rule.prefer, *rule.require))}
        row = best_row(run.rows, run.config)
        have = run.trajectory.figures(int(row["epoch"])) if row else {}
        return sorted(asked & set(figures.AFTER_TRAINING) - set(have))

    def needs_measuring(self) -> bool:
        """Whether the rule reads figures that are computed after training."""
        rule = self.spec.decision
        asked = {self.spec.objective.metric, *(item.metric for item in (*rule.prefer, *rule.require))}
        return bool(asked & set(figures.AFTER_TRAINING))

    def records(self) -> list[Record]:
        """What the decision reads: every trial as it ended."""
        return [self._record(trial) for trial in self.trials if trial.run.ended]

    def name_of(self, run: Run) -> str:
        return next(trial.name for trial in self.trials if trial.run is run)

    def _record(self, trial: Trial) -> Record:
        run = trial.run
        found = self.figures_of(run)
        return Record(
            arm=trial.candidate.name, trial=trial.name, seed=trial.seed, status=run.state, epochs=len(run.rows),
            best_epoch=int(found.get("epoch", 0)), note=run.note, settings=trial.candidate.settings,
            figures={key: value for key, value in found.items() if key not in ("epoch", "seconds")},
            improving=self._improving(run))

    def _improving(self, run: Run) -> float:
        """By how much the objective improved over the last three epochs, as a share."""
        if run.state != "completed" or len(run.rows) < 4:
            return 0.0
        before, now = self.score(run, len(run.rows) - 3), self.score(run, len(run.rows))
        return excess(before, now, self.rungs.mode) if math.isfinite(before) and math.isfinite(now) else 0.0

    def _fit(self, run: Run, epoch: int | None = None) -> bool:
        found = self.figures_of(run, epoch)
        return all((r.min is None or found.get(r.metric, -math.inf) >= r.min)
                   and (r.max is None or found.get(r.metric, math.inf) <= r.max) for r in self.spec.decision.require)

    def _learn(self, run: Run) -> None:
        for trial in self.trials:
            if trial.run is run:
                self._tell(trial.candidate, run)

    def _tell(self, candidate: Candidate, run: Run) -> None:
        if self.searcher is not None:
            values = [self.score(run, epoch) for epoch in range(1, len(run.rows) + 1)]
            if values and self.spec.objective.metric in figures.AFTER_TRAINING:
                values[-1] = self.score(run)
            self.searcher.tell(candidate, run.state, values)
