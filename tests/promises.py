"""What a sweep that was harmed (faults.py) still owes: no stored epoch is lost or trained again, and all comes out as
without the harm."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from harmed import Project


@dataclass
class Findings:
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def promise(self, kept: object, words: str) -> None:
        if not kept:
            self.broken.append(words)

    def show(self) -> None:
        width = max(map(len, self.figures), default=0)
        for name, value in self.figures.items():
            print(f"{name:<{width}}  {f'{value:.1f}' if isinstance(value, float) else value}")
        for words in self.broken:
            print(f"BROKEN: {words}")


def check_epochs(findings: Findings, *projects: Project, running: int) -> None:
    """No stored epoch was trained again; of those that never came to be stored, at most ``running`` were lost."""
    started = [epoch for project in projects for epoch in project.epochs()]
    stored = sum(project.stored() for project in projects)
    again = [epoch for epoch in started if epoch.number <= epoch.held]
    findings.figures |= {"epochs stored": stored, "epochs begun in all": len(started),
                         "stored epochs trained again": len(again),
                         "running epochs trained again": len(started) - stored - len(again)}
    findings.promise(not again, f"stored epochs trained again: {again}")
    findings.promise(len(started) - stored <= running, f"{len(started) - stored} epochs lost, {running} were running")


def check_equal(findings: Findings, project: Project, whole: Project) -> None:
    """Every trajectory is that of the uninterrupted run, or its beginning: figures to the last digit, weights and the
    optimizer's state to the last bit."""
    wrong = []
    for key in project.rows():
        mine, its = project.output / "store" / key, whole.output / "store" / key
        if not its.is_dir():
            wrong.append(f"{key}: not trained there")
            continue
        rows, expected = table(mine / "metrics.csv"), table(its / "metrics.csv")
        if rows != expected[:len(rows)]:
            wrong.append(f"{key}: figures differ")
        if len(rows) == len(expected):
            wrong += [f"{key}: {name} differs" for name in ("latest.pt", "best.pt")
                      if not same(load(mine / name), load(its / name))]
    findings.figures["trajectories unlike the uninterrupted run's"] = \
        findings.figures.get("trajectories unlike the uninterrupted run's", 0) + len(wrong)
    findings.promise(not wrong, "; ".join(wrong))


def table(path: Path) -> list[dict[str, str]]:
    """Rows without their duration."""
    with path.open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def load(path: Path) -> dict[str, Any]:
    import torch

    return {key: value for key, value in torch.load(path, weights_only=True).items()
            if key in ("epoch", "model", "optimizer")}


def same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_kept(findings: Findings, before: Mapping[str, list[str]], project: Project) -> None:
    """Every line that stood in a table still stands there."""
    after = project.rows()
    lost = [key for key, rows in before.items() if after.get(key, [])[:len(rows)] != rows]
    findings.promise(not lost, f"rows lost or changed: {lost}")


def stops(project: Project) -> dict[str, int]:
    """Key -> the epoch at which it was stopped and not continued since."""
    found: dict[str, int] = {}
    for event in project.events("stopped", "continued"):
        found.pop(event["key"], None)
        if event["event"] == "stopped":
            found[event["key"]] = event["epoch"]
    return found


def check_events(findings: Findings, before: Mapping[str, int], project: Project) -> None:
    """Stops are honoured unless a ``continued`` says otherwise; no point is suggested twice."""
    continued = {event["key"] for event in project.events("continued")}
    with (project.output / project.name / "trials.csv").open(newline="") as file:
        trials = {Path(project.output, project.name, "trials", row["trial"]).resolve().name: row
                  for row in csv.DictReader(file)}
    for key, epoch in before.items():
        row = trials[key]
        honoured = row["status"] == "stopped" and int(row["epochs"]) == epoch == len(project.rows()[key])
        findings.promise(honoured or key in continued,
                         f"{row['trial']} was stopped at epoch {epoch}, now {row['status']} at {row['epochs']}")
    points = [json.dumps(event["settings"], sort_keys=True) for event in project.events("suggested")]
    findings.figures["points suggested twice"] = \
        findings.figures.get("points suggested twice", 0) + len(points) - len(set(points))
    findings.promise(len(points) == len(set(points)), f"points suggested twice: {points}")


def unreadable(output: Path) -> list[str]:
    """What lies in an output folder and cannot be read, or is a temporary file."""
    import torch

    readers = {".json": lambda path: json.loads(path.read_text()),
               ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
               ".yaml": lambda path: yaml.safe_load(path.read_text()),
               ".pt": lambda path: torch.load(path, weights_only=True), ".csv": read_table}
    found = []
    for path in output.rglob("*"):
        if path.is_file() and path.name.startswith(".") and path.name != ".lock":
            found.append(f"{path}: temporary")
        elif path.is_file() and path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                found.append(f"{path}: {type(error).__name__}: {error}")
    return found


def read_table(path: Path) -> None:
    text = path.read_text()
    header, *rows = csv.reader(text.splitlines())
    if not text.endswith("\n") or any(len(row) != len(header) for row in rows):
        raise ValueError("a line is not whole")
    if path.name == "metrics.csv":
        [float(cell or "nan") for row in rows for cell in row]
