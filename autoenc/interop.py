"""ImgiNav in and out: its experiment files read as settings, and a configuration written as one.

``python -m autoenc.interop FILE`` turns an experiment file into a configuration, and a configuration into an
experiment. What either form cannot say is an error that names it. This module knows neither torch nor ray.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoenc.checks import Faults, describe, shown
from autoenc.config import (
    HEADS,
    Config,
    DataConfig,
    LossConfig,
    absolute_paths,
    check_values,
    load_config,
    make_config,
)
from autoenc.errors import InputError, command
from autoenc.files import write_atomic
from autoenc.imginav import IMAGE_SIZE, SAME, SECTIONS, TERMS, TWICE, TYPES, WITHOUT_EFFECT, File, conflicts
from autoenc.yamlfile import dump_yaml, read_yaml

PALETTE = Path(__file__).resolve().parent / "data" / "palette_imginav.yaml"
BUDGET = ("train.epochs", "train.patience", "train.min_delta", "train.sample_every")


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says."""

    where: str
    """the file, as messages name it"""
    name: str
    settings: dict[str, Any]
    """by our dotted keys; everything that the form determines"""
    notices: tuple[str, ...]
    """what a person should know of how it was read, each with the file's name"""
    classes: int | None
    """how many segmentation classes its head declares; None without the head"""
    labels: int | None
    """how many labels its classification head declares; None without the head"""


def is_experiment(content: Any) -> bool:
    """Whether a YAML file's content is in the source's form, sound or not."""
    return isinstance(content, Mapping) and sum(section in content for section in SECTIONS) >= 2


def read_experiment(content: Mapping[str, Any], path: Path) -> Experiment:
    """The experiment in a file's content. Paths in it are relative to ``path``, the file.

    Raises :class:`InputError` that names every key and value which is unknown, impossible, or nothing that can be
    done here. Two things are read as what they become: the share that ``train_split`` leaves is halved into validation
    and test, and ``normalize_latents`` is exact (``model.normalizer``).
    """
    where = str(path)
    try:
        file = File.model_validate(content)
    except ValidationError as error:
        raise InputError(describe(error, where, File)) from None
    losses = {loss.term: loss.weight for loss in file.training.loss.losses}
    weights = {term: losses.get(term, 0.0) for term in TERMS}
    heads = [head for head, kind in TYPES.items() if any(kind == one.type for one in file.autoencoder.decoder.heads)]
    usual = [head for head in HEADS if head == "rgb" or weights[head] > 0]
    settings = {
        **{ours: file.at(theirs) for ours, theirs in SAME.items()},
        "data.source": "manifest", "data.palette": str(PALETTE) if file.has_classes else None,
        "data.image_size": file.image_size, "data.split": _split(file.training.train_split),
        "model.heads": None if heads == usual else heads,
        "model.normalizer": "loss" if weights["standardization"] > 0 else "exact",
        **{f"loss.{term}": weight for term, weight in weights.items()},
    }
    faults = Faults()
    faults.said += [f"{where}: {conflict}" for conflict in conflicts(file)]
    with faults.kept():
        settings = absolute_paths(settings, path.resolve().parent, where)
        _check_values(settings, where)
    faults.tell()
    counts = {head.type: head.count for head in file.autoencoder.decoder.heads}
    return Experiment(where, file.experiment.name, settings, tuple(f"{where}: {said}" for said in _notices(file)),
                      counts.get("SegmentationHead"), counts.get("ClassificationHead"))


def load_experiment(path: str | Path) -> Experiment | None:
    """The experiment in a file; None where the file is in another form. Raises :class:`InputError`."""
    content = read_yaml(path)
    return read_experiment(content, Path(path)) if is_experiment(content) else None


def check_counts(experiment: Experiment, classes: int, labels: int) -> None:
    """Raise :class:`InputError` where the data's number of segmentation classes, or of labels, is not the declared."""
    faults = Faults()
    for kind, declared, have, what in (("SegmentationHead", experiment.classes, classes, "segmentation classes"),
                                       ("ClassificationHead", experiment.labels, labels, "labels")):
        if declared not in (None, have):
            faults.said.append(f"{experiment.where}: autoencoder.decoder.heads: {kind}: num_classes: {declared}, and "
                               f"the data has {have} {what}")
    faults.tell()


def as_arm(experiment: Experiment, start: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An experiment as a sweep's candidate: its settings without data, seed and budget, which must be the sweep's for
    candidates to compare, and a notice of those that are others in the sweep (``start``: all settings under its arms).
    """
    given_way = [key for key in experiment.settings
                 if key.startswith("data.") or key == "train.seed" or key in BUDGET]
    others = [f"{key} ({shown(start[key])} here)" for key in given_way
              if start.get(key, experiment.settings[key]) != experiment.settings[key]]
    notices = [f"{experiment.where}: gives way to the sweep: {', '.join(others)}"] if others else []
    return {key: value for key, value in experiment.settings.items() if key not in given_way}, notices


def _split(train: float) -> list[float]:
    rest = round((1 - train) / 2, 12)            # 0.1, not 0.09999999999999998
    return [train, rest, rest]


def _check_values(settings: Mapping[str, Any], where: str) -> None:
    try:
        check_values(settings, where)
    except InputError as error:
        weights = {f"loss.{term}": f"training.loss: {kind} ({key}): weight" for term, (kind, key, _) in TERMS.items()}
        theirs = {**SAME, **weights, "data.split": "training.train_split",
                  "data.image_size": "dataset.transform: Resize: size"}
        said = str(error)
        for ours, their in theirs.items():
            said = said.replace(f"{where}: {ours}", f"{where}: {their}")
        raise InputError(said) from None


def _notices(file: File) -> Iterator[str]:
    idle = [key for key in WITHOUT_EFFECT if key.rpartition(".")[2] in file.at(key.split(".")[0]).model_fields_set]
    said = [f"without effect here: {', '.join(idle)}"] if idle else []
    if file.experiment.save_path is not None:
        said.append("experiment.save_path gives way to --output")
    if said:
        yield "; ".join(said)
    train, rest, _ = _split(file.training.train_split)
    yield f"training.train_split: {train:g}: the rest is halved, {rest:g} to validate and {rest:g} to test on"
    if not file.dataset.transform:
        yield f"images are {IMAGE_SIZE} px, unless data.image_size says otherwise"
    elif any(step.type == "Resize" and (step.interpolation != "nearest" or not file.has_classes)
             for step in file.dataset.transform.transforms):
        yield ("dataset.transform: images are scaled to the nearest pixel where there is segmentation or a palette of "
               "their own, else with antialiasing, and padded to a square")
    if not file.autoencoder.encoder.variational and any(loss.term == "kl" for loss in file.training.loss.losses):
        yield "training.loss: KLDLoss: without effect, as autoencoder.encoder.variational is false"
    if file.autoencoder.encoder.normalize_latents:
        yield ("autoencoder.encoder.normalize_latents: by exact statistics after training; trained shift and scale "
               "(model.normalizer: learned) do not standardise")


def write_experiment(config: Config, name: str, labels: int | None = None) -> dict[str, Any]:
    """A configuration in the source's form; read back, it is the same one.

    ``labels``: how many labels the data has, for the classification head; None: they are counted in the manifest.
    Raises :class:`InputError` for every setting that the form cannot express.
    """
    meant = _meant(config)
    document: dict[str, Any] = {"experiment": {"name": name, "save_path": f"outputs/{name}"}, "dataset": {},
                                "autoencoder": {"encoder": {"in_channels": 3}, "decoder": {}}, "training": {}}
    for ours, theirs in SAME.items():
        *place, key = theirs.split(".")
        section = reduce(lambda inner, part: inner.setdefault(part, {}), place, document)
        if meant[ours] is not None:
            section[key] = meant[ours]
    dataset, training = document["dataset"], document["training"]
    encoder, decoder = document["autoencoder"]["encoder"], document["autoencoder"]["decoder"]
    dataset.setdefault("manifest", "manifest.csv")
    if meant["data.palette"] is not None:
        dataset["outputs"]["segmentation"] = meant["data.image_column"]
    if meant["data.image_size"] != IMAGE_SIZE:
        dataset["transform"] = _written_transform(meant["data.image_size"], nearest=meant["data.palette"] is not None)
    encoder |= {"activation": "SiLU", "norm_groups": 8}
    decoder |= {theirs: encoder[ours] for ours, theirs in TWICE.items()}
    counts = {"rgb": {"out_channels": 3, "final_activation": "tanh"}, "classification": {"num_classes": labels or 1},
              "segmentation": {"num_classes": len(_palette())}}
    decoder["heads"] = [{"type": TYPES[head], "name": head, **counts[head]} for head in config.heads]
    training |= {"train_split": meant["data.split"][0], "optimizer": "AdamW", "shuffle": True,
                 "early_stopping_restore_best": True}
    terms = TERMS | ({"standardization": ("LatentStandardizationLoss", "mu", "mu")} if config.model.variational else {})
    training["loss"] = {"type": "CompositeLoss", "losses": [
        {"type": kind, "key": key, "target": target, "weight": meant[f"loss.{term}"]}
        for term, (kind, key, target) in terms.items() if meant[f"loss.{term}"] > 0]}
    _check_written(meant, document)
    if labels is None and "classification" in config.heads:
        from autoenc.data.listing import read_listing
        decoder["heads"][-1]["num_classes"] = len(read_listing(config.data).label_names)
    return document


def _written_transform(size: int, *, nearest: bool) -> dict[str, Any]:
    resize = {"type": "Resize", "size": [size, size], **({"interpolation": "nearest"} if nearest else {})}
    return {"type": "Compose", "transforms": [resize, {"type": "ToTensor"},
                                              {"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]}


def _meant(config: Config) -> dict[str, Any]:
    """All settings by dotted key, one way of saying for those that mean the same."""
    flat = absolute_paths(config.flat(), Path.cwd())
    flat |= {"data.cache_dir": None, "model.heads": list(config.heads),
             "loss.standardization": config.loss_weights.get("standardization", 0.0)}
    idle = [key for key, schedule in (("kl_warmup_epochs", "linear"), ("kl_cycles", "cyclical"))
            if config.kl_schedule != schedule]
    if not config.model.variational:
        flat |= {"model.latent": "mean", "train.stop_on_collapse": False}
        idle += ["kl_reduction", "kl_schedule", "free_bits", "optimal_variance"]
    flat |= {f"loss.{key}": LossConfig.model_fields[key].default for key in idle}
    if not config.model.normalize_latents or config.model.normalizer == "loss":
        flat["model.normalizer"] = "exact"          # with the loss's weight, the same
    if config.data.source == "layouts":
        flat["data.palette"] = str(PALETTE)         # which they bring along
    if flat["data.palette"] is None:
        flat["data.palette_tolerance"] = DataConfig().palette_tolerance
    elif flat["data.palette"] != str(PALETTE) and read_yaml(flat["data.palette"]) == _palette():
        flat["data.palette"] = str(PALETTE)
    return flat


@cache
def _palette() -> Any:
    return read_yaml(PALETTE)


def _check_written(meant: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` where the document does not say what was meant."""
    where = "as an experiment"
    back = _meant(make_config(read_experiment(document, Path(where)).settings, where))
    said = []
    for key, value in meant.items():
        if key == "data.split":
            differs = any(abs(mine - theirs) > 1e-9 for mine, theirs in zip(value, back[key], strict=True))
        else:
            differs = value != back[key] and not (key == "data.manifest" and value is None)
        if differs:
            said.append(f"{key}: {shown(value)} has no place in ImgiNav's form (there it is {shown(back[key])})")
    if said:
        raise InputError("\n".join(said))


def main(arguments: list[str]) -> int:
    """``python -m autoenc.interop FILE``: an experiment file as a configuration, or the other way."""
    parser = argparse.ArgumentParser(prog="python -m autoenc.interop", description="Turn an experiment file of ImgiNav "
                                     "into a configuration, or a configuration into an experiment file.")
    parser.add_argument("file", metavar="FILE", help="an experiment file, a best_config.yaml, or any configuration")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--to", choices=["imginav"], help="write an experiment file")
    way.add_argument("--from", dest="source", choices=["imginav"], help="read an experiment file")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: standard output)")
    options = parser.parse_args(arguments)
    path, content = Path(options.file), read_yaml(options.file)
    if options.to and is_experiment(content):
        raise InputError(f"--to imginav: {path}: is an experiment file already")
    if options.source and not is_experiment(content):
        raise InputError(f"--from imginav: {path}: is no experiment file (sections {', '.join(SECTIONS)})")
    text = dump_yaml(_read(content, path) if is_experiment(content) else _written(content, path))
    if options.output is None:
        print(text, end="")
        return 0
    try:
        write_atomic(options.output, text)
    except OSError as error:
        raise InputError(f"--output: {options.output}: cannot be written: {error.strerror}") from None
    return 0


def _read(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    experiment = read_experiment(content, path)
    for notice in experiment.notices:
        print(f"note: {notice}", file=sys.stderr)
    return {"config": make_config(experiment.settings, str(path)).nested()}


def _written(content: Any, path: Path) -> dict[str, Any]:
    config = load_config(path)
    provenance = content.get("provenance")
    name = provenance.get("sweep") if isinstance(provenance, Mapping) else None
    try:
        return write_experiment(config, name if isinstance(name, str) and name else path.stem)
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None


if __name__ == "__main__":
    command(main)
