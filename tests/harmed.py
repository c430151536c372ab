"""Real sweeps by the real command, to be harmed (faults.py), and every epoch that was begun in them. Linux only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 400                     # seconds after which a command, or a process that should be gone, counts as hung
SLOTS = 2
DECISION = "decision.json"
# Two processes of Ray's own wait 60 s, idle, for a head that is gone with the command; all others end in seconds.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
WORKERS = ("ray::TrialWorker", "ray::ResourceTrainable")          # between two epochs, and in one

# Runs in every process of a sweep (as sitecustomize) and writes down each epoch as its training starts and ends, with
# the epochs that the store's table holds at that moment: what is counted does not rest on the sweep's own books.
WITNESS = '''
import importlib.abc, importlib.util, os, sys, time
from pathlib import Path

def watch(module):
    train = module._train_epoch

    def watched(run, epoch):
        from autoenc.trajectory import trajectory_key

        key = trajectory_key(run.config, run.dataset.fingerprint, run.device.type)
        table = Path(os.environ["FAULTS_STORE"], key, "metrics.csv")
        held = max(0, table.read_bytes().count(b"\\n") - 1) if table.is_file() else 0
        say("start", key, epoch, held)
        figures = train(run, epoch)
        say("end", key, epoch, held)
        return figures

    module._train_epoch = watched

def say(*words):
    file = os.open(os.environ["FAULTS_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, (" ".join(map(str, [*words, os.getpid(), time.time()])) + "\\n").encode())
    os.close(file)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "autoenc.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), watch(module))
        return spec

sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Size:
    """About three quarters of a minute, start of Ray and export included, on two cores of 2024."""

    epochs: int = 30
    images: int = 400
    trials: int = 8
    dashboard: bool = True


USUAL = Size()
ARMS = {"A": {"model.latent_channels": 2}, "B": {"model.latent_channels": 4},
        "C": {"train.learning_rate": 1e-4}, "D": {"model.latent_channels": 1}}
SPACE = {"train.learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True}}


@dataclass
class Epoch:
    key: str
    number: int
    held: int                   # epochs in the store's table as it started
    pid: int
    began: float
    ended: float | None = None


class Project:
    """Sweep files in a folder, the command over them, and what its processes did."""

    def __init__(self, folder: Path, size: Size = USUAL, **config: Any) -> None:
        folder = folder.resolve()
        self.folder, self.output, self.size = folder, folder / "out", size
        folder.mkdir(parents=True)
        (folder / "witness").mkdir()
        (folder / "witness" / "sitecustomize.py").write_text(WITNESS)
        self.ray = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))      # its sockets' paths may not be long
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = environment | {
            "HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "RAY_TMPDIR": str(self.ray),
            "PYTHONPATH": os.pathsep.join([str(folder / "witness"), str(REPOSITORY)]), "PYTHONUNBUFFERED": "1",
            "FAULTS_WITNESS": str(folder / "witness.log"), "FAULTS_STORE": str(self.output / "store")}
        settings = {"data.image_size": 16, "data.limit": size.images, "model.latent_channels": 2,
                    "model.base_channels": 16, "model.downsampling_steps": 2, "train.epochs": size.epochs,
                    "train.batch_size": 16, "train.learning_rate": 1e-3, "train.patience": None, **config}
        nested: dict[str, Any] = {}
        for key, value in settings.items():
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
        self._write("base", {"config": nested})
        self.name = "toy"

    def sweep(self, arms: Mapping[str, Any] = ARMS, *, name: str = "toy", asha: bool = False,
              **content: Any) -> Project:
        """Write a sweep; no more than two trials run at once on one machine."""
        self._write(name, {
            "name": name, "arms": dict(arms), "resources": {"cpus": max(1, (os.cpu_count() or 1) // SLOTS), "gpus": 0},
            "asha": {"grace_epochs": 2, "reduction_factor": 2, "margin": "2%"} if asha else False, **content})
        self.name = name
        return self

    def sampled(self, *, asha: bool, **content: Any) -> Project:
        """The arms, and random points. (TPE's depend on which of two trials ended first.)"""
        return self.sweep(asha=asha, search={"algorithm": "random", "trials": self.size.trials}, space=SPACE, **content)

    def _write(self, stem: str, content: Any) -> None:
        (self.folder / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def start(self, *arguments: str, name: str | None = None) -> subprocess.Popen:
        """The command, with further sweeps among the arguments; what it says goes to a file: Ray's processes could hold
        a pipe open beyond its end."""
        command = [sys.executable, str(REPOSITORY / "tune_runner.py"), f"{name or self.name}.yaml", "--output", "out",
                   *([] if self.size.dashboard else ["--no-dashboard"])]
        with (self.folder / f"{name or self.name}.log").open("a") as log:
            return subprocess.Popen([*command, *arguments], cwd=self.folder, env=self.environment,
                                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def said(self, name: str | None = None) -> str:
        return (self.folder / f"{name or self.name}.log").read_text()

    def complete(self, *arguments: str, name: str | None = None) -> float:
        """Run the command undisturbed; its seconds, which are kept."""
        began = time.monotonic()
        try:
            code = self.start(*arguments, name=name).wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = f"none within {LIMIT} s"
        if code != 0:
            raise RuntimeError(f"an undisturbed sweep ended with exit code {code}:\n{self.said(name)}")
        self.seconds = time.monotonic() - began
        return self.seconds

    def processes(self) -> dict[tuple[int, str], str]:
        """(process id, start time) -> command line of all that runs in this folder: the command and its Ray."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, IndexError):
                if entry.name.isdigit() and (entry / "cwd").readlink() == self.folder:
                    started = (entry / "stat").read_text().rpartition(")")[2].split()[19]
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name), started] = words.strip()
        return found

    def workers(self) -> list[int]:
        """Processes that train, or wait for the next trial."""
        return [pid for (pid, _), words in self.processes().items() if words.startswith(WORKERS)]

    def epochs(self) -> list[Epoch]:
        """Every epoch whose training was started, in order."""
        found: list[Epoch] = []
        path = self.folder / "witness.log"
        for line in path.read_text().splitlines() if path.is_file() else []:
            kind, key, number, held, pid, when = line.split()
            if kind == "start":
                found.append(Epoch(key, int(number), int(held), int(pid), float(when)))
            else:
                which = (key, int(number), int(pid))
                next(epoch for epoch in reversed(found)
                     if (epoch.key, epoch.number, epoch.pid) == which).ended = float(when)
        return found

    def rows(self) -> dict[str, list[str]]:
        """Key -> the complete lines of its table, as text."""
        tables = (self.output / "store").glob("*/metrics.csv")
        return {path.parent.name: path.read_text().split("\n")[1:-1] for path in tables}

    def stored(self) -> int:
        return sum(map(len, self.rows().values()))

    def events(self, *kinds: str, name: str | None = None) -> list[dict[str, Any]]:
        path = self.output / (name or self.name) / "events.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with suppress(ValueError):
                found.append(json.loads(line))
        return [event for event in found if event["event"] in kinds]

    def decision(self, name: str | None = None) -> dict[str, Any]:
        return json.loads((self.output / (name or self.name) / DECISION).read_text())

    def key_of(self, arm: str) -> str:
        return next((self.output / self.name / "trials").glob(f"{arm}_seed*")).resolve().name

    def close(self) -> None:
        """End whatever still runs."""
        for pid, _ in self.processes():
            kill(pid)
        shutil.rmtree(self.ray, ignore_errors=True)


def undisturbed(new: Callable[..., Project], size: Size) -> Project:
    """A sweep that ran to its end, to compare with."""
    project = new("whole", size).sampled(asha=False)
    project.complete()
    return project


@contextmanager
def projects(folder: Path) -> Iterator[Callable[..., Project]]:
    """Makes projects, and ends what still runs in them."""
    made: list[Project] = []

    def new(name: str, size: Size, **config: Any) -> Project:
        made.append(Project(folder / name, size, **config))
        return made[-1]

    try:
        yield new
    finally:
        for project in made:
            project.close()


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(true: Callable[[], Any], what: str, seconds: float = LIMIT) -> Any:
    """Wait for something to be true; its value."""
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return value
