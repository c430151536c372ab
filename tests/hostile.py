"""What the tests of hostile input break things with, and the command without Ray to run over what they broke."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from sweepfiles import places

import tune_runner
from autoenc.errors import InputError
from autoenc.sweep.driver import Driver
from autoenc.sweep.work import Task, in_text, work

torch.set_num_threads(1)

EXAMPLES = int(os.environ.get("AUTOENC_EXAMPLES", "0"))          # instead of the usual numbers
MANY = EXAMPLES or 10_000
QUIET = settings(deadline=None, phases=set(Phase) - {Phase.explain}, suppress_health_check=list(HealthCheck))

NUMBERS = [0, -1, 1, 3, 10**9, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 10**290, 10**400, True]
WORDS = ["", " ", "x", "é☃", "a\nb", "a\x00b", "\ud800", "nan", "1e999", "[/b]", "\x1b[31m", "../x", "/etc", "val/mse",
         "completed", "diverged", "x" * 70_000]
WILD = st.one_of(st.none(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers(), st.floats(),
                 st.text(max_size=5))
VALUES = st.recursive(WILD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["1", "2", "epoch", "step", "what"]), inner, max_size=3), max_leaves=5)

# What a file as a whole can be.
GARBAGE = [b"", b"\x00", b"\n", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", b"3", b"NaN", b'"x"',
           b"1" * 5000, b"\xff\xfe\x00", b"PK\x03\x04", b"PK\x05\x06" + b"\x00" * 18, b"\x80\x02.",
           b"half a file\n", b"x" * 300_000, b"- " * 5000, b"{a: " * 100]


def examples(usual: int) -> settings:
    return settings(QUIET, max_examples=EXAMPLES or usual)


def few(count: int, values: list[Any]) -> list[Any]:
    """Parameters of which only the first are tried by default."""
    return [pytest.param(value, id=str(k), marks=pytest.mark.slow if k >= count else ()) for k, value in
            enumerate(values)]


class Hung(BaseException):
    """No handler of the code takes it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises :class:`Hung` where the block takes longer."""
    def ring(*_: Any) -> None:
        raise Hung(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def spoil_tree(draw: st.DrawFn, content: Any, values: st.SearchStrategy = VALUES) -> Any:
    """A tree of plain values with one to three of its parts dropped, replaced, renamed, nested or moved. In place."""
    tree = {"": content}
    for _ in range(draw(st.integers(1, 3))):
        spots = places(tree)
        holder, key = draw(st.sampled_from(spots))
        what = draw(st.sampled_from(["drop", "retype", "retype", "misspell", "nest", "deepen", "move", "add"]))
        if what == "drop" and holder is not tree:
            del holder[key]
        elif what == "misspell" and isinstance(holder, dict) and holder is not tree:
            holder[draw(st.sampled_from([f"{key}s", f"{key}"[:-1], f" {key}", f"{key}"[::-1]]))] = holder.pop(key)
        elif what == "nest":
            holder[key] = {draw(st.sampled_from(["epoch", "x", "1"])): holder[key]}
        elif what == "deepen":
            for _ in range(draw(st.integers(1, 30))):
                holder[key] = [holder[key]]
        elif what == "move":
            other, there = draw(st.sampled_from(spots))
            holder[key] = json.loads(json.dumps(other[there]))
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["epoch", "diverged", "failed", "state", "x"]))] = draw(values)
        else:
            holder[key] = draw(values)
    return tree[""]


def spoil_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Cut, overwritten here and there, or with something put in."""
    what = draw(st.sampled_from(["cut", "flip", "flip", "insert", "remove", "twice", "garbage"]))
    at = draw(st.integers(0, max(0, len(raw) - 1)))
    if what == "cut":
        return raw[:at]
    if what == "garbage":
        return draw(st.sampled_from(GARBAGE))
    if what == "insert":
        return raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    if what == "remove":
        return raw[:at] + raw[at + draw(st.integers(1, 40)):]
    if what == "twice":
        return raw[:at] + raw
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


class Outcome:
    """A run of the command: exit code, what it said, the epochs that were trained, by trajectory, and the decisions."""

    def __init__(self) -> None:
        self.code, self.said, self.decisions = 0, "", []
        self.trained: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"exit code {self.code}"


def command(arguments: Sequence[str], report: bool = False) -> Outcome:
    """``tune_runner.py`` with these arguments, its workers one after another in this process instead of on a cluster.
    What is neither told nor an error of the file system escapes. Without its report.html unless asked for."""
    outcome, printed = Outcome(), io.StringIO()

    class Runner(tune_runner.Runner):
        def join_cluster(self) -> None:
            pass

        def share_gpus(self, race: Any) -> None:
            pass

        def train(self, phase: Any, race: Any) -> None:
            driver = Driver(race, output=str(self.output), folder=str(phase.folder.path), threads=1, device="cpu",
                            together=1, pairing=None, deadline=None, data="", changed=lambda: None,
                            say=self.console.print)
            while (run := driver.next()) is not None:
                for said in work(Task(**driver.task(run)["task"])):
                    outcome.trained[run.key] += "epoch" in said
                    if driver.take(run, in_text(said)):
                        break
            phase.folder.write_trials(race)

        def report(self, *given: Any) -> Path:
            return super().report(*given) if report else self.output / "report.html"

    usual, tune_runner.Runner = tune_runner.Runner, Runner
    try:
        with redirect_stdout(printed):
            outcome.code = tune_runner.main(list(arguments))
    except InputError as error:
        outcome.code, outcome.said = 2, str(error)
    except OSError as error:
        outcome.code, outcome.said = 1, f"{error.filename}: {error.strerror}" if error.strerror else str(error)
    finally:
        tune_runner.Runner = usual
    outcome.said += printed.getvalue()
    outcome.trained += Counter()                 # without those that are 0
    return outcome


CONFIG = {
    "data": {"image_size": 16, "limit": 40}, "loss": {"mse": 1.0},
    "model": {"base_channels": 8, "downsampling_steps": 2, "latent_channels": 2},
    "train": {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "patience": None, "sample_every": 2}}
FIRST = {"name": "first", "arms": {"A": {}, "B": {"train.learning_rate": 0.001}}}
SECOND = {"name": "second", "inherits": "first.yaml", "asha": {"grace_epochs": 1, "reduction_factor": 2},
          "arms": {"C": {}, "D": {"loss.l1": 0.5}, "E": {"train.learning_rate": 1e-6}},
          "decision": {"within": 0.2, "prefer": [{"metric": "latent/smoothness", "mode": "min"}]}}


class Finished:
    """Two sweeps, the second on the first, decided; and copies of their output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "whole"
        base = {"config": CONFIG, "asha": False, "resources": {"gpus": 0}}
        for name, content in {"base": base, "first": FIRST, "second": SECOND}.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        self.first = self.run(self.output, report=True)
        self.copies = 0

    def __repr__(self) -> str:
        return "…"

    def run(self, output: Path, *more: str, report: bool = False) -> Outcome:
        """The command for the second sweep, and what is decided after it."""
        outcome = command([str(self.folder / "second.yaml"), "--output", str(output), *more], report)
        files = [output / name / "decision.json" for name in ("first", "second")]
        outcome.decisions = [file.read_bytes() if file.is_file() else b"" for file in files]
        return outcome

    def copy(self) -> Path:
        """Of the output folder; the one before goes."""
        shutil.rmtree(self.folder / f"copy{self.copies}", ignore_errors=True)
        self.copies += 1
        return Path(shutil.copytree(self.output, self.folder / f"copy{self.copies}", symlinks=True))

    def key(self, trial: str) -> str:
        """The trajectory of a trial, ``second/D_seed42``."""
        sweep, name = trial.split("/")
        return (self.output / sweep / "trials" / name).resolve().name
