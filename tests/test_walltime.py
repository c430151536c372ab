"""How long a process may run: the option, what schedulers print, and a real Slurm."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm import Slurm, slurm

from autoenc.errors import InputError
from autoenc.sweep import walltime
from autoenc.sweep.walltime import (
    LONGEST,
    Limit,
    job_limit,
    parse_lsf_time_left,
    parse_slurm_time_left,
    parse_wall_time,
    time_left,
)

HOUR, DAY = 3600, 86400
durations = st.integers(1, LONGEST)


def parts(seconds: int) -> tuple[int, int, int, int]:
    return seconds // DAY, seconds // HOUR % 24, seconds // 60 % 60, seconds % 60


def slurm_prints(seconds: int) -> str:
    """As squeue does: days and hours only where there are any."""
    days, hours, minutes, rest = parts(seconds)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# The option -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, seconds", [
    ("90", 5400), ("1.5", 90), (".5", 30), ("5.", 300), (" 90 ", 5400), ("1:30:00", 5400), ("0:10:30", 630),
    ("36:00:00", 1.5 * DAY), ("0:90:00", 5400), ("2-12", 2.5 * DAY), ("1-12:00", 1.5 * DAY), ("0-00:00:30", 30)])
def test_wall_time_in_minutes_and_in_slurms_notation(text, seconds):
    assert parse_wall_time(text) == seconds


@given(durations)
def test_wall_time_reads_what_was_written(seconds):
    days, hours, minutes, rest = parts(seconds)
    assert parse_wall_time(f"{days}-{hours:02}:{minutes:02}:{rest:02}") == seconds
    assert parse_wall_time(f"{seconds // HOUR}:{minutes:02}:{rest:02}") == seconds
    if seconds >= 60:
        assert parse_wall_time(f"{days}-{hours:02}:{minutes:02}") == seconds - rest
    assert math.isclose(parse_wall_time(f"{seconds / 60:.9f}"), seconds, abs_tol=1e-6)


@given(st.integers(0, 200), st.integers(0, 59))
def test_what_slurm_and_lsf_read_differently_is_refused_with_both_ways_to_write_it(first, last):
    with pytest.raises(InputError) as error:
        parse_wall_time(f"{first}:{last:02}")
    assert f"--wall-time {first}:{last:02}: " in str(error.value)
    one, other = str(error.value).partition("write ")[2].split(" or ")
    if first:
        assert (parse_wall_time(one), parse_wall_time(other)) == (60 * first + last, HOUR * first + 60 * last)


@pytest.mark.parametrize("text", [
    "", " ", "0", "0.0", "0:00:00", "0-00:00", "-5", "nan", "inf", "-inf", "1e3", "1_000", "٣", "90m", "1h", "1:2:3:4",
    "1-", "-1-00:00", "1-2:3:4:5", "1:30:", "unlimited", "600000", "365-00:00", "8785:00:00", "9" * 400, "9" * 5000,
    "9" * 400 + "-12"])
def test_wall_time_that_is_none_is_told(text):
    with pytest.raises(InputError) as error:
        parse_wall_time(text)
    assert f"--wall-time {text}" in str(error.value)


@given(st.text() | st.text("0123456789:-. ", max_size=20))
def test_any_text_is_a_time_or_wrong_input(text):
    try:
        assert 0 < parse_wall_time(text) <= LONGEST
    except InputError as error:
        assert f"--wall-time {text}" in str(error)


# What schedulers print ------------------------------------------------------------------------------------------------

@given(durations | st.just(0))
def test_slurms_time_left(seconds):
    assert parse_slurm_time_left(slurm_prints(seconds) + "\n") == seconds


@pytest.mark.parametrize("text", ["", "UNLIMITED", "NOT_SET", "INVALID", "N/A", "-1:00", "1-12", "59", "3:00\n3:00",
                                  "slurm_load_jobs error: Invalid job id specified", "9" * 5000 + ":00"])
def test_no_limit_from_slurm(text):
    assert parse_slurm_time_left(text) is None


@given(st.integers(0, LONGEST // 60 - 1), st.sampled_from(["", " L", " X", "L"]), st.booleans())
def test_lsfs_time_left(minutes, kind, padded):
    hours, rest = divmod(minutes, 60)
    assert parse_lsf_time_left((f"{hours:02}:{rest:02}" if padded else f"{hours}:{rest}") + kind + "\n") == 60 * minutes
    assert parse_lsf_time_left(f"{hours:02}:{rest:02}:07{kind}\n") == 60 * minutes + 7      # LSB_HMS_TIME_FORMAT=Y


@pytest.mark.parametrize("text", ["", "-", "0:57 E", "0:57 Q", "57", "L", "Job <77> is not found", "1:2 L\n1:2 L",
                                  "9" * 5000 + ":0 L"])
def test_no_limit_from_lsf(text):
    assert parse_lsf_time_left(text) is None


@given(st.text() | st.text("0123456789:-LEX \n", max_size=20))
def test_any_output_is_a_time_or_nothing(text):
    for parse in (parse_slurm_time_left, parse_lsf_time_left):
        seconds = parse(text)
        assert seconds is None or 0 <= seconds <= LONGEST


# The job --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A PATH for the commands that a test writes; what a shell needs is there too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sleep", "sh"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_no_job(bin_folder):
    command(bin_folder, "squeue", "echo 10:00")
    command(bin_folder, "bjobs", "echo 0:10 L")
    path = {"PATH": str(bin_folder)}
    for more in ({}, {"SLURM_JOB_ID": ""}, {"SLURM_JOB_ID": "--help", "LSB_JOBID": "x"}, {"LSB_JOBID": "-a"}):
        assert job_limit(path | more) is None


def test_lsf_is_asked_for_this_job(bin_folder):
    command(bin_folder, "bjobs", 'case "$*" in\n"-noheader -o time_left 77") echo "0:57 L";;\n'
                                 '"-noheader -o time_left 77[3]") echo "10:2 L";;\n*) exit 255;;\nesac')
    lsf = {"PATH": str(bin_folder), "LSB_JOBID": "77"}
    assert job_limit(lsf) == Limit(57 * 60, "LSF job 77")
    assert job_limit(lsf | {"LSB_JOBINDEX": "0"}) == Limit(57 * 60, "LSF job 77")
    assert job_limit(lsf | {"LSB_JOBINDEX": "3"}) == Limit(10 * HOUR + 120, "LSF job 77[3]")
    assert job_limit(lsf | {"LSB_JOBID": "78"}) is None


@pytest.mark.parametrize("job, name", [({"LSB_JOBID": "77"}, "bjobs"), ({"SLURM_JOB_ID": "77"}, "squeue")])
def test_a_command_that_does_not_answer(bin_folder, monkeypatch, job, name):
    environ = {"PATH": str(bin_folder), **job}
    assert job_limit(environ) is None                                      # missing
    for body in ("exit 1", "echo 1:00:00; exit 1", "echo LSF is down >&2", "printf '\\377\\000'", "kill -9 $$"):
        command(bin_folder, name, body)
        assert job_limit(environ) is None, body
    (bin_folder / name).chmod(0o644)
    assert job_limit(environ) is None
    (bin_folder / name).write_text("neither script nor program")
    (bin_folder / name).chmod(0o755)
    assert job_limit(environ) is None
    monkeypatch.setattr(walltime, "ANSWER_SECONDS", 0.5)
    command(bin_folder, name, "exec sleep 60")
    start = time.monotonic()
    assert job_limit(environ) is None and time.monotonic() - start < 10


def test_slurms_end_time_in_the_environment(tmp_path):
    now = int(time.time())
    slurm = {"PATH": str(tmp_path), "SLURM_JOB_ID": "1234"}
    limit = job_limit(slurm | {"SLURM_JOB_END_TIME": str(now + 600)})
    assert limit.source == "Slurm job 1234" and 590 < limit.seconds <= 600
    for end in ("", "0", str(now - 5), "-5", "soon", "nan", "1e400", "9" * 18, "9" * 5000, str(now + 366 * DAY)):
        assert job_limit(slurm | {"SLURM_JOB_END_TIME": end}) is None


def test_the_nearer_limit_counts(tmp_path):
    job = {"PATH": str(tmp_path), "SLURM_JOB_ID": "5", "SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    assert time_left(None, {}) is None
    assert time_left("90", {}) == Limit(5400, "--wall-time 90")
    assert time_left("5", job) == Limit(300, "--wall-time 5")
    assert time_left("11", job).source == time_left(None, job).source == "Slurm job 5"
    with pytest.raises(InputError, match="--wall-time soon"):
        time_left("soon", job)


# A real Slurm ---------------------------------------------------------------------------------------------------------

# In every job: what this version sets, what it tells, and what is made of it with and without the variable.
JOB = """\
import json, os, subprocess, time
from autoenc.sweep.walltime import job_limit
job = os.environ["SLURM_JOB_ID"]
shown = subprocess.check_output(["scontrol", "show", "job", job, "-o"], text=True)
end = shown.split("EndTime=")[1].split()[0]
end = subprocess.check_output(["date", "+%s", "-d", end], text=True).strip() if end != "Unknown" else ""
without = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_END_TIME"}
ways = {"as set": dict(os.environ), "asked": without, "from its end": without | {"SLURM_JOB_END_TIME": end}}
limits = {name: job_limit(environ) for name, environ in ways.items()}
print(json.dumps({"job": job, "variable": os.environ.get("SLURM_JOB_END_TIME"), "end": end,
                  "left": subprocess.check_output(["squeue", "-h", "-j", job, "-o", "%L"], text=True),
                  "limits": {name: limit and [limit.seconds, limit.source] for name, limit in limits.items()}}))
time.sleep(3 if "SLURM_ARRAY_JOB_ID" in os.environ else 0)           # so that its elements run side by side
"""


@pytest.fixture(scope="module")
def batch() -> Iterator[Slurm]:
    with slurm(["n1"], cpus=2) as system:
        (system.folder / "job.py").write_text(JOB)
        yield system


def _submit(batch: Slurm, name: str, *options: str) -> list[dict]:
    """Run the job and wait for it; what it printed, for each of its array's elements."""
    folder, root = batch.folder, Path(walltime.__file__).parents[2]
    told = batch.run("sbatch", "--wait", "-o", f"{folder}/{name}.%A_%a.out", *options, f"--chdir={folder}",
                     f"--wrap=PYTHONPATH={root} {sys.executable} {folder}/job.py")
    outputs = [path.read_text() for path in sorted(folder.glob(f"{name}.*.out"))]
    assert outputs, told
    return [json.loads(output) for output in outputs]


@pytest.mark.slow
@pytest.mark.cluster
def test_in_a_real_slurm_job(batch):
    (told,) = _submit(batch, "limited", "-t", "3")
    for way, (seconds, source) in told["limits"].items():
        assert 150 < seconds <= 180 and source == f"Slurm job {told['job']}", way
    assert parse_slurm_time_left(told["left"]) is not None
    assert told["variable"] in (None, told["end"])                 # Slurm before 23.02 does not set it


@pytest.mark.slow
@pytest.mark.cluster
def test_in_a_real_slurm_job_without_limit_and_with_days(batch):
    (told,) = _submit(batch, "unlimited", "-t", "UNLIMITED")
    assert told["left"].strip() == "UNLIMITED" and set(told["limits"].values()) == {None}
    (told,) = _submit(batch, "days", "-t", "1-02:03:00")
    assert told["left"].startswith("1-02:0")
    for seconds, _ in told["limits"].values():
        assert DAY + 2 * HOUR + 150 < seconds <= DAY + 2 * HOUR + 180


@pytest.mark.slow
@pytest.mark.cluster
def test_in_a_real_slurm_job_array_each_element_asks_for_itself(batch):
    elements = _submit(batch, "array", "-t", "3", "--array=1-2")
    assert len({told["job"] for told in elements}) == 2
    assert any("\n" in told["left"].strip() for told in elements)  # the number of one stands for both
    for told in elements:
        assert 150 < told["limits"]["asked"][0] <= 180
