from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import Timeout
from hypothesis import given
from hypothesis import strategies as st
from racing import KNOB, Lab, decision_of, put, row_of

from autoenc.errors import InputError
from autoenc.sweep.store import Store, SweepFolder, copy_into, move_aside

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
    assert list(rows[0]) == [*COLUMNS, KNOB, "model.heads", "val/mse", "val/ssim"]
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


def test_copies_are_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError):
        copy_into(tmp_path / "none", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights" and len(list(Path(tmp_path).iterdir())) == 2
