"""How many trials share a GPU. What runs on a GPU itself (autoenc.sweep.gpu.measure) is run by no test."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import heads
import pytest
from helpers import small_config, small_dataset
from hypothesis import example, given
from hypothesis import strategies as st
from racing import KNOB, Lab, levels, states
from workers import simulated_worker

from autoenc import batches
from autoenc.errors import InputError
from autoenc.sweep import gpu
from autoenc.sweep.packing import (
    MOST,
    RESERVE,
    Cluster,
    Node,
    Use,
    choose,
    fraction,
    out_of_gpu_memory,
    packing,
    precision_warning,
)
from autoenc.sweep.parts import Resources

GIB = 2**30
L40S, V100 = Use("NVIDIA L40S", 3.1 * GIB, 45 * GIB, 0.22), Use("Tesla V100-PCIE-16GB", 3.1 * GIB, 16 * GIB, 0.22)
bytes_ = st.floats(1e6, 1e12)
shares = st.floats(0, 1)
cpus_ = st.integers(0, 200)


# The number -----------------------------------------------------------------------------------------------------------

@given(bytes_, bytes_, shares, cpus_)
@example(1e9, 80e9, 0.0, 64)
@example(1e9, 80e9, 5e-324, 64)
def test_what_is_packed_fits_pays_and_has_cpus(memory, total, busy, cpus):
    number = packing(memory, total, busy, cpus)
    assert isinstance(number, int) and 1 <= number <= MOST
    if number > 1:
        assert number * memory <= (1 - RESERVE) * total * (1 + 1e-12) and number <= cpus
        assert number * busy <= 1 + busy / 2 + 1e-12                    # the last one finds half of what it asks for
    if number < min(MOST, cpus):                                        # and one more would not
        assert (number + 1) * memory > (1 - RESERVE) * total * (1 - 1e-12) or (number + 0.5) * busy >= 1 - 1e-12


@given(bytes_, bytes_, shares, cpus_, st.floats(1, 10), st.integers(0, 10))
def test_a_smaller_trial_or_a_larger_gpu_packs_no_fewer(memory, total, busy, cpus, larger, more):
    number = packing(memory, total, busy, cpus)
    assert packing(memory / larger, total, busy, cpus) >= number
    assert packing(memory, total * larger, busy, cpus) >= number
    assert packing(memory, total, busy / larger, cpus) >= number
    assert packing(memory, total, busy, cpus + more) >= number


@pytest.mark.parametrize(("memory", "total", "busy", "cpus", "number"), [
    (3.1, 80, 0.22, 16, 5), (3.1, 80, 0.25, 16, 4), (3.1, 80, 0.95, 16, 1), (3.1, 80, 0.6, 16, 2),
    (3.1, 80, 0.01, 16, 8), (20, 80, 0.1, 16, 3), (73, 80, 0.1, 16, 1), (90, 80, 0.1, 16, 1), (3.1, 80, 0.1, 2, 2),
    (3.1, 80, 0.1, 0, 1)])
def test_some_gpus(memory, total, busy, cpus, number):
    assert packing(memory, total, busy, cpus) == number


@given(st.integers(1, MOST))
def test_so_many_fractions_are_one_gpu_in_rays_parts(trials):
    parts = fraction(trials) * 10_000
    assert parts == pytest.approx(round(parts), abs=1e-9)               # Ray rounds to them
    assert trials * round(parts) <= 10_000 < (trials + 1) * round(parts)
    assert Node("", "", 1000, 3).room(1, fraction(trials)) == 3 * trials


def test_it_says_what_it_chose_and_why():
    assert choose([L40S], 16, 20) == (5, "5 trials a GPU: one takes 3.1 of 45 GiB and keeps it busy 22% of the time")
    assert choose([replace(L40S, busy=0.9)], 16, 20)[1].startswith("1 trial a GPU: one takes 3.1 of 45 GiB and keeps")
    assert choose([L40S], 3, 20) == (3, "3 trials a GPU: one takes 3.1 of 45 GiB and keeps it busy 22% of the time; "
                                        "beside a GPU there are CPUs for 3")
    number, said = choose([L40S], 16, 2)
    assert number == 5 and said.startswith("2 trials a GPU: ") and said.endswith("; there are no more for it")
    number, said = choose([L40S, V100], 16, 20)
    assert number == 4 and said.startswith("4 trials a GPU (Tesla V100-PCIE-16GB, the smallest of 2 kinds): ")


def test_a_gpu_for_one_process_is_not_shared():
    alone = replace(L40S, exclusive=True)
    assert choose([V100, alone], 16, 20) == (
        1, "1 trial a GPU: NVIDIA L40S takes one process only (compute mode Exclusive_Process or Prohibited)")


# The cluster ----------------------------------------------------------------------------------------------------------

def of_nodes(*nodes: Node, **more) -> Cluster:
    return Cluster(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), None, False, nodes=nodes, **more)


MIXED = of_nodes(Node("1", "n1", 8, 4, "V100"), Node("2", "n2", 32, 2, "L40S"), Node("3", "n3", 64, 0), packing=4)


@pytest.mark.parametrize(("asked", "runs", "share"), [
    ({}, 6, (1, 1.0, 6)),                                   # a GPU for each
    ({}, 12, (1, 0.5, 12)),                                 # two are enough for twelve
    ({}, 100, (1, 0.25, 16)),                               # n1 has CPUs for eight, n2 room for eight
    ({"gpus": 0.4}, 100, (1, 0.4, 12)),                     # a fraction is of one GPU: two on each, not two and a half
    ({"gpus": 0.3}, 1, (1, 0.3, 14)),                       # and is taken as it is
    ({"gpus": 2}, 100, (1, 2.0, 3)), ({"gpus": 0}, 100, (1, 0.0, 104)), ({"cpus": 16}, 3, (16, 1.0, 2)),
])
def test_nodes_are_filled_each_for_itself(asked, runs, share):
    assert MIXED.share(Resources(**asked), runs) == share


def test_what_no_node_can_give_is_refused():
    for asked, said in (({"cpus": 100}, "resources.cpus: 100 a trial, but no node of the cluster has more than 64"),
                        ({"gpus": 5}, "resources.gpus: 5 a trial, but no node of the cluster has more than 4"),
                        ({"cpus": 40}, "resources: 40 CPUs and 1 GPUs a trial, but no node of the cluster has both"),
                        ({"cpus": 200}, "resources.cpus: 200 a trial, but the cluster has 104")):
        with pytest.raises(InputError) as error:
            MIXED.share(Resources(**asked), 1)
        assert str(error.value) == said
    with pytest.raises(InputError) as error:
        of_nodes(Node("1", "n1", 8, 0)).share(Resources(gpus=0.5), 9)
    assert str(error.value) == ("resources.gpus: 0.5 a trial, but the cluster has 0; to train on CPUs: "
                                "--set resources.gpus=0")


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=4), st.integers(1, 8),
       st.sampled_from(["auto", 0, 0.25, 0.3, 1, 2]), st.integers(1, 50), st.none() | st.integers(1, 20),
       st.integers(1, MOST))
def test_slots_are_what_the_nodes_have(nodes, cpus, gpus, runs, most, packed):
    here = of_nodes(*(Node("", "", *each) for each in nodes), slots=most, packing=packed)
    asked = Resources(cpus=cpus, gpus=gpus)
    try:
        got, part, slots = here.share(asked, runs)
    except InputError:
        part = gpus if gpus != "auto" else fraction(here.together(asked, runs)) if here.gpus else 0
        assert not any(node.cpus >= cpus and node.gpus >= part for node in here.nodes)
        return
    assert got == cpus and 1 <= slots <= (most or slots)
    assert slots * cpus <= here.cpus and slots * part <= here.gpus
    if gpus == "auto" and here.gpus:
        together = here.together(asked, runs)
        assert 1 <= together <= packed and together <= max(1, math.ceil(runs / here.gpus))


def test_cpus_beside_each_gpu():
    assert (MIXED.beside(1), MIXED.beside(2), MIXED.beside(4), MIXED.kinds) == (2, 1, 0, ["L40S", "V100"])
    assert Cluster(8, 2, None, False).beside(1) == 4


def test_precisions_that_do_not_suit_the_gpus():
    assert precision_warning({"fp32"}, ["L40S", "V100"]) == "" == precision_warning({"bf16", "fp16"}, ["L40S"])
    assert "bf16, fp32" in (said := precision_warning({"fp32", "bf16"}, ["L40S", "V100"])) and "L40S, V100" in said
    assert "V100 has no arithmetic in bf16" in precision_warning({"bf16"}, ["L40S", "V100"])
    assert precision_warning({"bf16", "fp32"}, []) == ""


# The measurement, as far as it needs no GPU ---------------------------------------------------------------------------

TOLD = """\
GPU-6c1f3ad2-0f43-3e1b-9a55-0c55e8c1f001, NVIDIA L40S, 46068, 1, 0, Default
GPU-6c1f3ad2-0f43-3e1b-9a55-0c55e8c1f002, Tesla V100-PCIE-16GB, 16384, 3075, 87, Exclusive_Process
GPU-6c1f3ad2-0f43-3e1b-9a55-0c55e8c1f003, NVIDIA A100-SXM4-80GB, 81920, 0, [N/A], Default
"""


def test_what_the_driver_tells():
    gpus = gpu.parse_gpus(TOLD)
    assert len(gpus) == 3
    key, reading = gpu.reading_of(gpus, "6c1f3ad2-0f43-3e1b-9a55-0c55e8c1f002")
    assert key.startswith("GPU-") and key.endswith("f002")
    assert reading == gpu.Reading("Tesla V100-PCIE-16GB", 16 * GIB, 3075 * 2**20, 0.87, True)
    first, _, third = gpus.values()
    assert (first.busy, first.exclusive, third.busy) == (0.0, False, None)
    with pytest.raises(LookupError, match="MIG-1"):
        gpu.reading_of(gpus, "MIG-1")


@given(st.text())
@example("No devices were found")
@example(TOLD.replace("46068", "[N/A]"))
def test_anything_else_is_a_value_error(text):
    with suppress(ValueError):
        assert gpu.parse_gpus(text) == {} or text.count(",") >= 5


def test_a_piece_is_trained_and_measured_like_the_whole(monkeypatch):
    from autoenc.train import train

    whole, config = small_dataset(300), small_config(train__batch_size=4)
    part = gpu.piece(whole, 4)
    sizes = {split: len(part.splits[split]) for split in part.splits}
    assert sizes == {"train": 80, "val": 23, "test": 30}                 # 60 of 210 to validate with: in proportion
    assert len(gpu.piece(whole, 8).splits["val"]) == 46 and len(gpu.piece(whole, 16).splits["val"]) == 60
    assert [len(gpu.piece(whole, 64).splits[split]) for split in ("train", "val")] == [210, 60]
    assert next(train(config, part)).epoch == 1
    each = 16 * 16 * (3 + 1) + 2
    assert gpu.resident(whole) == 270 * each and gpu.resident(part) == 103 * each
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 100 * each)           # the training split stays in main memory
    assert gpu.resident(whole) == 60 * each


def test_memory_that_ran_out_is_told_from_other_failures():
    import torch

    from autoenc.course import failure

    config = small_config()
    for error, ours in ((torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
                        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
                        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
                        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
                        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
                        (MemoryError(), False), (ValueError("out of memory"), False)):
        assert out_of_gpu_memory(failure(error, config)) is ours, error


# A real Ray with a GPU that is only its word --------------------------------------------------------------------------

def crowded_worker(least: float):
    """A worker whose trial runs out of memory after two epochs where Ray gave it less than so much of a GPU."""
    note = "out of GPU memory with train.batch_size 16 (OutOfMemoryError: CUDA out of memory.)"
    return simulated_worker(seconds=lambda rows, output: 0.1,
                            fails=lambda rows, has: note if has["GPU"] < least and len(rows) >= 2 else "")


@pytest.fixture(scope="module")
def one_gpu(ray_token) -> Iterator[Cluster]:
    """A head that says it has a V100: Ray shares it as it would a real one."""
    with heads.head(ray_token, "--num-cpus=6", "--num-gpus=1", '--resources={"accelerator_type:V100": 1}') as address:
        from autoenc.sweep import ray_cluster

        with ray_cluster.cluster(address) as here:
            yield here


ARMS = {name: {KNOB: 0.1 + 0.001 * number} for number, name in enumerate("ABCDE")}


@pytest.mark.slow
@pytest.mark.cluster
def test_memory_that_runs_out_halves_the_packing(tmp_path, one_gpu, monkeypatch):
    """Five share the GPU where two fit: the sweep goes on from the store, and no epoch is trained twice."""
    from autoenc.sweep import run_ray

    monkeypatch.setattr(run_ray, "TrialWorker", crowded_worker(0.5))
    lab, said = Lab(tmp_path, levels, arms=ARMS, asha=False), []
    race = lab.race()
    here = run_ray.run(race, replace(one_gpu, packing=8), folder=lab.folder.path, output=tmp_path, say=said.append)
    assert race.done and states(race) == {f"{name}_seed42": ("completed", 8) for name in ARMS}
    assert sum(run.trained for run in race.runs.values()) == 8 * len(ARMS)
    assert here.packing == 2 and run_ray.share(race, here) == (1, 0.5, 2)
    (line,) = [line for line in said if "memory" in line]
    assert line.endswith("_seed42: out of GPU memory with 5 trials a GPU; the sweep goes on from the store with 2")
    assert {event["trial"] for event in lab.events("out of memory")} == {
        name.strip() for name in line.partition(":")[0].split(",")}
    assert not lab.events("failed")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_trial_that_has_the_gpu_to_itself_fails(tmp_path, one_gpu, monkeypatch):
    """As does one whose share was given by hand."""
    from autoenc.sweep import run_ray

    monkeypatch.setattr(run_ray, "TrialWorker", crowded_worker(2))
    for name, more, lines in (("auto", {}, 2), ("by hand", {"resources": {"gpus": 0.5, "accelerator": "V100"}}, 0)):
        folder = tmp_path / name
        folder.mkdir()
        lab, said = Lab(folder, levels, arms={arm: ARMS[arm] for arm in "ABCD"}, asha=False, **more), []
        race = lab.race()
        here = run_ray.run(race, replace(one_gpu, packing=4), folder=lab.folder.path, output=folder, say=said.append)
        assert {state for state, _ in states(race).values()} == {"failed"}
        assert len([line for line in said if "out of GPU memory" in line]) == lines
        assert here.packing == (1 if lines else 4)


@pytest.mark.slow
@pytest.mark.cluster
def test_where_nothing_can_be_measured_a_gpu_is_not_shared(tmp_path, one_gpu):
    """This GPU is only Ray's word for one. Where there are enough GPUs, or they are given, nothing is measured."""
    from autoenc.sweep import run_ray

    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU, and it would be measured")
    said = []
    assert one_gpu.kinds == ["V100"]
    here = run_ray.pack(Lab(tmp_path, arms=ARMS).race(), one_gpu, said.append)
    assert here == replace(one_gpu, packing=1) and len(said) == 1
    assert said[0].startswith("1 trial a GPU: what one takes cannot be measured (FileNotFoundError: ")
    few = Lab(tmp_path, arms={"A": ARMS["A"]}).race()
    given_ = Lab(tmp_path, arms=ARMS, resources={"gpus": 0.25}).race()
    assert run_ray.pack(few, one_gpu, said.append) is one_gpu is run_ray.pack(given_, one_gpu, said.append)
    assert len(said) == 1 and run_ray.share(given_, one_gpu) == (1, 0.25, 4)
    half = Lab(tmp_path, arms=ARMS, config={"train.precision": "bf16"}, resources={"gpus": 0.5}).race()
    run_ray.pack(half, one_gpu, said.append)
    assert said[1].startswith("! train.precision bf16: V100 has no arithmetic in bf16")


# One kind of GPU ------------------------------------------------------------------------------------------------------

def test_a_kind_of_gpu_that_is_asked_for_is_all_there_is():
    both = of_nodes(Node("1", "n1", 8, 4, "V100"), Node("2", "n2", 16, 2, "L40S"), Node("3", "n3", 64, 0))
    assert both.share(Resources(gpus=1), 20) == (1, 1.0, 6)
    assert both.share(Resources(gpus=1, accelerator="L40S"), 20) == (1, 1.0, 2)
    assert both.only("V100").kinds == ["V100"] and both.only(None) is both
    for cluster, have in ((both, "its GPUs are L40S, V100"), (of_nodes(Node("1", "n1", 8, 0)), "it has no GPUs")):
        with pytest.raises(InputError, match=f"accelerator: 'A100': the cluster has none of that kind: {have}"):
            cluster.share(Resources(accelerator="A100"), 1)
