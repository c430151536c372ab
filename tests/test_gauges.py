"""Gauges: what a race makes them, the dashboard made of them, and what a real Prometheus then knows of a real sweep."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from racing import KNOB, Lab, states

from autoenc.sweep.gauges import GAUGES, REFRESH_SECONDS, STATES, Gauges

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "autoenc.json").read_text(encoding="utf-8"))
PROMETHEUS = ROOT / "cluster" / "prometheus" / "prometheus.yml"
NEEDS_PROMETHEUS = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
ARMS = {"A": {KNOB: 0.1}, "B": {KNOB: 0.11}, "C": {KNOB: 0.2}, "D": {KNOB: 0.3}}


class Board:
    """Takes gauges as Ray's metrics do: a report has only what was set for it."""

    def __init__(self) -> None:
        self.reports: list[dict[tuple[str, ...], float]] = []

    def make(self, name: str, description: str, labels: tuple[str, ...]) -> Any:
        board = self

        class Gauge:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert tags.keys() == set(labels) and type(value) is float
                series = (name.removeprefix("autoenc_"), *(tags[label] for label in labels if label != "sweep"))
                assert series not in board.reports[-1]
                board.reports[-1][series] = value

        assert labels == GAUGES[name][0] and description
        return Gauge()

    def report(self, gauges: Gauges) -> dict[tuple[str, ...], float]:
        self.reports.append({})
        gauges.report()
        return self.reports[-1]


def trials(**counts: int) -> dict[tuple[str, ...], float]:
    return {("trials", state): float(counts.get(state, 0)) for state in STATES}


# A race without Ray ---------------------------------------------------------------------------------------------------

def test_a_race_from_its_start_to_its_end(tmp_path):
    lab, board = Lab(tmp_path, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.2}}, asha=False), Board()
    lab.store_epochs("B", 3)
    race = lab.race()
    gauges = Gauges(race, 2, board.make, images=32)
    still = {("slots",): 2.0, ("epochs_saved", "asha"): 0.0, ("epochs_saved", "store"): 3.0}
    stored = pytest.approx(0.2 * (1 + 1 / 3))
    assert board.report(gauges) == still | trials(waiting=2) | {
        ("slots_busy",): 0.0, ("epochs_trained",): 0.0, ("best_objective", "val/mse"): stored}

    first, second = race.next(), race.next()
    lab.step(race, first)
    assert board.report(gauges) == still | trials(running=2) | {
        ("slots_busy",): 2.0, ("epochs_trained",): 1.0, ("best_objective", "val/mse"): 0.2,
        ("trial_epoch", "A_seed42"): 1.0, ("trial_objective", "val/mse", "A_seed42"): 0.2,
        ("images_per_second", "A_seed42"): 64.0,                    # 32 in half a second, says the table
        ("trial_epoch", "B_seed42"): 3.0, ("trial_objective", "val/mse", "B_seed42"): stored}

    while not lab.step(race, first):
        pass
    reached = 0.1 * (1 + 1 / 8)
    done = board.report(gauges)
    assert done == still | trials(running=1, completed=1) | {
        ("slots_busy",): 1.0, ("epochs_trained",): 8.0, ("best_objective", "val/mse"): pytest.approx(reached),
        ("trial_epoch", "B_seed42"): 3.0, ("trial_objective", "val/mse", "B_seed42"): stored}
    while not lab.step(race, second):
        pass
    assert not [name for name, *_ in board.report(gauges) if name.startswith(("trial_", "images"))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), unfit=st.sets(st.sampled_from("ABC")))
def test_whatever_the_order_the_ends_are_those_of_the_books(seed, slots, unfit):
    def curve(config) -> list:
        ends = "diverged" if seed % 2 else "failed"
        knob = config.train.weight_decay
        values = [knob * (1 + 1 / epoch) for epoch in range(1, 9)]
        return values[:3] + [ends] * 5 if any(ARMS[arm][KNOB] == knob for arm in unfit) else values

    with tempfile.TemporaryDirectory() as folder:
        lab, board = Lab(Path(folder), curve, arms=ARMS, asha={"margin": 0.05}), Board()
        race = lab.run(slots, seed)
        found = board.report(Gauges(race, slots, board.make))
        ends = states(race)
        assert {state: found["trials", state] for state in STATES} == {
            state: sum(end == state for end, _ in ends.values()) for state in STATES}
        fit = [race.score(trial.run) for trial in race.trials if trial.run.state in ("completed", "stopped")]
        assert found["best_objective", "val/mse"] == min(fit)
        assert found["epochs_saved", "asha"] == sum(
            8 - lab.trained[run.key] for run in race.runs.values() if run.state == "stopped")
        assert found["epochs_trained",] == sum(lab.trained.values())

        again = board.report(Gauges(lab.race(retry=False), slots, board.make))
        assert again["epochs_trained",] == 0 and again["best_objective", "val/mse"] == min(fit)
        assert again["epochs_saved", "store"] == sum(epochs for _, epochs in ends.values())


def test_where_large_is_good_and_where_nothing_is_known_yet(tmp_path):
    def curve(config) -> list:
        return [{"val/mse": 1 / epoch, "val/psnr": 100 * config.train.weight_decay + epoch} for epoch in range(1, 9)]

    lab, board = Lab(tmp_path, curve, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.2}}, asha=False,
                     objective={"metric": "val/psnr"}), Board()
    race = lab.race()
    gauges = Gauges(race, 1, board.make)
    assert not [series for series in board.report(gauges) if series[0] == "best_objective"]
    run = race.next()
    assert board.report(gauges)["trial_epoch", "A_seed42"] == 0
    lab.step(race, run)
    found = board.report(gauges)
    assert found["best_objective", "val/psnr"] == 11 and ("images_per_second", "A_seed42") not in found
    assert board.report(Gauges(lab.run(), 1, board.make))["best_objective", "val/psnr"] == 28


def test_metrics_that_fail_are_told_once_and_hurt_nobody(tmp_path):
    def make(name: str, description: str, labels: tuple[str, ...]) -> Any:
        raise RuntimeError("no agent")

    lab, said = Lab(tmp_path, arms={"A": {KNOB: 0.1}}), []
    gauges = Gauges(lab.race(), 1, make, say=said.append)
    gauges.refresh()
    gauges.report()
    assert said == ["the gauges for Prometheus are reported no more: RuntimeError: no agent"]


def test_a_report_a_second_at_most(tmp_path):
    now = [100.0]
    board = Board()
    gauges = Gauges(Lab(tmp_path, arms={"A": {KNOB: 0.1}}).race(), 1, board.make, clock=lambda: now[0])
    for number, moment in enumerate((100.0, 100.9 * REFRESH_SECONDS, 101.0 * REFRESH_SECONDS)):
        now[0] = moment
        board.reports.append({})
        gauges.refresh()
        assert bool(board.reports[-1]) == (number != 1)


# The dashboard, and the page about it ---------------------------------------------------------------------------------

def queries() -> list[tuple[str, str, str]]:
    """Panel, expression and legend of every query."""
    return [(panel["title"], target["expr"], target["legendFormat"])
            for panel in DASHBOARD["panels"] for target in panel["targets"]]


def asked(expression: str) -> str:
    """An expression as Grafana sends it with all sweeps selected."""
    return expression.replace("$sweep", ".*")


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_has_every_gauge_and_asks_for_no_label_that_is_not_there():
    labels = {f"ray_{name}": set(of) for name, (of, _) in GAUGES.items()}
    shown = {name for _, expression, _ in queries() for name in metrics(expression)}
    assert {name for name in shown if name.startswith("ray_autoenc_")} == labels.keys()
    for title, expression, legend in queries():
        for name in metrics(expression) & labels.keys():
            kept = set(re.search(r"by \(([\w, ]+)\)", expression)[1].split(", "))
            assert kept <= labels[name] and set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept, title
            assert '{sweep=~"$sweep"}' in expression
    source, sweep = DASHBOARD["templating"]["list"]
    assert source["type"] == "datasource" and source["query"] == "prometheus"
    assert re.fullmatch(r"label_values\((\w+), sweep\)", sweep["query"]["query"])[1] in labels
    for part in (sweep, *DASHBOARD["panels"], *(t for panel in DASHBOARD["panels"] for t in panel["targets"])):
        assert part["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_rays_own_metrics_are_among_those_that_this_ray_has():
    """In a process of its own: what imports Ray decides there and then how it authenticates."""
    code = "from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES; print(*METRICS_GAUGES)"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {name for _, expression, _ in queries() for name in metrics(expression) if "autoenc" not in name}
    assert {"ray_node_gpus_utilization", "ray_node_gram_used"} <= own <= {f"ray_{name}" for name in known}


def test_the_page_has_every_gauge_with_its_labels():
    page = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `ray_(autoenc_\w+)` \| ([\w, ]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert {name: tuple(labels.split(", ")) for name, labels in rows} == {
        name: labels for name, (labels, _) in GAUGES.items()}


# Prometheus -----------------------------------------------------------------------------------------------------------

def free_ports(number: int) -> list[int]:
    listeners = [socket.socket() for _ in range(number)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of its answer; raises AssertionError with what it says is wrong."""
        try:
            url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def values(self, query: str, label: str | None = None) -> Any:
        """What it answers now: by label, or a single value."""
        found = self.ask("query", query=query)["result"]
        values = {each["metric"].get(label, ""): float(each["value"][1]) for each in found}
        assert len(values) == len(found)
        return values if label else values.get("")


@contextmanager
def prometheus(folder: Path, config: Path) -> Iterator[Prometheus]:
    (port,) = free_ports(1)
    process = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'series'}",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(30)


@NEEDS_PROMETHEUS
def test_every_query_is_one_to_prometheus_with_the_configuration_that_comes_along(tmp_path):
    with prometheus(tmp_path, PROMETHEUS) as server:
        for title, expression, _ in queries():
            assert server.ask("query", query=asked(expression))["resultType"] == "vector", title
        with pytest.raises(AssertionError, match="parse error"):
            server.ask("query", query="max by sweep (ray_autoenc_trials)")


# A real sweep ---------------------------------------------------------------------------------------------------------

SWEEP = {"config": {"data": {"image_size": 32, "limit": 40},
                    "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2},
                    "train": {"epochs": 60, "batch_size": 8, "learning_rate": 1e-3, "patience": None}},
         "asha": False}
TINY = {"name": "tiny", "arms": {"S": {"model.latent_channels": 2}, "L": {"model.latent_channels": 4}}}


@pytest.fixture
def project(tmp_path) -> Iterator[dict[str, str]]:
    """A folder with a sweep, and the environment of a person with a token; ``RAY`` in it is Ray's folder."""
    for stem, content in (("base", SWEEP), ("tiny", TINY)):
        (tmp_path / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp")             # its sockets lie there: their paths may not be long
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {**env, "HOME": str(tmp_path), "AUTOENC_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "RAY": ray,
           "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": ray,
           "RAY_metrics_report_interval_ms": "4000"}         # of the driver, too: else 10 s, and the sweep may be over
    shutil.rmtree(ray, ignore_errors=True)


@contextmanager
def head(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """A cluster of one node, which reports every four seconds; its address."""
    port, dashboard, *others = free_ports(6)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port",
             "metrics-export-port")
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
             f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
             "--node-ip-address=127.0.0.1", f"--temp-dir={env['RAY']}/ray", "--disable-usage-stats",
             *(f"--{name}={number}" for name, number in zip(names, others, strict=True))],
            env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/", timeout=5):
                break
            assert process.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.cluster
@NEEDS_PROMETHEUS
def test_prometheus_knows_the_best_objective_of_a_sweep(tmp_path, project):
    config = tmp_path / "prometheus.yml"
    config.write_text(PROMETHEUS.read_text().replace("/tmp/ray", f"{project['RAY']}/ray").replace(": 10s", ": 1s"))
    began = time.time()
    with prometheus(tmp_path, config) as server, head(tmp_path, project) as address:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tune_runner.py"), "tiny.yaml", "--output", "out", "--address", address],
            cwd=tmp_path, env=project, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        links = dict(re.findall(r"^(Ray dashboard|gauges for Prometheus) (http://\S+) ", done.stdout, re.MULTILINE))
        with urllib.request.urlopen(links["gauges for Prometheus"], timeout=20) as answer:       # without a token
            assert "# TYPE ray_" in answer.read().decode()
        with pytest.raises(HTTPError, match="401"):
            urllib.request.urlopen(f"{links['Ray dashboard']}/api/cluster_status", timeout=20)

        until = time.time() + 60
        while server.values("ray_autoenc_trials", "state") and time.time() < until:              # as nobody reports it
            time.sleep(0.5)
        assert server.ask("query", query='{__name__=~"ray_autoenc_.+"}')["result"] == []

        def last(query: str, label: str | None = None) -> Any:
            return server.values(f"last_over_time({query}[10m])", label)

        folder = tmp_path / "out" / "tiny"
        with (folder / "trials.csv").open() as file:
            rows = {row["trial"]: row for row in csv.DictReader(file)}
        decision = json.loads((folder / "decision.json").read_text())
        (score,) = {row["score"] for row in decision["candidates"] if row["arm"] == decision["winner"]}
        best = last("ray_autoenc_best_objective", "metric")
        assert best == {"val/mse": pytest.approx(min(float(row["val/mse"]) for row in rows.values()), rel=1e-12)}
        assert best["val/mse"] == pytest.approx(score, rel=1e-12)
        assert {state: number for state, number in last("ray_autoenc_trials", "state").items() if number} == {
            "completed": 2}
        assert last("ray_autoenc_slots", "sweep") == {"tiny": 2} and last("ray_autoenc_epochs_trained") == 120
        assert last("ray_autoenc_epochs_saved", "by") == {"asha": 0, "store": 0}
        assert server.values("max_over_time(ray_autoenc_slots_busy[10m])", "sweep") == {"tiny": 2}
        seen = {name: last(f"ray_autoenc_{name}", "trial")
                for name in ("trial_epoch", "trial_objective", "images_per_second")}
        for trial in rows:
            with (folder / "trials" / trial / "metrics.csv").open() as file:
                table = list(csv.DictReader(file))
            assert seen["trial_epoch"][trial] <= 60
            assert min(abs(seen["trial_objective"][trial] - float(row["val/mse"])) for row in table) < 1e-12
            speeds = [31 / float(row["seconds"]) for row in table]
            assert min(speeds) * 0.99 <= seen["images_per_second"][trial] <= max(speeds) * 1.01

        gpus = set(server.ask("label/__name__/values")) & {"ray_node_gpus_utilization"}
        for title, expression, _ in queries():
            found = server.ask("query_range", query=asked(expression), start=began, end=time.time(), step=1)["result"]
            assert bool(found) == (bool(gpus) or not title.startswith("GPU")), title
