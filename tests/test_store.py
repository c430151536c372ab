from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
import pytest
from filelock import Timeout
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st
from racing import KNOB, Lab, decision_of, put, row_of

from autoenc.errors import InputError
from autoenc.sweep import store as store_module
from autoenc.sweep.store import Store, SweepFolder, copy_into, move_aside, owner_in_words

COLUMNS = ["trial", "arm", "seed", "status", "epochs", "epochs_trained", "best_epoch", "seconds", "device"]


def table(lab: Lab) -> list[dict[str, str]]:
    with (lab.folder.path / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def lab(tmp_path) -> Lab:
    def curve(config):
        figures = [{"val/mse": config.train.weight_decay * (1 + abs(epoch - 5)), "val/ssim": epoch / 10}
                   for epoch in range(1, 9)]
        return figures if config.train.weight_decay != 0.3 else [figures[0], "diverged"]

    arms = {"A": {KNOB: 0.1}, "B": {KNOB: 0.101, "model.heads": ["rgb"]}, "C": {KNOB: 0.2}, "D": {KNOB: 0.3}}
    return Lab(tmp_path, curve, arms=arms, decision={"repeats": 2}, asha={"margin": 0.5, "grace_epochs": 2})


def test_trials_csv(lab):
    race = lab.run()
    lab.folder.write_trials(race)
    rows = table(lab)
    assert list(rows[0]) == [*COLUMNS, KNOB, "model.heads", "val/mse", "val/ssim", "stability/epochs", "device_name"]
    assert [tuple(row[column] for column in COLUMNS[:7]) for row in rows] == [
        ("A_seed42", "A", "42", "completed", "8", "8", "5"), ("B_seed42", "B", "42", "completed", "8", "8", "5"),
        ("C_seed42", "C", "42", "stopped", "2", "2", "2"), ("D_seed42", "D", "42", "diverged", "1", "1", "1"),
        ("A_seed43", "A", "43", "completed", "8", "8", "5"), ("B_seed43", "B", "43", "completed", "8", "8", "5")]
    assert [(row["val/mse"], row["val/ssim"]) for row in rows[:2]] == [("0.1", "0.5"), ("0.101", "0.5")]
    assert rows[1]["model.heads"] == '["rgb"]' and rows[0]["model.heads"] == "" and rows[0]["seconds"] == "4.0"
    again = lab.race()
    assert again.idle
    lab.folder.write_trials(again)
    assert [row | {"epochs_trained": "0"} for row in rows] == table(lab)


def test_trials_csv_in_pandas(lab):
    lab.folder.write_trials(lab.run())
    kinds = pandas.read_csv(lab.folder.path / "trials.csv").dtypes.map(lambda dtype: dtype.kind).to_dict()
    assert {name: kinds[name] for name in ("seed", "epochs", "epochs_trained", "best_epoch")} == dict.fromkeys(
        ("seed", "epochs", "epochs_trained", "best_epoch"), "i")
    assert {kinds[name] for name in ("seconds", KNOB, "val/mse", "val/ssim")} == {"f"}


def test_trials_csv_of_a_sweep_in_which_nothing_ended(lab):
    lab.folder.write_trials(lab.race())
    assert {row["status"] for row in table(lab)} == {"waiting"} and list(table(lab)[0])[:9] == COLUMNS


def test_trials_are_linked_and_links_follow_the_output_folder(lab, tmp_path):
    race = lab.run()
    lab.folder.link_trials(race)
    links = sorted((lab.folder.path / "trials").iterdir())
    assert [link.name for link in links] == sorted(trial.name for trial in race.trials)
    for link in links:
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert (link / "metrics.csv").is_file()
    (tmp_path / "toy").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    for name in ("moved", "store"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert (tmp_path / "elsewhere" / "moved" / "trials" / "A_seed42" / "metrics.csv").is_file()


def test_links_of_trials_that_are_no_more_go(lab, tmp_path):
    lab.folder.link_trials(lab.run())
    other = Lab(tmp_path, lab.curve, arms={"A": {KNOB: 0.2}, "E": {KNOB: 0.5}})
    race = other.race()
    other.folder.link_trials(race)
    other.folder.link_trials(race)
    folder = lab.folder.path / "trials"
    assert sorted(path.name for path in folder.iterdir()) == ["A_seed42", "E_seed42"]
    assert (folder / "A_seed42").resolve() == race.trials[0].run.trajectory.folder.resolve()


def test_events_are_appended(lab):
    lab.run()
    path = lab.folder.path / "events.jsonl"
    before = path.read_bytes()
    lab.folder.emit(event="decided", winner=None)
    after = path.read_bytes()
    assert after.startswith(before) and after[len(before):].count(b"\n") == 1
    last = lab.folder.events()[-1]
    assert last["event"] == "decided" and last["winner"] is None and time.strptime(last["time"], "%Y-%m-%dT%H:%M:%SZ")
    stopped = lab.events("stopped")[0]
    assert stopped["trial"] == "C_seed42" and stopped["epoch"] == 2 and stopped["metric"] == "val/mse"
    assert stopped["value"] > stopped["cutoff"] >= stopped["best"] and len(stopped["beaten_by"]) == 2


@given(st.lists(st.one_of(st.binary(max_size=20), st.just(b'{"event": "a"}')), max_size=6))
def test_broken_events_are_passed_over(tmp_path_factory, lines):
    folder = SweepFolder(tmp_path_factory.getbasetemp(), "broken")
    folder.path.mkdir(exist_ok=True)
    (folder.path / "events.jsonl").write_bytes(b"\n".join(lines))
    found = folder.events()
    assert found.count({"event": "a"}) >= lines.count(b'{"event": "a"}')
    assert all(isinstance(event, dict) for event in found)


def test_an_event_after_a_half_written_one_is_not_lost(tmp_path):
    """Killed while it appended: what comes next stands on a line of its own."""
    folder = SweepFolder(tmp_path, "toy")
    folder.path.mkdir()
    (folder.path / "events.jsonl").write_text('{"event": "stopped", "tri')
    folder.emit(event="started")
    assert [event["event"] for event in folder.events()] == ["started"]


HOLD = """
import sys
from pathlib import Path
from autoenc.sweep.store import Store, SweepFolder
with SweepFolder(Path(sys.argv[1]), "toy").writing(), Store(Path(sys.argv[1])).lock("key"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_writer_at_a_time(tmp_path):
    """Another process holds the sweep and a trajectory; when it is killed both are free."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        held = pytest.raises(InputError, match=f"toy: process {other.pid} on .* is writing here")
        with held, SweepFolder(tmp_path, "toy").writing():
            pass
        with SweepFolder(tmp_path, "other").writing(), pytest.raises(Timeout):
            Store(tmp_path).lock("key").acquire(timeout=0)
        with Store(tmp_path).lock("other key"):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdin.close(), other.stdout.close()
    with SweepFolder(tmp_path, "toy").writing(), Store(tmp_path).lock("key"):
        pass
    with SweepFolder(tmp_path, "toy").writing():
        pass


LEASE = 2                # seconds, for these tests
needs_root = pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0,
                                reason="makes another host of a process")


@contextmanager
def held_elsewhere(output: Path) -> Iterator[subprocess.Popen]:
    """Another host has the sweep and a trajectory; it renews its claim as long as it lives."""
    code = HOLD.replace("with", f"from autoenc.sweep import store\nstore.LEASE_SECONDS = {LEASE}\nwith", 1)
    elsewhere = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]
    with subprocess.Popen([*elsewhere, sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            yield other
        finally:
            other.kill()


@needs_root
def test_the_lock_of_another_host_is_respected_as_long_as_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE_SECONDS", LEASE)
    with held_elsewhere(tmp_path) as other:
        lock, began = Store(tmp_path).lock("key"), time.monotonic()
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        message = f"toy: process {other.pid} on elsewhere is writing here; wait until it has ended"
        with pytest.raises(InputError, match=message), SweepFolder(tmp_path, "toy").writing():
            pass
        assert time.monotonic() - began > LEASE
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        assert owner_in_words(lock) == f"process {other.pid} on elsewhere"


@needs_root
def test_the_lock_of_a_dead_host_is_taken_over_once_its_lease_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE_SECONDS", LEASE)
    with held_elsewhere(tmp_path) as other:
        other.kill()
        other.wait()
        began = time.monotonic()
        with SweepFolder(tmp_path, "toy").writing():
            assert time.monotonic() - began >= LEASE


IN_A_CONTAINER = """
import subprocess, sys, time
from pathlib import Path
from autoenc.sweep.store import SweepFolder
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
with subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], **pipes) as other:
    assert other.stdout.readline() == b"held\\n"
    began = time.monotonic()
    try:
        with SweepFolder(Path(sys.argv[1]), "toy").writing():
            pass
    except Exception as error:
        print(round(time.monotonic() - began), error)
"""


@needs_root
def test_a_process_of_the_same_container_is_known_to_live(tmp_path):
    """There a lock's owner has more to its host than the name."""
    done = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_A_CONTAINER,
                           str(tmp_path), HOLD], capture_output=True, text=True, timeout=30)
    said = rf"[0-9] .*toy: process \d+ on {socket.gethostname()} is writing here; .*\n"
    assert re.fullmatch(said, done.stdout), done.stdout + done.stderr


WORKER = f"""
import json, sys
from autoenc.sweep import store
from autoenc.sweep.work import Task, work
store.LEASE_SECONDS = {LEASE}
for said in work(Task(**json.loads(sys.argv[1]))):
    print(json.dumps(said), flush=True)
"""


@contextmanager
def worker(task: dict[str, Any]) -> Iterator[subprocess.Popen]:
    arguments = [sys.executable, "-c", WORKER, json.dumps(task)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def rest(process: subprocess.Popen) -> list[dict[str, Any]]:
    """What a worker says until its end."""
    said = [json.loads(line) for line in process.stdout]
    assert process.wait(30) == 0
    return said


def stored(said: list[dict[str, Any]]) -> list[int]:
    return [each["epoch"] for each in said if "row" in each]


@pytest.mark.parametrize("other_is", ["at work", pytest.param("through", marks=pytest.mark.slow)])
def test_a_worker_that_was_suspended_overwrites_nothing(tmp_path, monkeypatch, other_is):
    """Stopped within an epoch, for longer than its lease lasts: another one goes on, and it goes on from there."""
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "LEASE_SECONDS", LEASE)
    epochs = 6
    config = small_config(data__limit=200, train__epochs=epochs, train__patience=None)
    task = {"key": "key", "output": str(tmp_path / "out"), "config": config.flat(), "threads": 1, "device": "cpu"}
    with worker(task) as one:
        first = json.loads(one.stdout.readline())
        assert first["epoch"] == 1
        lock = Store(tmp_path / "out").lock("key")
        one.send_signal(signal.SIGSTOP)
        while (owner := lock.owner) is None or owner.pid != one.pid:
            one.send_signal(signal.SIGCONT)                  # it was between two epochs
            assert one.poll() is None
            one.send_signal(signal.SIGSTOP)
        done = len(Store(tmp_path / "out").open("key").rows())
        with worker(task) as other:
            said = [json.loads(other.stdout.readline())]
            while len(stored(said)) < 2:
                said.append(json.loads(other.stdout.readline()))
            said += rest(other) if other_is == "through" else []
            one.send_signal(signal.SIGCONT)
            said += rest(other)
        mine = [first, *rest(one)]
    assert said[-1] == mine[-1] == {"outcome": "completed"}
    assert stored(mine)[:done] == list(range(1, done + 1)) and stored(said)[:2] == [done + 1, done + 2]
    told = sorted((each["row"] for each in mine + said if "row" in each), key=lambda row: row["epoch"])
    found = Store(tmp_path / "out").open("key")
    assert told == found.rows() and len(told) == epochs              # each stored once, and as it was stored
    assert found.whole_weights(found.status()["best_epoch"]) and not list(found.folder.glob("*.broken"))


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out"), SweepFolder(tmp_path / "out", "toy").writing():
        pass


def test_equal_decisions_are_equal_bytes(lab):
    lab.folder.write_json("decision.json", decision_of(lab.run()))
    before = (lab.folder.path / "decision.json").read_bytes()
    race = lab.race()
    assert race.idle
    lab.folder.write_json("decision.json", decision_of(race))
    assert (lab.folder.path / "decision.json").read_bytes() == before and json.loads(before)["winner"] == "A"


def test_seconds_per_epoch(tmp_path):
    store = Store(tmp_path)
    put(store.open("a"), [row_of(epoch, 0.1) | {"seconds": float(epoch)} for epoch in (1, 2, 3)])
    assert store.seconds_per_epoch(["a", "none"]) == 2.0 and store.seconds_per_epoch(["none"]) is None


def test_moving_aside(tmp_path):
    store, names = Store(tmp_path), []
    store.set_aside("none")
    for _ in range(2):
        put(store.open("a"), [row_of(1, 0.1)])
        store.set_aside("a")
        names.append(sorted(path.name for path in store.folder.iterdir()))
    assert names == [["a.old1"], ["a.old1", "a.old2"]] and store.open("a").rows() == []
    folder = SweepFolder(tmp_path, "toy")
    with folder.writing():
        folder.emit(event="x")
    folder.set_aside()
    assert not folder.path.exists() and (tmp_path / "toy.old1" / "events.jsonl").is_file() and folder.events() == []
    move_aside(tmp_path / "nothing")


def test_a_sweep_that_was_set_aside_links_to_its_own_trainings(lab, tmp_path):
    """Not to those that are trained anew, nor to those that were set aside before. One stays where it was."""
    for attempt in (1, 2, 3):
        race = lab.run()
        for run in race.runs.values():
            (run.trajectory.folder / "attempt").write_text(str(attempt))
        lab.folder.link_trials(race)
        for trial in race.trials:
            if (trial.name, attempt) != ("C_seed42", 2):
                lab.store.set_aside(trial.run.key)
        lab.folder.set_aside()
        lab.folder.path.mkdir()
    for attempt in (1, 2, 3):
        links = {link.name: link for link in (tmp_path / f"toy.old{attempt}" / "trials").iterdir()}
        assert len(links) == 6 and not any(link.readlink().is_absolute() for link in links.values())
        if attempt == 2:
            assert links.pop("C_seed42").readlink().suffix == ""
        assert {(link / "attempt").read_text() for link in links.values()} == {str(attempt)}
    shutil.rmtree(tmp_path / "toy.old1")
    lab.folder.set_aside()
    assert sorted(path.name for path in tmp_path.glob("toy.*old*")) == ["toy.old2", "toy.old3", "toy.old4"]


def test_copies_are_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError):
        copy_into(tmp_path / "none", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights" and len(list(Path(tmp_path).iterdir())) == 2
