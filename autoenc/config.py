"""The typed configuration of one training: data, model, loss, train (see autoenc.settings for each of them).

Keys are written dotted (``loss.kl``) wherever a single setting is named: on the command line, in arms and spaces, in
tables. Unknown keys and values of the wrong type are errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from autoenc import figures
from autoenc.checks import Conflict, Faults, describe, shown
from autoenc.custom import check_target, said_of, source_digest
from autoenc.errors import InputError, did_you_mean
from autoenc.settings import (
    HEADS,
    RESNET_BLOCKS,
    SPLAT_COLUMNS,
    SPLAT_KINDS,
    STANDARDIZATION,
    TERMS,
    DataConfig,
    LossConfig,
    ModelConfig,
    Section,
    TrainConfig,
)
from autoenc.yamlfile import read_yaml


class Config(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_kind()
        for head in ("segmentation", "classification"):
            weight = getattr(self.loss, head)
            if weight > 0 and head not in self.heads:
                raise Conflict(f"loss.{head}: weight {weight} for a head that model.heads "
                                 f"({', '.join(self.heads)}) leaves out")
        if self.model.norm == "batch" and self.train.batch_size == 1:
            raise Conflict("train.batch_size: 1: model.norm batch takes statistics over a batch, so it needs 2 or more")
        if self.counted_from > self.train.epochs:
            key, least = ("kl_cycles", 2 * self.loss.kl_cycles) if self.kl_schedule == "cyclical" else (
                "kl_warmup_epochs", self.counted_from)
            raise Conflict(f"train.epochs: {self.train.epochs}: no epoch is trained wholly at the KL's final weight "
                           f"with loss.{key} {getattr(self.loss, key)}; that takes {least} epochs or more")
        return self

    def _check_kind(self) -> None:
        kind, source, steps = self.model.kind, self.data.source, self.model.downsampling_steps
        if (source == "splats") != (kind in SPLAT_KINDS):
            takes = "splats (data.source splats)" if kind in SPLAT_KINDS else "images"
            raise Conflict(f"model.kind: {kind!r} takes {takes}, and data.source is {source!r}"
                           + (f": {' and '.join(SPLAT_KINDS)} take splats" if source == "splats" else ""))
        if kind == "conv2d" and self.data.image_size % 2**steps:
            raise Conflict(f"data.image_size: {self.data.image_size} is not divisible by {2**steps} "
                           f"(2 to the power of model.downsampling_steps, {steps})")
        if kind in SPLAT_KINDS:
            if self.data.splats % self.splats_divisor:
                raise Conflict(f"data.splats: {self.data.splats} is not divisible by {self.splats_divisor}, by which "
                               f"model.kind {kind} shortens the sequence")
            if len(self.heads) > 1:
                raise Conflict(f"model.heads: {list(self.heads)}: model.kind {kind} has rgb alone, and no loss."
                               f"{self.heads[1]}")
        elif self.loss.splats > 0:
            raise Conflict(f"loss.splats: {self.loss.splats:g}: model.kind {kind!r} gives no splats")
        for term in self.loss.custom:
            if term.name in BESIDE_TERMS or f"train/{term.name}" in figures.MODES:
                raise Conflict(f"loss.custom: {term.target!r}: {term.name} is the name of a figure; call the function "
                               "otherwise")

    @property
    def takes_splats(self) -> bool:
        """Whether the model encodes splats."""
        return self.model.kind in SPLAT_KINDS

    @property
    def splat_filters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of the levels of a splat model's encoder, outermost first, and of its decoder, innermost first."""
        model = self.model
        if model.kind == "conv1d":
            return model.encoder_filters, model.decoder_filters
        widths = tuple(model.base_channels * min(2**level, 4) for level in range(RESNET_BLOCKS))
        return widths, widths[::-1]

    @property
    def splats_divisor(self) -> int:
        """What the number of splats must be divisible by."""
        return 2**max(map(len, self.splat_filters))

    @property
    def elements(self) -> int:
        """The numbers of an image, or of its splats, that a likelihood is over: D of the evidence lower bound."""
        if self.takes_splats:
            return self.data.splats * SPLAT_COLUMNS[self.model.splat_target]
        return 3 * self.data.image_size**2

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """(C, h, w), or (D,) of a vector; None where only the model knows (kind custom)."""
        model = self.model
        if model.kind == "custom":
            return None
        if self.takes_splats:
            return (model.latent_dim,)
        side = self.data.image_size // 2**model.downsampling_steps
        return model.latent_channels, side, side

    @property
    def heads(self) -> tuple[str, ...]:
        """The decoder heads, in a fixed order, the default resolved."""
        if self.model.heads is not None:
            return tuple(head for head in HEADS if head in self.model.heads)
        return tuple(head for head in HEADS if head == "rgb" or getattr(self.loss, head) > 0)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss terms that take part, with their weights; ``kl`` (at its full weight) only for a variational model,
        as is ``optimal_variance``, which then stands for ``mse``."""
        weights = {name: getattr(self.loss, name) for name in TERMS if getattr(self.loss, name)}
        if self.loss.standardization is None and self.model.normalize_latents and self.model.normalizer == "loss":
            weights["standardization"] = STANDARDIZATION
        if not self.model.variational:
            weights.pop("kl", None)
        elif self.loss.optimal_variance:
            weights["optimal_variance"] = weights.pop("splats" if "splats" in weights else "mse")
        return weights | {term.name: term.weight for term in self.loss.custom if term.weight}

    @property
    def kl_schedule(self) -> str:
        """``loss.kl_schedule``; constant where there is no KL to weigh."""
        return self.loss.kl_schedule if "kl" in self.loss_weights else "constant"

    @property
    def kl_reduction(self) -> str:
        """``loss.kl_reduction``; sum with ``loss.optimal_variance``."""
        return "sum" if self.loss.optimal_variance else self.loss.kl_reduction

    @property
    def counted_from(self) -> int:
        """The first epoch (from 1) that is trained wholly at the KL's final weight: those before it count neither for
        the best epoch nor for patience, as their figures are of another objective."""
        if self.kl_schedule == "linear":
            return self.loss.kl_warmup_epochs + 1
        if self.kl_schedule == "cyclical":           # the last half of the last cycle, rounded up to whole epochs
            halves = 2 * self.loss.kl_cycles
            return -(-self.train.epochs * (halves - 1) // halves) + 1
        return 1

    @property
    def as_trained(self) -> Config:
        """What trains. Where latents are standardised after training only (``exact``, and ``loss``, whose loss is a
        term like others), that is the plain autoencoder: its training is shared with those that do not standardise."""
        if not self.model.normalize_latents or self.model.normalizer in ("running", "learned"):
            return self
        weight = self.loss_weights.get("standardization", 0.0)
        return self.model_copy(update={"model": self.model.model_copy(update={"normalize_latents": False}),
                                       "loss": self.loss.model_copy(update={"standardization": weight})})

    def identity(self) -> dict[str, Any]:
        """Everything here that can change an epoch's result, and nothing else: part of a trajectory's key.

        Out of it: paths and names (the decoded data has a fingerprint of its own), and what only decides when to stop.
        A setting added later goes in only where it differs from what was done before it existed, so that stored
        trajectories keep their keys.
        """
        model = {key: getattr(self.model, key) for key in ("kind", *OF_KIND[self.model.kind], "variational")}
        model = {key: list(value) if isinstance(value, tuple) else value for key, value in model.items()}
        model["heads"] = list(self.heads)
        if self.model.variational:
            model["latent"] = self.model.latent
        if self.model.normalize_latents and self.model.normalizer in ("running", "learned"):
            model["normalizer"] = self.model.normalizer
        train = {key: getattr(self.train, key)
                 for key in ("batch_size", "learning_rate", "weight_decay", "seed", "precision", "monitor")}
        if self.train.schedule != "constant":
            train["schedule"] = self.train.schedule
        if self.train.schedule == "cosine":
            train["epochs"] = self.train.epochs
        if self.train.schedule == "plateau":
            train["min_delta"] = self.train.min_delta
        if self.train.ema is not None:
            train["ema"] = self.train.ema
        for key in ("norm", "init"):
            if getattr(self.model, key) != ModelConfig.model_fields[key].default:
                model[key] = getattr(self.model, key)
        if self.kl_schedule == "cyclical":
            train["epochs"] = self.train.epochs
        loss = self.loss_weights | self._kl_identity()
        if self.loss.splats and self.loss.group_reduction != "sum":
            loss["group_reduction"] = self.loss.group_reduction
        return {"model": model, "loss": loss, "train": train} | self._own_sources()

    @property
    def own(self) -> list[tuple[str, str, str]]:
        """What is one's own here and takes part: (setting, target, class or function)."""
        terms = [("loss.custom", term.target, "function") for term in self.loss.custom if term.weight]
        return [("model.target", self.model.target, "class"), *terms] if self.model.kind == "custom" else terms

    def _own_sources(self) -> dict[str, Any]:
        """The source texts of what is one's own, by target, as digests."""
        found = {}
        for key, target, _ in self.own:
            with said_of(key):
                found[target] = source_digest(target)
        return {"sources": dict(sorted(found.items()))} if found else {}

    def _kl_identity(self) -> dict[str, Any]:
        """What shapes the KL, where there is one, as far as it is not the plain mean at a constant weight. (An optimal
        variance shows in the weights.)"""
        if "kl" not in self.loss_weights:
            return {}
        shape: dict[str, Any] = {}
        if self.kl_reduction == "sum" and not self.loss.optimal_variance:
            shape["kl_reduction"] = "sum"
        if self.kl_schedule != "constant":
            length = "kl_warmup_epochs" if self.kl_schedule == "linear" else "kl_cycles"
            shape |= {"kl_schedule": self.kl_schedule, length: getattr(self.loss, length)}
        if self.loss.free_bits:
            shape["free_bits"] = self.loss.free_bits
        return shape

    def flat(self) -> dict[str, Any]:
        """All settings by dotted key, as plain values that YAML and JSON hold."""
        return {f"{section}.{key}": value for section, part in self.model_dump(mode="json").items()
                for key, value in part.items()}

    def nested(self) -> dict[str, dict[str, Any]]:
        """All settings as nested mappings of plain values: what a ``config:`` in YAML holds."""
        return nest(self.flat())


# What shapes a model of each kind, beside what all have: part of its identity.
OF_KIND = {"conv2d": ("latent_channels", "base_channels", "downsampling_steps"),
           "conv1d": ("latent_dim", "pool", "splat_target", "encoder_filters", "decoder_filters", "dropout_rates"),
           "resnet1d": ("latent_dim", "pool", "splat_target", "base_channels"),
           "custom": ("target", "settings")}
SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig,
                                      "train": TrainConfig}
KEYS = tuple(f"{section}.{key}" for section, part in SECTIONS.items() for key in part.model_fields)
BESIDE_TERMS = ("kl_free", "palette_classes", "segmentation_classes")      # measured with the terms of a split
WITHOUT_EFFECT = ("data.cache_dir", "train.sample_every")         # on any figure or weight
PATH_KEYS = ("data.manifest", "data.palette", "data.cache_dir")
BESIDE_CONFIG = ("config", "provenance", "description",           # in a best_config.yaml; in a base file or preset
                 "search", "asha", "objective", "decision", "resources")


def flatten(settings: Any, where: str) -> dict[str, Any]:
    """Settings by dotted key, from nested mappings, dotted keys or both.

    Raises :class:`InputError` for anything that names no setting; ``where`` says whose they are.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise InputError(f"{where}: {shown(settings)} should be a mapping of settings, like {{train: {{epochs: 10}}}}")
    flat: dict[str, Any] = {}
    said: list[str] = []
    for key, value in settings.items():
        if key not in SECTIONS:
            inner = {str(key): value}
        elif isinstance(value, Mapping):
            inner = {f"{key}.{name}": item for name, item in value.items()}
        else:
            inner = {}
            said.append(f"{key}: {shown(value)} should be a mapping of its settings"
                        f" ({', '.join(SECTIONS[key].model_fields)})")
        for name, item in inner.items():
            if name not in KEYS:
                said.append(f"{shown(name)} is no setting{_near_key(name)}")
            elif name in flat:
                said.append(f"{name} is given twice")
            else:
                flat[name] = item
    if said:
        raise InputError("\n".join(f"{where}: {line}" for line in said))
    return flat


def _near_key(name: str) -> str:
    by_leaf = [key for key in KEYS if key.split(".")[1] == name]
    section = name.split(".")[0]
    return did_you_mean(name, by_leaf or ([key for key in KEYS if key.startswith(section + ".")]
                                          if section in SECTIONS else [*KEYS, *SECTIONS]))


def nest(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested mappings from dotted keys, in the order of the keys."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, name = key.split(".", 1)
        nested.setdefault(section, {})[name] = value
    return nested


def make_config(flat: Mapping[str, Any], where: str) -> Config:
    """The configuration of these settings, all others at their defaults. Raises :class:`InputError`."""
    try:
        return Config.model_validate(nest(flat))
    except ValidationError as error:
        raise InputError(describe(error, where, Config)) from None


def check_values(flat: Mapping[str, Any], where: str) -> None:
    """Raise :class:`InputError` for values that no configuration can hold, whatever the other settings are."""
    try:
        Config.model_validate(nest(flat))
    except ValidationError as error:
        if said := describe(error, where, Config, alone=True):
            raise InputError(said) from None


def absolute_paths(flat: Mapping[str, Any], folder: Path, where: str = "") -> dict[str, Any]:
    """The same settings with relative paths made absolute from ``folder``; ``~`` is the home folder.

    Raises :class:`InputError` where there is no such home folder.
    """
    absolute = dict(flat)
    for key in PATH_KEYS:
        value = flat.get(key)
        if isinstance(value, str):
            try:
                absolute[key] = os.path.realpath(folder / Path(value).expanduser())
            except (RuntimeError, OSError, ValueError) as error:
                raise InputError(f"{where + ': ' if where else ''}{key}: {shown(value)}: {error}") from None
    return absolute


def load_config(path: str | Path) -> Config:
    """Read one configuration: a ``best_config.yaml``, any YAML file with ``config:`` or the sections themselves, or an
    experiment file (autoenc.interop).

    Paths in it are relative to the file. Raises :class:`InputError`.
    """
    from autoenc.interop import is_experiment, read_experiment  # which builds on this module

    content = read_yaml(path)
    if is_experiment(content):
        return make_config(read_experiment(content, Path(path)).settings, str(path))
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: should hold a configuration: config: {{data: …, model: …, loss: …, train: …}}")
    if any(key in content for key in ("name", "inherits", "arms", "space")):
        raise InputError(f"{path}: is a sweep, not one configuration; run it with: python tune_runner.py {path}")
    settings = content
    if "config" in content:
        settings = content["config"]
        for key in content:
            if key not in BESIDE_CONFIG:
                raise InputError(f"{path}: unknown key {shown(key)} beside config"
                                 + (f": it belongs into it, as config: {{{key}: …}}" if key in SECTIONS
                                    else did_you_mean(key, BESIDE_CONFIG)))
    flat = flatten(settings, str(path))
    return make_config(absolute_paths(flat, Path(path).resolve().parent, str(path)), str(path))


def check_own(config: Config, where: str) -> None:
    """Raise :class:`InputError` for a model or loss term of one's own that is not there. Nothing of it is imported."""
    faults = Faults()
    for key, target, kind in config.own:
        with faults.kept(), said_of(f"{where}: {key}"):
            check_target(target, kind)
    faults.tell()


def own_sources(settings: Mapping[str, Any]) -> dict[str, str]:
    """The source texts, as digests, of what is one's own among some settings by dotted key; of what is there."""
    targets = [term["target"] for term in settings.get("loss.custom", ()) if term.get("weight", 1)]
    if settings.get("model.target") and settings.get("model.kind", "custom") == "custom":
        targets.append(settings["model.target"])
    found = {}
    for target in targets:
        with suppress(InputError):
            found[target] = source_digest(target)
    return found


def check_heads(config: Config, classes: int, labels: int) -> None:
    """Raise :class:`InputError` for heads, or a monitored figure, that this data cannot serve.

    ``classes`` is the number of segmentation classes, ``labels`` that of image labels (0: the data has none).
    """
    problems = []
    for head, have, need, what in (("segmentation", classes, 1, "segmentation classes (data.palette)"),
                                   ("classification", labels, 2, "two or more labels (data.label_column)")):
        weight = getattr(config.loss, head)
        if head in config.heads and have < need:
            drop = f"loss.{head}=0" if weight > 0 else f"{head!r} left out of model.heads"
            if weight > 0 and config.model.heads is not None:
                drop += f" and {head!r} left out of model.heads"
            source = f"loss.{head}: {weight}" if weight > 0 else f"model.heads: {list(config.heads)}"
            problems.append(f"{source}: the {head} head needs {what}, and the data has "
                            f"{have or 'none'}; without the head: {drop}")
    name = config.train.monitor.removeprefix("val/")
    needs = {"mse_sampled": (config.model.variational, "model.variational=true"),
             "palette_miou": (classes > 0, "segmentation classes (data.palette)")}
    needs.update(dict.fromkeys(("kl", "kl_nats", "nelbo"), needs["mse_sampled"]))
    needs["log_sigma"] = ("optimal_variance" in config.loss_weights, "model.variational=true and "
                          "loss.optimal_variance=true")
    needs.update(dict.fromkeys(("splats", *figures.OF_SPLATS), (
        config.takes_splats, f"model.kind {' or '.join(SPLAT_KINDS)}")))
    for head in ("segmentation", "classification"):
        if name.startswith(head):
            needs[name] = (head in config.heads, f"the {head} head (loss.{head} above 0, or model.heads)")
    served, what = needs.get(name, (True, ""))
    if not served:
        problems.append(f"train.monitor: {config.train.monitor!r} is reported only with {what}")
    if problems:
        raise InputError("\n".join(problems))
