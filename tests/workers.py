"""Workers for a real Ray that train nothing: their epochs come from a curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from racing import Curve, levels, put, row_of

from autoenc.sweep.store import Store


def simulated_worker(curve: Curve = levels, *,
                     seconds: Callable[[Sequence[Any], Path], float] = lambda rows, output: 0.02,
                     fails: Callable[[Sequence[Any], Mapping[str, float]], str] = lambda rows, has: "") -> type:
    """A worker that tells of its epochs as ``autoenc.sweep.work`` does, for :mod:`autoenc.sweep.run_ray`. Local: Ray
    sends it to its processes by value.

    ``seconds(rows, output)``: what the last of these epochs takes, with this output folder. ``fails(rows, resources)``:
    after these epochs, with what it has of the cluster, it fails, with this note; empty: it does not. Its status names
    the kind of its GPU, where it was given one of a kind.
    """
    import ray
    from ray import tune

    from autoenc.config import make_config
    from autoenc.sweep.work import in_text

    class Simulated(tune.Trainable):
        def setup(self, config):
            task = config["task"]
            self.settings = make_config(task["config"], "the task")
            self.output = Path(task["output"])
            self.trajectory = Store(self.output).open(task["key"])
            self.has = ray.get_runtime_context().get_assigned_resources()
            kinds = [name.partition(":")[2] for name in self.has if name.startswith("accelerator_type:")]
            self.about = {"device_name": kinds[0]} if kinds else {}

        def reset_config(self, new_config):
            self.setup(new_config)
            return True

        def step(self):
            rows = self.trajectory.rows()
            if len(rows) == self.settings.train.epochs:
                return {"outcome": "completed"}
            if note := fails(rows, self.has):
                put(self.trajectory, rows, failed=note, **self.about)
                return {"outcome": "failed", "note": note}
            what = curve(self.settings)[len(rows)]
            if what == "diverged":
                put(self.trajectory, rows, diverged={"epoch": len(rows) + 1, "step": 1, "what": "loss"}, **self.about)
                return {"outcome": "diverged", "note": "by test"}
            row = row_of(len(rows) + 1, what)
            put(self.trajectory, [*rows, row], **self.about)
            time.sleep(seconds([*rows, row], self.output))
            return in_text({"row": row})

    return Simulated
