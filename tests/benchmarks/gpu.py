"""On a GPU: one large training, and many small ones at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from commands import command, searched
from measure import Options, Round, Skip, in_turn, timed
from pictures import of_manifest, write_pictures
from place import place

TOGETHER = 8                     # trials that share the GPU


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Skip("there is no GPU (torch.cuda.is_available() is false)")


def gpu_large(options: Options) -> Iterator[Round]:
    """Images a second at 512 px with the settings of --preset full: base.yaml's model, batches of 16, bfloat16
    autocast, channels last; against a bare loop of the same model in float32, eager, as PyTorch comes, with all images
    as tensors on the GPU.

    Ours is an epoch of ``autoenc.train.train`` as it is, with 1.5% of the images to validate with. An epoch of each in
    turn; the first of each is left out.
    """
    require_gpu()
    from training import BareLoop, phases_data, product

    with tempfile.TemporaryDirectory() as folder:
        config, dataset = phases_data(Path(folder), 512, 32 if options.quick else 400)
        half = config.model_copy(update={
            "train": config.train.model_copy(update={"precision": "bf16"})})
        ours, bare = product(half, dataset, "cuda"), BareLoop(config, dataset, "cuda")
        ours(), bare.epoch()
        for number in count():
            mine, its = in_turn(number, ours, lambda: timed(bare.epoch))
            yield Round({"512 px": (bare.count / mine, bare.count / its)})


def gpu_many(options: Options) -> Iterator[Round]:
    """Trials an hour on one GPU at 64 px: 32 trials of 10 epochs on 400 images, by the command, eight at a time on the
    GPU (``resources.gpus: 0.125``), against one at a time (``resources.gpus: 1``), which is how a sweep would usually
    be run. Whole sweeps: start-up, decision and report are included in both.
    """
    require_gpu()
    images, trials, epochs = (40, 4, 2) if options.quick else (400, 32, 10)
    with place() as here:
        settings = of_manifest(write_pictures(here.folder / "files", images, 64), 64, **{"train.epochs": epochs})
        sweeps = [here.sweep(name, settings, searched(trials, epochs, resources={"cpus": 1, "gpus": gpus}))
                  for name, gpus in (("together", 1 / TOGETHER), ("alone", 1))]
        for number in count():
            seconds = in_turn(number, *(lambda sweep=sweep: command(here, sweep, trials * epochs, slots=TOGETHER)
                                        for sweep in sweeps))
            yield Round({"64 px": tuple(3600 * trials / each for each in seconds)})
