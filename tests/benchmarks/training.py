"""Training in this process: against a bare loop on tensors in memory, and against a loader that decodes files."""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Options, Round, clocked, in_turn, timed
from pictures import PHASES, mostly_training, of_manifest, write_pictures
from place import HERE

if TYPE_CHECKING:
    from autoenc.config import Config
    from autoenc.data import Dataset


def training_step(options: Options) -> Iterator[Round]:
    """Images a second of ``autoenc.train.train``, against a bare loop. One thread, base.yaml's model, at 32 and 64 px.

    Ours: an epoch as it is: reading from the memory map, conversion from uint8, gradient norm, finiteness, means; and
    validation with every figure, of which there is little, 2% of the images. The bare loop has all images as float32
    tensors in memory, in the same memory format, and does nothing but shuffle, forward, MSE, backward and the same
    fused AdamW, then MSE on the same validation images. An epoch of each in turn; the first of each is left out.
    """
    images = 48 if options.quick else 320
    sizes = (32, 64)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        prepared = {}
        for size in sizes:
            config, dataset = phases_data(Path(folder), size, images)
            prepared[size] = product(config, dataset, "cpu"), BareLoop(config, dataset, "cpu")
        for number in count():
            pairs, notes = {}, {}
            for size, (ours, bare) in prepared.items():
                if number == 0:
                    ours(), bare.epoch()
                mine, its = in_turn(number, lambda ours=ours: clocked(ours), lambda bare=bare: clocked(bare.epoch))
                pairs[f"{size} px"] = bare.count / mine[0], bare.count / its[0]
                notes[f"ratio of processor time, {size} px:"] = its[1] / mine[1]
            yield Round(pairs, notes)


def data(options: Options) -> Iterator[Round]:
    """Images a second of training at 64 px with two threads (two cores), base.yaml's model.

    Ours: ``autoenc.train.train`` on a manifest's files, decoded before (once in a project's life). Beside it: the
    training loop of the plain scripts, whose DataLoader decodes each file with Pillow whenever it comes by: without
    workers, as is its default, and with two, which are left running over epochs; the faster of the two counts. It does
    not validate (ours does, with 1.5% of the images). An epoch of each in turn; the first of each is left out. Files of
    512 px, a size at which plans are drawn, and files that have the size they are trained at, which cost least.
    """
    images = 48 if options.quick else 400
    sys.path.insert(0, str(HERE / "peers"))
    with tempfile.TemporaryDirectory() as folder, threads(2):
        prepared = {}
        for size in (512, 64):
            manifest = write_pictures(Path(folder, str(size)), images, size)
            config, dataset = phases_data(Path(folder), 64, images, **of_manifest(manifest, 64))
            train = len(dataset.splits["train"])
            prepared[size] = train, product(config, dataset, "cpu"), _Decoding(manifest, train, 0), \
                _Decoding(manifest, train, 2)
        for number in count():
            pairs, notes = {}, {}
            for size, (train, *works) in prepared.items():
                if number == 0:
                    for work in works:
                        work()
                ours, alone, helped = in_turn(number, *works)
                pairs[f"{size} px files"] = train / ours, train / min(alone, helped)
                notes[f"workers of the faster DataLoader, {size} px files:"] = 0 if alone < helped else 2
            yield Round(pairs, notes)


def phases_data(folder: Path, size: int, images: int, **settings: object) -> tuple[Config, Dataset]:
    """base.yaml's model without auxiliary losses and its data, nearly all of it to train on."""
    from autoenc.config import make_config
    from autoenc.data import prepare

    config = make_config({"data.image_size": size, "data.limit": images, **PHASES, **settings,
                          "data.split": mostly_training(images), "data.cache_dir": str(folder / "cache"),
                          "train.epochs": 100_000, "train.sample_every": 0}, "the benchmark")
    return config, prepare(config.data)


def product(config: Config, dataset: Dataset, device: str) -> Callable[[], float]:
    """An epoch of the product's training whenever it is called; its seconds."""
    from autoenc.train import train

    steps = train(config, dataset, device=device)
    return lambda: timed(lambda: next(steps))


class BareLoop:
    """All images as tensors on the device, and nothing but the steps and the MSE on what there is to validate with.
    """

    def __init__(self, config: Config, dataset: Dataset, device: str) -> None:
        import torch

        from autoenc.checkpoint import build_model
        from autoenc.metrics import to_unit

        last = config.data.image_size >= 64 and device == "cpu"                # as train() chooses it there
        self.images, self.val = (to_unit(dataset.images[dataset.splits[split]], device, channels_last=last)
                                 for split in ("train", "val"))
        self.model = build_model(config, dataset).to(
            device, memory_format=torch.channels_last if last else torch.preserve_format).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.train.learning_rate,
                                           weight_decay=config.train.weight_decay, fused=True)
        self.batch_size, self.count, self.device = config.train.batch_size, len(self.images), device

    def epoch(self) -> None:
        import torch
        from torch.nn import functional

        for rows in torch.randperm(self.count, device=self.device).split(self.batch_size):
            images = self.images[rows]
            loss = functional.mse_loss(self.model(images)["rgb"], images)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            for images in self.val.split(4 * self.batch_size):
                functional.mse_loss(self.model(images)["rgb"], images)
        if self.device == "cuda":
            torch.cuda.synchronize()


class _Decoding:
    """An epoch of the plain scripts' loop whenever it is called; its seconds."""

    def __init__(self, manifest: Path, train: int, workers: int) -> None:
        import plain
        import torch
        from torch.utils.data import DataLoader

        self.plain = plain
        self.model = plain.build(Namespace(size=64, base_channels=32, steps=4), latent_channels=8)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loader = DataLoader(plain.Pictures(plain.paths_of(manifest)[:train], 64), batch_size=16, shuffle=True,
                                 num_workers=workers, persistent_workers=workers > 0)

    def __call__(self) -> float:
        began = time.perf_counter()
        self.plain.train_epoch(self.model, self.optimizer, self.loader)
        return time.perf_counter() - began


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
