"""What a decided sweep hands on: best_config.yaml, and the winner's weights, figures and samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autoenc.config import own_sources
from autoenc.files import write_atomic
from autoenc.sweep.decide import concession
from autoenc.sweep.final import write_handoff
from autoenc.sweep.inherit import Winner, parent_hashes, winner_hash
from autoenc.sweep.race import Race
from autoenc.sweep.standing import Trial
from autoenc.sweep.store import SweepFolder, copy_into
from autoenc.table import csv_text
from autoenc.trajectory import FORMAT
from autoenc.yamlfile import dump_yaml

PACKAGES = ("autoenc", "torch", "ray", "optuna", "numpy")


def winning_trial(race: Race, decision: Mapping[str, Any]) -> Trial | None:
    """The winner's first seed: what is exported is never the luckiest."""
    trials = [trial for trial in race.trials if trial.candidate.name == decision["winner"]]
    return min(trials, key=lambda trial: trial.seed) if trials else None


def provenance(race: Race, decision: Mapping[str, Any], parent: Winner | None, fingerprint: str) -> dict[str, Any]:
    """Where a winner comes from: sweep, arm, scores, parents' hashes, data, what was conceded on the way, versions."""
    trial = winning_trial(race, decision)
    row = next(row for row in decision["candidates"] if row["arm"] == decision["winner"])
    status, sources = trial.run.trajectory.status(), own_sources(trial.run.config.flat())
    return {
        "format": FORMAT, "sweep": race.spec.name, "arm": decision["winner"], "trial": trial.name,
        "trajectory": trial.run.key, "hash": winner_hash(trial.run.config.flat(), sources), **(
            {"sources": sources} if sources else {}),
        "scores": {"metric": race.spec.objective.metric, "score": row["score"], "se": row["se"], "seeds": row["seeds"],
                   "best_epoch": int(race.figures_of(trial.run)["epoch"])},
        "concessions": {**(dict(parent.provenance.get("concessions") or {}) if parent else {}),
                        race.spec.name: concession(decision)},
        "parents": parent_hashes(parent), "data": fingerprint,
        "device": {key: status.get(key) for key in ("device", "device_name", "threads")},
        "versions": {name: version(name) for name in PACKAGES} | (status.get("versions") or {}),
        "content_hash": race.spec.content_hash, "content": race.spec.content,
    }


def missing_weights(race: Race, decision: Mapping[str, Any]) -> tuple[Trial, int] | None:
    """The winner's trial and its best epoch, where the weights of that epoch are not kept (the store went on beyond
    this sweep's budget, or they were given up, or are broken)."""
    trial = winning_trial(race, decision)
    if trial is None:
        return None
    epoch = int(race.figures_of(trial.run)["epoch"])
    normalized = trial.run.config.model.normalize_latents
    return (trial, epoch) if trial.run.trajectory.whole_weights(epoch, normalized) is None else None


def export(race: Race, decision: Mapping[str, Any], parent: Winner | None, fingerprint: str,
           folder: SweepFolder) -> list[Path]:
    """Write the winner's files, best_config.yaml last: once it is there, all of it is. Returns the paths."""
    trial = winning_trial(race, decision)
    trajectory, name = trial.run.trajectory, race.spec.export_name
    epoch = int(race.figures_of(trial.run)["epoch"])
    paths = [folder.path / f"{name}_checkpoint_best.pt", folder.path / f"{name}_checkpoint_latest.pt",
             folder.path / f"{name}_metrics.csv", folder.path / "best_config.yaml"]
    normalized = trial.run.config.model.normalize_latents
    copy_into(trajectory.weights(epoch, normalized), paths[0])
    # What was taken over is finished: its last state is the one that is handed on.
    latest = trajectory.weights(epoch, normalized) if race.spec.takes_over else trajectory.folder / "latest.pt"
    if latest.is_file():
        copy_into(latest, paths[1])
    write_atomic(paths[2], csv_text(trial.run.rows))
    _export_samples(trajectory.folder / "samples", folder.path / "samples", len(trial.run.rows))
    if race.spec.final:
        paths[3:3] = _export_final(race, trial, epoch, folder)
    write_atomic(paths[-1], dump_yaml({"config": trial.run.config.nested(),
                                      "provenance": provenance(race, decision, parent, fingerprint)}))
    return [path for path in paths if path.exists()]


def _export_final(race: Race, trial: Trial, epoch: int, folder: SweepFolder) -> list[Path]:
    """What a finished model has beside: its weights as safetensors, its evaluation, and what hands it on."""
    trajectory, normalized, name = trial.run.trajectory, trial.run.config.model.normalize_latents, race.spec.export_name
    weights = folder.path / f"{name}_checkpoint_best.safetensors"
    evaluation, handoff = folder.path / "evaluation.json", folder.path / "handoff.yaml"
    copy_into(trajectory.weights_path(epoch, normalized).with_suffix(".safetensors"), weights)
    copy_into(trajectory.evaluation_path(epoch, normalized), evaluation)
    write_handoff(handoff, race, trial, trajectory.evaluation(epoch, normalized))
    _copy_pictures(trajectory.weights_path(epoch, normalized).with_suffix(".pictures"), folder.path / "pictures")
    return [weights, evaluation, handoff]


def _export_samples(source: Path, target: Path, epochs: int) -> None:
    _copy_pictures(source, target, lambda name: name in {f"epoch_{epoch:04d}" for epoch in range(1, epochs + 1)})


def _copy_pictures(source: Path, target: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for picture in sorted(source.glob("*.png")):
        if wanted(picture.stem):
            copy_into(picture, target / picture.name)


def withdraw(folder: SweepFolder) -> None:
    """A sweep without a winner leaves no best_config.yaml."""
    (folder.path / "best_config.yaml").unlink(missing_ok=True)


def set_broken_aside(folder: SweepFolder) -> None:
    """A best_config.yaml that cannot be read gives way to a new one, and is kept for whoever changed it."""
    path = folder.path / "best_config.yaml"
    if path.exists():
        path.replace(path.with_name("best_config.yaml.broken"))
