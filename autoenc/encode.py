"""python -m autoenc.encode CHECKPOINT [MANIFEST] --output DIR: the latents of a data set, for a diffusion model.

    latents_00000.safetensors …    `latent` (N, C, h, w) or (N, D) as encode() gives; --posterior: also `mu`, `logvar`
    manifest.csv                   name, shard, row, split, label of every image, in the order of the data
    statistics.json                written last: latents_mean and latents_std per channel, what they are of

Every shard says in itself what it holds, with a checksum, so that a run can go on after whatever ended the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from autoenc.checkpoint import check_splats, load_model
from autoenc.config import Config, make_config
from autoenc.data import Dataset, prepare
from autoenc.errors import InputError, command
from autoenc.evaluation.splits import latent_shape, shape_in_words
from autoenc.metrics import to_inputs
from autoenc.model import Autoencoder, derived_seed
from autoenc.options import device_of, with_data_settings
from autoenc.shards import FORMATS, Settings, Shards, Tensors, load_latents
from autoenc.sweep.store import lease, owner_in_words
from autoenc.train import EVALUATION_BATCH

__all__ = ["Settings", "encode_dataset", "load_latents", "main"]

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AHEAD = 4                # batches that are read before they are needed
SAY_EVERY = 10.0         # seconds between two lines of progress where there is no terminal
Given, Made = TypeVar("Given"), TypeVar("Made")


def encode_dataset(model: Autoencoder, dataset: Dataset, output: Path, checkpoint: str,
                   settings: Settings | None = None, *, batch_size: int = 64,
                   advance: Callable[[int], Any] = lambda images: None,
                   say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Write the latents of all images to a folder; shards that are there already are kept. Returns the statistics.

    The model (in eval mode) encodes where it is. ``checkpoint``: its sha256. ``advance`` is called with the number of
    images done, first with those that were there; ``say`` with what a person should know. Where ``model.latent`` is
    sample, each image's draw has a seed of its own, from ``train.seed`` and its index. Raises :class:`InputError` for a
    folder that holds other latents or files, that another process writes to, and for latents that are not finite;
    OSError.
    """
    settings = settings or Settings()
    of = {"format": FORMAT, "checkpoint": checkpoint, "data": dataset.fingerprint, "settings": asdict(settings)}
    output.mkdir(parents=True, exist_ok=True)
    lock = lease(output / ".lease")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"--output: {output}: {owner_in_words(lock)} is writing there") from None
    try:
        shards = Shards(output, dataset, of, settings)
        shards.find(say)
        advance(sum(len(moments[0]) for moments in shards.moments.values()))
        _encode(model, dataset, shards, settings, batch_size, advance)
        return shards.finish(model)
    finally:
        lock.release()


def _encode(model: Autoencoder, dataset: Dataset, shards: Shards, settings: Settings, batch_size: int,
            advance: Callable[[int], None]) -> None:
    """Encode what is missing. On a GPU nothing here waits for it: batches are read and pinned ahead, latents stay on
    the device until a shard is full, and the thread that writes waits for their copy."""
    device = next(model.parameters()).device
    shape = latent_shape(model, dataset)
    drawn = model.config.model.variational and model.config.model.latent == "sample"
    wanted = ("latent", "mu", "logvar") if settings.posterior else ("latent",)

    def read(rows: range) -> tuple[Tensor, Tensor | None]:
        found = torch.from_numpy(np.array(dataset.inputs[rows.start:rows.stop]))
        noise = _noise(model.config.train.seed, rows, shape) if drawn else None
        if device.type == "cuda":       # pinned memory is copied while the GPU computes
            return found.pin_memory(), None if noise is None else noise.pin_memory()
        return found, noise

    # Batches do not reach over the end of a shard: each shard's bytes depend on nothing before it.
    batches = [range(start, min(start + batch_size, rows.stop)) for rows in shards.missing()
               for start in range(rows.start, rows.stop, batch_size)]
    parts: list[Tensors] = []
    with ThreadPoolExecutor(1) as writer:
        written = None
        for rows, (inputs, noise) in _ahead(read, batches):
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16"):
                encoded = _encoded(model, to_inputs(inputs, device), noise)
                parts.append({name: encoded[name].to(DTYPES[settings.dtype]) for name in wanted})
            if rows.stop % settings.shard_size == 0 or rows.stop == len(dataset.images):
                if written is not None:
                    written.result()
                written = writer.submit(shards.write, (rows.stop - 1) // settings.shard_size, _fetched(parts))
                parts = []
            advance(len(rows))
        if written is not None:
            written.result()


def _encoded(model: Autoencoder, inputs: Tensor, noise: Tensor | None) -> Tensors:
    """``model.encode``, with the draw's standard normal noise given."""
    if noise is None:
        return model.encode(inputs)
    mu, logvar = model.encoder(inputs)
    raw = mu + noise.to(inputs.device, non_blocking=True) * torch.exp(0.5 * logvar)
    return {"latent": model.normalize(raw), "mu": mu, "logvar": logvar}


def _noise(seed: int, rows: range, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(derived_seed(seed, "latent", row)))
                        for row in rows])


def _ahead(make: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[tuple[Given, Made]]:
    """Each item with what a thread makes of it, up to ``AHEAD`` of them before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) > AHEAD:
                first, made = waiting.popleft()
                yield first, made.result()
        for first, made in waiting:
            yield first, made.result()


def _fetched(parts: Sequence[Tensors]) -> Callable[[], Tensors]:
    """Start to copy a shard from the device; the function returned waits for it."""
    whole = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    device = next(iter(whole.values())).device
    if device.type != "cuda":
        return lambda: whole
    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
              for name, tensor in whole.items()}
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))        # of another GPU than the default one, perhaps

    def fetch() -> Tensors:
        arrived.synchronize()
        return copies

    return fetch


def main(arguments: list[str]) -> int:
    """Write latents and say what was done. Raises :class:`InputError`; OSError."""
    options = _parser().parse_args(arguments)
    path, output = Path(options.checkpoint), Path(options.output)
    for flag in ("shard_size", "batch_size"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')}: {getattr(options, flag)}: should be 1 or more")
    if options.format == "npz" and options.dtype == "bfloat16":
        raise InputError("--dtype: bfloat16: npz files do not know it; --format safetensors does")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output}: is no folder")
    model = load_model(path, device_of(options.device))
    checkpoint = hashlib.sha256(path.read_bytes()).hexdigest()
    if options.posterior and not model.config.model.variational:
        raise InputError(f"--posterior: {path} is no VAE, and has none")
    config = _with_data(model.config, options.manifest, options.settings)
    try:
        dataset = prepare(config.data)
    except InputError as error:
        if options.manifest is not None or options.settings:
            raise
        raise InputError(f"{path}: the data that it was trained with:\n{error}\nother data, or where it is now: as "
                         "second argument") from None
    check_splats(path, model.config, dataset)
    count = len(dataset.images)
    if config.data.filters:
        print(f"data.filters: {config.data.filters}: {count:,} images match")
    settings = Settings(options.format, options.dtype, options.posterior, options.precision, options.shard_size)
    batch_size = options.batch_size or EVALUATION_BATCH * config.train.batch_size
    with _progress(count) as progress:
        found = encode_dataset(model, dataset, output, checkpoint, settings, batch_size=batch_size,
                               advance=progress.advance, say=progress.say)
    print(f"{output}: {count:,} images as {shape_in_words(found['latent_shape'])} latents in {found['shards']:,} "
          f"shard{'s' * (found['shards'] > 1)}; {progress.pace()}")
    if not model.config.model.normalize_latents:
        print("not standardised: subtract latents_mean and divide by latents_std (statistics.json)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m autoenc.encode", description="Write the latents of a data set, for a diffusion model. "
        "Ended at any moment, the same command goes on where it was.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pt file that a training or sweep wrote")
    parser.add_argument("manifest", metavar="MANIFEST", nargs="?", help="a CSV manifest or a folder of images "
                        "(default: what the model was trained on); nothing is left out unless --set data.limit=N")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder, or one to go on in")
    parser.add_argument("--set", dest="settings", metavar="data.KEY=VALUE", action="append", default=[],
                        help="a data setting other than the model was trained with; repeatable")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="of the shards (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="to write (default: %(default)s)")
    parser.add_argument("--posterior", action="store_true", help="write a VAE's mu and logvar, too, not normalised")
    parser.add_argument("--shard-size", metavar="N", type=int, default=Settings.shard_size,
                        help="images in a shard (default: %(default)s)")
    parser.add_argument("--batch-size", metavar="N", type=int, help="default: that of validation when training")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="to compute in (default: %(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    return parser


def _with_data(config: Config, manifest: str | None, settings: Sequence[str]) -> Config:
    """The checkpoint's configuration with the data that the command names, relative to the working directory."""
    flat = config.flat()
    if manifest is not None:
        where = Path(manifest).absolute()
        flat["data.manifest"] = str(where)
        if flat["data.source"] != "splats":
            flat["data.source"] = "folder" if where.is_dir() else "manifest"
    if flat["data.manifest"] is not None:         # else it is how many to generate
        flat["data.limit"] = None
    return with_data_settings(make_config(flat, "data"), settings)


class _Progress:
    def __init__(self, total: int, show: Callable[[int], None], say: Callable[[str], None]) -> None:
        self.total, self.show, self.say = total, show, say
        self.found, self.done = 0, 0
        self.began: float | None = None

    def advance(self, images: int) -> None:
        if self.began is None:           # the first call: those that were there
            self.found, self.began = images, time.monotonic()
        self.done += images
        self.show(self.done)

    def pace(self) -> str:
        new = self.done - self.found
        rate = f"{new / max(time.monotonic() - self.began, 1e-9):,.0f} images/s" if new else "nothing to do"
        return f"{self.found:,} were there, {rate}" if self.found else rate


@contextmanager
def _progress(total: int) -> Iterator[_Progress]:
    """A bar on a terminal, now and then a line anywhere else."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        said = time.monotonic()

        def line(done: int) -> None:
            nonlocal said
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                console.print(f"{done:,} of {total:,} images; {progress.pace()}")

        progress = _Progress(total, line, console.print)
        yield progress
        return
    with Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"), TimeRemainingColumn(),
                  console=console, transient=True) as bar:
        task = bar.add_task("", total=total, pace="")
        progress = _Progress(total, lambda done: bar.update(task, completed=done, pace=progress.pace()), console.print)
        yield progress


if __name__ == "__main__":
    command(main)
