"""The sweeps of an output folder on the terminal, and who runs one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pytest
from racing import KNOB, Killed, Lab, levels
from rich.console import Console

import tune_runner
from autoenc.errors import InputError
from autoenc.report.listing import show_sweeps
from autoenc.sweep.store import LEASE_SECONDS, SweepFolder
from autoenc.yamlfile import dump_yaml

HOLD = ("from pathlib import Path; from autoenc.sweep.store import SweepFolder\n"
        "with SweepFolder(Path(sys.argv[1]), 'toy').writing(): ")


def shown(output) -> list[list[str]]:
    console = Console(width=200, record=True, file=io.StringIO())
    show_sweeps(console, output)
    return [line.split("  ") for line in console.export_text().splitlines()]


def cells(output, name: str) -> list[str]:
    line = next(line for line in shown(output) if line[0] == name)
    return [cell.strip() for cell in line if cell.strip()]


@pytest.fixture
def interrupted(tmp_path):
    """A sweep of two arms, eight epochs each, that was killed on the way."""
    lab = Lab(tmp_path, levels, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.101}})
    with pytest.raises(Killed):
        lab.run(kill_in=14)
    lab.kill_in = None
    race = lab.race()
    lab.folder.link_trials(race)
    for run in race.runs.values():
        if run.rows:
            (run.trajectory.folder / "config.yaml").write_text(dump_yaml({"config": run.config.nested()}))
    return lab, sum(len(run.rows) for run in race.runs.values())


def test_an_interrupted_sweep_is_resumable_and_a_finished_one_done(tmp_path, interrupted):
    lab, epochs = interrupted
    state, trials, done = cells(tmp_path, "toy")[1:4]
    assert (state, trials) == ("resumable", f"{int(epochs >= 8)} of 2")
    assert done.rstrip("+") in (f"{epochs} of 8", f"{epochs} of 16")
    lab.run()
    lab.folder.emit(event="decided", winner=None)
    assert cells(tmp_path, "toy")[1] == "no winner"


def test_who_runs_a_sweep(tmp_path, interrupted):
    folder = interrupted[0].folder
    code = "import sys\n" + HOLD + "print('here', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "here\n"
        assert folder.writer().startswith(f"process {other.pid} on ")
        assert cells(tmp_path, "toy")[1] == "running" and f"process {other.pid}" in cells(tmp_path, "toy")[-1]
        old = time.time() - 2 * LEASE_SECONDS
        os.utime(folder.path / ".lease", (old, old))
        assert folder.writer() == ""
        other.stdin.close()
    assert folder.writer() == ""
    with folder.writing():
        assert folder.writer() == ""                     # this process knows by itself whether it runs
        assert cells(tmp_path, "toy")[1] == "resumable"


def test_a_dead_process_runs_nothing(tmp_path, interrupted):
    code = "import os, sys\n" + HOLD + "os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "toy" / ".lease").exists() and SweepFolder(tmp_path, "toy").writer() == ""


@pytest.mark.parametrize("content", ["", "{", '{"candidates": [3]}', '{"candidates": [{"trials": 3, "epochs": "x"}]}'])
def test_broken_decisions_are_listed_all_the_same(tmp_path, interrupted, content):
    lab, _ = interrupted
    lab.folder.emit(event="decided", winner="A")
    (lab.folder.path / "decision.json").write_text(content)
    assert cells(tmp_path, "toy")[0] == "toy"


def test_the_command(tmp_path, interrupted, capsys):
    assert tune_runner.main(["--list", "--output", str(tmp_path)]) == 0
    assert "resumable" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert tune_runner.main(["--list", "--output", str(tmp_path / "empty")]) == 0
    assert "no sweep in" in capsys.readouterr().out
    with pytest.raises(InputError, match="no such folder"):
        tune_runner.main(["--list", "--output", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as error:
        tune_runner.main([])
    assert error.value.code == 2
