"""A cluster as a service: sweeps as Ray jobs, several of them beside each other, and one that grows on demand."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import yaml

import tune_runner
from autoenc.errors import InputError
from autoenc.sweep.packing import Cluster
from autoenc.sweep.parts import Resources

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-tests-0123456789abcdef"
BASE = {"config": {"data": {"image_size": 16, "limit": 40},
                   "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2},
                   "train": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "patience": None}}, "asha": False}


# The share ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", ["0", "-1", "1.5", "two", "", "1e3", "٣"])
def test_slots_that_are_no_number_of_trials(given):
    with pytest.raises(InputError) as error:
        tune_runner.parse(["sweep.yaml", f"--slots={given}"])
    assert str(error.value) == f"--slots {given}: should be a number of trials at once, 1 or more"


def test_slots_and_growth_are_read():
    assert tune_runner.parse(["sweep.yaml"]).slots is None
    assert tune_runner.parse(["sweep.yaml", "--slots", "12"]).slots == 12
    with pytest.raises(InputError, match="--grow: to how many trials at once"):
        tune_runner.parse(["sweep.yaml", "--grow", "--address", "auto"])
    with pytest.raises(InputError, match="does not grow"):
        tune_runner.parse(["sweep.yaml", "--grow", "--slots", "2", "--address", "local"])
    assert tune_runner.parse(["sweep.yaml", "--grow", "--slots", "2", "--address", "auto"]).grow


@pytest.mark.parametrize(("cpus", "gpus", "asked", "runs", "slots", "share"), [
    (8, 0, {}, 20, None, (1, 0.0, 8)),
    (8, 0, {}, 20, 3, (1, 0.0, 3)),
    (8, 0, {"cpus": 4}, 20, 3, (4, 0.0, 2)),             # more than there is: what there is
    (8, 0, {}, 20, 1000, (1, 0.0, 8)),
    (8, 4, {}, 20, None, (1, 0.5, 8)),
    (8, 4, {}, 20, 4, (1, 1.0, 4)),                      # as many at once as GPUs: nobody has to share one
    (8, 4, {}, 20, 6, (1, 0.5, 6)),
    (8, 4, {"gpus": 2}, 20, 6, (1, 2.0, 2)),
    (8, 4, {"gpus": 0}, 20, 6, (1, 0.0, 6)),
])
def test_slots_cap_the_share(cpus, gpus, asked, runs, slots, share):
    assert Cluster(cpus, gpus, None, False, slots).share(Resources(**asked), runs) == share


def test_what_the_cluster_can_never_give_is_refused_with_slots_too():
    with pytest.raises(InputError, match=r"resources.gpus: 1 a trial, but the cluster has 0"):
        Cluster(8, 0, None, False, 2).share(Resources(gpus=1), 1)


def test_a_cluster_that_grows_gives_all_slots():
    """Whatever it has now: the trials that wait are what makes it grow."""
    assert Cluster(1, 0, None, False, 6, True).share(Resources(cpus=4, gpus=1), 2) == (4, 1.0, 6)
    assert Cluster(4, 1, None, False, 6, True).share(Resources(), 20) == (1, 1.0, 6)
    assert Cluster(4, 0, None, False, 6, True).share(Resources(), 20) == (1, 0.0, 6)


# A head with jobs -----------------------------------------------------------------------------------------------------

HEAD_ID = "f" * 51 + "00000"                # what Ray's provider of nodes on one machine takes the head for
GROWS = {"cluster_name": "growing", "max_workers": 2, "idle_timeout_minutes": 5, "upscaling_speed": 2,
         **{f"{name}_commands": [] for name in ("setup", "head_setup", "worker_setup", "initialization",
                                                "head_start_ray", "worker_start_ray")},
         "auth": {}, "file_mounts": {}, "cluster_synced_files": [],
         "provider": {"type": "external", "launch_multiple": True, "head_node_id": HEAD_ID,
                      "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"},
         "head_node_type": "ray.head.default",
         "available_node_types": {
             "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
             "worker": {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {},
                        "min_workers": 0, "max_workers": 2}}}
GROWING = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
           "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Service:
    """A Ray head with a token on ports of its own, and a project whose sweeps are submitted to it."""

    def __init__(self, folder: Path, ray_folder: str, cpus: int, *, grows: bool) -> None:
        self.folder, self.project, self.output, self.ray = folder, folder / "project", folder / "out", Path(ray_folder)
        self.gcs, self.http, *others = free_ports(6)
        self.address = f"http://127.0.0.1:{self.http}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        token = folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        self.env = {**env, "HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
                    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_JOB_STOP_WAIT_TIME_S": "60",
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",                   # all of it on loopback
                    "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        names = ("dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port",
                 "dashboard-agent-grpc-port")
        self.command = ["ray", "start", "--head", "--block", f"--port={self.gcs}", f"--dashboard-port={self.http}",
                        "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={self.ray}",
                        "--disable-usage-stats", f"--num-cpus={cpus}",
                        *(f"--{name}={port}" for name, port in zip(names, others, strict=True))]
        self.process: subprocess.Popen | None = None
        if grows:
            provider = {**GROWS["provider"], "gcs_address": f"127.0.0.1:{self.gcs}"}
            (folder / "grows.yaml").write_text(yaml.safe_dump({**GROWS, "provider": provider}))
            self.command.append(f"--autoscaling-config={folder / 'grows.yaml'}")
        self.more = GROWING if grows else {}

    def start(self) -> None:
        with (self.folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(self.command, env={**self.env, **self.more}, stdout=log, stderr=log,
                                            cwd=self.folder, start_new_session=True)
        for _ in range(300):
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            with suppress(OSError):
                if "ray_version" in self.ask("/api/version"):
                    return
            time.sleep(0.2)
        raise AssertionError((self.folder / "head.log").read_text())

    def end(self) -> None:
        """Ends the head, and whatever it has started: all of that names the temporary folder."""
        if self.process is None:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self.ray).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)

    def ask(self, path: str) -> dict:
        asked = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return json.load(answer)

    def lay_out(self, **sweeps) -> None:
        """The project as a clone has it, with these sweeps in place of its own."""
        shutil.copytree(ROOT / "autoenc", self.project / "autoenc", ignore=shutil.ignore_patterns("__pycache__"),
                        dirs_exist_ok=True)
        for name in ("tune_runner.py", ".gitignore", ".rayignore"):
            shutil.copy(ROOT / name, self.project / name)
        self.write(base=BASE, **sweeps)

    def write(self, **sweeps) -> None:
        (self.project / "sweeps").mkdir(exist_ok=True)
        for stem, content in sweeps.items():
            (self.project / "sweeps" / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def job(self, *words: str, env: dict | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(["ray", "job", *words], cwd=self.project, env=env or self.env, capture_output=True,
                              text=True, timeout=280)

    def submit(self, name: str, sweep: str, *options: str, wait: bool = True, output: str | None = None,
               env: dict | None = None) -> subprocess.CompletedProcess:
        """As the documentation says it."""
        return self.job("submit", "--address", self.address, "--working-dir", ".", "--submission-id", name,
                        *(() if wait else ("--no-wait",)), "--", "python", "tune_runner.py", f"sweeps/{sweep}.yaml",
                        "--output", output or str(self.output), *options, env=env)

    def status(self, name: str) -> str:
        return self.ask(f"/api/jobs/{name}")["status"]

    def ended(self, name: str, within: float = 180) -> str:
        until = time.monotonic() + within
        while (status := self.status(name)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < until, self.logs(name)
            time.sleep(0.3)
        return status

    def logs(self, name: str) -> str:
        return self.ask(f"/api/jobs/{name}/logs")["logs"]

    def workers(self) -> dict[str, int]:
        """How many trials' workers each job has alive, by its submission: what Ray itself says."""
        jobs = {job["job_id"]: job["submission_id"] for job in self.ask("/api/jobs/") if job["job_id"]}
        actors = self.ask("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        alive = [jobs[actor["job_id"]] for actor in actors if "Trainable" in actor["class_name"]
                 and actor["state"] == "ALIVE" and actor["job_id"] in jobs]
        return {name: alive.count(name) for name in set(alive)}

    def stored(self, sweep: str) -> dict[str, int]:
        """Epochs of each trial in the store."""
        return {table.parent.name: len(table.read_text().splitlines()) - 1
                for table in (self.output / sweep / "trials").glob("*/metrics.csv")}

    def trials(self, sweep: str) -> dict[str, dict[str, str]]:
        with (self.output / sweep / "trials.csv").open() as file:
            return {row["trial"]: row for row in csv.DictReader(file)}


@contextmanager
def service(folder: Path, cpus: int, *, grows: bool = False) -> Iterator[Service]:
    ray_folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")       # Ray's sockets lie there: their paths may not be long
    head = Service(folder, ray_folder, cpus, grows=grows)
    try:
        head.start()
        yield head
    finally:
        head.end()
        shutil.rmtree(ray_folder, ignore_errors=True)


def arms(number: int, start: int = 0) -> dict:
    return {f"A{index}": {"train.learning_rate": 1e-3 * (1 + index)} for index in range(start, start + number)}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service"), 2) as head:
        head.lay_out(tiny={"name": "tiny", "arms": arms(2)})
        yield head


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_as_a_job(head):
    (head.project / "outputs").mkdir()
    (head.project / "outputs" / "large.pt").write_bytes(bytes(1000))
    (head.project / "data").mkdir()
    (head.project / "data" / "image.png").write_bytes(bytes(1000))
    done = head.submit("first", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.status("first") == "SUCCEEDED" and "tiny" in done.stdout
    assert (head.output / "tiny" / "best_config.yaml").is_file()
    assert {row["epochs_trained"] for row in head.trials("tiny").values()} == {"3"}
    (package,) = (head.ray / "session_latest" / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/")
    assert (package / "autoenc" / "data" / "__init__.py").is_file() and (package / "sweeps" / "tiny.yaml").is_file()
    assert not (package / "outputs").exists() and not (package / "data").exists()

    done = head.submit("second", "tiny")
    assert done.returncode == 0 and "nothing to train" in done.stdout and head.status("second") == "SUCCEEDED"
    assert {row["epochs_trained"] for row in head.trials("tiny").values()} == {"0"}


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_that_was_given_something_wrong_fails_and_says_what(head):
    head.write(wrong={"name": "wrong", "arms": {"A": {"train.learning_rat": 1e-3}}})
    done = head.submit("wrong", "wrong")
    assert done.returncode != 0 and head.status("wrong") == "FAILED"
    assert "did you mean 'train.learning_rate'" in head.logs("wrong") and "Traceback" not in head.logs("wrong")
    assert "exit code 2" in head.ask("/api/jobs/wrong")["message"]
    assert not (head.output / "wrong").exists()

    done = head.submit("lost", "tiny", output="outputs")            # would be gone with the job
    assert done.returncode != 0 and "Ray makes for a job and removes after it" in head.logs("lost")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_without_the_token_does_not_get_in(head):
    env = {**head.env, "RAY_AUTH_TOKEN_PATH": str(head.folder / "other")}
    (head.folder / "other").write_text("not-the-token")
    done = head.submit("stranger", "tiny", env=env)
    assert done.returncode != 0 and "token" in (done.stdout + done.stderr).lower()
    with pytest.raises(OSError, match="404"):
        head.status("stranger")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_that_is_stopped_goes_on_where_it_was(head):
    head.write(long={"name": "long", "arms": arms(2, 10), "config": {"train": {"epochs": 120, "batch_size": 4}}})
    head.submit("stopped", "long", wait=False)
    until = time.monotonic() + 120
    while sum(head.stored("long").values()) < 6:
        assert time.monotonic() < until, head.logs("stopped")
        time.sleep(0.1)
    head.job("stop", "--address", head.address, "stopped")
    assert head.ended("stopped") == "STOPPED"
    assert "what was done is kept; go on with the same command" in head.logs("stopped")
    kept = head.stored("long")
    assert sum(kept.values()) < 240
    assert head.submit("again", "long").returncode == 0
    assert {name: int(row["epochs_trained"]) for name, row in head.trials("long").items()} == {
        name: 120 - kept[name] for name in kept}


# Several at once ------------------------------------------------------------------------------------------------------

def watch(head: Service, *jobs: str) -> list[dict[str, int]]:
    """How many workers each job has alive, time and again until all of them have ended."""
    seen = []
    until = time.monotonic() + 240
    while any(head.status(job) in ("PENDING", "RUNNING") for job in jobs):
        assert time.monotonic() < until, [head.logs(job) for job in jobs]
        seen.append(head.workers())
        time.sleep(0.1)
    assert {head.status(job) for job in jobs} == {"SUCCEEDED"}, [head.logs(job) for job in jobs]
    return seen


@pytest.mark.slow
@pytest.mark.cluster
def test_two_sweeps_keep_to_their_slots(head):
    for name, start in (("left", 20), ("right", 30)):
        head.write(**{name: {"name": name, "arms": arms(4, start), "config": {"train": {"epochs": 20}}}})
        head.submit(name, name, "--slots", "1", wait=False)
    seen = watch(head, "left", "right")
    assert {job: max(counts.get(job, 0) for counts in seen) for job in ("left", "right")} == {"left": 1, "right": 1}
    assert any(counts.get("left") and counts.get("right") for counts in seen), "they ran one after the other"


@pytest.fixture
def held(head) -> Iterator[Callable[[str, int], None]]:
    """Has CPUs of the cluster held by somebody else's job; gone at the end of the test."""
    names = []

    def hold(name: str, cpus: int) -> None:
        head.job("submit", "--address", head.address, "--submission-id", name, "--no-wait",
                 "--entrypoint-num-cpus", str(cpus), "--", "sleep", "600")
        names.append(name)
        until = time.monotonic() + 60
        while head.status(name) != "RUNNING":
            assert time.monotonic() < until, head.logs(name)
            time.sleep(0.1)

    yield hold
    for name in names:
        head.job("stop", "--address", head.address, name)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_runs_on_what_others_leave(head, held):
    """It counts two slots, and one is never free."""
    held("half", 1)
    head.write(modest={"name": "modest", "arms": arms(3, 40)})
    head.submit("modest", "modest", wait=False)
    seen = watch(head, "modest")
    assert max(counts.get("modest", 0) for counts in seen) == 1
    assert {row["epochs"] for row in head.trials("modest").values()} == {"3"}


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_waits_until_others_are_done_and_says_so(head, held):
    held("all", 2)
    head.write(patient={"name": "patient", "arms": arms(4, 50), "config": {"train": {"epochs": 20}}})
    head.submit("patient", "patient", wait=False)
    until = time.monotonic() + 120
    while "no trial runs: what one needs is not free" not in head.logs("patient"):
        assert time.monotonic() < until and head.status("patient") in ("PENDING", "RUNNING"), head.logs("patient")
        time.sleep(0.5)
    assert not head.workers()
    head.job("stop", "--address", head.address, "all")
    seen = watch(head, "patient")
    assert max(counts.get("patient", 0) for counts in seen) == 2       # without --slots: all there is


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_grows_from_no_worker_to_the_slots_asked_for(tmp_path):
    """Ray's own autoscaler, with nodes that are processes of this machine."""
    with service(tmp_path, 0, grows=True) as head:
        head.lay_out(grown={"name": "grown", "arms": arms(4), "config": {"train": {"epochs": 20}}})
        # The code is there already, as in an image: nodes on one machine would replace each other's copy of an upload.
        command = ["python", str(head.project / "tune_runner.py"), str(head.project / "sweeps" / "grown.yaml"),
                   "--output", str(head.output), "--slots", "2"]
        submit = ("submit", "--address", head.address, "--no-wait", "--submission-id")
        head.job(*submit, "none", "--", *command)
        assert head.ended("none") == "FAILED"
        assert "resources.cpus: 1 a trial, but the cluster has 0" in head.logs("none")
        head.job(*submit, "grown", "--", *command, "--grow")
        seen = watch(head, "grown")
        assert max(counts.get("grown", 0) for counts in seen) == 2
        assert {row["epochs"] for row in head.trials("grown").values()} == {"20"}
