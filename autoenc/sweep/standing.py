"""What is known of a sweep's trials at any moment. Reading only; what moves them is the race.

A :class:`Run` is a trajectory that the sweep needs, a :class:`Trial` a candidate with a seed that rests on one; two
candidates that come to the same training share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from autoenc import figures
from autoenc.config import Config
from autoenc.course import best_row, collapsed_at, own_end
from autoenc.sweep.asha import Stop, excess, within
from autoenc.sweep.inherit import Candidate
from autoenc.sweep.records import Record
from autoenc.sweep.spec import Spec
from autoenc.table import Row
from autoenc.trajectory import FINISHED, Trajectory

NEAR = 0.05                      # of its best: where a training is as good as there
ENDED = ("completed", "stopped", "diverged", "failed")


@dataclass(eq=False)
class Run:
    """A trajectory, as far as this sweep needs it."""

    id: str                          # among the sweep's runs: the key, and the end where that is not the usual one
    key: str                         # the trajectory's
    config: Config
    trajectory: Trajectory
    rows: list[Row] = field(default_factory=list)
    state: str = "waiting"           # waiting, running, or one of ENDED
    trained: int = 0                 # epochs that this run of the command trained
    stored: int = 0                  # epochs that were there before
    protected: bool = False          # never stopped, never a measure: the baseline, a person's pick, repeats
    stop: Stop | None = None
    note: str = ""
    keep: int | None = None          # an epoch whose weights are needed, trained once more where they are not kept

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def at_end(self) -> bool:
        """Whether its rows reach the end of its budget or patience."""
        return own_end(self.rows, self.config) is not None

    @property
    def pace(self) -> float | None:
        """Seconds an epoch, on average."""
        seconds = [row["seconds"] for row in self.rows if row["seconds"] > 0]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def spared(self) -> int:
        """Epochs of its budget that early stopping, or a collapse that ended it, left untrained."""
        if self.state != "stopped" and collapsed_at(self.rows, self.config) is None:
            return 0
        beyond = self.trained - (len(self.rows) - min(self.stored, len(self.rows)))    # until the stop was told
        return self.config.train.epochs - len(self.rows) - max(0, beyond)

    def read(self) -> None:
        """Take over the epochs that the store has beyond those known, as far as they are this run's."""
        rows = self.trajectory.rows()
        rows = rows[:own_end(rows, self.config) or len(rows)]
        if len(rows) > len(self.rows):
            self.rows = rows


@dataclass(frozen=True, eq=False)
class Trial:
    candidate: Candidate
    seed: int
    run: Run

    @property
    def name(self) -> str:
        return f"{self.candidate.name}_seed{self.seed}"


class Standing:
    """The trials of a sweep and what they have reached."""

    spec: Spec
    trials: list[Trial]
    runs: dict[str, Run]

    def score(self, run: Run, epoch: int | None = None) -> float:
        """The objective at the best epoch so far, which is what the decision would read if the run ended here."""
        return self.figures_of(run, epoch).get(self.spec.objective.metric, math.nan)

    def figures_of(self, run: Run, epoch: int | None = None) -> Row:
        """All figures at the best epoch (among the first ``epoch`` ones)."""
        row = best_row(run.rows[:epoch], run.config)
        if row is None:
            return {}
        return {**row, **self._course(run), **self._figures_after(run, row)} if epoch is None else row

    def _course(self, run: Run) -> Row:
        """Figures of the whole course: how steady a training was, and how soon it came near its best."""
        metric, mode = self.spec.objective.metric, self.spec.objective.direction
        if metric in (*figures.AFTER_TRAINING, *figures.OF_THE_COURSE):
            metric, mode = run.config.train.monitor, figures.MODES[run.config.train.monitor]
        values, first = [row.get(metric, math.nan) for row in run.rows], run.config.counted_from
        best = figures.best_epoch(values, mode, first)
        soon = [epoch for epoch, value in enumerate(values[first - 1:], start=first)
                if best and within(excess(value, values[best - 1], mode), NEAR)]
        spikes = [row["train/spikes"] for row in run.rows if "train/spikes" in row]
        return {**({"stability/spikes": math.fsum(spikes)} if spikes else {}),
                **({"stability/epochs": float(soon[0])} if soon else {})}

    def missing_figures(self, run: Run) -> list[str]:
        """Figures that the rule reads and that are computed after training, where they have not been yet."""
        row = best_row(run.rows, run.config)
        if row is None:                          # the monitored figure is undefined: there is no best model to measure
            return []
        return sorted(self._measured_after(run) - set(self._figures_after(run, row)))

    def wanted_after(self, run: Run) -> tuple[str, ...]:
        """The figures of a run that are computed when its training is finished."""
        return tuple(sorted(self._measured_after(run)))

    def _measured_after(self, run: Run) -> set[str]:
        rule = self.spec.decision
        asked = {self.spec.objective.metric, *(item.metric for item in (*rule.prefer, *rule.require)),
                 *(rule.baseline.gains if rule.baseline else ())}
        asked &= set(figures.AFTER_TRAINING)
        if not run.config.model.variational:
            asked -= set(figures.OF_POSTERIORS)
        if not run.config.model.normalize_latents:
            asked -= set(figures.STANDARDIZED)
        else:
            asked |= set(figures.STANDARDIZED)
        return asked | ({FINISHED} if self.spec.final else set())

    def _figures_after(self, run: Run, row: Row) -> Row:
        return run.trajectory.figures(int(row["epoch"]), normalized=run.config.model.normalize_latents)

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
            improving=self._improving(run), collapsed=self._collapsed(run))

    def _collapsed(self, run: Run) -> bool:
        """Whether it was ended because its latent had collapsed for good."""
        return run.state == "completed" and collapsed_at(run.rows, run.config) is not None

    def _improving(self, run: Run) -> float:
        """By how much the objective improved over the last three epochs, as a share."""
        if run.state != "completed" or len(run.rows) < 4:
            return 0.0
        before, now = self.score(run, len(run.rows) - 3), self.score(run, len(run.rows))
        known = math.isfinite(before) and math.isfinite(now)
        return excess(before, now, self.spec.objective.direction) if known else 0.0

    def _fit(self, run: Run, epoch: int | None = None) -> bool:
        """Whether the rule's requirements hold (among the first ``epoch`` epochs); one is that it has not collapsed for
        good, where that ends a trial."""
        if collapsed_at(run.rows[:epoch], run.config) is not None:
            return False
        found = self.figures_of(run, epoch)
        return all((r.min is None or found.get(r.metric, -math.inf) >= r.min)
                   and (r.max is None or found.get(r.metric, math.inf) <= r.max) for r in self.spec.decision.require)
