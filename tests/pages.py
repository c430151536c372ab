"""A sweep's folder as training leaves it, without training, and what a browser would see of its report."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from autoenc.report.sweep import render
from autoenc.sweep import inherit
from autoenc.sweep.inherit import Winner
from autoenc.sweep.phase import decide_race
from autoenc.sweep.race import Race
from autoenc.sweep.store import Store
from autoenc.table import csv_text
from autoenc.trajectory import trajectory_key
from autoenc.yamlfile import dump_yaml

GOOD = [0.5, 0.4, 0.3, 0.2, 0.1]
FAIR = [0.55, 0.45, 0.31, 0.22, 0.104]
POOR = [0.9, 0.8, 0.7]
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" {{ 7*7 }} {% raise %}"


class Page(HTMLParser):
    """What a browser would see: the text, the elements with their attributes, tables, the charts' data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.charts: list[dict] = []
        self.words = ""
        self.depths: dict[str, int] = {}             # tag -> how deep it stands in itself at most
        self._open: dict[str, int] = {}
        self._inside = self._cell = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open[tag] = self._open.get(tag, 0) + 1
        self.depths[tag] = max(self._open[tag], self.depths.get(tag, 0))
        self._inside = "chart" if ("type", "application/json") in attributes else tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = tag

    def handle_endtag(self, tag):
        self._open[tag] = self._open.get(tag, 0) - 1
        self._inside = ""
        self._cell = "" if tag == self._cell else self._cell

    def handle_data(self, data):
        if self._inside == "chart":
            self.charts.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def text(self) -> str:
        return " ".join(self.words.split())

    def row(self, name: str, table: int = 0) -> list[str]:
        cells = [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]
        return next(row for row in cells if row[0] == name)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def rows_of(values, **figures):
    return [{"epoch": epoch, "seconds": 2.0, "val/mse": value, "train/mse": value * 0.9, "val/psnr": 20.0 + epoch,
             "parameters": 1234567.0, **figures} for epoch, value in enumerate(values, start=1)]


class Sweep:
    """A sweep in a folder, its trajectories as training leaves them."""

    def __init__(self, folder: Path, arms: dict, **content) -> None:
        self.output = folder / "outputs"
        self.past: list[dict] = []
        content = {"name": "phase", "config": {"train": {"epochs": 5}}, "arms": arms,
                   "asha": {"grace_epochs": 2, "reduction_factor": 2},
                   "decision": {"within": "5%", "prefer": [{"metric": "parameters", "mode": "min"}]}, **content}
        path = folder / "phase.yaml"
        path.write_text(dump_yaml(content), encoding="utf-8")
        self.spec = inherit.load_chain(path)[-1]
        self.start = inherit.starting_point(self.spec, None)
        self.arms = inherit.arm_candidates(self.spec, self.start)
        self.store = Store(self.output)
        for arm in self.arms:
            (self.folder(arm.name) / "samples").mkdir(parents=True, exist_ok=True)

    def folder(self, arm: str) -> Path:
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        return self.store.open(self.key(config)).folder

    @staticmethod
    def key(config) -> str:
        return trajectory_key(config, "fingerprint", "cpu")

    def trained(self, arm: str, rows, **status) -> None:
        folder = self.folder(arm)
        (folder / "metrics.csv").write_text(csv_text(rows))
        (folder / "status.json").write_text(json.dumps({
            "state": "training", "epochs": len(rows), "best_epoch": len(rows), "device": "cpu", "data": "fingerprint",
            "versions": {"torch": "9.9"}, **status}))

    def sample(self, arm: str, epoch: int, colour=(200, 30, 60), size=(64, 24)) -> None:
        Image.new("RGB", size, colour).save(self.folder(arm) / "samples" / f"epoch_{epoch:04d}.png")

    def stopped(self, arm: str, epoch: int, value: float, best: float, by: str) -> None:
        config, other = (next(c.config for c in self.arms if c.name == name) for name in (arm, by))
        self.past.append({"event": "stopped", "key": self.key(config), "epoch": epoch, "value": value, "cutoff": best,
                          "best": best, "beaten_by": [self.key(other)], "metric": "val/mse"})

    def race(self) -> Race:
        return Race(self.spec, self.start, self.arms, key_of=self.key, open_trajectory=self.store.open,
                    past=self.past, retry=False)

    def decision(self) -> dict:
        race = self.race()
        assert race.idle
        return decide_race(race)

    def winner(self, arm: str, **provenance) -> Winner:
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        return Winner("phase", config.flat(), {"arm": arm, "trial": f"{arm}_seed42", **provenance})

    def repeated(self, arm: str, k: int, rows) -> None:
        """The arm's k-th further seed."""
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        again = config.train.model_copy(update={"seed": config.train.seed + k})
        folder = self.store.open(self.key(config.model_copy(update={"train": again}))).folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.csv").write_text(csv_text(rows))

    def sampled(self, name: str, point: dict, rows) -> None:
        """A point that an earlier run drew from the space, trained."""
        self.past.append({"event": "suggested", "name": name, "settings": point})
        candidate = inherit.make_candidate(self.spec, self.start, name, point)
        folder = self.store.open(self.key(candidate.config)).folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.csv").write_text(csv_text(rows))

    def page(self, winner: Winner | None = None, command: str = "python tune_runner.py phase.yaml",
             data: str = "99 images", state: str = "decided") -> Page:
        race = self.race()
        assert race.idle or state != "decided"
        return Page(render(race, decide_race(race), winner=winner, dataset_words=data, command=command,
                           output=self.output, state=state))


def arms(*names, **more) -> dict:
    return {name: {"train.learning_rate": 10.0 ** -(place + 2), **more} for place, name in enumerate(names)}
