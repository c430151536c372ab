"""What a sweep that is run again does before anything starts: the store's epochs go back to the race and ASHA."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import yaml
from measure import Options, Round, in_turn, timed


def replay(options: Options) -> Iterator[Round]:
    """Seconds to bring 1,000 stored epochs (100 arms of 10) back: open the sweep, read every trajectory, report all to
    ASHA's rungs, settle what has ended. The sweep lost its decision, so everything is looked at.

    Beside it: to read the same tables and status files with Python's csv and json and do nothing with them, which
    whoever starts again would have to do at least. The tables have the columns of a real training, the values are
    drawn; file system caches are warm for both.
    """
    arms, epochs = (10, 3) if options.quick else (100, 10)
    with tempfile.TemporaryDirectory() as folder:
        lab = Stored(Path(folder), arms, epochs)
        lab.race(), lab.read()                       # warm
        for number in count():
            ours, plain = in_turn(number, lambda: timed(lab.race), lambda: timed(lab.read))
            yield Round({"replay": (ours, plain)}, {"epochs": lab.reported})


class Stored:
    """A sweep whose arms have all been trained, in a real store."""

    def __init__(self, folder: Path, arms: int, epochs: int) -> None:
        from autoenc.table import csv_text

        self.folder, self.sweep, self.reported = folder, folder / "stored.yaml", 0
        base = {"data": {"image_size": 8, "limit": 30, "cache_dir": str(folder / "cache")},
                "model": {"downsampling_steps": 3}, "train": {"epochs": epochs, "patience": None}}
        (folder / "base.yaml").write_text(yaml.safe_dump({"config": base}))
        self.sweep.write_text(yaml.safe_dump({
            "name": "stored", "asha": {"grace_epochs": 1, "reduction_factor": 3},
            "arms": {f"A{arm:03d}": {"train.learning_rate": 1e-5 * (1 + arm)} for arm in range(arms)}}))
        draw = random.Random(0)
        for run in self.open().race("cpu").runs.values():
            run.trajectory.folder.mkdir(parents=True)
            rows = [{"epoch": epoch, "seconds": 1.0, **{name: draw.uniform(0.01, 0.02) for name in COLUMNS}}
                    for epoch in range(1, epochs + 1)]
            (run.trajectory.folder / "metrics.csv").write_text(csv_text(rows))
            (run.trajectory.folder / "status.json").write_text(json.dumps({"state": "completed", "epochs": epochs}))

    def open(self):
        from autoenc.data import prepare
        from autoenc.sweep.inherit import load_chain
        from autoenc.sweep.phase import open_phase

        return open_phase(load_chain(self.sweep)[-1], self.folder / "out", prepare)

    def race(self) -> None:
        race = self.open().race("cpu")
        self.reported = sum(len(run.rows) for run in race.runs.values())
        if not all(run.ended for run in race.runs.values()):
            raise RuntimeError("what is stored was not taken over")

    def read(self) -> None:
        for trajectory in (self.folder / "out" / "store").iterdir():
            with (trajectory / "metrics.csv").open(newline="") as file:
                list(csv.DictReader(file))
            json.loads((trajectory / "status.json").read_text())


COLUMNS = (
    *(f"train/{name}" for name in ("loss", "mse", "psnr", "grad_norm", "spikes")),
    *(f"val/{name}" for name in ("loss", "mse", "psnr", "l1", "ssim", "palette_miou", "palette_classes")),
    *(f"latent/{name}" for name in ("mean", "std", "active_units")), "latent_size", "parameters")
