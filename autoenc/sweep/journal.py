"""A sweep as an Optuna study: in memory for its charts, as a journal file for ``optuna-dashboard``.

It holds one trial a candidate, of its first seed; further seeds are told in user attributes. The search has a study of
its own (see :mod:`~autoenc.sweep.search`): that one only knows points of the space, this one every arm, with every
setting that the sweep varies.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.files import write_atomic
from autoenc.sweep.race import Race
from autoenc.sweep.search import objectives, quiet_optuna
from autoenc.sweep.standing import Run, Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, TrialState

KEY_FIGURES = ("val/mse", "val/psnr", "val/ssim", "val/palette_miou", "latent_size", "parameters")


def write_journal(path: Path, race: Race) -> None:
    """Write the sweep as an Optuna journal, over one that is there. ``optuna-dashboard PATH`` shows it,
    ``optuna.load_study(study_name=<the sweep's name>, storage=…)`` reads it. Raises OSError."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with tempfile.TemporaryDirectory() as folder:            # Optuna locks and flushes it for every line
        beside = Path(folder) / "optuna.log"
        study_of(race, JournalStorage(JournalFileBackend(str(beside))))
        write_atomic(path, beside.read_bytes())


def study_of(race: Race, storage: BaseStorage | None = None) -> Study:
    """The race as it stands, as an Optuna study: of two objectives where two are searched by (then the objective after
    each epoch is a user attribute, since Optuna has intermediate values of a single objective only)."""
    optuna, aims = quiet_optuna(), objectives(race.spec)
    study = optuna.create_study(directions=[f"{item.direction}imize" for item in aims], study_name=race.spec.name,
                                storage=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([item.metric for item in aims])
    first = [trial for trial in race.trials if trial.seed == trial.candidate.config.train.seed]
    settings = {trial.name: _settings(race, trial) for trial in first}
    distributions = {key: _distribution(race, key, [found[key] for found in settings.values() if key in found])
                     for key in race.spec.varied if any(key in found for found in settings.values())}
    for trial in first:
        study.add_trial(_frozen(race, trial, settings[trial.name], distributions))
    return study


def _settings(race: Race, trial: Trial) -> dict[str, Any]:
    """Every varied setting; none that the space has only under a condition which fails here."""
    flat, space = trial.run.config.flat(), race.spec.space
    return {key: json.dumps(flat[key]) if isinstance(flat[key], list | tuple | dict) else flat[key]
            for key in race.spec.varied
            if key not in space or all(flat[other] == value for other, value in space[key].when.items())}


def _distribution(race: Race, key: str, values: Sequence[Any]) -> BaseDistribution:
    """The space's where all values are its own (exact 0 beside a range is not), else the range of all values, or what
    occurs."""
    from optuna import distributions
    from optuna.trial import FixedTrial

    parameter = race.spec.space.get(key)
    drawn = [parameter.drawn(key, value) or {} for value in values] if parameter is not None else [{}]
    if all(key in found for found in drawn):
        fixed = FixedTrial(drawn[0])
        parameter.draw(fixed, key)
        return fixed.distributions[key]
    if all(type(value) in (int, float) for value in values):
        kind = distributions.IntDistribution if all(type(value) is int for value in values) \
            else distributions.FloatDistribution
        return kind(min(values), max(values))
    return distributions.CategoricalDistribution(list(dict.fromkeys(values)))


def _frozen(race: Race, trial: Trial, settings: Mapping[str, Any],
            distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    run, aims = trial.run, objectives(race.spec)
    values = [race.figures_of(run).get(item.metric, math.nan) for item in aims]
    state = _state(run, values)
    by_epoch = {epoch: value for epoch in range(1, len(run.rows) + 1)
                if math.isfinite(value := race.score(run, epoch))}
    attributes = _attributes(race, trial)
    if len(aims) > 1:
        attributes[f"{aims[0].metric} by epoch"] = list(by_epoch.values())
    started, ended = _times(run)
    if state != TrialState.COMPLETE:
        values = [by_epoch[max(by_epoch)]] if state == TrialState.PRUNED and by_epoch and len(aims) == 1 else None
    frozen = create_trial(
        state=state, values=values, params=dict(settings), user_attrs=attributes,
        distributions={key: distributions[key] for key in settings},
        intermediate_values=by_epoch if len(aims) == 1 else None)
    frozen.datetime_start = started if state != TrialState.WAITING else None
    frozen.datetime_complete = ended if state.is_finished() else None
    return frozen


def _state(run: Run, values: Sequence[float]) -> TrialState:
    from optuna.trial import TrialState

    if not run.ended:
        return TrialState.RUNNING if run.rows or run.state == "running" else TrialState.WAITING
    if run.state == "stopped":
        return TrialState.PRUNED
    return TrialState.COMPLETE if run.state == "completed" and not any(map(math.isnan, values)) else TrialState.FAIL


def _attributes(race: Race, trial: Trial) -> dict[str, Any]:
    """What the dashboard shows of a trial beside its settings; a figure that is not finite as text."""
    run, metric = trial.run, race.spec.objective.metric
    found = race.figures_of(run)
    told: dict[str, Any] = {"arm": trial.candidate.name, "seed": trial.seed, "status": run.state}
    if run.note:
        told["note"] = run.note
    told |= {"epochs": len(run.rows), "best epoch": int(found.get("epoch", 0))}
    preferred = (item.metric for item in race.spec.decision.prefer)
    told |= {name: found[name] for name in dict.fromkeys((*KEY_FIGURES, *preferred)) if name in found}
    told |= {f"{metric} (seed {other.seed})": race.score(other.run) for other in race.trials
             if other.candidate.name == trial.candidate.name and other is not trial and other.run.ended}
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in told.items()}


def _times(run: Run) -> tuple[datetime, datetime]:
    """When a training ended, by its table's last change, and when it would have begun, had it run in one piece."""
    table = run.trajectory.folder / "metrics.csv"
    ended = datetime.fromtimestamp(table.stat().st_mtime) if table.is_file() else datetime.now()
    return ended - timedelta(seconds=sum(row["seconds"] for row in run.rows)), ended
