"""Which arms a sweep's gallery shows, and the worker that makes it. No torch and no Ray here; the pictures are
:mod:`autoenc.evaluation.gallery`'s."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoenc.interrupts import Deadline
from autoenc.report.candidates import best_first, first_seeds
from autoenc.settings import DataConfig
from autoenc.sweep.race import Race

MOST_ARMS = 24
SECONDS = 300.0              # that making it may take, waiting for its worker included
SPARE_SECONDS = 30.0         # before a deadline, for what follows it


def draw(race: Race, decision: Mapping[str, Any], folder: Path, call: Callable[..., list[str]],
         deadline: Deadline | None = None) -> str:
    """Have the gallery in ``folder`` show the arms as the race left them; nothing is done where it does already.

    ``call(function, *task, seconds=…)`` calls a function on a worker. Returns what went wrong, in a line: no failure of
    it may cost the decision.
    """
    shown = exhibits(race, decision)
    if not shown or is_current(folder, shown):
        return ""
    seconds = min(SECONDS, deadline.left - SPARE_SECONDS if deadline else SECONDS)
    if seconds < SPARE_SECONDS:
        return f"{deadline.source} is nearly over: no pictures of the arms beside each other"
    try:
        problems = call(make, shown, race.trials[0].candidate.config.data, folder, seconds=seconds)
    except TimeoutError:
        problems = [f"not done within {seconds:.0f} s"]
    except Exception as error:                  # a worker that died, memory, a disk that is full: of many kinds
        cause = getattr(error, "cause", None) or error
        problems = [f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"]
    return f"pictures of the arms beside each other: {'; '.join(problems)}" if problems else ""


def exhibits(race: Race, decision: Mapping[str, Any]) -> list[tuple[str, Path, int, str, str]]:
    """What is to be shown, best first: (arm, checkpoint, epoch, trajectory's key, trial) of the first seeds that
    completed and whose best weights are kept, of the best arms where there are many."""
    first = {trial.candidate.name: trial for trial in first_seeds(race.trials)}
    found = []
    for trial in (first[arm] for arm in best_first(race, decision) if arm in first):
        run = trial.run
        epoch = int(race.figures_of(run).get("epoch", 0)) if run.state == "completed" else 0
        path = run.trajectory.weights(epoch, run.config.model.normalize_latents) if epoch else None
        if path is not None:
            found.append((trial.candidate.name, path, epoch, run.key, trial.name))
    return found[:MOST_ARMS]


def is_current(folder: Path, shown: Sequence[tuple[str, Path, int, str, str]]) -> bool:
    """Whether the gallery in ``folder`` is whole and shows exactly these arms, keys and epochs."""
    try:
        content = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
        there = {arm: (told["weights"], told["epoch"], told["key"]) for arm, told in content["arms"].items()}
        pictures = [content["inputs"], *(told["picture"] for told in content["arms"].values())]
        return (there == {arm: (path.name, epoch, key) for arm, path, epoch, key, _ in shown}
                and all((folder / name).is_file() for name in pictures))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False                         # none, or a broken one


def make(shown: Sequence[tuple[str, Path, int, str, str]], data: DataConfig, folder: Path, threads: int,
         device: str) -> list[str]:
    """Make the gallery, on a worker; returns what is wrong with arms that are left out."""
    import torch

    from autoenc.data import prepare
    from autoenc.evaluation.gallery import write_gallery

    torch.set_num_threads(threads)
    return write_gallery(shown, prepare(data), folder, device)
