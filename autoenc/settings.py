"""The settings of one training, by section: data, model, loss, train. Every default stands once, here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autoenc import figures
from autoenc.checks import Conflict, Scalar
from autoenc.errors import did_you_mean

STANDARDIZATION = 0.1            # weight of the loss of model.normalizer: loss, as the source's author ended with
HEADS = ("rgb", "segmentation", "classification")
TERMS = ("mse", "l1", "splats", "segmentation", "classification", "kl", "standardization")       # weights among loss.…
RESNET_BLOCKS = 5                # of resnet1d, each way
SPLAT_HIDDEN = 512               # units of the dense layer on either side of a splat model's latent
SPLAT_ENTRY = 4                  # numbers a splat that its decoder's convolutions start from
SPLAT_KERNEL = 5
SPLAT_KINDS = ("conv1d", "resnet1d")
SPLAT_COLUMNS = {"raw": 8, "canonical": 9, "logcov": 8}      # numbers of a splat, by model.splat_target


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
Filters1d = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], BeforeValidator(_as_tuple),
                      Field(min_length=1, max_length=8)]
Rates = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_as_tuple)]
Heads = Annotated[tuple[Literal["rgb", "segmentation", "classification"], ...], BeforeValidator(_as_tuple),
                  AfterValidator(_check_heads)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    source: Literal["layouts", "manifest", "folder", "splats"] = "layouts"
    """layouts: generated; manifest: a CSV file; folder: a folder of images, labels from its sub-folders; splats: images
    as 2D Gaussians, out of .npz files or fitted to images"""
    manifest: str | None = None
    """the CSV file (source manifest) or the folder (source folder); for splats either of them, of images or .npz files,
    or none: splats are fitted to data.generated"""
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
    """side of the square images, pixels; of those that splats are fitted to and rendered as"""
    splats: Annotated[int, Field(ge=8, le=65_536)] = 512
    """splats an image (source splats)"""
    curve: Literal["hilbert", "morton"] = "hilbert"
    """the space-filling curve that splats are sorted along"""
    generated: Literal["compositions", "layouts"] = "compositions"
    """what splats are fitted to where data.manifest names nothing: abstract compositions, or floor plans"""
    refine: Annotated[int, Field(ge=0, le=10_000)] = 0
    """gradient steps through the renderer after splats were fitted to an image"""
    fit: Literal["crop", "pad"] = "pad"
    """how an image that is not square becomes so: cut at the centre, or padded"""
    limit: Annotated[int, Field(ge=3, le=10_000_000)] | None = None
    """so many items, chosen by hash of their names, not the first rows; of what is generated: how many"""
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
        if self.source in ("manifest", "folder") and self.manifest is None:
            what = "a CSV file" if self.source == "manifest" else "a folder of images"
            raise Conflict(f"data.manifest: source {self.source!r} needs it: the path of {what}")
        return self


class ModelConfig(Section):
    kind: Literal["conv2d", "conv1d", "resnet1d", "custom"] = "conv2d"
    """conv2d: images to a grid of latent vectors; conv1d, resnet1d: splats to one vector; custom: model.target"""
    latent_channels: Annotated[int, Field(ge=1, le=4096)] = 8
    base_channels: Annotated[int, Field(ge=1, le=1024)] = 32
    """channels of the first level; they double per level (of resnet1d to four times as many)"""
    downsampling_steps: Annotated[int, Field(ge=1, le=8)] = 4
    """levels; the latent's side is image_size / 2**steps"""
    latent_dim: Annotated[int, Field(ge=1, le=65_536)] = 256
    """numbers of the latent (conv1d, resnet1d)"""
    pool: Literal["mean", "none"] = "mean"
    """between the convolutions and the latent of conv1d and resnet1d. mean: over the sequence, which forgets the order;
    none: everything is flattened"""
    splat_target: Literal["raw", "canonical", "logcov"] = "raw"
    """the coordinates in which splats are learnt. raw: as they are, the angle as a number; canonical: longer axis
    first, log scales, anisotropy times cosine and sine of twice the angle; logcov: the covariance's logarithm"""
    encoder_filters: Filters1d = (32, 64, 128)
    """of the convolutions of conv1d, each followed by a pooling of 2"""
    decoder_filters: Filters1d = (64, 32, 16)
    """of the convolutions of conv1d's decoder, each of which doubles the sequence"""
    dropout_rates: Rates = (0.1, 0.15, 0.2)
    """after each convolution of conv1d's encoder"""
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
    """normalisation of the layers. batch: statistics of the batch while training, running ones otherwise; what models
    of splats learn with"""
    init: Literal["default", "xavier", "kaiming"] = "default"
    """weights of the layers at the start: torch's own (default), xavier_uniform_, kaiming_normal_; the latter two with
    biases 0"""
    target: str | None = None
    """package.module:Class of a model of one's own (kind custom)"""
    settings: dict[str, Scalar | list[Scalar]] = {}
    """what it is built from, as keyword arguments"""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.kind == "custom" and self.target is None:
            raise Conflict("model.target: kind 'custom' needs it: package.module:Class")
        if self.kind == "conv1d" and len(self.dropout_rates) != len(self.encoder_filters):
            raise Conflict(f"model.dropout_rates: {list(self.dropout_rates)}: should be one for each of "
                           f"model.encoder_filters {list(self.encoder_filters)}")
        return self


class CustomTerm(Section):
    target: str
    """package.module:function"""
    weight: Weight = 1.0

    @property
    def name(self) -> str:
        """Of the term in figures: the function's."""
        return self.target.rpartition(":")[2]


Terms = Annotated[tuple[CustomTerm, ...], BeforeValidator(_as_tuple)]


class LossConfig(Section):
    """Weights of the loss terms, 0 leaves a term out; and what shapes the KL divergence."""

    mse: Weight = 1.0
    l1: Weight = 0.0
    splats: Weight = 0.0
    """of the splats' squared error by groups (position, scale, rotation, colour), each of which weighs the same; conv1d
    and resnet1d only, where mse and l1 are of the rendered image, which is rendered only if one of them weighs
    something"""
    group_reduction: Literal["sum", "mean"] = "sum"
    """of the squared errors within a group, each divided by its columns: their sum; or their mean, which divides by the
    columns a second time"""
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
    custom: Terms = ()
    """further terms of one's own: [{target: package.module:function, weight: 0.1}, …]"""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not any((self.mse, self.l1, self.splats, self.segmentation, self.classification, self.custom)):
            raise Conflict("loss: every weight is 0, so there is nothing to train for")
        if self.kl_schedule == "linear" and self.kl_warmup_epochs == 0:
            raise Conflict("loss.kl_warmup_epochs: 0: loss.kl_schedule linear needs 1 or more")
        if self.optimal_variance and (self.mse == 0) == (self.splats == 0):
            raise Conflict(f"loss.mse: {self.mse:g}: with loss.optimal_variance it weighs the likelihood (of splats "
                           "loss.splats does), and one of the two should be above 0")
        names = [term.name for term in self.custom]
        for name in names:
            if names.count(name) > 1 or name in (*TERMS, "optimal_variance"):
                raise Conflict(f"loss.custom: {name!r}: there is another term of that name")
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
