"""Seeds that are compared in pairs stay on one kind of GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from racing import KNOB, Lab, states
from workers import simulated_worker

from autoenc.sweep import doors, final
from autoenc.sweep.packing import Cluster, Node
from autoenc.sweep.pairing import Pairing, make_pairing, pairing_words
from autoenc.sweep.past import Past

KINDS = ["V100", "L40S", "A100"]
slots_ = st.dictionaries(st.sampled_from(KINDS), st.integers(1, 8), min_size=2)
seeds_ = st.integers(42, 46)
ARMS = {name: {KNOB: 0.1 + 0.0001 * number} for number, name in enumerate("ABC")}


# The kind of a seed ---------------------------------------------------------------------------------------------------

@given(slots_, st.lists(st.tuples(seeds_, st.lists(seeds_, max_size=8)), min_size=1, max_size=12),
       st.dictionaries(seeds_, st.sampled_from([*KINDS, "K80"])))
def test_a_seed_stays_where_it_is(slots, asked, before):
    pairing = Pairing(slots, before)
    found = {}
    for seed, running in asked:
        kind = pairing.home(seed, running)
        assert kind in slots and found.setdefault(seed, kind) == kind
        assert kind == before.get(seed, kind) or before[seed] not in slots       # a kind that is there no more


@given(slots_, st.lists(seeds_, max_size=8))
def test_a_new_seed_goes_where_most_is_free(slots, running):
    pairing = Pairing(slots, {})
    for seed in dict.fromkeys(running):
        pairing.home(seed)
    taken = Counter(pairing.home(seed) for seed in running)
    kind = pairing.home(99, running)
    assert slots[kind] - taken[kind] == max(slots[each] - taken[each] for each in slots)


def mixed(*more: Node, **changes) -> Cluster:
    nodes = (Node("1", "n1", 8, 4, "V100"), Node("2", "n2", 32, 2, "L40S"), Node("3", "n3", 64, 0), *more)
    return Cluster(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), None, False,
                   **{"nodes": nodes, "packing": 1, **changes})


def asking(folder: Path, repeats: int = 3, **resources) -> Lab:
    return Lab(folder, arms=ARMS, asha=False, decision={"repeats": repeats}, resources=resources)


def test_only_where_there_is_something_to_keep_together(tmp_path):
    assert make_pairing(asking(tmp_path).spec, mixed(), 9, {}).slots == {"L40S": 2, "V100": 4}
    assert make_pairing(asking(tmp_path).spec, mixed(packing=2), 90, {}).slots == {"L40S": 4, "V100": 8}
    assert make_pairing(asking(tmp_path, gpus=2).spec, mixed(), 9, {}).slots == {"L40S": 1, "V100": 2}
    one = mixed(nodes=(Node("1", "n1", 8, 4, "V100"), Node("2", "n2", 8, 2, "V100")))
    unnamed = mixed(nodes=(Node("1", "n1", 8, 4), Node("2", "n2", 8, 2, "V100")))
    for lab, here in ((asking(tmp_path, repeats=1), mixed()), (asking(tmp_path, gpus=0), mixed()),
                      (asking(tmp_path, accelerator="V100"), mixed()), (asking(tmp_path, accelerator="any"), mixed()),
                      (asking(tmp_path), one), (asking(tmp_path), unnamed),
                      (asking(tmp_path, gpus=3), mixed()),                      # which only n1 has room for
                      (asking(tmp_path), mixed(slots=4, grows=True))):
        assert make_pairing(lab.spec, here, 9, {}) is None


def test_it_says_what_is_done(tmp_path):
    def said(lab: Lab, here: Cluster) -> str:
        return pairing_words(make_pairing(lab.spec, here, 9, {}), lab.spec, here)

    assert said(asking(tmp_path), mixed()) == (
        "seeds are compared in pairs, so that all trials of a seed run on one kind of GPU (L40S: 2 trials at once, "
        "V100: 4 trials at once); resources.accelerator: any takes whatever is free")
    assert said(asking(tmp_path, accelerator="any"), mixed()).startswith("! decision.repeats compares seeds in pairs")
    assert said(asking(tmp_path, accelerator="V100"), mixed()) == said(asking(tmp_path, repeats=1), mixed()) == ""


@given(st.lists(st.fixed_dictionaries({}, optional={
    "event": st.sampled_from(["seed placed", "started"]), "seed": st.one_of(st.integers(), st.text(), st.booleans()),
    "kind": st.one_of(st.none(), st.text(), st.integers())})))
def test_events_that_were_edited(events):
    for seed, kind in Past(events).homes().items():
        assert type(seed) is int and isinstance(kind, str)


# A real Ray whose GPUs are only its word ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_kinds(ray_token) -> Iterator[Cluster]:
    """Two nodes on this machine, each of which says it has a GPU."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_token))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")       # everything listens on loopback
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]))
        doors.prepare_local()
        from ray.cluster_utils import Cluster as Nodes

        from autoenc.sweep import ray_cluster

        nodes = Nodes()
        stack.callback(nodes.shutdown)
        for kind in ("V100", "L40S"):
            nodes.add_node(num_cpus=4, num_gpus=1, resources={f"accelerator_type:{kind}": 1}, include_dashboard=False)
        with ray_cluster.cluster(nodes.address) as here:
            yield here


@pytest.mark.slow
@pytest.mark.cluster
def test_trials_of_a_seed_run_on_one_kind(tmp_path, two_kinds, monkeypatch):
    """Both kinds are used; an arm that is added later joins the others of its seed."""
    from autoenc.sweep import run_ray

    monkeypatch.setattr(run_ray, "TrialWorker", simulated_worker())

    def ran(arms: dict) -> tuple[Lab, dict[int, set[str]]]:
        lab = Lab(tmp_path, arms=arms, asha=False, decision={"repeats": 4, "within": "5%"})
        race, kinds = lab.race(), {}
        run_ray.run(race, two_kinds, folder=lab.folder.path, output=tmp_path)
        assert states(race) == {f"{arm}_seed{seed}": ("completed", 8) for arm in arms for seed in (42, 43, 44, 45)}
        assert not [remark for remark in final.remarks(race, None, None, tmp_path) if "kinds of device" in remark.text]
        for trial in race.trials:
            kinds.setdefault(trial.seed, set()).add(trial.run.trajectory.status()["device_name"])
        return lab, kinds

    lab, kinds = ran(ARMS)
    assert set(map(len, kinds.values())) == {1} and set.union(*kinds.values()) == {"V100", "L40S"}
    placed = {event["seed"]: {event["kind"]} for event in lab.events("seed placed")}
    assert placed == kinds and len(lab.events("seed placed")) == 4
    assert ran({**ARMS, "D": {KNOB: 0.1005}})[1] == kinds
