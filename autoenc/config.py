"""The typed configuration of one training: data, model, loss, train.

Every default stands once, here. Keys are written dotted (``loss.kl``) wherever a single setting is named:
on the command line, in arms and spaces, in tables. Unknown keys and values of the wrong type are errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autoenc import figures
from autoenc.checks import Conflict, Scalar, describe, shown
from autoenc.errors import InputError, did_you_mean
from autoenc.yamlfile import read_yaml

STANDARDIZATION = 0.1            # weight of the loss of model.normalizer: loss, as the source's author ended with
HEADS = ("rgb", "segmentation", "classification")
TERMS = ("mse", "l1", "segmentation", "classification", "kl", "standardization")       # weights among loss.…


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_lists(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: accepted if isinstance(accepted, list) else [accepted] for key, accepted in value.items()}


def _check_split(split: tuple[float, ...]) -> tuple[float, ...]:
    if any(share < 0 for share in split) or abs(sum(split) - 1) > 1e-6:
        raise ValueError("should be three shares that sum to 1")
    if split[0] == 0 or split[1] == 0:
        raise ValueError("leaves nothing to train on or to validate with")
    return split


def _check_heads(heads: tuple[str, ...]) -> tuple[str, ...]:
    if "rgb" not in heads:
        raise ValueError("lacks 'rgb', which every figure is measured on")
    if len(set(heads)) < len(heads):
        raise ValueError("names a head twice")
    return heads


def _check_monitor(name: str) -> str:
    if name not in figures.MONITORED:
        raise ValueError(f"is no figure of the validation split{did_you_mean(name, figures.MONITORED)}")
    return name


Weight = Annotated[float, Field(ge=0, le=1e6)]
Split = Annotated[tuple[float, float, float], BeforeValidator(_as_tuple), AfterValidator(_check_split)]
Filters = Annotated[dict[str, list[Scalar]], BeforeValidator(_as_lists)]
Heads = Annotated[tuple[Literal["rgb", "segmentation", "classification"], ...], BeforeValidator(_as_tuple),
                  AfterValidator(_check_heads)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    source: Literal["layouts", "manifest", "folder"] = "layouts"
    """layouts: generated; manifest: a CSV file; folder: a folder of images, labels from its sub-folders"""
    manifest: str | None = None
    """the CSV file (source manifest) or the folder (source folder)"""
    image_column: str = "layout_path"
    """manifest column with image paths, relative to the manifest"""
    label_column: str | None = "type"
    """manifest column with class labels; none: no labels"""
    filters: Filters = {}
    """manifest rows to keep: column -> accepted values (or the one)"""
    palette: str | None = None
    """YAML file {class: {rgb: [r, g, b], class_index: i}}; none: no segmentation (layouts bring their own)"""
    palette_tolerance: Annotated[float, Field(ge=0, le=442)] = 30.0
    """largest RGB distance to a palette colour; pixels farther off are ignored"""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 64
    """side of the square images, pixels"""
    fit: Literal["crop", "pad"] = "pad"
    """how an image that is not square becomes so: cut at the centre, or padded"""
    limit: Annotated[int, Field(ge=3, le=10_000_000)] | None = None
    """so many items, chosen by hash of their names, not the first rows; for layouts: how many to generate"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """of the split, the choice under a limit, and generated layouts"""
    split: Split = (0.8, 0.1, 0.1)
    """shares of train, val, test"""
    cache_dir: str | None = None
    """where decoded data is kept; none: $AUTOENC_CACHE, else ~/.cache/autoenc"""
    allow_outside: bool = False
    """accept manifest paths that lead out of the manifest's folder"""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.source != "layouts" and self.manifest is None:
            what = "a CSV file" if self.source == "manifest" else "a folder of images"
            raise Conflict(f"data.manifest: source {self.source!r} needs it: the path of {what}")
        return self


class ModelConfig(Section):
    kind: Literal["conv2d"] = "conv2d"
    latent_channels: Annotated[int, Field(ge=1, le=4096)] = 8
    base_channels: Annotated[int, Field(ge=1, le=1024)] = 32
    """channels of the first level; they double per level"""
    downsampling_steps: Annotated[int, Field(ge=1, le=8)] = 4
    """levels; the latent's side is image_size / 2**steps"""
    variational: bool = False
    latent: Literal["mean", "sample"] = "mean"
    """what a VAE's encode() returns as the latent"""
    normalize_latents: bool = False
    """encode() returns latents with mean 0 and standard deviation 1 per channel, decode() takes them"""
    normalizer: Literal["exact", "running", "loss", "learned"] = "exact"
    """how. exact: by statistics of the finished model over the training split; running: also by running statistics
    while it trains; loss: also by a loss (loss.standardization); learned: shift and scale are trained through
    normalising and its inverse, which gives them no gradient: as the source did, to compare with"""
    heads: Heads | None = None
    """decoder heads; none: rgb, and those whose loss weight is above 0"""
    norm: Literal["group", "batch"] = "group"
    """normalisation of the layers. batch: statistics of the batch while training, running ones otherwise"""
    init: Literal["default", "xavier", "kaiming"] = "default"
    """weights of the layers at the start: torch's own (default), xavier_uniform_, kaiming_normal_; the latter two with
    biases 0"""


class LossConfig(Section):
    """Weights of the loss terms, 0 leaves a term out; and what shapes the KL divergence."""

    mse: Weight = 1.0
    l1: Weight = 0.0
    segmentation: Weight = 0.0
    classification: Weight = 0.0
    kl: Weight = 0.0
    """full weight of the KL divergence from N(0, 1); like what shapes it, without effect unless model.variational"""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """mean: nats, mean over latent dimensions; sum: nats summed over them, divided by the numbers of an image: beside
    mse, which is a mean over those, a weight then means the same at every latent size"""
    kl_schedule: Literal["constant", "linear", "cyclical"] = "constant"
    """of the KL's weight. linear: from 0 to loss.kl over loss.kl_warmup_epochs; cyclical: in each of loss.kl_cycles
    from 0 to loss.kl over one half, then held. Only epochs trained wholly at the final weight count for the best epoch,
    for patience, and where trials are compared"""
    kl_warmup_epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    """length of the linear schedule, epochs"""
    kl_cycles: Annotated[int, Field(ge=1, le=100_000)] = 4
    """of the cyclical schedule, over train.epochs"""
    free_bits: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """nats per latent channel (summed over its positions, batch mean) below which the KL has no gradient"""
    optimal_variance: bool = False
    """instead of mse, the Gaussian likelihood at the batch's best variance (sigma-VAE), weighted by loss.mse; the KL is
    reduced by sum: with both weights 1, the evidence lower bound per number of an image"""
    standardization: Weight | None = None
    """per channel, squared mean plus squared difference of the standard deviation from 1; none: 0.1 with
    model.normalizer loss, else 0"""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not any((self.mse, self.l1, self.segmentation, self.classification)):
            raise Conflict("loss: every weight is 0, so there is nothing to train for")
        if self.kl_schedule == "linear" and self.kl_warmup_epochs == 0:
            raise Conflict("loss.kl_warmup_epochs: 0: loss.kl_schedule linear needs 1 or more")
        if self.optimal_variance and self.mse == 0:
            raise Conflict("loss.mse: 0: with loss.optimal_variance it weighs the likelihood, and should be above 0")
        return self


class TrainConfig(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """of AdamW"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    patience: Annotated[int, Field(ge=1, le=100_000)] | None = 3
    """epochs without improvement of the monitored figure before training ends; none: never"""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """smallest change of the monitored figure that counts as improvement (absolute)"""
    monitor: Annotated[str, AfterValidator(_check_monitor)] = "val/mse"
    """the figure that names the best epoch and that patience watches"""
    stop_on_collapse: bool = False
    """end a VAE's training once no dimension of its latent has been active for three epochs that count"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp16 needs a GPU"""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """of the learning rate: cosine falls towards 0 over train.epochs; plateau halves after two epochs without gain"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay per step of an exponential moving average of the weights, which then is the model; none: no average"""
    sample_every: Annotated[int, Field(ge=0, le=100_000)] = 5
    """sample images at the first epoch and every so many; 0: never"""


class Config(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        steps, size = self.model.downsampling_steps, self.data.image_size
        if size % 2**steps:
            raise Conflict(f"data.image_size: {size} is not divisible by {2**steps} "
                             f"(2 to the power of model.downsampling_steps, {steps})")
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
            weights["optimal_variance"] = weights.pop("mse")
        return weights

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
        model = {"kind": self.model.kind, "latent_channels": self.model.latent_channels,
                 "base_channels": self.model.base_channels, "downsampling_steps": self.model.downsampling_steps,
                 "variational": self.model.variational, "heads": list(self.heads)}
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
        return {"model": model, "loss": self.loss_weights | self._kl_identity(), "train": train}

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
        return {f"{section}.{key}": list(value) if isinstance(value, tuple) else value
                for section, part in self for key, value in part}

    def nested(self) -> dict[str, dict[str, Any]]:
        """All settings as nested mappings of plain values: what a ``config:`` in YAML holds."""
        return nest(self.flat())


SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig,
                                      "train": TrainConfig}
KEYS = tuple(f"{section}.{key}" for section, part in SECTIONS.items() for key in part.model_fields)
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
    experiment file of ImgiNav.

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
    for head in ("segmentation", "classification"):
        if name.startswith(head):
            needs[name] = (head in config.heads, f"the {head} head (loss.{head} above 0, or model.heads)")
    served, what = needs.get(name, (True, ""))
    if not served:
        problems.append(f"train.monitor: {config.train.monitor!r} is reported only with {what}")
    if problems:
        raise InputError("\n".join(problems))
