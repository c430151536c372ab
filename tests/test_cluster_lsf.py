"""cluster/lsf: the job script and the launcher, with stand-ins for LSF's commands and variables, and real Rays on hosts
of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults import ARMS, Findings, Project, Size, check_epochs
from harmed import WORKERS
from hosts import REPOSITORY, Site, site

LSF = REPOSITORY / "cluster" / "lsf"
SCRIPTS = [LSF / "sweep.lsf", LSF / "submit", REPOSITORY / "cluster" / "slurm" / "sweep.sbatch"]
# As LSF's: runs a command on a host of the job in the same folder, with the same variables and standard streams.
BLAUNCH = """\
#!/bin/sh
host=$1
shift
[ $host = n3 ] && export PYTHONPATH={folder}/other:$PYTHONPATH
exec nsenter --target=$(cat {folder}/$host.pid) --net --uts --mount sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
"""
# What a host sees that has another Ray installed.
OTHER = """\
import sys, types
sys.modules["ray._version"] = version = types.ModuleType("ray._version")
version.version, version.commit = "2.9.9", ""
"""


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """Before all else on the PATH of :func:`bash`; with a ``python`` that writes down its arguments."""
    program(tmp_path / "bin", "python", f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/words\n")
    return tmp_path / "bin"


def bash(bin_folder: Path, *words: object, **environ: str) -> subprocess.CompletedProcess:
    others = ("LSB_", "SLURM", "AUTOENC_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", *map(str, words)], cwd=REPOSITORY, text=True, capture_output=True, timeout=120,
                          check=False, env=kept | {"PATH": path, "HOME": str(bin_folder.parent)} | environ)


# The scripts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], check=False, capture_output=True, text=True)
        assert not done.returncode, done.stdout


def test_the_page_has_every_setting():
    sources = "".join(path.read_text() for path in [*SCRIPTS, REPOSITORY / "autoenc" / "rayhosts.py"])
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    told = re.findall(r"^\| `(AUTOENC_[A-Z_]+)`", page, re.MULTILINE)
    assert set(re.findall(r"AUTOENC_[A-Z_]+", sources)) == set(told)


def test_the_job_script_hands_on_what_the_variables_say(bin_folder, tmp_path):
    done = bash(bin_folder, LSF / "sweep.lsf", AUTOENC_SWEEP="sweeps/phase1_1.yaml sweeps/phase1_4.yaml",
                AUTOENC_OPTIONS="--set 'data.filters=a b' --preset full")
    assert not done.returncode, done.stderr
    assert (tmp_path / "words").read_text().splitlines() == [
        "-m", "autoenc.cluster", "run", "python", "tune_runner.py", "sweeps/phase1_1.yaml", "sweeps/phase1_4.yaml",
        "--set", "data.filters=a b", "--preset", "full"]
    done = bash(bin_folder, LSF / "sweep.lsf")
    assert done.returncode == 2 and "AUTOENC_SWEEP is not set" in done.stderr


def test_the_slurm_script_hands_on_its_arguments(bin_folder, tmp_path):
    script = REPOSITORY / "cluster" / "slurm" / "sweep.sbatch"
    assert not bash(bin_folder, script, "sweeps/phase1_4.yaml", "--set", "a=b c").returncode
    assert (tmp_path / "words").read_text().splitlines()[3:] == ["python", "tune_runner.py", "sweeps/phase1_4.yaml",
                                                                 "--set", "a=b c"]
    done = bash(bin_folder, script)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


def test_the_launcher(bin_folder, tmp_path):
    """What it submits, run as LSF would run it, gets what was typed."""
    program(bin_folder, "bsub", f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/asked\n"
                                f"env | grep AUTOENC_ > {tmp_path}/environ\nexec bash\n")
    done = bash(bin_folder, LSF / "submit", "sweeps/phase1_4.yaml", "--queue", "gpuv100", "--hosts", "2",
                "--gpus-per-host", "2", "--cpus-per-host", "8", "--wall-time", "24:00", "--resubmit",
                "--bsub", "-P 'my project'", "--", "--set", "a=b c")
    assert not done.returncode, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == [
        "-J", "autoenc", "-n", "16", "-R", "span[ptile=8]", "-R", "rusage[mem=4GB]", "-W", "24:00",
        "-o", "autoenc.%J.out", "-r", "-Q", "99", "-q", "gpuv100", "-gpu", "num=2:j_exclusive=yes", "-P", "my project"]
    assert {"AUTOENC_GPUS_PER_HOST=2", "AUTOENC_RESUBMIT=1"} <= set((tmp_path / "environ").read_text().splitlines())
    assert (tmp_path / "words").read_text().splitlines()[3:] == ["python", "tune_runner.py", "sweeps/phase1_4.yaml",
                                                                 "--set", "a=b c"]
    done = bash(bin_folder, LSF / "submit", "sweeps/phase1_4.yaml", "--gpus-per-host", "0")
    assert not done.returncode and "-gpu" not in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(("words", "message"), [
    ([], "which sweep?"), (["sweeps/none.yaml"], "sweeps/none.yaml: no such sweep file"),
    (["sweeps/base.yaml", "--hosts", "two"], "--hosts two: should be a whole number"),
    (["sweeps/base.yaml", "--gpus-per-host", "-1"], "--gpus-per-host -1: should be"),
    (["sweeps/base.yaml", "--wall-time", "90"], "--wall-time 90: should be hours and minutes"),
    (["sweeps/base.yaml", "--que", "x"], "--que: no such setting"),
    (["sweeps/base.yaml", "--queue"], "--queue: its value is missing")])
def test_the_launcher_tells_what_is_wrong_and_submits_nothing(bin_folder, tmp_path, words, message):
    program(bin_folder, "bsub", f"#!/bin/sh\ntouch {tmp_path}/submitted\n")
    done = bash(bin_folder, LSF / "submit", *words)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "submitted").exists()


# A head that never comes up -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("blaunch", "message"), [
    ("echo 'Host <a> is down' >&2; exit 5", r"Ray's head on a ended with exit code 5:\n    a: Host <a> is down"),
    ("cat", r"Ray's head on a did not come up within AUTOENC_JOIN_SECONDS=1")])
def test_without_a_head_the_job_ends_with_one_message(tmp_path, blaunch, message):
    program(tmp_path / "bin", "blaunch", f"#!/bin/sh\n{blaunch}\n")
    done = bash(tmp_path / "bin", LSF / "sweep.lsf", AUTOENC_SWEEP="sweeps/phase1_4.yaml", AUTOENC_JOIN_SECONDS="1",
                LSB_JOBID="77", LSB_MCPU_HOSTS="a 2")
    assert done.returncode == 2 and not done.stdout
    assert re.match(f"error: LSF job 77: {message}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


# Hosts ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hosts() -> Iterator[Site]:
    with site(["n1", "n2", "n3"]) as made:
        program(made.folder / "bin", "blaunch", BLAUNCH.format(folder=made.folder))
        program(made.folder / "other", "sitecustomize.py", OTHER)
        yield made


class Job:
    """The script on the first host, as LSF starts it."""

    def __init__(self, where: Site, project: Project, number: int, log: Path, **environ: str) -> None:
        self.site, self.log = where, log
        path = f"{where.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = project.environment | {
            "PATH": path, "HOME": str(where.home), "LSB_JOBID": str(number), "LSB_JOBINDEX": "0",
            "AUTOENC_SWEEP": "toy.yaml", "AUTOENC_OPTIONS": "--output out", "AUTOENC_TMP": str(where.local),
            "AUTOENC_GPUS_PER_HOST": "0", "AUTOENC_RESUBMIT": "1", "OMP_NUM_THREADS": "1"} | environ
        start = f"cd {project.folder} && exec bash {LSF}/sweep.lsf"
        with log.open("ab") as file:
            self.process = subprocess.Popen([*where.on("n1"), "sh", "-c", start], env=environ, stdout=file,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def until(self, true, what: str, seconds: float = 240) -> None:
        limit = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"{what}: exit code {self.process.returncode}:\n{self.log.read_text()}")
            time.sleep(0.3)

    def signal(self, number: int) -> None:
        """To every process of the job, as LSF sends it."""
        for host in ("n1", "n2", "n3"):
            for pid in {*self.site.processes(host)} - {self.process.pid}:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def niceness(where: Site, host: str) -> set[int]:
    """Of Ray's workers on a host; of those that have just ended none."""
    found = set()
    for pid in where.processes(host):
        with suppress(ProcessLookupError, FileNotFoundError):
            if Path(f"/proc/{pid}/cmdline").read_text().startswith(WORKERS):
                found.add(os.getpriority(os.PRIO_PROCESS, pid))
    return found


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_over_hosts_of_lsf(hosts, tmp_path):
    """Three hosts, one of them with another version of Ray: a sweep over the two others, whose workers do not give way
    to what else the hosts do. LSF's warning ends it, with the exit code that puts the job into the queue again; run
    again, it trains the rest."""
    project = Project(hosts.folder / "project", Size(epochs=10, images=200))
    (project.folder / "tune_runner.py").symlink_to(REPOSITORY / "tune_runner.py")
    project.sweep(ARMS, resources={"cpus": 1, "gpus": 0})
    (project.folder / "hostfile").write_text("n1\nn2\nn3\n")
    job = Job(hosts, project, 77, tmp_path / "first", LSB_DJOB_HOSTFILE=f"{project.folder}/hostfile")

    def trained() -> set[str]:
        records = [json.loads(path.read_text()) for path in project.output.glob("store/*/status.json")]
        return {record["host"] for record in records if record["epochs"]}

    job.until(lambda: trained() == {"n1", "n2"}, "epochs on both hosts")
    assert [niceness(hosts, host) for host in ("n1", "n2")] == [{os.nice(0)}, {os.nice(0)}]
    job.signal(signal.SIGUSR2)
    assert job.process.wait(120) == 99, job.log.read_text()
    told = job.log.read_text()
    assert re.search(r"Ray on n3 has ended \(exit code 1\); going on without it\n    n3: RuntimeError: Version mismatch"
                     r": .*\n    n3: +Ray: \S+\n(?s:.*)    n3: +Ray: 2.9.9\n", told), told
    assert "2 of 3 hosts have joined: n1, n2" in told and "interrupted (by SIGUSR2)" in told
    job = Job(hosts, project, 77, tmp_path / "second", LSB_MCPU_HOSTS="n1 1 n2 1")
    assert job.process.wait(240) == 0, job.log.read_text()
    assert {row["epochs"] for row in project.decision()["candidates"]} == {project.size.epochs}
    findings = Findings()
    check_epochs(findings, project, running=2)
    assert not findings.broken, findings.broken
    assert [hosts.left(host) for host in ("n1", "n2", "n3")] == [[], [], []]
