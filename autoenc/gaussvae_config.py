"""Configuration files of GaussVAE as settings, and a configuration as one. Their form is in autoenc.gaussvae."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoenc.checks import Faults, describe, shown
from autoenc.config import SPLAT_KINDS, Config
from autoenc.errors import InputError
from autoenc.experiment import Experiment, check_written, checked, meant, no_place
from autoenc.gaussvae import FIXED, KERNEL, OF_CONV1D, OF_RESNET, PARTS, SAME, File, conflicts
from autoenc.settings import RESNET_BLOCKS

NAME = "GaussVAE"
TOLD_BY = "sections model and training"
WORDS = {**SAME, "data.manifest": "data.train_dir", "model.base_channels": "model.encoder_filters.0"}
OURS = ("train", "loss", "config", "name", "inherits", "arms", "space")        # of no such file


def holds(content: Any) -> bool:
    """Whether a YAML file's content is in this form, sound or not."""
    return isinstance(content, Mapping) and {"model", "training"} <= set(content) and not any(
        key in content for key in OURS)


def read(content: Mapping[str, Any], path: Path) -> Experiment:
    """The configuration in a file's content. Paths in it are relative to ``path``, the file.

    Raises :class:`InputError` that names every key and value which is unknown, impossible, or nothing that can be
    done here. Its three folders of splats become one data set, split by hash.
    """
    where = str(path)
    try:
        file = File.model_validate(content)
    except ValidationError as error:
        raise InputError(describe(error, where, File)) from None
    faults, settings = Faults(), _settings(file)
    faults.said += [f"{where}: {conflict}" for conflict in conflicts(file)]
    with faults.kept():
        settings = checked(settings, path, where, WORDS)
    faults.tell()
    return Experiment(where, file.experiment_name or path.stem, settings,
                      tuple(f"{where}: {said}" for said in _notices(file, settings)))


def _settings(file: File) -> dict[str, Any]:
    model, training = file.model, file.training
    patience, folders = file.callbacks.early_stopping_patience, file.data.folders
    warmed_up = training.max_beta > 0 and training.beta_warmup_epochs > 0
    found = {**FIXED, **{ours: file.at(theirs) for ours, theirs in SAME.items()}, "model.kind": model.kind,
             "data.manifest": str(Path(folders[0]).parent) if folders else None,
             "loss.kl_schedule": "linear" if warmed_up else "constant",
             "loss.kl_warmup_epochs": training.beta_warmup_epochs if warmed_up else 0,
             "train.patience": patience if patience < training.epochs else None}
    if file.seed is None:
        del found["train.seed"]
    if model.kind == "conv1d":
        return found | {f"model.{key}": list(getattr(model, key)) for key in OF_CONV1D}
    return found | {"model.base_channels": model.encoder_filters[0]}


def _notices(file: File, settings: Mapping[str, Any]) -> Iterator[str]:
    model, training, callbacks = file.model, file.training, file.callbacks
    unused = OF_RESNET if model.kind == "conv1d" else ("dropout_rates", *OF_RESNET[4:])
    idle = [f"model.{key}" for key in unused if key in model.model_fields_set and getattr(model, key) is not None]
    idle += [f"{section}.{key}" for section, keys in (("data", ("stats_path", "shuffle_buffer")),
                                                      ("callbacks", ("checkpoint_every",)))
             for key in keys if key in getattr(file, section).model_fields_set]
    said = [f"without effect here: {', '.join(idle)}"] if idle else []
    if file.output_dir is not None:
        said.append("output_dir gives way to --output")
    if said:
        yield "; ".join(said)
    if model.kind == "resnet1d":
        filters = resnet_filters(settings["model.base_channels"])
        if [*map(list, (model.encoder_filters, model.decoder_filters))] != [*filters]:
            yield (f"model.encoder_filters, decoder_filters: here the residual blocks have {_listed(filters[0])} and "
                   f"{_listed(filters[1])} channels, by the first one (model.base_channels)")
    if training.mixed_precision:
        yield ("training.mixed_precision: trained in fp32, as it is there, where only the optimizer is wrapped "
               "(train.precision has others)")
    if callbacks.reduce_lr_patience < training.epochs:
        yield ("callbacks.reduce_lr_patience: the learning rate stays as it is (train.schedule: plateau halves it "
               "after two epochs without gain)")
    if settings["train.patience"] is not None:
        yield ("callbacks.early_stopping_patience: goes by train.monitor, from the end of the warm-up on; there by the "
               "total loss from the start")
    if settings["data.manifest"] is None:
        yield "data: names no splats, so images are generated and splats fitted, unless data.manifest says otherwise"
    else:
        yield f"data: all splats below {settings['data.manifest']}, split by hash (data.split)"


def _listed(numbers: Sequence[int]) -> str:
    return "-".join(str(number) for number in numbers)


def resnet_filters(base: int) -> tuple[list[int], list[int]]:
    """Channels of the residual blocks of resnet1d, of its encoder and its decoder."""
    widths = [base * min(2**level, 4) for level in range(RESNET_BLOCKS)]
    return widths, widths[::-1]


def write(config: Config, name: str) -> dict[str, Any]:
    """A configuration in this form; read back, it is the same one.

    Raises :class:`InputError` for every setting that the form cannot express.
    """
    kind = config.model.kind
    if kind not in SPLAT_KINDS:
        raise InputError(no_place("model.kind", kind, NAME, "conv1d or resnet1d"))
    said = _meant(config)
    document: dict[str, Any] = {"experiment_name": name, "model": {"name": "conv1d"}, "training": {}, "data": {},
                                "callbacks": {}, "output_dir": f"outputs/{name}"}
    for ours, theirs in SAME.items():
        *place, key = theirs.split(".")
        reduce(dict.__getitem__, place, document)[key] = said[ours]
    if kind == "conv1d":
        document["model"] |= {key: said[f"model.{key}"] for key in OF_CONV1D}
    else:
        document["model"] |= _written_resnet(said["model.base_channels"])
    document["training"]["mixed_precision"] = False
    never = said["train.epochs"]
    document["callbacks"] = {"early_stopping_patience": said["train.patience"] or never, "reduce_lr_patience": never}
    if said["data.manifest"] is not None:
        document["data"] = {f"{part}_dir": str(Path(said["data.manifest"]) / part) for part in PARTS}
    faults = Faults()
    if kind == "conv1d":
        faults.said += [f"{key}: {shown(said[key])}: {NAME}'s conv1d has three levels"
                        for key in ("model.encoder_filters", "model.decoder_filters") if len(said[key]) != len(PARTS)]
    if said["data.manifest"] is not None and Path(said["data.manifest"]).suffix == ".csv":
        faults.said.append(no_place("data.manifest", said["data.manifest"], NAME, "a folder with train, dev and test"))
    with faults.kept():
        check_written(said, document, NAME, read, _meant)
    faults.tell()
    return {key: value for key, value in document.items() if value != {}}


def _written_resnet(base: int) -> dict[str, Any]:
    """All that it takes there: a resnet's keys have no defaults."""
    encoder, decoder = resnet_filters(base)
    return {"name": "resnet_conv1d", "encoder_filters": encoder, "decoder_filters": decoder,
            **{key: [KERNEL] * RESNET_BLOCKS for key in OF_RESNET[:2]},
            **{key: [0.0] * RESNET_BLOCKS for key in OF_RESNET[2:4]},
            **{key: [2] * (RESNET_BLOCKS - 1) + [None] for key in OF_RESNET[4:6]}, "encoder_dense_units": 512,
            "encoder_dense_dropout": 0.0, "decoder_dense_units": [512, 32 * 512], "decoder_reshape_target": [32, 512]}


def _meant(config: Config) -> dict[str, Any]:
    flat, default = meant(config), Config().flat()
    idle = ["train.sample_every"]
    if "kl" not in config.loss_weights:
        idle += ["loss.kl_reduction", "loss.kl_schedule", "loss.kl_warmup_epochs", "loss.kl_cycles", "loss.free_bits"]
    if config.data.manifest is not None:
        idle.append("data.generated")
    if config.train.patience is not None and config.train.patience >= config.train.epochs:
        flat["train.patience"] = None
    return flat | {key: default[key] for key in idle}
