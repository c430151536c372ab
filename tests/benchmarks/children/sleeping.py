"""A sweep by the product's driver whose workers sleep, on a cluster of several nodes on this machine.

    python sleeping.py '{"output": …, "nodes": 4, "slots": 16, "trials": 256, "epochs": 10, "seconds": 2.0}'
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"      # before Ray is imported; its head listens on loopback

from ray.cluster_utils import Cluster

from autoenc.sweep import ray_cluster, run_ray
from autoenc.sweep.inherit import arm_candidates, load_chain, starting_point
from autoenc.sweep.race import Race
from autoenc.sweep.store import Store, SweepFolder
from autoenc.sweep.work import Task
from autoenc.table import append_row
from autoenc.trajectory import trajectory_key


class Sleeper(run_ray.TrialWorker):
    """A worker that sleeps instead of training."""

    def setup(self, config: dict) -> None:
        super().setup(config)
        self.steps = slept(Task(**config["task"]))


def slept(task: Task) -> Iterator[dict]:
    """What :func:`autoenc.sweep.work.work` would yield. When it slept is written down beside the store."""
    trajectory = Store(Path(task.output)).open(task.key)
    trajectory.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(task.key)
    for epoch in range(1, task.config["train.epochs"] + 1):
        began = time.time()
        time.sleep(SECONDS * draw.uniform(0.8, 1.2))
        with Path(task.output, "slept", task.key).open("a") as log:
            log.write(f"{task.key} {os.getpid()} {began} {time.time()}\n")
        row = {"epoch": epoch, "seconds": time.time() - began, "val/mse": draw.uniform(0.01, 0.02)}
        append_row(trajectory.folder / "metrics.csv", row)
        yield {"epoch": epoch, "row": row}
    if "torch" in sys.modules:
        raise RuntimeError("a worker that sleeps has imported torch")
    yield {"outcome": "completed"}


def main(trials: int, epochs: int, output: str, nodes: int, slots: int) -> None:
    folder = Path(output)
    (folder / "slept").mkdir()
    (folder / "sleeping.yaml").write_text(json.dumps({
        "name": "sleeping", "config": {"train": {"epochs": epochs, "patience": None}}, "asha": False,
        "space": {"train.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}},
        "search": {"algorithm": "random", "trials": trials}}))
    spec = load_chain(folder / "sleeping.yaml")[-1]
    start = starting_point(spec, spec.base)
    sweep = SweepFolder(folder, spec.name)
    run_ray.TrialWorker = Sleeper
    resources = {"num_cpus": slots, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=slots, object_store_memory=80 * 2**20)
        with sweep.writing(), ray_cluster.cluster(cluster.address) as here:
            race = Race(spec, start, arm_candidates(spec, start), emit=sweep.emit, open_trajectory=Store(folder).open,
                        key_of=lambda config: trajectory_key(config, "none", "cpu"), past=sweep.events())
            run_ray.run(race, here, folder=sweep.path, output=folder)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    SECONDS = settings.pop("seconds")
    main(**settings)
