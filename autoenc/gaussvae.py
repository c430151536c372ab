"""The form of GaussVAE's configuration files, of VAEs over 512 splats: sections, keys, and what its code does whatever
they say.

Everything that is absent has that project's default. Keys and defaults: github.com/rokocuba/GaussVAE-showcase,
src/gaussvae/training/config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from autoenc.checks import shown
from autoenc.imginav import Form
from autoenc.settings import Filters1d, ModelConfig, Rates

NAMES = {"conv1d": "conv1d", "resnet": "resnet1d"}       # how model.name begins -> model.kind
KERNEL = 5

SAME = {
    "model.latent_dim": "model.latent_dim", "train.batch_size": "training.batch_size",
    "train.epochs": "training.epochs", "train.learning_rate": "training.learning_rate",
    "loss.kl": "training.max_beta", "loss.kl_warmup_epochs": "training.beta_warmup_epochs",
    "train.patience": "callbacks.early_stopping_patience", "train.seed": "seed",
}
OF_CONV1D = ("encoder_filters", "decoder_filters", "dropout_rates")
OF_RESNET = ("encoder_kernel_sizes", "decoder_kernel_sizes", "encoder_dropout_rates", "decoder_dropout_rates",
             "encoder_pool_sizes", "decoder_upsample_sizes", "encoder_dense_units", "encoder_dense_dropout",
             "decoder_dense_units", "decoder_reshape_target")
FIXED: dict[str, Any] = {
    "data.source": "splats", "data.splats": 512, "data.curve": "morton",
    "model.pool": "mean", "model.splat_target": "raw", "model.variational": True, "model.normalize_latents": False,
    "model.norm": "batch", "model.init": "xavier",       # Keras' own: Glorot's uniform, biases 0
    "loss.mse": 0.0, "loss.l1": 0.0, "loss.splats": 1.0, "loss.group_reduction": "sum",     # group means, summed
    "loss.kl_reduction": "mean", "loss.free_bits": 0.0, "loss.optimal_variance": False,
    "train.weight_decay": 0.0, "train.precision": "fp32", "train.schedule": "constant",     # Adam
}
PARTS = ("train", "dev", "test")


def _check_name(name: str) -> str:
    if not name.lower().startswith(tuple(NAMES)):
        raise ValueError("should begin with " + " or ".join(f"{begin!r} (model.kind {kind})"
                                                            for begin, kind in NAMES.items()))
    return name


Positive = Annotated[int, Field(ge=1)]


class Model(Form):
    name: Annotated[str, AfterValidator(_check_name)] = "conv1d"
    """only a name there, where another script trains another kind; all of them say which"""
    latent_dim: int = 256
    encoder_filters: Filters1d = ModelConfig().encoder_filters
    decoder_filters: Filters1d = ModelConfig().decoder_filters
    dropout_rates: Rates = ModelConfig().dropout_rates
    encoder_kernel_sizes: Filters1d | None = None
    decoder_kernel_sizes: Filters1d | None = None
    encoder_pool_sizes: Any = None
    decoder_upsample_sizes: Any = None
    encoder_dropout_rates: Rates | None = None
    decoder_dropout_rates: Rates | None = None
    encoder_dense_units: Any = None
    encoder_dense_dropout: Any = None
    decoder_dense_units: Any = None
    decoder_reshape_target: Any = None

    @property
    def kind(self) -> str:
        """Our ``model.kind``."""
        return next(kind for begin, kind in NAMES.items() if self.name.lower().startswith(begin))


class Training(Form):
    batch_size: int = 32
    epochs: int = 100
    learning_rate: float = 1e-3
    beta_warmup_epochs: Annotated[int, Field(ge=0)] = 50
    max_beta: float = 1.0
    mixed_precision: bool = True


class Data(Form):
    train_dir: str | None = None
    dev_dir: str | None = None
    test_dir: str | None = None
    stats_path: Any = None
    shuffle_buffer: Any = None

    @property
    def folders(self) -> list[str]:
        """Those that are given."""
        return [folder for folder in (self.train_dir, self.dev_dir, self.test_dir) if folder is not None]


class Callbacks(Form):
    checkpoint_every: Any = None
    early_stopping_patience: Positive = 15
    reduce_lr_patience: Positive = 5
    reduce_lr_factor: Any = None
    min_lr: Any = None


class File(Form):
    model: Model = Model()
    training: Training = Training()
    data: Data = Data()
    callbacks: Callbacks = Callbacks()
    output_dir: Any = None
    experiment_name: str | None = None
    seed: int | None = None

    def at(self, key: str) -> Any:
        """The value of a dotted key."""
        return reduce(getattr, key.split("."), self)


def conflicts(file: File) -> Iterator[str]:
    """What does not go together in a file, or with what is done here."""
    if file.model.kind == "resnet1d":
        for key in ("encoder_kernel_sizes", "decoder_kernel_sizes"):
            if any(size != KERNEL for size in getattr(file.model, key) or ()):
                yield f"model.{key}: {shown(getattr(file.model, key))}: should be {KERNEL} everywhere, as it is here"
        for key in ("encoder_dropout_rates", "decoder_dropout_rates"):
            if any(getattr(file.model, key) or ()):
                yield f"model.{key}: {shown(getattr(file.model, key))}: should be 0: resnet1d has no dropout"
    folders = [Path(folder) for folder in file.data.folders]
    if folders and (len(set(folders)) < len(PARTS) or len({folder.parent for folder in folders}) > 1):
        yield (f"data.train_dir: {shown(file.data.train_dir)}, dev_dir: {shown(file.data.dev_dir)}, test_dir: "
               f"{shown(file.data.test_dir)}: should be three folders side by side, like splats/train, splats/dev and "
               "splats/test: whatever is below splats is read as one data set, and split by hash")
