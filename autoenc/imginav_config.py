"""Experiments of ImgiNav as settings, and a configuration as an experiment. Their form is in autoenc.imginav."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoenc.checks import Faults, describe
from autoenc.config import HEADS, Config, DataConfig
from autoenc.errors import InputError
from autoenc.experiment import Experiment, check_written, checked, meant, no_place
from autoenc.imginav import IMAGE_SIZE, SAME, SECTIONS, TERMS, TWICE, TYPES, WITHOUT_EFFECT, File, conflicts
from autoenc.yamlfile import read_yaml

NAME = "ImgiNav"
TOLD_BY = f"sections {', '.join(SECTIONS)}"
PALETTE = Path(__file__).resolve().parent / "data" / "palette_imginav.yaml"


def holds(content: Any) -> bool:
    """Whether a YAML file's content is in this form, sound or not."""
    return isinstance(content, Mapping) and sum(section in content for section in SECTIONS) >= 2


def read(content: Mapping[str, Any], path: Path) -> Experiment:
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
    words = {**SAME, "data.split": "training.train_split", "data.image_size": "dataset.transform: Resize: size",
             **{f"loss.{term}": f"training.loss: {kind} ({key}): weight" for term, (kind, key, _) in TERMS.items()}}
    faults = Faults()
    faults.said += [f"{where}: {conflict}" for conflict in conflicts(file)]
    with faults.kept():
        settings = checked(settings, path, where, words)
    faults.tell()
    counts = {head.type: head.count for head in file.autoencoder.decoder.heads}
    return Experiment(where, file.experiment.name, settings, tuple(f"{where}: {said}" for said in _notices(file)),
                      counts.get("SegmentationHead"), counts.get("ClassificationHead"))


def _split(train: float) -> list[float]:
    rest = round((1 - train) / 2, 12)            # 0.1, not 0.09999999999999998
    return [train, rest, rest]


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


def write(config: Config, name: str, labels: int | None = None) -> dict[str, Any]:
    """A configuration in the source's form; read back, it is the same one.

    ``labels``: how many labels the data has, for the classification head; None: they are counted in the manifest.
    Raises :class:`InputError` for every setting that the form cannot express.
    """
    if config.model.kind != "conv2d":
        raise InputError(no_place("model.kind", config.model.kind, NAME, "conv2d"))
    said = _meant(config)
    document: dict[str, Any] = {"experiment": {"name": name, "save_path": f"outputs/{name}"}, "dataset": {},
                                "autoencoder": {"encoder": {"in_channels": 3}, "decoder": {}}, "training": {}}
    for ours, theirs in SAME.items():
        *place, key = theirs.split(".")
        section = reduce(lambda inner, part: inner.setdefault(part, {}), place, document)
        if said[ours] is not None:
            section[key] = said[ours]
    dataset, training = document["dataset"], document["training"]
    encoder, decoder = document["autoencoder"]["encoder"], document["autoencoder"]["decoder"]
    dataset.setdefault("manifest", "manifest.csv")
    if said["data.palette"] is not None:
        dataset["outputs"]["segmentation"] = said["data.image_column"]
    if said["data.image_size"] != IMAGE_SIZE:
        dataset["transform"] = _written_transform(said["data.image_size"], nearest=said["data.palette"] is not None)
    encoder |= {"activation": "SiLU", "norm_groups": 8}
    decoder |= {theirs: encoder[ours] for ours, theirs in TWICE.items()}
    counts = {"rgb": {"out_channels": 3, "final_activation": "tanh"}, "classification": {"num_classes": labels or 1},
              "segmentation": {"num_classes": len(_palette())}}
    decoder["heads"] = [{"type": TYPES[head], "name": head, **counts[head]} for head in config.heads]
    training |= {"train_split": said["data.split"][0], "optimizer": "AdamW", "shuffle": True,
                 "early_stopping_restore_best": True}
    terms = TERMS | ({"standardization": ("LatentStandardizationLoss", "mu", "mu")} if config.model.variational else {})
    training["loss"] = {"type": "CompositeLoss", "losses": [
        {"type": kind, "key": key, "target": target, "weight": said[f"loss.{term}"]}
        for term, (kind, key, target) in terms.items() if said[f"loss.{term}"] > 0]}
    if said["data.manifest"] is None:
        del said["data.manifest"]                    # of generated layouts, which have no place for another reason
    check_written(said, document, NAME, read, _meant)
    if labels is None and "classification" in config.heads:
        from autoenc.data.listing import read_listing
        decoder["heads"][-1]["num_classes"] = len(read_listing(config.data).label_names)
    return document


def _written_transform(size: int, *, nearest: bool) -> dict[str, Any]:
    resize = {"type": "Resize", "size": [size, size], **({"interpolation": "nearest"} if nearest else {})}
    return {"type": "Compose", "transforms": [resize, {"type": "ToTensor"},
                                              {"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]}


def _meant(config: Config) -> dict[str, Any]:
    flat = meant(config)
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
