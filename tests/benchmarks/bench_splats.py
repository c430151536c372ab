"""Splats: images fitted a minute, with and without refinement, what they render to, and what rendering takes.

    python tests/benchmarks/bench_splats.py --images 64 --threads 1

Not a test: nothing here is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from autoenc.data import compositions, layouts
from autoenc.data.splat_fit import fit_all
from autoenc.data.splats import in_order
from autoenc.metrics import psnr, to_unit
from autoenc.render import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--splats", type=int, default=512)
    parser.add_argument("--refine", type=int, nargs="*", default=[0, 20, 50], help="steps of refinement")
    parser.add_argument("--batch-size", type=int, default=16, help="of the rendering that is timed")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size, device = options.image_size, torch.device(options.device)
    made = {"compositions": [compositions.generate(0, index, size) for index in range(options.images)],
            "layouts": [layouts.PALETTE[layouts.generate(0, index, size)[0]] for index in range(options.images)]}
    print(f"{size} px, {options.splats} splats, {device}, {torch.get_num_threads()} threads")
    for name, images in made.items():
        for steps in options.refine:
            start, busy = time.perf_counter(), time.process_time()
            splats = np.stack(list(fit_all(images, options.splats, 0, steps, device)))
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            found = quality(splats, np.stack(images), device)
            print(f"{name}, {steps} steps: {60 * len(images) / seconds:,.0f} images a minute "
                  f"({1000 * busy / len(images):.0f} ms of processor time each); rendered PSNR {np.mean(found):.1f} dB "
                  f"(from {min(found):.1f} to {max(found):.1f})")
    print(f"sorting: {timed(lambda: in_order(splats), device) / len(splats) * 1000:.2f} ms an image")
    batch = torch.from_numpy(np.resize(splats, (options.batch_size, options.splats, 8))).to(device)
    print(f"rendering a batch of {len(batch)}: {1000 * timed(lambda: render(batch, size), device):.1f} ms, with its "
          f"gradient {1000 * timed(lambda: with_gradient(batch, size), device):.1f} ms")


def quality(splats: np.ndarray, images: np.ndarray, device: torch.device) -> list[float]:
    """Rendered PSNR of each image."""
    rendered = render(torch.from_numpy(splats).to(device), images.shape[1]).clamp(-1, 1)
    return [psnr(error) for error in (rendered - to_unit(images, device)).square().mean((1, 2, 3)).tolist()]


def with_gradient(batch: torch.Tensor, size: int) -> None:
    leaf = batch.clone().requires_grad_()
    render(leaf, size).square().mean().backward()


def timed(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median seconds."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
