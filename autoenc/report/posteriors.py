"""What the latents of a sweep's variational candidates tell: a diagnosis an arm, the KL beside its weight."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from autoenc.doctor import Diagnosis, Signs, diagnose, signs_of
from autoenc.report import curves
from autoenc.report.candidates import best_first, first_seeds
from autoenc.report.chart import Chart
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.standing import Standing, Trial


def variational(race: Standing) -> list[Trial]:
    """The first seed's trial of every variational arm that has epochs."""
    return [trial for trial in first_seeds(race.trials) if trial.run.config.model.variational and trial.run.rows]


def diagnosis_of(race: Standing, trial: Trial) -> tuple[Signs, Diagnosis] | None:
    """A trial's signs at its best epoch (before any counts: at its last one) and what they amount to; None where its
    figures are not those of a VAE."""
    signs = signs_of(race.figures_of(trial.run) or trial.run.rows[-1])
    return None if signs is None else (signs, diagnose(signs))


def diagnoses(race: Snapshot, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row an arm, best first: its signs, the diagnosis, and from which epoch on its epochs count."""
    trials = {trial.candidate.name: trial for trial in variational(race)}
    rows = []
    for arm in best_first(race, decision):
        if arm in trials and (found := diagnosis_of(race, trials[arm])) is not None:
            signs, diagnosis = found
            run = trials[arm].run
            rows.append({"arm": arm, "signs": signs, "diagnosis": diagnosis, "beta": run.rows[-1].get("beta", nan),
                         "counted": run.config.counted_from})
    return rows


def charts(race: Snapshot, decision: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Chart | None]:
    """The KL of an image and its weight by epoch, each arm's first seed."""
    shown = {trial.name for trial in curves.shown_trials(race, decision)}
    trials = [trial for trial in variational(race) if trial.name in shown]
    return {name: curves.figure_chart(trials, metric, colours, decision["winner"])
            for name, metric in (("kl", "val/kl_nats"), ("beta", "beta"))}
