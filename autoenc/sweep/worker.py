"""What Ray runs of a sweep in processes of its own. It imports what these need and no more: each waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import ray
from ray import tune

from autoenc.custom import arrive
from autoenc.sweep import visible
from autoenc.sweep.work import Task, in_text, work


class TrialWorker(tune.Trainable):
    """One worker: trains a task an epoch a step. A worker is used again for the next task, torch and data loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        arrive(config["own"])
        said = visible.not_seen(config["folder"])
        self.steps: Iterator[dict[str, Any]] = \
            iter([{"outcome": "broken", "note": said}]) if said else work(Task(**config["task"]))
        self.node = ray.get_runtime_context().get_node_id()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        return {**in_text(next(self.steps)), "node_id": self.node}

    def cleanup(self) -> None:
        with suppress(Exception):
            self.steps.close()


def trial_resources(cpus: int, gpus: float) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """What a trial asks Ray for, by its configuration. (It travels with the trial.)"""
    return lambda config: tune.PlacementGroupFactory([{"CPU": cpus, "GPU": gpus} | _of_kind(config["kind"])])


def _of_kind(kind: str | None) -> dict[str, float]:
    """What makes Ray keep to nodes with GPUs of a kind: they all have one of it to give."""
    return {f"accelerator_type:{kind}": 0.001} if kind else {}


class Caller:
    """Calls a function in a process of its own."""

    def call(self, own: dict[str, tuple[str, str, bytes]], function: Callable[..., Any], *task: Any) -> Any:
        arrive(own)
        return function(*task)
