"""cluster/slurm/sweep.sbatch in a real Slurm: two nodes, each with an address and a disk of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import ARMS, Findings, Project, Size, check_epochs
from hosts import REPOSITORY
from slurm import Slurm, slurm

SCRIPT = REPOSITORY / "cluster" / "slurm" / "sweep.sbatch"
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def batch() -> Iterator[Slurm]:
    with slurm(["n1", "n2"], cpus=1) as system:
        yield system


@pytest.fixture
def project(batch, request) -> Iterator[Project]:
    """A sweep of four arms, on a folder that both nodes see."""
    made = Project(batch.folder / request.node.name[5:25], Size(epochs=10, images=200))
    (made.folder / "tune_runner.py").symlink_to(REPOSITORY / "tune_runner.py")
    made.sweep(resources={"cpus": 1, "gpus": 0})
    try:
        yield made
    finally:
        batch.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root", check=False)
        made.close()


def submit(batch: Slurm, project: Project, nodes: int, **settings: str) -> str:
    """The job's number."""
    environ = project.environment | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HOME": str(batch.site.home), "AUTOENC_TMP": str(batch.site.local), "AUTOENC_GPUS_PER_HOST": "0", **settings}
    return batch.run("sbatch", "--parsable", f"--chdir={project.folder}", f"--nodes={nodes}", "--cpus-per-task=1",
                     "--gpus-per-node=0", "--time=10", str(SCRIPT), f"{project.name}.yaml", "--output", "out",
                     **environ).split()[-1]


def said(project: Project, job: str) -> str:
    path = project.folder / f"autoenc.{job}.out"
    return path.read_text() if path.exists() else ""


def hosts(project: Project) -> set[str]:
    """Where trials have trained an epoch."""
    records = [json.loads(path.read_text()) for path in project.output.glob("store/*/status.json")]
    return {record["host"] for record in records if record["epochs"]}


def until(true, batch: Slurm, project: Project, job: str, what: str, seconds: float = 240) -> None:
    """Wait for something to be true of a job or its sweep; the job may not end before."""
    limit = time.monotonic() + seconds
    while not true():
        state = batch.state(job)
        if time.monotonic() > limit or (state in ENDS and not true()):
            pytest.fail(f"{what}: not in time, the job is {state}:\n{said(project, job)}")
        time.sleep(0.5)


def both_train(project: Project):
    return lambda: hosts(project) == {"n1", "n2"}


def ended(batch: Slurm, project: Project, job: str, state: str) -> None:
    until(lambda: batch.state(job) in ENDS, batch, project, job, "its end")
    assert batch.state(job) == state, said(project, job)


def check(project: Project, running: int) -> None:
    """Every arm has its epochs and a verdict, and none of them was trained twice once it was stored."""
    assert {row["epochs"] for row in project.decision()["candidates"]} == {project.size.epochs}
    findings = Findings()
    check_epochs(findings, project, running=running)
    assert not findings.broken, findings.broken


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_that_is_cancelled_goes_on_when_submitted_again(batch, project):
    job = submit(batch, project, nodes=2)
    until(both_train(project), batch, project, job, "epochs on both nodes")
    assert (batch.site.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    rows = project.stored()
    batch.run("scancel", job)
    ended(batch, project, job, "CANCELLED")
    assert "submit the same job again to go on" in said(project, job), said(project, job)
    assert not batch.site.left("n1") and not batch.site.left("n2")
    again = submit(batch, project, nodes=2)
    ended(batch, project, again, "COMPLETED")
    assert project.stored() >= rows and "2 of 2 hosts have joined: n1, n2" in said(project, again)
    check(project, running=2)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_whose_time_is_over_puts_itself_into_the_queue_again(batch, project):
    project.sweep({name: ARMS[name] for name in "AB"}, resources={"cpus": 1, "gpus": 0})
    job = submit(batch, project, nodes=1, AUTOENC_RESUBMIT="1")
    until(lambda: project.stored() > 2, batch, project, job, "epochs")
    batch.run("scancel", "--batch", "--signal=USR1", job)               # as Slurm does for --signal=B:USR1@60
    until(lambda: batch.shown(job)["Restarts"] == "1", batch, project, job, "its second start")
    ended(batch, project, job, "COMPLETED")
    assert "interrupted (by SIGUSR1)" in said(project, job) and "back into the queue" in said(project, job)
    check(project, running=1)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_that_goes_away_is_done_without(batch, project):
    job = submit(batch, project, nodes=2)
    until(both_train(project), batch, project, job, "epochs on both nodes")
    batch.site.kill("n2")
    ended(batch, project, job, "COMPLETED")
    assert "Ray on n2 has ended" in said(project, job) and "going on without it" in said(project, job)
    assert project.events("restarted")
    check(project, running=1)
    assert not batch.site.left("n1")
