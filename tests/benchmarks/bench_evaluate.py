"""What a whole evaluation takes, against one plain pass of the model over the same held-out images.

    python tests/benchmarks/bench_evaluate.py --images 400

Both on one thread, in turn, several times: what else runs on the machine meets both alike. Not a test: nothing here is
asserted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from measure import Options, Round, in_turn, timed
from training import threads

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
    with works(options.images, options.image_size) as (whole, plain):
        pairs = [(timed(whole), timed(plain)) for _ in range(options.repeats)]
    evaluation, one_pass = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{options.images} images of {options.image_size} px: evaluation {evaluation:.2f} s, one plain pass "
          f"{one_pass:.2f} s: {evaluation / one_pass:.1f} times (medians of {options.repeats})")


@contextmanager
def works(images: int, size: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A whole evaluation, and a plain pass over the same held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"data.limit": 5 * images, "data.image_size": size, "data.cache_dir": folder,
                              "loss.segmentation": 0.05}, "the benchmark")
        dataset = prepare(config.data)
        model = build_model(config, dataset).eval()

        def whole() -> None:
            evaluate(model, dataset, config, pictures=Path(folder) / "pictures")

        @torch.inference_mode()
        def plain() -> None:
            for split in ("val", "test"):
                for batch in torch.from_numpy(dataset.splits[split]).split(64):
                    model.decode(model.encode(to_unit(dataset.images[batch.numpy()], torch.device("cpu")))["latent"])

        yield whole, plain


def rounds(asked: Options) -> Iterator[Round]:
    """Seconds of ``autoenc.evaluate`` (every figure on val and test, baselines, latents, interpolation, latency,
    pictures) on 400 held-out images of 32 px, against one plain pass of the model over them; one thread."""
    with threads(1), works(20 if asked.quick else 400, 32) as (whole, plain):
        for number in count():
            yield Round({"evaluate": tuple(in_turn(number, lambda: timed(whole), lambda: timed(plain)))})


if __name__ == "__main__":
    main()
