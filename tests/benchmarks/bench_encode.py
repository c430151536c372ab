"""Throughput of autoenc.encode against that of the bare model at the same batch size; the aim is 90%.

    python tests/benchmarks/bench_encode.py --image-size 64 --images 2000 --threads 2

The bare model encodes float batches that are on the device already. Both are measured in turn, several times over the
same images: what else runs on the machine then meets both alike. Of a CPU also the processor time of all threads, which
other work hardly changes. Not a test: nothing here is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from measure import Options, Round, in_turn, timed
from training import threads

from autoenc.checkpoint import build_model
from autoenc.config import make_config
from autoenc.data import prepare
from autoenc.encode import Settings, encode_dataset
from autoenc.metrics import to_unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--shard-size", type=int, default=Settings.shard_size)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sample", action="store_true", help="a VAE whose latents are draws, with its posterior")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bare, command, device = works(options)

    def measured(work: Callable[[], None]) -> tuple[float, float]:
        """Images per second, and per second of processor time."""
        began, used = time.perf_counter(), time.process_time()
        work()
        return options.images / (time.perf_counter() - began), options.images / (time.process_time() - used)

    measured(bare), measured(command)            # warm
    rounds = [(measured(bare), measured(command)) for _ in range(options.rounds)]
    for k, unit in enumerate(("images/s", "images per second of processor time")[:1 + (device.type == "cpu")]):
        paces = [(first[k], second[k]) for first, second in rounds]
        for name, column in zip(("bare model", "autoenc.encode"), zip(*paces, strict=True), strict=True):
            print(f"{name:16}{statistics.median(column):10,.0f} {unit} ({min(column):,.0f} to {max(column):,.0f})")
        ratios = sorted(second / first for first, second in paces)
        print(f"{'ratio':16}{statistics.median(ratios):10.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})")


def works(options: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None], torch.device]:
    """What encodes all images by the bare model, what does by autoenc.encode, and where."""
    config = make_config({"data.image_size": options.image_size, "data.limit": options.images,
                          "model.normalize_latents": True, "model.variational": options.sample,
                          "model.latent": "sample" if options.sample else "mean"}, "benchmark")
    dataset, device = prepare(config.data), torch.device(options.device)
    model = build_model(config, dataset).to(device).eval()
    settings = Settings(posterior=options.sample, precision=options.precision, shard_size=options.shard_size)
    batches = [to_unit(np.array(dataset.images[start:start + options.batch_size]), device)
               for start in range(0, options.images, options.batch_size)]

    def bare() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, options.precision == "bf16"):
            for batch in batches:
                model.encode(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            encode_dataset(model, dataset, Path(folder), "0" * 64, settings, batch_size=options.batch_size)

    return bare, command, device


def rounds(asked: Options) -> Iterator[Round]:
    """Images a second of ``autoenc.encode`` (reading, encoding, writing shards, statistics) against the bare model on
    float batches that are in memory already: 64 px, batches of 64, two threads, a CPU."""
    images = 128 if asked.quick else 2000
    options = argparse.Namespace(image_size=64, images=images, batch_size=64, shard_size=Settings.shard_size,
                                 device="cpu", precision="fp32", sample=False)
    with threads(2):
        bare, command, _ = works(options)
        bare(), command()                        # warm
        for number in count():
            ours, its = in_turn(number, lambda: timed(command), lambda: timed(bare))
            yield Round({"encode": (images / ours, images / its)})


if __name__ == "__main__":
    main()
