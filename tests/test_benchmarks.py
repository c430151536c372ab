"""The benchmark command: what it lists, a tiny benchmark from end to end, its file and its table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "benchmarks"
RUN = FOLDER / "run.py"
# The table: figure -> what it must say of its mark.
MARKS = {"time per sweep": "at least 3", "slots busy": "at least 0.95", "training step, 32 px": "at least 0.97",
         "data, files of 512 px": "at least 1.3", "memory": "at most 0.05", "scale: trials a second": "at least 3",
         "scale: driver memory a trial": "at most 100", "many slots": "at least 0.95",
         "replay of 1,000 epochs": "at most 2", "start": "at most 1.3", "epochs of first seeds": "at most 0.65",
         "GPU, 512 px": "at least 3", "GPU, 64 px: trials an hour": "at least 4"}


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """As the command finds them; forgotten afterwards: their names are short."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def run(*arguments: object, code: int = 0, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, RUN, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_every_figure_of_the_table_has_a_benchmark_and_its_mark():
    from catalogue import BENCHMARKS

    rows = {row.what: row for benchmark in BENCHMARKS.values() for row in benchmark.rows.values()}
    assert {what: f"{rows[what].mark.relation} {rows[what].mark.value:g}" for what in MARKS} == MARKS
    listed = run("--list")
    assert all(what in listed for what in rows) and all(f"{name} " in listed for name in BENCHMARKS)


def test_every_benchmark_says_what_it_measures():
    from importlib import import_module

    from catalogue import BENCHMARKS

    for benchmark in BENCHMARKS.values():
        assert len(getattr(import_module(benchmark.module), benchmark.function).__doc__) > 150, benchmark.name


def test_a_tiny_run_from_end_to_end(tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("# Before\n\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\n\nAfter.\n")
    said = run("replay", "epochs", "--quick", "--repeats", 3, "--json", file, "--write", page)

    found = json.loads(file.read_text())
    assert set(found["machine"]) >= {"cpu", "cores", "memory_gb", "python", "torch", "ray", "commit", "date"}
    row, = found["rows"]                                 # epochs was not run: it was given no images
    assert found["quick"] and found["benchmarks"]["replay"]["rounds"] == 3
    assert "--manifest" in found["benchmarks"]["epochs"]["skipped"]
    ratios = [ours / other for ours, other in zip(row["ours"]["values"], row["other"]["values"], strict=True)]
    assert row["ratio"]["values"] == pytest.approx(ratios) and row["ratio"]["median"] == pytest.approx(
        statistics.median(ratios))
    assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert row["reached"] is (row["ours"]["median"] <= 2)

    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    table = text.split("begin -->")[1].split("<!--")[0].strip()
    assert table in said and "| replay of 1,000 epochs " in table and "mean anything" in table
    assert run("--from", file).strip() == table
    assert f"| yes     | {number_of(row)} " in run("--from", file, file)          # of a run before, its ratio


def number_of(row: dict) -> str:
    from table import number

    return number(row["ratio"]["median"])


@pytest.mark.parametrize(("arguments", "said"), [
    (["replai"], "replai: no such benchmark (did you mean 'replay'?)"),
    (["replay", "--repeats", "0"], "--repeats 0: should be 1 or more"),
    (["epochs", "--manifest", "nowhere.csv"], "nowhere.csv: no such file"),
    (["--from", "nowhere.json"], "--from nowhere.json: is no file of an earlier run"),
    (["replay", "--json", "no/where.json"], "no/where.json: there is no folder"),
], ids=["name", "repeats", "manifest", "from", "json"])
def test_what_is_wrong_is_told_before_anything_is_measured(arguments, said):
    assert run(*arguments, code=2).startswith(f"error: {said}")


def test_a_page_without_markers_is_left_alone(tmp_path):
    from table import write_into

    from autoenc.errors import InputError

    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(InputError, match=r"page\.md: lacks the lines"):
        write_into(page, "a table")
    assert page.read_text() == "no markers"


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=1, max_size=9))
def test_ratios_are_taken_round_by_round(pairs):
    from measure import Mark, Row, summary

    faster = summary(Row("", "", "", "s", "other/ours", Mark("at least", 1.0)), pairs)["ratio"]
    slower = summary(Row("", "", "", "s", "ours/other"), pairs)["ratio"]
    assert faster["values"] == pytest.approx([1 / ratio for ratio in slower["values"]])
    assert min(faster["values"]) <= faster["q1"] <= faster["median"] <= faster["q3"] <= max(faster["values"])


def test_slots_are_busy_between_the_first_reports_and_the_last_start():
    from slots import Epoch, busy

    # Two slots: A and C on one, B and D on the other. The window is [2, 7]: B reports first at 2, D begins at 7.
    epochs = [Epoch("A", 0, 1), Epoch("A", 1, 4), Epoch("B", 0, 2), Epoch("B", 2, 6), Epoch("C", 5, 9),
              Epoch("D", 7, 9)]
    assert busy(epochs, 2) == ((4 - 2) + (6 - 2) + (7 - 5), 2 * 5)
    with pytest.raises(RuntimeError, match="leave no time"):
        busy(epochs[:4], 2)
    # Of the workers x and y, the second comes later than two trials of the first: [4, 7].
    late = [Epoch("A", 0, 1, "x"), Epoch("B", 1, 3, "x"), Epoch("C", 3, 6, "x"), Epoch("D", 2, 4, "y"),
            Epoch("E", 7, 8, "y")]
    assert busy(late, 2) == (6 - 4, 2 * 3)


@given(st.integers(0, 500_000), st.floats(0, 1e4), st.integers(12, 60))
def test_growth_is_the_slope_without_start_and_end(each, base, trials):
    from scale import rate, slope

    points = [(0.0, 0, 0), *((0.5 * k, k, int(base) + each * k) for k in range(1, trials + 1)),
              *((0.5 * trials + k, trials, 10**9) for k in range(1, 4))]
    assert slope(points) == pytest.approx(each, abs=1) and rate(points) == pytest.approx(2)


@pytest.mark.slow
def test_a_sweep_against_the_plain_scripts(tmp_path):
    file = tmp_path / "found.json"
    (tmp_path / "tmp").mkdir()
    run("sweep-time", "start", "--quick", "--repeats", 1, "--json", file, TMPDIR=str(tmp_path / "tmp"))
    found = json.loads(file.read_text())
    assert [row["what"] for row in found["rows"]] == [
        "time per sweep", "time per sweep, beside plain Optuna", "start"]
    assert all(row["ours"]["median"] > 0 and row["other"]["median"] > 0 for row in found["rows"])
    assert not list((tmp_path / "tmp").glob("autoenc-benchmark-*"))
