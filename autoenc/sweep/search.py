"""Points beyond the arms: an Optuna study that is told the truth about every trial.

Ray's own OptunaSearch tells a trial that ASHA stopped as complete with its last value, which mixes budgets, and leaves
a NaN trial running for ever. Here a stopped trial is PRUNED with its intermediate values, a diverged or failed one
FAIL, and what an earlier run of the sweep suggested is told before anything new is asked for.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from autoenc.config import make_config
from autoenc.sweep.inherit import Candidate
from autoenc.sweep.space import Parameter, draw_point, grid_points, optuna_parameters
from autoenc.sweep.spec import Spec


class Searcher:
    """Draws points of a sweep's space and learns from their trials. One candidate may stand for several draws."""

    def __init__(self, spec: Spec, start: Mapping[str, Any], drawn_before: int) -> None:
        """``drawn_before``: points that earlier runs drew and that this one goes on from."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            direction="minimize" if spec.objective.direction == "min" else "maximize")
        self.space: Mapping[str, Parameter] = spec.space
        self.start = start
        self._search = spec.search
        self._draws = drawn_before
        self._open: dict[str, list[Any]] = {}            # candidate -> Optuna trials that wait for its result
        self._grid: Iterator[dict[str, Any]] | None = (
            grid_points(spec.space, start) if spec.search.algorithm == "grid" else None)

    def know(self, candidate: Candidate) -> None:
        """Enter an arm, or a point that an earlier run drew, so that its result will be learnt from. An arm that is
        no point of the space (it sets something else, too) teaches nothing about it."""
        from optuna.trial import FixedTrial

        parameters = optuna_parameters(self.space, candidate.config.flat())
        if parameters is None:
            return
        try:
            point = draw_point(FixedTrial(parameters), self.space, self.start)
        except ValueError:                       # a parameter that exists for a point, but not for this arm
            return
        if make_config({**self.start, **point}, candidate.name).identity() != candidate.config.identity():
            return
        self.study.enqueue_trial(parameters)
        trial = self.study.ask()
        draw_point(trial, self.space, self.start)
        self.assign(candidate, trial)

    def draw(self) -> tuple[dict[str, Any], Any] | None:
        """A new point and its Optuna trial; None when a grid has no more."""
        if self._grid is not None:
            point = next(self._grid, None)
            return None if point is None else (point, None)
        self.study.sampler = self._sampler()
        self._draws += 1
        trial = self.study.ask()
        return draw_point(trial, self.space, self.start), trial

    def _sampler(self) -> Any:
        """A sampler for the next draw. Its seed counts the draws, so that a sweep which is killed and continued goes on
        in the sequence, and neither begins it again nor leaves it."""
        import optuna

        seed = (self._search.seed + 1_000_003 * self._draws) % 2**32
        if self._search.algorithm == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)           # of group
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True, group=True)

    def refuse(self, trial: Any) -> None:
        """A drawn Optuna trial whose settings do not go together."""
        from optuna.trial import TrialState

        if trial is not None:
            self.study.tell(trial, state=TrialState.FAIL)

    def assign(self, candidate: Candidate, trial: Any) -> None:
        """Let a drawn Optuna trial wait for this candidate's result."""
        if trial is not None:
            self._open.setdefault(candidate.name, []).append(trial)

    def tell(self, candidate: Candidate, status: str, values: Sequence[float]) -> None:
        """A candidate's trial ended; ``values``: the objective after each epoch, as the decision would have read it."""
        from optuna.trial import TrialState

        finite = [value for value in values if math.isfinite(value)]
        for trial in self._open.pop(candidate.name, []):
            for epoch, value in enumerate(values, start=1):
                if math.isfinite(value):
                    trial.report(value, epoch)
            if status == "completed" and finite:
                self.study.tell(trial, finite[-1])
            elif status == "stopped" and finite:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, state=TrialState.FAIL)


def sampled_names(taken: Collection[str]) -> Iterator[str]:
    """Names for sampled points: S001, S002, …, none that an arm has."""
    return (name for number in itertools.count(1) if (name := f"S{number:03d}") not in taken)
