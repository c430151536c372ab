"""What a whole evaluation takes, against one plain pass of the model over the same held-out images.

    python tests/benchmarks/bench_evaluate.py --images 400

Both on one thread, in turn, several times: what else runs on the machine meets both alike. Not a test: nothing here is
asserted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from autoenc.checkpoint import build_model
from autoenc.config import make_config
from autoenc.data import prepare
from autoenc.evaluate import evaluate
from autoenc.metrics import to_unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="held out, half validation and half test")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"data.limit": 5 * options.images, "data.image_size": options.image_size,
                              "data.cache_dir": folder, "loss.segmentation": 0.05}, "the benchmark")
        dataset = prepare(config.data)
        model = build_model(config, dataset).eval()

        def whole() -> None:
            evaluate(model, dataset, config, pictures=Path(folder) / "pictures")

        @torch.inference_mode()
        def plain() -> None:
            for split in ("val", "test"):
                for batch in torch.from_numpy(dataset.splits[split]).split(64):
                    model.decode(model.encode(to_unit(dataset.images[batch.numpy()], torch.device("cpu")))["latent"])

        seconds = {work.__name__: [] for work in (whole, plain)}
        for _ in range(options.repeats):
            for work in (whole, plain):
                seconds[work.__name__].append(_timed(work))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.images} images of {options.image_size} px: evaluation {middle['whole']:.2f} s, one plain pass "
          f"{middle['plain']:.2f} s: {middle['whole'] / middle['plain']:.1f} times (medians of {options.repeats})")


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
