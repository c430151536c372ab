"""What one more concurrent trial needs of a large data set."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

from commands import TRIVIAL
from measure import Options, Round, in_turn
from pictures import PHASES
from place import HERE, Place, ended, place, private_bytes, proportional_bytes

SIZE = 256                       # px: an image is 192 KiB
SMALL = 128                      # items


def memory(options: Options) -> Iterator[Round]:
    """Growth of memory per further concurrent trial on a data set of 2 GB (images as decoded), over the size of that
    data set.

    A trial is a process that does what a worker does: it opens the data (``autoenc.data.prepare``) and trains an epoch
    over all of it, with the smallest model. Memory is the sum of the processes' proportional set sizes after that
    epoch, in which the page cache of mapped files counts once, however many processes map it. It is measured with one
    and with three trials at once: of what they have mapped, half the difference is what a further one adds; of what
    each has allocated itself, the mean of all four, as that of single processes varies by 150 MB, whatever the data.

    A worker has Python, torch, its model and its batches in memory, whatever the data. That is taken off by the same
    measurement on 128 items, in turn; the growth with it is the second row.
    """
    items = 256 if options.quick else 10_240
    with place() as here:
        for number in count():
            sizes = [data_bytes(here, count_of) for count_of in (items, SMALL)]
            large, small = in_turn(number, lambda: growth(here, items), lambda: growth(here, SMALL))
            size = (sizes[0] - sizes[1]) / 1e6
            yield Round({"memory": ((large - small) / 1e6, size), "worker included": (large / 1e6, sizes[0] / 1e6)})


def growth(here: Place, items: int) -> float:
    """Bytes that a further trial adds, of one and of three at once."""
    (one, alone), (three, each) = (together(here, items, trials) for trials in (1, 3))
    return (three - one) / 2 + statistics.mean(alone + each)


def together(here: Place, items: int, trials: int) -> tuple[int, list[int]]:
    """Bytes that so many concurrent trials have mapped, together, and that each has allocated, each after its epoch."""
    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        arguments = HERE / "children" / "trial.py", json.dumps(settings(here, items))
        workers = [stack.enter_context(ended(here.start(*arguments, **pipes))) for _ in range(trials)]
        for worker in workers:
            if worker.stdout.readline() != "trained\n":
                raise RuntimeError(f"a trial ended before its epoch:\n{here.said()[-3000:]}")
        allocated = [private_bytes(worker.pid) for worker in workers]
        mapped = sum(proportional_bytes(worker.pid) for worker in workers) - sum(allocated)
        for worker in workers:
            worker.communicate("end\n")
    return mapped, allocated


def settings(here: Place, items: int) -> dict[str, Any]:
    return {**PHASES, **TRIVIAL, "data.image_size": SIZE, "data.limit": items, "data.split": [0.9, 0.1, 0.0],
            "data.cache_dir": here.environment["AUTOENC_CACHE"], "train.batch_size": 2}


def data_bytes(here: Place, items: int) -> int:
    """Bytes of the decoded data set, which is made here where it is not there yet."""
    from autoenc.config import make_config
    from autoenc.data import prepare

    return prepare(make_config(settings(here, items), "the benchmark").data).images.nbytes
