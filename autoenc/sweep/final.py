"""What is to say of a finished model, and the file that hands it to what comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoenc.doctor import ADVICE, HEALTHY, WORDS, Diagnosis, Signs, diagnose, signs_of
from autoenc.errors import InputError
from autoenc.files import write_atomic
from autoenc.sweep.evidence import Table
from autoenc.sweep.inherit import Winner, read_winner
from autoenc.sweep.race import Race
from autoenc.sweep.standing import Trial
from autoenc.sweep.words import number, percent
from autoenc.yamlfile import dump_yaml

STANDARD = 1e-3             # how far from mean 0 and deviation 1 a channel of the training split may be


@dataclass(frozen=True)
class Remark:
    text: str
    warning: bool = False


def remarks(race: Race, trial: Trial | None, parent: Winner | None, output: Path) -> list[Remark]:
    """What a person should know of a sweep's winner (its ``trial``) as a finished model; nothing for a sweep that
    varies something and normalises nothing."""
    said: list[Remark] = []
    if trial is not None and race.spec.final:
        said += [*_end(race, trial), *_chain(race, trial, parent, output)]
    said += [*_devices(race), *_noise(race)]
    said += _posteriors(race)
    for other in race.trials:
        if other.run.config.model.normalize_latents and other.run.state == "completed":
            said += _latents(race, other)
    return said


def _end(race: Race, trial: Trial) -> Iterator[Remark]:
    run, settings = trial.run, trial.run.config.train
    best = int(race.figures_of(run).get("epoch", 0))
    if race.spec.takes_over:
        yield Remark(f"taken over as it was trained, at epoch {best}: nothing was trained")
    elif len(run.rows) < settings.epochs:
        yield Remark(f"converged: {settings.patience} epochs without gain ended it at epoch {len(run.rows)} of at most "
                     f"{settings.epochs}; the weights are those of the best one, {best}")
    elif settings.patience is not None:
        yield Remark(f"ran out of epochs: still within its patience at epoch {settings.epochs} (best: {best}); more "
                     f"may help: --set {race.spec.name}:train.epochs={2 * settings.epochs}", warning=True)


def _devices(race: Race) -> Iterator[Remark]:
    """Paired seeds should differ in their arm alone."""
    ran: dict[int, dict[str, str]] = {}                      # seed -> device -> an arm that ran there
    for trial in race.trials:
        name = trial.run.trajectory.status().get("device_name")
        if name and trial.run.state == "completed":
            ran.setdefault(trial.seed, {}).setdefault(name, trial.candidate.name)
    for seed, devices in ran.items():
        if len(devices) > 1 and race.spec.decision.repeats > 1:
            told = ", ".join(f"{arm} on {device}" for device, arm in devices.items())
            yield Remark(f"seed {seed} was trained on several kinds of device ({told}): a pair of trials then differs "
                         "in more than its arm", warning=True)


def _noise(race: Race) -> Iterator[Remark]:
    """Whether a first seed may have left a good arm behind: what one is behind by chance alone is to lie within the
    margin by which arms are stopped, and given further seeds."""
    records = [record for record in race.records() if record.status == "completed"]
    table = Table({arm: {r.seed: r.figures.get(race.spec.objective.metric, math.nan) for r in records if r.arm == arm}
                   for arm in {record.arm: None for record in records}})
    by_chance = 2 * math.sqrt(2) * table.deviation                   # two standard deviations of a difference
    if table.log and by_chance > race.reach:
        yield Remark(f"seeds of one arm differ by {percent(table.deviation)} (standard deviation, beside what they do "
                     f"to all arms alike): by chance alone a first seed may be {percent(by_chance)} behind, more than "
                     f"the {percent(race.reach)} that keep an arm in the race (asha.margin)", warning=True)


def _chain(race: Race, trial: Trial, parent: Winner | None, output: Path) -> Iterator[Remark]:
    """Whether the objective is the best of all phases."""
    metric, mode = race.spec.objective.metric, race.spec.objective.direction
    own, above = race.score(trial.run), {}
    names = [*(parent.provenance.get("parents") or {}), parent.sweep] if parent else []
    for name in names:
        try:
            winner = read_winner(output / name)
        except InputError:
            continue
        scores = (winner.provenance.get("scores") or {}) if winner else {}
        if scores.get("metric") == metric and isinstance(scores.get("score"), int | float):
            above[name] = scores["score"]
    if not above:
        return
    name, best = (min if mode == "min" else max)(above.items(), key=lambda item: item[1])
    if (own > best) if mode == "min" else (own < best):
        yield Remark(f"{metric} {number(own)} is not the best of all phases: {name} reached {number(best)}",
                     warning=True)
    else:
        yield Remark(f"{metric} {number(own)} is the best of all phases (before: {number(best)}, {name})")


def _posteriors(race: Race) -> Iterator[Remark]:
    """The doctor's word on every variational arm, by its first seed, arms with one diagnosis together."""
    found: dict[str, list[tuple[str, Signs, Diagnosis]]] = {word: [] for word in reversed(WORDS)}
    arms: set[str] = set()
    for trial in race.trials:
        signs = signs_of(race.figures_of(trial.run)) if trial.run.config.model.variational else None
        if signs is not None and trial.run.state == "completed" and trial.candidate.name not in arms:
            arms.add(trial.candidate.name)
            diagnosis = diagnose(signs)
            found[diagnosis.word].append((trial.candidate.name, signs, diagnosis))
    for word, those in found.items():
        if len(those) == 1:
            [(arm, _, diagnosis)] = those
            yield Remark(f"latent of {arm}: {diagnosis.text}", warning=word != HEALTHY)
        elif those:
            told = ", ".join(f"{arm} ({signs.collapsed_dimensions} of {signs.dimensions} dimensions tell nothing, "
                             f"{signs.kl})" for arm, signs, _ in those)
            yield Remark(f"latents: {word}: {told}" + (f"; {ADVICE[word]}" if ADVICE[word] else ""),
                         warning=word != HEALTHY)


def _latents(race: Race, trial: Trial) -> Iterator[Remark]:
    found, mode = race.figures_of(trial.run), trial.run.config.model.normalizer
    worst = [found.get(f"latent/worst_{name}") for name in ("mean", "deviation", "correlation")]
    if None in worst:
        return
    measured = (f"{trial.name}: over the training split every channel's mean is within {worst[0]:.2g} of 0, its "
                f"standard deviation within {worst[1]:.2g} of 1")
    if max(worst[:2]) > STANDARD:
        why = (": shift and scale trained through normalising and its inverse cancel out, and get no gradient"
               if mode == "learned" else "")
        yield Remark(f"{measured}: not standardised{why}", warning=True)
        return
    yield Remark(f"{measured}; reconstructions changed by {found.get('latent/reconstruction_change', 0):.2g} at most; "
                 f"two channels correlate by up to {worst[2]:.2f}: standardised is not yet N(0, I)")


def handoff(race: Race, trial: Trial, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a latent diffusion model's configuration needs to know of a finished autoencoder."""
    config, name = trial.run.config, race.spec.export_name
    channels, *sides = evaluation["model"]["latent"]
    vector = not sides                               # one position, as a diffusion model of sequences takes it
    height, width = sides or (1, 1)
    return {
        "checkpoint": f"{name}_checkpoint_best.pt", "weights": f"{name}_checkpoint_best.safetensors",
        "image": {"height": config.data.image_size, "width": config.data.image_size, "channels": 3},
        "latent": {**({"length": channels} if vector else {"height": height, "width": width, "channels": channels}),
                   "normalized": config.model.normalize_latents},
        "latents_mean": evaluation["latents_mean"], "latents_std": evaluation["latents_std"],
        **({} if vector else {"unet": {"in_channels": channels, "out_channels": channels, "sample_size": width}}),
        "psnr": {split: (evaluation.get(split) or {}).get("psnr") for split in ("val", "test")},
        "latency": _latency(evaluation["cost"].get("speed") or {}),
    }


def _latency(speed: Mapping[str, Any]) -> dict[str, Any]:
    """Of one image, median in milliseconds; evaluation.json has the spread, and larger batches."""
    one = (speed.get("batches") or {}).get("1") or {}
    return {"device": speed.get("device"), **{
        f"{way}_ms": round(one[way]["latency_ms"]["median"], 3) for way in ("encode", "decode") if way in one}}


def write_handoff(path: Path, race: Race, trial: Trial, evaluation: Mapping[str, Any]) -> None:
    """Write handoff.yaml from an evaluation."""
    write_atomic(path, dump_yaml(handoff(race, trial, evaluation)))
