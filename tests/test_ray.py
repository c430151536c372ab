"""The command from end to end, on a Ray of its own, and what a worker does with one trial."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import small_config

from autoenc import load_config, load_model
from autoenc.sweep.store import Store

RUNNER = Path(__file__).resolve().parents[1] / "tune_runner.py"

BASE = {"config": {"data": {"image_size": 16, "limit": 40},
                   "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2},
                   "train": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "patience": None}},
        "asha": {"grace_epochs": 1, "margin": "200%"}}
FIRST = {"name": "first_size", "arms": {"S": {"model.latent_channels": 2}, "L": {"model.latent_channels": 4}},
         "decision": {"within": "500%", "prefer": [{"metric": "latent_size"}]}}
SECOND = {"name": "second_vae", "inherits": "first.yaml", "config": {"train": {"epochs": 2}},
          "arms": {"V1": {"model.variational": False}, "V2": {"model.variational": True, "loss.kl": 1e-4}},
          "decision": {"within": "500%", "prefer": [{"metric": "latent/smoothness"}]}}


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Where Ray keeps its sockets: their paths may not be long."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Project:
    """Sweep files in a folder, and the command over them."""

    def __init__(self, folder: Path, ray_folder: str) -> None:
        self.folder, self.output, self.ray = folder, folder / "out", Path(ray_folder)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = {**env, "HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "RAY_TMPDIR": ray_folder}
        self.write(base=BASE, first=FIRST, second=SECOND)

    def write(self, **files) -> None:
        for stem, content in files.items():
            (self.folder / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def run(self, *arguments: str) -> str:
        """Runs sweep second; its output."""
        command = [sys.executable, str(RUNNER), "second.yaml", "--output", "out", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout

    def sessions(self) -> list[Path]:
        """One for each time that Ray was started."""
        return [path for path in self.ray.glob("**/session_2*") if path.is_dir() and not path.is_symlink()]

    def trials(self, sweep: str) -> dict[str, dict[str, str]]:
        with (self.output / sweep / "trials.csv").open() as file:
            return {row["trial"]: row for row in csv.DictReader(file)}

    def stored(self) -> dict[str, int]:
        return {folder.name: len(Store(self.output).open(folder.name).rows())
                for folder in (self.output / "store").iterdir()}


def test_two_phases_from_the_command(tmp_path, ray_folder):
    project = Project(tmp_path, ray_folder)
    said = project.run()
    assert "second_vae" in said and len(project.sessions()) == 1 and "Ray dashboard http://127.0.0.1:" in said
    check_files(project)

    trials = project.trials("second_vae")
    assert {name: (row["status"], row["epochs"], row["epochs_trained"]) for name, row in trials.items()} == {
        # first_size trained V1, for an epoch more; the weights to measure within two epochs are not those it kept
        "V1_seed42": ("completed", "2", "2"), "V2_seed42": ("completed", "2", "2")}
    assert {row["epochs_trained"] for row in project.trials("first_size").values()} == {"3"}
    assert sorted(project.stored().values()) == [2, 3, 3]

    kept = ["decision.json", "best_config.yaml", "second_vae_checkpoint_best.pt"]
    before = [(project.output / "second_vae" / name).read_bytes() for name in kept]
    stored = {path: path.stat().st_mtime_ns for path in (project.output / "store").glob("*/*.*")}
    project.run()
    assert before == [(project.output / "second_vae" / name).read_bytes() for name in kept]
    assert stored == {path: path.stat().st_mtime_ns for path in (project.output / "store").glob("*/*.*")}
    assert {row["epochs_trained"] for row in project.trials("second_vae").values()} == {"0"}
    assert len(project.sessions()) == 1, "nothing to train: no Ray"

    project.write(second={**SECOND, "decision": {"pick": "V2", "because": "a test"}})
    assert "V2" in project.run() and len(project.sessions()) == 1
    assert json.loads((project.output / "second_vae" / "decision.json").read_text())["winner"] == "V2"

    changed = {**SECOND["arms"], "V2": {"model.variational": True, "loss.kl": 1e-3}}
    project.write(second={**SECOND, "arms": changed})
    said = project.run("--no-dashboard")
    assert "Ray dashboard" not in said and "gauges for Prometheus http://127.0.0.1:" in said
    assert {name: row["epochs_trained"] for name, row in project.trials("second_vae").items()} == {
        "V1_seed42": "0", "V2_seed42": "2"}
    assert sorted(project.stored().values()) == [2, 2, 3, 3] and len(project.sessions()) == 2


def check_files(project: Project) -> None:
    """Design section 3."""
    for sweep, arms, epochs in (("first_size", ["S", "L"], 3), ("second_vae", ["V1", "V2"], 2)):
        folder = project.output / sweep
        decision = json.loads((folder / "decision.json").read_text())
        assert set(decision) >= {"rule", "winner", "candidates", "reasons"} and decision["winner"] in arms
        assert [row["arm"] for row in decision["candidates"]] == arms
        for row in decision["candidates"]:
            assert set(row) >= {"arm", "trials", "seeds", "score", "se", "epochs", "verdict", "reasons"}
        best = yaml.safe_load((folder / "best_config.yaml").read_text())
        assert best["provenance"]["sweep"] == sweep and best["provenance"]["arm"] == decision["winner"]
        config = load_config(folder / "best_config.yaml")
        assert config.train.epochs == epochs and config.data.image_size == 16
        trials = project.trials(sweep)
        assert list(next(iter(trials.values())))[:9] == [
            "trial", "arm", "seed", "status", "epochs", "epochs_trained", "best_epoch", "seconds", "device"]
        links = {link.name: link for link in (folder / "trials").iterdir()}
        assert links.keys() == trials.keys() == {f"{arm}_seed42" for arm in arms}
        for link in links.values():
            assert link.resolve().parent == (project.output / "store").resolve()
            assert {"config.yaml", "metrics.csv", "status.json", "latest.pt", "best.pt"} <= {
                path.name for path in link.iterdir()}
        assert {"started", "completed", "decided"} <= {
            json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()}
        assert load_model(folder / f"{sweep}_checkpoint_best.pt").latent_size > 0
        rows = (folder / f"{sweep}_metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + epochs and rows[0].startswith("epoch,seconds,")
        assert (folder / f"{sweep}_checkpoint_latest.pt").is_file() and (folder / "report.html").is_file()
        assert list((folder / "samples").glob("epoch_*.png"))
        assert not list(folder.glob(".tune*"))
    best = yaml.safe_load((project.output / "second_vae" / "best_config.yaml").read_text())
    assert best["provenance"]["parents"].keys() == {"first_size"} and best["config"]["model"]["latent_channels"] == 2
    smooth = [float(row["latent/smoothness"]) for row in project.trials("second_vae").values()]
    assert min(smooth) >= 1


def test_an_error_beside_the_training_itself_is_told_not_taken_for_a_dead_worker(tmp_path, monkeypatch):
    """And weights that are broken are had again: theirs are the only epochs trained."""
    from autoenc.sweep.work import Task, work

    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    config = small_config(data__limit=40, train__epochs=2, train__patience=None)
    task = Task(key="key", output=str(tmp_path), config=config.flat(), threads=1, device="cpu",
                after=("latent/smoothness",))
    folder = Store(tmp_path).open("key").folder
    *epochs, outcome = work(task)
    assert [said["epoch"] for said in epochs] == [1, 2] and outcome == {"outcome": "completed"}
    (outcome,) = work(replace(task, data="of another processor"))
    assert outcome["outcome"] == "failed" and "data is other data than where the command runs" in outcome["note"]
    (folder / "figures.json").unlink()
    (outcome,) = work(replace(task, device="nowhere"))
    assert outcome["outcome"] == "failed" and "RuntimeError" in outcome["note"]
    assert "finish" in (folder / "traceback.txt").read_text()

    (folder / "latest.pt").unlink()
    (weights,) = folder.glob("best_epoch_*.pt")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000] + bytes(1000))
    warning, *epochs, outcome = work(task)
    assert "is broken; set aside" in warning["warning"] and outcome == {"outcome": "completed"}
    assert all("row" not in said for said in epochs) and weights.read_bytes() == whole


def test_workers_on_one_trajectory_take_turns(tmp_path, monkeypatch):
    """One that is stopped, or waits for its next trial, holds nobody up, and no epoch is trained twice."""
    from autoenc.sweep.work import Task, work

    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))

    def worker(epochs: int):
        config = small_config(data__limit=40, train__epochs=epochs, train__patience=None)
        return work(Task(key="key", output=str(tmp_path), config=config.flat(), threads=1, device="cpu"))

    short, long, told = worker(3), worker(5), []

    def take_turns() -> None:
        told.extend(next(short)["row"]["epoch"] for _ in range(2))          # and is left there, as a stopped one is
        told.extend(next(long)["row"]["epoch"] for _ in range(2))
        told.append(next(short)["outcome"])
        told.extend([next(long)["row"]["epoch"], next(long)["outcome"]])

    thread = threading.Thread(target=take_turns, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert told == [1, 2, 3, 4, "completed", 5, "completed"]
    assert len(Store(tmp_path).open("key").rows()) == 5
