from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
from pages import Page

from autoenc.report.watch import Watched
from autoenc.yamlfile import dump_yaml

RUNNER = Path(__file__).resolve().parents[1] / "tune_runner.py"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def young():
    """A page looks for garbage after it: among the hundred thousands of objects of other tests for long."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("takes", "share"), [(0.01, 0.001), (0.3, 0.02), (2.0, 0.02), (60.0, 0.02)])
def test_writes_at_once_and_then_costs_a_small_share_of_the_time(takes, share):
    clock, written = Clock(), []

    def write(state: str) -> None:
        clock.now += takes
        written.append((clock.now, state))

    page = Watched(write, clock=clock)
    page.changed()
    assert len(written) == 1
    while len(written) < 12:
        clock.now += 1
        page.changed()
    gaps = [after - before for (before, _), (after, _) in pairwise(written)]
    assert all(takes / gap <= share + 1e-9 for gap in gaps) and all(gap >= 15 for gap in gaps)
    assert max(gaps) <= max(15, 50 * takes) + takes + 1 + 1e-9
    assert {state for _, state in written} == {"running"}


def test_an_interrupt_is_written_however_new_the_page_is():
    written = []
    page = Watched(written.append, clock=Clock())
    page.changed()
    page.changed()
    page.interrupted()
    assert written == ["running", "interrupted"]


def test_what_keeps_a_page_from_being_written_is_said_once_and_ends_nothing():
    clock, said = Clock(), []

    def write(state: str) -> None:
        raise OSError(28, "No space left on device")

    page = Watched(write, said.append, clock)
    for _ in range(3):
        page.changed()
        clock.now += 100
    page.interrupted()
    assert said == ["the report could not be written: OSError: [Errno 28] No space left on device"]


def test_a_person_who_interrupts_the_writing_is_heard():
    def write(state: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watched(write).changed()


@pytest.mark.slow
def test_a_sweep_can_be_watched_and_its_page_says_that_it_was_interrupted(tmp_path):
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")                      # paths of Ray's sockets may not be long
    (tmp_path / "base.yaml").write_text(dump_yaml({
        "config": {"data": {"image_size": 16, "limit": 40}, "train": {"epochs": 2000, "patience": None},
                   "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2}}, "asha": False}))
    (tmp_path / "toy.yaml").write_text(dump_yaml({"name": "toy", "arms": {
        "A": {"train.weight_decay": 0.1}, "B": {"train.weight_decay": 0.2}}}))
    env = {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
           "HOME": str(tmp_path), "AUTOENC_CACHE": str(tmp_path / "cache"), "RAY_TMPDIR": scratch}
    page, index = tmp_path / "out" / "toy" / "report.html", tmp_path / "out" / "index.html"
    process = subprocess.Popen([sys.executable, str(RUNNER), "toy.yaml", "--output", "out", "--no-dashboard"],
                               cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not page.exists() or not index.exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.5)
        seen = Page(page.read_text())
        assert "Running: no trial has ended yet" in seen.text() and 'content="30"' in page.read_text()
        assert Page(index.read_text()).row("toy")[1] == "running"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    assert "Interrupted: no trial has ended yet" in Page(page.read_text()).text()
    assert 'http-equiv="refresh"' not in page.read_text() + index.read_text()
    assert Page(index.read_text()).row("toy")[1] == "unfinished"
