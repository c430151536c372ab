"""Points beyond the arms: an Optuna study that is told the truth about every trial.

Ray's own OptunaSearch tells a trial that ASHA stopped as complete with its last value, which mixes budgets, and leaves
a NaN trial running for ever. Here a stopped trial is PRUNED with its intermediate values, a diverged or failed one
FAIL, and what an earlier run of the sweep suggested is told before anything new is asked for.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoenc.config import make_config
from autoenc.sweep.decide import CHOOSABLE
from autoenc.sweep.inherit import Candidate
from autoenc.sweep.parts import Measured
from autoenc.sweep.quasi import quasi_random_points
from autoenc.sweep.space import Parameter, draw_point, grid_points, optuna_parameters
from autoenc.sweep.spec import Spec
from autoenc.table import read_text

LEARNING = ("tpe", "gp")


def quiet_optuna() -> Any:
    """The optuna module, silent but for errors: it tells of every study, and its warnings are about its own speed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def objectives(spec: Spec) -> tuple[Measured, ...]:
    """What the search optimises: the objective, and the first other figure that the rule prefers by, where there is
    one. By the error alone it would find that every auxiliary loss is best switched off."""
    searches = spec.trials > len(spec.arms) and spec.search.algorithm in LEARNING
    others = [item for item in spec.decision.prefer if item.metric != spec.objective.metric] if searches else []
    return (spec.objective, *others[:1])


class Searcher:
    """Draws points of a sweep's space and learns from their trials. One candidate may stand for several draws."""

    def __init__(self, spec: Spec, start: Mapping[str, Any], drawn_before: int) -> None:
        """``drawn_before``: points that earlier runs drew and that this one goes on from."""
        optuna = quiet_optuna()
        self.objectives = objectives(spec)
        self.study = optuna.create_study(directions=[f"{item.direction}imize" for item in self.objectives])
        self.space: Mapping[str, Parameter] = spec.space
        self.start = start
        self._search = spec.search
        self._whole = spec.search.algorithm == "gp"      # which only models what every point has
        self._draws = drawn_before
        self._open: dict[str, list[Any]] = {}            # candidate -> Optuna trials that wait for its result
        self._points: Iterator[dict[str, Any]] | None = None         # of an algorithm that learns nothing
        if spec.search.algorithm == "grid":
            self._points = grid_points(spec.space, start)
        elif spec.search.algorithm == "quasi_random":
            self._points = quasi_random_points(spec.space, start, spec.search.seed, drawn_before)

    def know(self, candidate: Candidate) -> None:
        """Enter an arm, or a point that an earlier run drew, so that its result will be learnt from. An arm that is
        no point of the space (it sets something else, too) teaches nothing about it."""
        parameters = parameters_of(self.space, self.start, candidate, self._whole)
        if parameters is not None:
            self.study.enqueue_trial(parameters)
            trial = self.study.ask()
            draw_point(trial, self.space, self.start, self._whole)
            self.assign(candidate, trial)

    def draw(self) -> tuple[dict[str, Any], Any] | None:
        """A new point and its Optuna trial; None when a grid has no more."""
        if self._points is not None:
            point = next(self._points, None)
            return None if point is None else (point, None)
        self.study.sampler = self._sampler()
        self._draws += 1
        trial = self.study.ask()
        return draw_point(trial, self.space, self.start, self._whole), trial

    def _sampler(self) -> Any:
        """A sampler for the next draw. Its seed counts the draws, so that a sweep which is killed and continued goes on
        in the sequence, and neither begins it again nor leaves it."""
        import optuna

        seed = (self._search.seed + 1_000_003 * self._draws) % 2**32
        if self._search.algorithm == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self._search.algorithm == "gp":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)           # of group
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True, group=True)

    def refuse(self, trial: Any) -> None:
        """A drawn Optuna trial whose settings do not go together."""
        if trial is not None:
            self._fail(trial)

    def assign(self, candidate: Candidate, trial: Any) -> None:
        """Let a drawn Optuna trial wait for this candidate's result."""
        if trial is not None:
            self._open.setdefault(candidate.name, []).append(trial)

    def tell(self, candidate: Candidate, status: str, values: Sequence[float], second: float = math.nan) -> None:
        """A candidate's trial ended; ``values``: the objective after each epoch, as the decision would have read it;
        ``second``: the second figure that is searched by, at the best epoch."""
        from optuna.trial import TrialState

        finite = [value for value in values if math.isfinite(value)]
        for trial in self._open.pop(candidate.name, []):
            self._report(trial, values)
            if not finite or status not in ("completed", "stopped"):
                self._fail(trial)
            elif status == "stopped" and not self._whole:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self._complete(trial, finite[-1], second)

    def _report(self, trial: Any, values: Sequence[float]) -> None:
        if len(self.objectives) > 1:                     # Optuna has intermediate values of a single objective only
            trial.set_user_attr(self.objectives[0].metric, list(values))
            return
        for epoch, value in enumerate(values, start=1):
            if math.isfinite(value):
                trial.report(value, epoch)

    def _complete(self, trial: Any, value: float, second: float) -> None:
        """A candidate without the second figure counts as the worst by it, as it does to the rule."""
        found = [value, second][:len(self.objectives)]
        if not math.isfinite(found[-1]):
            worst = self._worst()
            if worst is None:
                return self._fail(trial)
            found[-1] = worst[-1]
        self.study.tell(trial, found)

    def _fail(self, trial: Any) -> None:
        """Optuna's Gaussian process looks at completed trials only, and would propose the same bad point again and
        again: to it a failed one is as bad as the worst so far (and a stopped one as it was when it was stopped, which
        is no better than what it would have come to)."""
        from optuna.trial import TrialState

        worst = self._worst() if self._whole else None
        if worst is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, worst)

    def _worst(self) -> list[float] | None:
        """The worst value so far by each objective; None where no trial has completed."""
        from optuna.trial import TrialState

        told = [trial.values for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
        return [(max if item.direction == "min" else min)(values)
                for item, values in zip(self.objectives, zip(*told, strict=True), strict=True)] if told else None


def parameters_of(space: Mapping[str, Parameter], start: Mapping[str, Any], candidate: Candidate,
                  whole: bool = False) -> dict[str, Any] | None:
    """The Optuna parameters of a candidate; None where it is no point of the space, or sets something else, too."""
    from optuna.trial import FixedTrial

    parameters = optuna_parameters(space, candidate.config.flat(), whole)
    if parameters is None:
        return None
    try:
        point = draw_point(FixedTrial(parameters), space, start, whole)
    except ValueError:                           # a parameter that exists for a point, but not for this arm
        return None
    same = make_config({**start, **point}, candidate.name).identity() == candidate.config.identity()
    return parameters if same else None


def runners_up(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a finished sweep tried beside its winner and could have won, best score first: (where from, the settings
    over that sweep's start). Empty where its decision.json is old, was edited, or is not there."""
    try:
        decision = json.loads(read_text(folder / "decision.json"))
        mode = decision["rule"]["objective"]["mode"]
        rows = [row for row in decision["candidates"]
                if row["standing"] in CHOOSABLE and row["arm"] != decision["winner"]
                and isinstance(row["settings"], dict) and math.isfinite(row["score"])]
        rows.sort(key=lambda row: row["score"], reverse=mode == "max")
        return [(f"{folder.name}: {row['arm']}", row["settings"]) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def sampled_names(taken: Collection[str]) -> Iterator[str]:
    """Names for sampled points: S001, S002, …, none that an arm has."""
    return (name for number in itertools.count(1) if (name := f"S{number:03d}") not in taken)
