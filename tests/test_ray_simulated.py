"""Simulated curves through Ray's scheduler: order, stops, deadlines, workers that start slowly."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from racing import KNOB, Lab, decision_of, key_of, levels, put, row_of, states
from workers import simulated_worker

from autoenc.custom import Caller
from autoenc.files import append_line
from autoenc.sweep import doors

TESTS = Path(__file__).resolve().parent
AGENT = 52365                      # the port that every Ray's agent would like to have


def wobbling(config) -> list:
    """Falls to the knob's level, and crosses others by less than 5%; above 1 it is the best one and diverges."""
    level = config.train.weight_decay
    wave = [1 + 0.01 * ((-1) ** (epoch + round(1000 * level))) for epoch in range(config.train.epochs)]
    values = [value * up for value, up in zip(levels(config), wave, strict=True)]
    return values if level < 1 else [0.05] * 5 + ["diverged"] * 3


def until_one_is_stopped(rows, output) -> float:
    """What diverges after its fifth epoch still leads until others have come by."""
    limit = time.monotonic() + 60
    while (len(rows), rows[-1]["val/mse"]) == (5, 0.05) and time.monotonic() < limit \
            and '"stopped"' not in (output / "toy" / "events.jsonl").read_text():
        time.sleep(0.05)
    return 0.02


@pytest.fixture(scope="module")
def cluster(ray_token):
    """One for all: a process can start Ray with one token only. Something else listens where its agent would."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_token))
        doors.prepare_local()
        from autoenc.sweep import ray_cluster, run_ray

        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        patch.setattr(run_ray, "TrialWorker", simulated_worker(wobbling, seconds=until_one_is_stopped))
        with ExitStack() as stack:
            with suppress(OSError):              # somebody does already
                stack.enter_context(socket.create_server(("127.0.0.1", AGENT)))
            yield stack.enter_context(ray_cluster.cluster(None, dashboard_host=None))
    shutil.rmtree(folder, ignore_errors=True)


ARMS = {"A": 0.1, "B": 0.101, "C": 0.2, "E": 0.102}


@pytest.mark.slow
def test_arms_in_every_order_through_ray(tmp_path, cluster):
    from autoenc.sweep import run_ray

    winners, stops = set(), 0
    few = 0 < int(os.environ.get("AUTOENC_EXAMPLES", "0")) < 1000          # each takes seconds
    for number, order in enumerate(list(itertools.permutations(ARMS))[::4 if few else 1]):
        folder = tmp_path / str(number)
        folder.mkdir()
        lab = Lab(folder, wobbling, arms={name: {KNOB: ARMS[name]} for name in order}, asha={"margin": 0.05})
        race = lab.race()
        run_ray.run(race, cluster, folder=lab.folder.path, output=folder)
        assert race.done and lab.race().idle and states(lab.race()) == states(race)
        winners.add(decision_of(race)["winner"])
        assert {name for name, (state, _) in states(race).items() if state == "stopped"} <= {"C_seed42"}
        stops += len(lab.stops())
    assert len(winners) == 1 and stops > 0


@pytest.mark.slow
def test_a_stopped_run_is_continued_through_ray(tmp_path, cluster):
    """What beat it diverges; a search goes on beside; a further seed for the finalists."""
    from autoenc.sweep import run_ray

    lab = Lab(tmp_path, wobbling, arms={"X": {KNOB: 1.5}, "C": {KNOB: 0.2}}, asha={"margin": 0.05},
              decision={"repeats": 2, "within": "50%"}, search={"trials": 5, "algorithm": "random"},
              space={KNOB: {"type": "float", "low": 0.2, "high": 0.25}})
    race = lab.race()
    run_ray.run(race, cluster, folder=lab.folder.path, output=tmp_path)
    assert race.done and states(race)["X_seed42"] == ("diverged", 5)
    assert {state for name, (state, _) in states(race).items() if name != "X_seed42"} == {"completed"}
    stopped, continued = ({event["trial"] for event in lab.events(kind)} for kind in ("stopped", "continued"))
    assert stopped == continued != set()
    assert len(race.trials) == 9


@pytest.mark.slow
def test_no_epoch_is_begun_that_would_not_end_in_time(tmp_path, cluster):
    from autoenc.interrupts import Deadline
    from autoenc.sweep import run_ray

    lab = Lab(tmp_path, wobbling, arms={name: {KNOB: level} for name, level in ARMS.items()}, asha=False)
    slow = row_of(1, 0.5) | {"seconds": 3600.0}          # what an epoch takes, by the table
    for arm in ARMS:
        config = next(candidate.config for candidate in lab.arms if candidate.name == arm)
        put(lab.store.open(key_of(config)), [slow])
    race = lab.race()
    with pytest.raises(KeyboardInterrupt):
        run_ray.run(race, cluster, folder=lab.folder.path, output=tmp_path,
                    deadline=Deadline(time.monotonic() + 600, "a test"))
    assert {state for state, _ in states(race).values()} == {"waiting"} and not lab.events("started")
    race = lab.race()
    run_ray.run(race, cluster, folder=lab.folder.path, output=tmp_path,
                deadline=Deadline(time.monotonic() + 100_000, "a test"))
    assert race.done and {state for state, _ in states(race).values()} == {"completed"}
    with pytest.raises(KeyboardInterrupt):
        paused(tmp_path / "paused", cluster)


def paused(folder: Path, cluster) -> None:
    """A deadline that comes while the first epochs are trained: 0.5 s each, by the table."""
    from autoenc.interrupts import Deadline
    from autoenc.sweep import run_ray

    folder.mkdir()
    lab = Lab(folder, levels, arms={name: {KNOB: level} for name, level in ARMS.items()}, asha=False)
    race = lab.race()
    deadline = Deadline(time.monotonic() + 600, "a test")

    def changed() -> None:
        if any(run.rows for run in race.runs.values()):
            object.__setattr__(deadline, "at", time.monotonic() + 1.5)
    try:
        run_ray.run(race, cluster, folder=lab.folder.path, output=folder, deadline=deadline, changed=changed)
    finally:
        assert lab.events("paused") and 0 < sum(len(run.rows) for run in race.runs.values()) < 8 * len(ARMS)
        again = lab.race()
        run_ray.run(again, cluster, folder=lab.folder.path, output=folder)
        assert again.done and sum(run.trained for run in (*race.runs.values(), *again.runs.values())) == 8 * len(ARMS)


def niceness(*_) -> int:
    return os.nice(0)


@pytest.mark.slow
def test_workers_that_are_slow_to_start_are_waited_for(tmp_path, cluster, monkeypatch):
    """The first is there at once, and through with several trials before any other is."""
    from autoenc.sweep import run_ray

    class Slow(run_ray.TrialWorker):
        def setup(self, config):
            starts = not hasattr(self, "settings")
            super().setup(config)
            if starts:
                append_line(self.output / "started", f"{os.getpid()}\n")
                time.sleep(3.0 if (self.output / "started").read_text().count("\n") > 1 else 0.0)

        def step(self):
            append_line(self.output / "trained", f"{os.getpid()}\n")
            time.sleep(0.1)
            return super().step()

    monkeypatch.setattr(run_ray, "TrialWorker", Slow)
    lab = Lab(tmp_path, levels, arms={f"A{k}": {KNOB: 0.1 + 0.01 * k} for k in range(12)}, asha=False)
    race = lab.race()
    *_, slots = run_ray.share(race, cluster)
    run_ray.run(race, cluster, folder=lab.folder.path, output=tmp_path)
    assert race.done and {state for state, _ in states(race).values()} == {"completed"}
    started, trained = ((tmp_path / name).read_text().split() for name in ("started", "trained"))
    assert len(started) == slots and set(started) == set(trained)


@pytest.mark.slow
def test_what_waits_for_a_slot_comes_before_what_is_drawn_later(tmp_path, cluster, monkeypatch):
    """Others hold all slots of the cluster but one."""
    import ray

    from autoenc.sweep import run_ray

    class Telling(run_ray.TrialWorker):
        def step(self):
            append_line(self.output / "trained", f"{self.trajectory.folder.name}\n")
            return super().step()

    monkeypatch.setattr(run_ray, "TrialWorker", Telling)
    lab = Lab(tmp_path, levels, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.2}}, asha=False,
              search={"trials": 5, "algorithm": "random"}, space={KNOB: {"type": "float", "low": 0.2, "high": 0.25}})
    race = lab.race()
    others = ray.remote(num_cpus=int(ray.cluster_resources()["CPU"]) - 1)(Caller).remote()
    try:
        ray.get(others.__ray_ready__.remote())
        run_ray.run(race, cluster, folder=lab.folder.path, output=tmp_path)
    finally:
        ray.kill(others)
    assert race.done and len(race.trials) == 5
    trained = dict.fromkeys((tmp_path / "trained").read_text().split())
    assert list(trained) == [trial.run.key for trial in race.trials]


@pytest.mark.slow
def test_workers_do_not_give_way_to_all_else_on_the_machine(cluster):
    from autoenc.sweep import ray_cluster

    assert ray_cluster.call(1, 0, niceness, seconds=60) == os.nice(0) < 15


@pytest.mark.slow
def test_beside_another_ray_the_dashboards_agent_listens_elsewhere(cluster):
    import ray

    node = ray._private.worker._global_node
    with socket.create_connection((node.node_ip_address, node.dashboard_agent_listen_port), timeout=10):
        assert node.dashboard_agent_listen_port not in (0, AGENT)


@pytest.mark.slow
def test_an_epoch_is_measured_where_the_sweep_is_long(tmp_path, cluster):
    """The largest arm is, or the start where points are still to be drawn; what cannot be trained is left to the
    trials to say."""
    from autoenc.sweep import pace, run_ray

    def race(**content):
        tiny = {"data": {"image_size": 16, "limit": 60, **content.pop("data", {})},
                "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2}}
        return Lab(tmp_path, config={**tiny, "train": {"batch_size": 16}}, **content).race()

    arms = race(arms={"A": {"model.base_channels": 16}, "B": {}})
    assert pace.largest(arms)["model.base_channels"] == 16
    assert 0 < run_ray.measured_pace(arms, cluster) < 30
    drawn = race(space={"train.weight_decay": {"type": "float", "low": 0.1, "high": 1}}, search={"trials": 10})
    assert not drawn.runs and pace.largest(drawn) == drawn.start
    pixels = 10 * 8 * 16**2                      # of one image, over all epochs
    assert pace.worth_measuring(drawn, math.ceil(2e8 / pixels), "cpu")
    assert not pace.worth_measuring(drawn, math.floor(2e8 / pixels), "cpu")
    assert not pace.worth_measuring(drawn, math.ceil(2e8 / pixels), "cuda")
    broken = race(arms={"A": {}}, data={"source": "manifest", "manifest": str(tmp_path / "none.csv")})
    assert run_ray.measured_pace(broken, cluster) is None
