"""How many epochs the phases train, and whether they decide as they would with full training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from commands import rows_of
from measure import Options, Round, Skip
from place import REPOSITORY, RUNNER, Place, place

PHASES = ("phase1_1", "phase1_2", "phase1_3", "phase1_4")
ARMS, EPOCHS = 13, 10           # of the four phases, and what the source trains of each


def epochs(options: Options) -> Iterator[Round]:
    """Epochs that phases 1.1 to 1.4 train for the arms' first seeds, over the 130 that are trained without early
    stopping and store (13 arms of 10 epochs); round k has data seed 42 + k.

    One command runs the four phases as shipped, on the images of ``--manifest`` (``--limit`` of them) at
    ``--image-size`` px, from an empty store. What an arm takes over from a phase before counts as nothing, as the
    source's own runs would have trained it again. Repeats of finalists (further seeds), which the source does not have,
    are reported apart.

    Then the same phases without early stopping, over a copy of the store (epochs that are there are the ones that
    would be trained: the same seed on the same machine is the same to the last bit): ``winners as with full training``.
    It counts as reached only where every winner is the same in all rounds.

    With ``--folder`` the stores stay there: interrupted, it goes on with what they hold.
    """
    if options.manifest is None or options.palette is None:
        raise Skip("--manifest and --palette name no images and classes; it takes hours on a CPU")
    with place(options.folder) as here:
        for seed in count(42):
            name = f"{options.image_size}px_{options.limit or 'all'}_{seed}"
            stopped, full = here.folder / f"stopped_{name}", here.folder / f"full_{name}"
            settings = given(options, seed)
            chain(here, stopped, *settings)
            if not full.exists():
                half = here.new("half_copied")
                shutil.copytree(stopped, half, symlinks=True, dirs_exist_ok=True)
                half.rename(full)
            chain(here, full, *settings, "--preset", "full_training")
            first, repeats = trained(stopped)
            winners = [(winner(stopped, phase), winner(full, phase)) for phase in PHASES]
            same = sum(ours == theirs for ours, theirs in winners)
            yield Round({"epochs": (first, ARMS * (3 if options.quick else EPOCHS)), "winners": (same, len(PHASES))}, {
                "px": options.image_size, "images": options.limit or "all", "epochs of repeats": repeats,
                "winners": ", ".join(ours if ours == theirs else f"{ours} (full training: {theirs})"
                                     for ours, theirs in winners)})


def given(options: Options, seed: int) -> list[str]:
    """The command's arguments that name the data."""
    settings: dict[str, Any] = {
        "data.source": "manifest", "data.manifest": options.manifest.absolute(),
        "data.palette": options.palette.absolute(), "data.image_size": options.image_size,
        "data.limit": 60 if options.quick else options.limit or "null", "data.seed": seed}
    if options.quick:
        settings["train.epochs"] = 3
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def chain(here: Place, output: Path, *arguments: str) -> None:
    """Run the phases as they are shipped, with a preset beside them that turns early stopping off."""
    sweeps = here.folder / "sweeps"
    shutil.copytree(REPOSITORY / "sweeps", sweeps, dirs_exist_ok=True)
    (sweeps / "presets" / "full_training.yaml").write_text("description: every arm to its end\nasha: false\n")
    here.run(RUNNER, sweeps / f"{PHASES[-1]}.yaml", "--output", output, *arguments, limit=24 * 3600)


def trained(output: Path) -> tuple[int, int]:
    """Epochs trained for first seeds, and for repeats, of all sweeps: what the store holds."""
    tables = {table: yaml.safe_load((table.parent / "config.yaml").read_text())["config"]["train"]["seed"]
              for table in output.glob("store/*/metrics.csv")}
    epochs = {table: len(rows_of(table)) for table in tables}
    first = sum(epochs[table] for table, seed in tables.items() if seed == min(tables.values()))
    return first, sum(epochs.values()) - first


def winner(output: Path, phase: str) -> str:
    folder = output / yaml.safe_load((REPOSITORY / "sweeps" / f"{phase}.yaml").read_text())["name"]
    return json.loads((folder / "decision.json").read_text())["winner"]
