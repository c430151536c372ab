"""The form of ImgiNav's experiment files: sections, keys, and which values say what is done here.

Everything that is absent has the source's default, which is ours, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from autoenc.checks import shown
from autoenc.settings import DataConfig, Filters, TrainConfig

SECTIONS = ("experiment", "dataset", "autoencoder", "training")
IMAGE_SIZE = 512                 # of the source's layouts, where no transform resizes them

# Ours -> theirs, where one value stands for one.
SAME = {
    "data.manifest": "dataset.manifest", "data.image_column": "dataset.outputs.rgb",
    "data.label_column": "dataset.outputs.label", "data.filters": "dataset.filters",
    "data.seed": "training.split_seed",
    **{f"model.{key}": f"autoencoder.encoder.{key}"
       for key in ("latent_channels", "base_channels", "downsampling_steps", "variational", "normalize_latents")},
    **{f"train.{key}": f"training.{key}" for key in ("seed", "epochs", "batch_size", "learning_rate", "weight_decay")},
    "train.patience": "training.early_stopping_patience", "train.min_delta": "training.early_stopping_min_delta",
    "train.sample_every": "training.sample_interval",
}
TWICE = {key: key for key in ("latent_channels", "base_channels", "activation", "norm_groups")} | {
    "downsampling_steps": "upsampling_steps", "normalize_latents": "denormalize_latents"}    # in encoder and decoder
WITHOUT_EFFECT = ("experiment.phase", "dataset.return_path", "training.num_workers", "training.shuffle",
                  "training.early_stopping_restore_best", "training.save_interval")
TYPES = {"rgb": "RGBHead", "segmentation": "SegmentationHead", "classification": "ClassificationHead"}
TERMS = {                        # loss weight -> type, key (a head's name), target (a data set's output)
    "mse": ("MSELoss", "rgb", "rgb"), "l1": ("L1Loss", "rgb", "rgb"),
    "segmentation": ("CrossEntropyLoss", "segmentation", "segmentation"),
    "classification": ("CrossEntropyLoss", "classification", "label"),
    "kl": ("KLDLoss", "mu", "logvar"), "standardization": ("LatentStandardizationLoss", "latent", "latent"),
}
OF_LATENTS = {"KLDLoss": "kl", "LatentStandardizationLoss": "standardization"}    # whatever key and target are called


def _as_pair(size: Any) -> Any:
    return [size, size] if type(size) is int else size


def _as_composite(loss: Any) -> Any:
    single = isinstance(loss, Mapping) and "losses" not in loss and loss.get("type") != "CompositeLoss"
    return {"type": "CompositeLoss", "losses": [loss]} if single else loss


class Form(BaseModel):
    """A section of an experiment file; what is absent has the source's default, which is ours, too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class About(Form):
    name: Annotated[str, Field(min_length=1)]
    phase: Any = None
    save_path: Any = None


class Outputs(Form):
    rgb: str
    segmentation: str | None = None
    label: str | None = None


class Step(Form):
    type: Literal["Resize", "ToTensor", "Normalize"]
    size: Annotated[list[int], BeforeValidator(_as_pair), Field(min_length=2, max_length=2)] | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


class Transform(Form):
    type: Literal["Compose"]
    transforms: list[Step]


class Dataset(Form):
    manifest: str
    outputs: Outputs
    filters: Filters = {}
    return_path: Any = None
    transform: Transform | None = None


class Half(Form):
    latent_channels: int
    base_channels: int
    activation: Literal["SiLU"] = "SiLU"
    norm_groups: Literal[8] = 8
    """at most; fewer where they do not divide the channels"""


class Encoder(Half):
    in_channels: Literal[3] = 3
    downsampling_steps: int
    variational: bool = False
    normalize_latents: bool = False


class Head(Form):
    type: Literal["RGBHead", "SegmentationHead", "ClassificationHead"]
    name: str
    out_channels: int | None = None
    num_classes: int | None = None
    final_activation: str | None = None

    @property
    def count(self) -> int | None:
        return self.out_channels if self.num_classes is None else self.num_classes


class Decoder(Half):
    upsampling_steps: int
    variational: bool | None = None
    denormalize_latents: bool = False
    heads: list[Head]


class Autoencoder(Form):
    encoder: Encoder
    decoder: Decoder


class Loss(Form):
    type: Literal["MSELoss", "L1Loss", "CrossEntropyLoss", "KLDLoss", "LatentStandardizationLoss"]
    key: str | None = None
    target: str | None = None
    weight: float = 1.0

    @property
    def term(self) -> str | None:
        """Which of our loss weights this is; None where there is no such term."""
        said = (self.type, self.key, self.target if self.target is not None else self.key)
        return OF_LATENTS.get(self.type) or next((term for term, known in TERMS.items() if known == said), None)


class Composite(Form):
    type: Literal["CompositeLoss"]
    losses: Annotated[list[Loss], Field(min_length=1)]


class Training(Form):
    seed: int = TrainConfig().seed
    train_split: Annotated[float, Field(gt=0, lt=1)] = DataConfig().split[0]
    split_seed: int = DataConfig().seed
    batch_size: int
    num_workers: Any = None
    shuffle: Any = None
    epochs: int
    learning_rate: float
    optimizer: Literal["AdamW"] = "AdamW"
    weight_decay: float = TrainConfig().weight_decay
    save_interval: Any = None
    sample_interval: int = TrainConfig().sample_every
    early_stopping_patience: int | None = None
    early_stopping_min_delta: float = TrainConfig().min_delta
    early_stopping_restore_best: Any = None
    loss: Annotated[Composite, BeforeValidator(_as_composite)]


class File(Form):
    experiment: About
    dataset: Dataset
    autoencoder: Autoencoder
    training: Training

    def at(self, key: str) -> Any:
        """The value, or the section, of a dotted key."""
        return reduce(getattr, key.split("."), self)

    @property
    def has_classes(self) -> bool:
        return self.dataset.outputs.segmentation is not None

    @property
    def image_size(self) -> int:
        steps = self.dataset.transform.transforms if self.dataset.transform else []
        return next((step.size[0] for step in steps if step.type == "Resize" and step.size), IMAGE_SIZE)


def conflicts(file: File) -> Iterator[str]:
    """What does not go together in a file, or with what is done here."""
    encoder, decoder, outputs = file.autoencoder.encoder, file.autoencoder.decoder, file.dataset.outputs
    pairs = [*TWICE.items(), *([("variational", "variational")] if decoder.variational is not None else [])]
    for ours, theirs in pairs:
        if getattr(encoder, ours) != getattr(decoder, theirs):
            yield (f"autoencoder.encoder.{ours}: {shown(getattr(encoder, ours))} and autoencoder.decoder.{theirs}: "
                   f"{shown(getattr(decoder, theirs))} disagree")
    if outputs.segmentation not in (None, outputs.rgb):
        yield (f"dataset.outputs.segmentation: {shown(outputs.segmentation)} should be the column of rgb, "
               f"{shown(outputs.rgb)}: classes are read from the images' colours")
    yield from _head_conflicts(decoder.heads, outputs)
    yield from _loss_conflicts(file.training.loss.losses, [head.name for head in decoder.heads])
    if file.dataset.transform:
        yield from _transform_conflicts(file.dataset.transform.transforms)


def _head_conflicts(heads: list[Head], outputs: Outputs) -> Iterator[str]:
    key = "autoencoder.decoder.heads"
    kinds = [head.type for head in heads]
    if "RGBHead" not in kinds:
        yield f"{key}: lacks RGBHead, which every figure is measured on"
    for kind in dict.fromkeys(kinds):
        if kinds.count(kind) > 1:
            yield f"{key}: {kind} is given {kinds.count(kind)} times"
    for at, head in enumerate(heads):
        here = f"{key}.{at}: {head.type}"
        name = next(name for name, kind in TYPES.items() if kind == head.type)
        if head.name != name:
            yield f"{here}: name: {shown(head.name)} should be {name!r}"
        activation = "tanh" if name == "rgb" else None
        if "final_activation" in head.model_fields_set and head.final_activation != activation:
            yield f"{here}: final_activation: {shown(head.final_activation)} should be {activation or 'null (logits)'}"
        if name == "rgb":
            if head.num_classes is not None or head.out_channels not in (None, 3):
                yield f"{here}: out_channels: {shown(head.count)} should be 3"
            continue
        if head.count is None or head.count < 1 or head.out_channels not in (None, head.count):
            yield (f"{here}: num_classes: {shown(head.num_classes)}, out_channels: {shown(head.out_channels)}: one of "
                   "them should say how many classes there are")
        output = TERMS[name][2]
        if getattr(outputs, output) is None:
            yield f"dataset.outputs: lacks {output}, which {here} is trained on"


def _loss_conflicts(losses: list[Loss], heads: list[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for at, loss in enumerate(losses):
        here = f"training.loss.losses.{at}: {loss.type}"
        if loss.term is None:
            known = " or ".join(f"key: {key}, target: {target}" for kind, key, target in TERMS.values()
                                if kind == loss.type)
            yield f"{here}: key: {shown(loss.key)}, target: {shown(loss.target)} should be {known}"
        elif loss.term in seen:
            yield f"{here}: the same loss as training.loss.losses.{seen[loss.term]}"
        elif loss.type not in OF_LATENTS and loss.key not in heads:
            yield f"{here}: key: autoencoder.decoder.heads has no head {loss.key!r}"
        seen.setdefault(loss.term or "", at)


def _transform_conflicts(steps: list[Step]) -> Iterator[str]:
    kinds = [step.type for step in steps]
    if kinds not in (["ToTensor", "Normalize"], ["Resize", "ToTensor", "Normalize"]):
        yield f"dataset.transform: {', '.join(kinds) or 'nothing'} should be Resize, ToTensor, Normalize"
    for step in steps:
        if step.type == "Resize" and (not step.size or step.size[0] != step.size[1]):
            yield f"dataset.transform: Resize: size: {shown(step.size)} should be a square's, like [256, 256]"
        if step.type == "Normalize" and not step.mean == step.std == [0.5] * 3:
            yield (f"dataset.transform: Normalize: mean: {shown(step.mean)}, std: {shown(step.std)} should both be "
                   "[0.5, 0.5, 0.5]: images are in [-1, 1]")
