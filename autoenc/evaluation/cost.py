"""What encoding and decoding take: operations, and time on this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoenc.model import Autoencoder

SECONDS = 1.0                # that one measurement may take, unless its fewest runs take longer
WARM_UP, FEWEST, MOST = 2, 5, 200


def flops(model: Autoencoder, image_size: int) -> dict[str, int]:
    """Floating-point operations of encoding one image and of decoding its rgb: a multiply-add counts as two; of
    convolutions and matrix products, which are nearly all."""
    counted = {}
    for name, work in _works(model, image_size, 1).items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        counted[name] = counter.get_total_flops()
    return counted


def speed(model: Autoencoder, image_size: int, batch_sizes: tuple[int, ...]) -> dict[str, Any]:
    """Time to encode and to decode (rgb) batches, in float32, data already on the device: the device's name, and by
    batch size and work ``latency_ms`` of a batch {median, q1, q3}, ``images_per_second`` {median, q1, q3}, ``runs``."""
    device = next(model.parameters()).device
    found: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads(),
                             "cuda": device.type == "cuda", "batches": {}}
    for size in dict.fromkeys(batch_sizes):
        with torch.inference_mode():
            found["batches"][str(size)] = {name: _timed(work, device, size)
                                           for name, work in _works(model, image_size, size).items()}
    return found


def encode_ms(model: Autoencoder, image_size: int, seconds: float = 0.1) -> float:
    """Milliseconds to encode one image in float32, already on the device: the median of the runs that fit into
    ``seconds`` (at least a few, at most 200).

    On a CPU one thread does it, however many the process has, and what counts is the time that this thread computes:
    trials that train on the same cores make the clock's time several times as long, and this by a tenth.
    """
    device, threads = next(model.parameters()).device, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            found = _timed(_works(model, image_size, 1)["encode"], device, 1, seconds,
                           time.perf_counter if device.type == "cuda" else time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return found["latency_ms"]["median"]


def device_name(device: torch.device) -> str:
    """What a person calls the device: its model, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _works(model: Autoencoder, image_size: int, count: int) -> dict[str, Callable[[], Any]]:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    inputs = _random_inputs(model, image_size, count, generator)
    with torch.no_grad():
        latent = model.encode(inputs, generator)["latent"]
    return {"encode": lambda: model.encode(inputs, generator), "decode": lambda: model.decode(latent, heads=("rgb",))}


def _random_inputs(model: Autoencoder, image_size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Images within [-1, 1], or splats: small and round ones all over."""
    shape = (count, model.config.data.splats, 8) if model.takes == "splats" else (count, 3, image_size, image_size)
    values = torch.rand(shape, device=generator.device, generator=generator) * 2 - 1
    if model.takes == "splats":
        values[..., 2:4], values[..., 4] = 0.05, 0.0
    return values


def _timed(work: Callable[[], Any], device: torch.device, count: int, budget: float = SECONDS,
           clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    def once() -> float:
        start = clock()
        work()
        if device.type == "cuda":            # the call returns before the GPU is done
            torch.cuda.synchronize(device)
        return clock() - start

    for _ in range(WARM_UP):
        once()
    seconds, end = [], time.perf_counter() + budget
    while len(seconds) < FEWEST or (time.perf_counter() < end and len(seconds) < MOST):
        seconds.append(once())
    q1, median, q3 = np.percentile(seconds, (25, 50, 75)).tolist()
    return {"latency_ms": {"median": 1e3 * median, "q1": 1e3 * q1, "q3": 1e3 * q3},
            "images_per_second": {"median": count / median, "q1": count / q3, "q3": count / q1}, "runs": len(seconds)}
