"""Training: a generator that yields one epoch's result after another. It knows nothing of files or sweeps.

Everything random is a function of (train.seed, purpose, epoch): a training resumed after any epoch equals the
uninterrupted one, bit for bit on a CPU with as many threads, and no random state need be stored.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from autoenc import figures
from autoenc.batches import Batches
from autoenc.checkpoint import build_model, checkpoint_content, data_shapes
from autoenc.config import Config
from autoenc.errors import InputError, command
from autoenc.losses import Loss, losses_of, weighted_sum
from autoenc.metrics import COLUMNS, TERM_FIGURES, Means, SplitFigures, loss_figures
from autoenc.model import Autoencoder, count_parameters, derived_seed, draw
from autoenc.samples import sample
from autoenc.schedule import kl_weight, learning_rate

if TYPE_CHECKING:
    from autoenc.data import Dataset

CHECK_EVERY = 20         # steps between two looks at a GPU's losses and gradients; a CPU's are looked at every step
EVALUATION_BATCH = 4     # batches without gradients are so many times larger
SPIKE = 3.0              # a gradient norm above so many times the epoch's median
SAMPLES = 8
UNDEFINED = ("_miou", "_accuracy", "_ce", *figures.OF_SPLATS)       # figures that data may not have


class Diverged(Exception):
    """The loss, the gradient or a figure (``what``) is no longer finite, at this epoch and step (both from 1)."""

    def __init__(self, epoch: int, step: int, what: str) -> None:
        super().__init__(f"{what} is not finite (epoch {epoch}, step {step})")
        self.epoch, self.step, self.what = epoch, step, what


@dataclass(frozen=True)
class EpochResult:
    epoch: int
    """from 1"""
    metrics: dict[str, float]
    """every figure by name; NaN where undefined"""
    seconds: float
    """wall time, evaluation included"""
    improved: bool
    """the monitored figure is the best so far"""
    state: Callable[..., dict[str, Any]]
    """makes a checkpoint of the state after this epoch; to be called before the next epoch is asked for, and with
    ``copy=False`` to be written before that, too: nothing is copied then that is on the CPU already"""
    samples: np.ndarray | None
    """uint8 (height, width, 3): inputs above reconstructions above predicted classes; None except at sample epochs"""
    latents: np.ndarray | None
    """float32 (B, C, h, w): of the same images, as :func:`autoenc.samples.sample` gives them"""


class AdamW(torch.optim.AdamW):
    """torch's, without what makes it load torch's compiler (800 modules, 1.4 s of processor time in every worker) only
    to mark these methods as not to be compiled. Nothing is compiled here, and a model of one's own still may be."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@dataclass
class _Run:
    """What an epoch works on."""

    config: Config
    dataset: Dataset
    device: torch.device
    model: Autoencoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train: Batches
    val: Batches
    average: Autoencoder | None          # of the weights, with train.ema
    losses: dict[str, Loss]

    @property
    def result(self) -> Autoencoder:
        """What the training is for: what is measured, kept and exported."""
        return self.average or self.model

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.train) / self.config.train.batch_size)

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of the loss terms at a step (from 0, over the whole training)."""
        weights = self.config.loss_weights
        return weights | ({"kl": kl_weight(self.config, step, self.steps)} if "kl" in weights else {})

    def weights_after(self, epoch: int) -> dict[str, float]:
        """Those of an epoch's last step, which its figures are reported with."""
        return self.weights_at(epoch * self.steps - 1)

    def autocast(self) -> AbstractContextManager:
        precision = self.config.train.precision
        return torch.autocast(self.device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
                              enabled=precision != "fp32")

    def generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(derived_seed(self.config.train.seed, *purpose))


def train(config: Config, dataset: Dataset, *, device: str | torch.device = "cpu",
          resume: Mapping[str, Any] | None = None,
          history: Sequence[Mapping[str, float]] = ()) -> Iterator[EpochResult]:
    """Train up to ``config.train.epochs``, or until patience ends it; yields after every epoch.

    ``resume``: a checkpoint that an earlier result's ``state()`` made, to go on after its epoch; ``history``: the
    metrics of the epochs up to it, which patience and ``improved`` look back on. Raises
    :class:`~autoenc.errors.InputError`, at the call, for a configuration that this data or device cannot serve, and
    :class:`Diverged` from the iterator.
    """
    device, config = torch.device(device), config.as_trained
    if config.train.precision == "fp16" and device.type == "cpu":
        raise InputError("train.precision: 'fp16' needs a GPU; on a CPU use fp32 or bf16")
    if config.model.norm == "batch" and len(dataset.splits["train"]) == 1:
        raise InputError("model.norm: 'batch' takes statistics over several images, and the training split has one")
    for split in ("train", "val"):
        if len(dataset.splits[split]) == 0:
            raise InputError(f"data.split: {list(config.data.split)} leaves no image in {split} "
                             f"(of {len(dataset.images)})")
    return _epochs(_prepare(config, dataset, device, resume), resume["epoch"] if resume else 0, history)


def _prepare(config: Config, dataset: Dataset, device: torch.device, resume: Mapping[str, Any] | None) -> _Run:
    # Measured: on a CPU channels_last gains 10% at 64 px and nothing at 32; on a GPU tensor cores want it.
    channels_last = config.data.image_size >= 64 if device.type == "cpu" else config.train.precision != "fp32"
    model = build_model(config, dataset).to(
        device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    optimizer = AdamW(model.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay,
                      fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    average = copy.deepcopy(model) if config.train.ema is not None else None
    if resume is not None:
        if not all(torch.equal(known, resume["model"][name].to(device)) for name, known in model.fitted().items()):
            raise InputError("the checkpoint to go on from has the statistics of other data: its splats were "
                             "normalised by another training split")
        model.load_state_dict(resume["raw"] if average is not None else resume["model"])
        if average is not None:
            average.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))     # else steps would write into the caller's
        scaler.load_state_dict(resume["scaler"])
    own = bool(config.loss.custom)           # which may look at anything
    batches = partial(Batches, dataset, device=device, labels="classification" in config.heads or own,
                      channels_last=channels_last)
    return _Run(config, dataset, device, model, optimizer, scaler,
                batches(indices=dataset.splits["train"], segmentation=config.loss.segmentation > 0 or own,
                        images=not config.takes_splats or bool({"mse", "l1"} & config.loss_weights.keys()) or own),
                batches(indices=dataset.splits["val"], segmentation=True), average, losses_of(config))


def _epochs(run: _Run, done: int, history: Sequence[Mapping[str, float]]) -> Iterator[EpochResult]:
    settings = run.config.train
    mode = figures.MODES[settings.monitor]
    first = run.config.counted_from
    values = [row.get(settings.monitor, math.nan) for row in history]
    for epoch in range(done + 1, settings.epochs + 1):
        if figures.patience_end(values, mode, settings.patience, settings.min_delta, first) is not None:
            return
        start = time.perf_counter()
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch, values[first - 1:])
        metrics = _train_epoch(run, epoch) | _validate(run, epoch)
        _check_figures(metrics, settings.monitor, epoch, run.steps)
        values.append(metrics[settings.monitor])
        sampled = settings.sample_every and (epoch == 1 or epoch % settings.sample_every == 0)
        picture, latents = _samples(run) if sampled else (None, None)
        yield EpochResult(
            epoch=epoch, metrics=metrics, improved=figures.best_epoch(values, mode, first) == len(values),
            samples=picture, latents=latents, state=partial(_state, run, epoch, metrics),
            seconds=time.perf_counter() - start)


def _train_epoch(run: _Run, epoch: int) -> dict[str, float]:
    settings = run.config.train
    order = np.random.default_rng(derived_seed(settings.seed, "order", epoch)).permutation(len(run.train))
    noise = run.generator("noise", epoch)
    check_every = 1 if run.device.type == "cpu" else CHECK_EVERY
    means, norms, unread = Means(), [], []
    run.model.train()
    for step, batch in enumerate(run.train.pass_over(settings.batch_size, order), start=(epoch - 1) * run.steps):
        unread.append(_step(run, batch, noise, means, run.weights_at(step)))
        if run.average is not None:
            _average(run, step + 1)
        if len(unread) == check_every:
            norms += _read(unread, epoch, len(norms), run.scaler.is_enabled())
            unread = []
    norms += _read(unread, epoch, len(norms), run.scaler.is_enabled())
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise Diverged(epoch, len(norms), "gradient")
    config = run.config
    found = loss_figures(means.values(), run.weights_after(epoch), config.elements,
                         config.model.splat_target if config.takes_splats else None)
    finite = np.array([norm for norm in norms if math.isfinite(norm)] or [math.nan])
    return {**{f"train/{name}": value for name, value in found.items()}, "train/grad_norm": float(finite.mean()),
            "train/spikes": float((finite > SPIKE * np.median(finite)).sum())}


def _step(run: _Run, batch: dict[str, Tensor], noise: torch.Generator, means: Means,
          weights: Mapping[str, float]) -> Tensor:
    """One step; returns (loss, gradient norm) on the device, nothing waits for it."""
    with run.autocast():
        outputs = run.model(batch[run.model.takes], noise)
    terms = {name: run.losses[name](outputs, batch)
             for name in {"splats" if run.config.takes_splats else "mse": None, **weights}}
    loss = weighted_sum(terms, weights)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = get_total_norm([parameter.grad for parameter in run.model.parameters() if parameter.grad is not None])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        means.add_terms({name: term for name, term in terms.items() if name not in ("kl", "optimal_variance")}, batch)
        if "logvar" in outputs:
            means.add_posterior(outputs, batch, run.config)
            if run.config.takes_splats:
                means.add_groups(COLUMNS[0], outputs["columns"], outputs["target"], run.config.model.splat_target)
            if "mse" in terms:          # the model was trained on draws, so its mse is that of draws
                means.add("mse_sampled", terms["mse"], len(outputs["mu"]))
        return torch.stack((loss.detach(), norm))


@torch.no_grad()
def _average(run: _Run, step: int) -> None:
    """Move the average towards the weights after a step (from 1); early on by more, as it starts from nothing learnt.
    So do the running statistics of batch normalisation: those of the last weights are not those of the average. Other
    buffers (running latent statistics) are taken over."""
    decay = min(run.config.train.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - decay)
    for (name, mine), theirs in zip(run.average.named_buffers(), run.model.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            mine.lerp_(theirs, 1 - decay)
        else:
            mine.copy_(theirs)


def _read(unread: list[Tensor], epoch: int, before: int, scaled: bool) -> list[float]:
    """The gradient norms of steps whose losses and norms are still on the device. Raises :class:`Diverged`."""
    if not unread:
        return []
    rows = torch.stack(unread).tolist()
    for step, (loss, norm) in enumerate(rows, start=before + 1):
        if not math.isfinite(loss):
            raise Diverged(epoch, step, "loss")
        if not math.isfinite(norm) and not scaled:      # the scaler of fp16 skips such steps and scales down
            raise Diverged(epoch, step, "gradient")
    return [norm for _, norm in rows]


@torch.inference_mode()
def _validate(run: _Run, epoch: int) -> dict[str, float]:
    model, config = run.result.eval(), run.config
    noise = run.generator("validation noise", epoch)
    split = SplitFigures(model, run.dataset.palette if run.dataset.segmentation is not None else None)
    for batch in run.val.pass_over(EVALUATION_BATCH * config.train.batch_size):
        sampled = None
        with run.autocast():
            encoded = model.encode(batch[model.takes], noise)
            outputs = model.decode(model.mean_latent(encoded), model.measured_outputs)
            if "logvar" in encoded:
                drawn = encoded["latent"] if config.model.latent == "sample" else \
                    model.normalize(draw(encoded["mu"], encoded["logvar"], noise))
                sampled = model.decode(drawn, heads=model.drawn_outputs)
        split.update(batch, encoded, outputs, sampled)
    weights = run.weights_after(epoch)
    found = split.compute(weights, config.elements)
    metrics = {name if name in figures.ALONE else f"val/{name}": value for name, value in found.items()}
    metrics |= {"latent_size": float(model.latent_size), "parameters": float(count_parameters(model))}
    return metrics | ({"beta": weights.get("kl", 0.0)} if config.model.variational else {})


def _check_figures(metrics: Mapping[str, float], monitor: str, epoch: int, step: int) -> None:
    """Raise :class:`Diverged` for a figure that should be finite. Undefined accuracies, mIoUs and cross-entropies are
    NaN, and what is a logarithm of the error may be infinite."""
    for name in ("train/loss", "val/loss", "val/mse", "val/mse_sampled", monitor):
        value = metrics.get(name, 0.0)
        undefined = math.isnan(value) and name.endswith(UNDEFINED)
        perfect = math.isinf(value) and name in ("val/psnr", "val/nelbo")
        if not (math.isfinite(value) or undefined or perfect):
            raise Diverged(epoch, step, name)


def _samples(run: _Run) -> tuple[np.ndarray, np.ndarray]:
    count = min(SAMPLES, len(run.val))      # always the same, spread over the split
    batch = run.val.take(np.linspace(0, len(run.val) - 1, count).round().astype(np.int64))
    return sample(run.result.eval(), batch[run.model.takes], batch["images"], run.dataset.palette, run.autocast())


def _state(run: _Run, epoch: int, metrics: Mapping[str, float], copy: bool = True) -> dict[str, Any]:
    raw = {} if run.average is None else {"raw": run.model.state_dict()}
    return checkpoint_content(run.config, data_shapes(run.dataset), run.result, epoch=epoch, metrics=metrics, copy=copy,
                              optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(), **raw)


def main(arguments: list[str]) -> int:
    """``python -m autoenc.train CONFIG.yaml --output DIR``: train one configuration to its end, without Ray."""
    import argparse
    from pathlib import Path

    from autoenc.config import check_own, load_config
    from autoenc.course import best_row, collapse, divergence
    from autoenc.custom import said_of
    from autoenc.data import prepare
    from autoenc.interop import check_counts, load_experiment
    from autoenc.trajectory import Trajectory, trajectory_key

    parser = argparse.ArgumentParser(prog="python -m autoenc.train",
                                     description="Train one configuration to its end.")
    parser.add_argument("config", metavar="CONFIG.yaml", help="a best_config.yaml, or any file with a configuration")
    parser.add_argument("--output", required=True, metavar="DIR",
                        help="continued where it holds a part of this training")
    options = parser.parse_args(arguments)

    config, experiment = load_config(options.config), load_experiment(options.config)
    for notice in experiment.notices if experiment else ():
        print(f"note: {notice}", file=sys.stderr)
    check_own(config, options.config)
    dataset = prepare(config.data)
    if experiment:
        check_counts(experiment, len(dataset.classes), len(dataset.label_names))
    with said_of(options.config):
        build_model(config.as_trained, dataset), losses_of(config)      # what cannot be shows before a file is written
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trajectory = Trajectory(Path(options.output))
    key = trajectory_key(config, dataset.fingerprint, device)
    held = trajectory.status().get("key", key)
    if held != key:
        raise InputError(f"--output {options.output}: holds another training (see its config.yaml); choose another")
    try:
        for row in trajectory.train(config, dataset, device):
            print(_line(row, config), flush=True)
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    status, best = trajectory.status(), best_row(trajectory.rows(), config)
    if status.get("diverged") or status.get("failed"):
        reason = divergence(status["diverged"]) if status.get("diverged") else status["failed"]
        print(f"error: {reason}", file=sys.stderr)
        return 1
    if best is None:
        print(f"error: {config.train.monitor} is undefined at every epoch: there is no best one", file=sys.stderr)
        return 1
    if said := collapse(trajectory.rows(), config):
        print(f"note: {said}", file=sys.stderr)
    weights = trajectory.folder / "best.pt"
    if config.model.normalize_latents:
        from autoenc.finish import finish

        finish(trajectory, config, dataset, device, int(best["epoch"]), ())
        weights = trajectory.weights_path(int(best["epoch"]), normalized=True)
    print(f"best epoch {best['epoch']}: {config.train.monitor} {best[config.train.monitor]:.5g}; {weights}")
    return 0


def _line(row: Mapping[str, float], config: Config) -> str:
    """An epoch as people watch it: raw losses, the KL with its weight, the weighted total."""
    terms = {name: name for name in ("mse", "l1", "splats", *(term.name for term in config.loss.custom))} | TERM_FIGURES
    likelihood = "splats" if config.takes_splats else "mse"
    weighed = {likelihood if name == "optimal_variance" else name for name in config.loss_weights}
    told = [f"epoch {row['epoch']:>3}/{config.train.epochs}"]
    for split in ("train", "val"):
        values = [f"{name} {row[f'{split}/{figure}']:.5f}" for name, figure in terms.items()
                  if name in weighed and f"{split}/{figure}" in row]
        if f"{split}/kl" in row:
            values.append(f"kl {row[f'{split}/kl']:.5f} × {row['beta']:g}")
        told.append(f"{split}: {', '.join(values)}, total {row[f'{split}/loss']:.5f}")
    return f"{' | '.join(told)} | {row.get('val/psnr', math.nan):.2f} dB | {row['seconds']:.1f} s"


if __name__ == "__main__":
    command(main)
