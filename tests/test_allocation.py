"""What the batch systems tell about a job, the ports that follow from it, and the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoenc.allocation import (
    BLOCK,
    PORTS,
    Allocation,
    Host,
    allocation,
    parse_cpus_per_node,
    parse_host_file,
    parse_mcpu_hosts,
)
from autoenc.errors import InputError
from autoenc.rayhosts import read_settings

names = st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True)
hosts = st.dictionaries(names, st.integers(1, 512), min_size=1, max_size=20).map(
    lambda counts: [Host(name, count) for name, count in counts.items()])


# LSF ------------------------------------------------------------------------------------------------------------------

@given(hosts)
def test_lsfs_hosts_from_the_file_and_from_the_variable(these):
    assert parse_host_file("".join(f"{host.name}\n" * host.cpus for host in these)) == these
    assert parse_mcpu_hosts(" ".join(f"{host.name} {host.cpus}" for host in these) + " ") == these


@given(hosts, st.randoms())
def test_a_host_that_lsf_names_in_several_places_is_one(these, random):
    slots = [host.name for host in these for _ in range(min(host.cpus, 5))]
    random.shuffle(slots)
    assert {host.name: host.cpus for host in parse_host_file("\n".join(slots))} == \
        {host.name: slots.count(host.name) for host in these}
    assert sum(host.cpus for host in parse_mcpu_hosts(" ".join(f"{name} 2" for name in slots))) == 2 * len(slots)


@pytest.mark.parametrize("listed", ["", "a", "a b", "a 0", "a -1", "a 2 b", "a 2.5", "4 a", "a ٣"])
def test_anything_else_tells_no_hosts(listed):
    assert parse_mcpu_hosts(listed) == []
    with pytest.raises(InputError, match="LSF job 7: no hosts are told"):
        allocation({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": listed})


def test_an_lsf_job(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("b\nb\na\nb\n")
    job = {"LSB_JOBID": "77", "LSB_JOBINDEX": "0", "LSB_DJOB_HOSTFILE": str(path), "LSB_MCPU_HOSTS": "c 1"}
    assert allocation(job) == Allocation("LSF", "77", (Host("b", 3), Host("a", 1)))
    assert allocation(job | {"LSB_JOBINDEX": "3"}).job == "77[3]"
    assert allocation(job | {"LSB_JOBINDEX": "3"}).tag == "77-3"
    path.unlink()
    assert allocation(job).hosts == (Host("c", 1),)


@given(st.text())
def test_any_text_is_hosts_or_none(text):
    for host in [*parse_host_file(text), *parse_mcpu_hosts(text)]:
        assert host.name and not any(map(str.isspace, host.name)) and host.cpus > 0


# Slurm ----------------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(1, 512), st.integers(1, 30)), min_size=1, max_size=8))
def test_slurms_cpus_of_each_node(groups):
    text = ",".join(f"{cpus}(x{count})" if count > 1 else str(cpus) for cpus, count in groups)
    assert parse_cpus_per_node(text) == [cpus for cpus, count in groups for _ in range(count)]


@given(st.text() | st.text("0123456789(x), ", max_size=20))
def test_any_text_is_cpus_or_none(text):
    assert all(isinstance(cpus, int) for cpus in parse_cpus_per_node(text))


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A stand-in that expands n[1-2] alone."""
    path = tmp_path / "scontrol"
    path.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && echo n1 && echo n2\n')
    path.chmod(0o755)
    return path


def test_a_slurm_job(scontrol):
    job = {"PATH": f"{scontrol.parent}:/bin:/usr/bin", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]",
           "SLURM_JOB_CPUS_PER_NODE": "4(x2)"}
    assert allocation(job) == Allocation("Slurm", "5", (Host("n1", 4), Host("n2", 4)))
    with pytest.raises(InputError, match=r"SLURM_JOB_CPUS_PER_NODE=4 do not tell"):
        allocation(job | {"SLURM_JOB_CPUS_PER_NODE": "4"})
    with pytest.raises(InputError, match="Slurm job 5: scontrol show hostnames n7"):
        allocation(job | {"SLURM_JOB_NODELIST": "n7"})
    scontrol.unlink()
    with pytest.raises(InputError, match="Slurm job 5: scontrol show hostnames"):
        allocation(job | {"PATH": str(scontrol.parent)})


def test_outside_of_a_job():
    with pytest.raises(InputError, match="this is no batch job"):
        allocation({"LSB_JOBID": "", "SLURM_JOB_ID": ""})


# Ports and settings ---------------------------------------------------------------------------------------------------

@given(st.integers(1, 10 ** 9), st.integers(1, 1000))
def test_jobs_with_near_numbers_begin_with_ports_of_their_own(number, further):
    def of(job):
        return Allocation("Slurm", str(job), (Host("a", 1),)).ports()

    one, other = of(number), of(number + further)
    assert not set(one[0]) & set(other[0])
    assert sorted(block.start for block in one) == list(range(PORTS.start, PORTS.stop - BLOCK + 1, BLOCK))
    assert all(len(block) == BLOCK and block[0] in PORTS and block[-1] in PORTS for block in one)


def test_elements_of_an_array_differ():
    element = [Allocation("LSF", f"77[{index}]", (Host("a", 1),)) for index in (1, 2)]
    assert element[0].ports()[0] != element[1].ports()[0] and element[0].tag != element[1].tag


def test_settings():
    assert read_settings({}) == read_settings({"AUTOENC_TMP": "", "AUTOENC_RESUBMIT": "0", "AUTOENC_JOIN_SECONDS": ""})
    settings = read_settings({"AUTOENC_CPUS_PER_HOST": "4", "AUTOENC_GPUS_PER_HOST": "0", "AUTOENC_JOIN_SECONDS": "60",
                              "AUTOENC_TMP": "/scratch", "AUTOENC_RESUBMIT": "1"})
    assert (settings.cpus, settings.gpus, settings.join_seconds) == (4, 0, 60)
    assert (settings.folder, settings.resubmit) == (Path("/scratch"), True)


@pytest.mark.parametrize(("name", "value"), [
    ("CPUS_PER_HOST", "0"), ("CPUS_PER_HOST", "two"), ("GPUS_PER_HOST", "-1"), ("GPUS_PER_HOST", "0.5"),
    ("JOIN_SECONDS", "0"), ("JOIN_SECONDS", "5m"), ("RESUBMIT", "yes"), ("TMP", "tmp"), ("TMP", "/a b")])
def test_a_setting_that_is_none_is_told(name, value):
    with pytest.raises(InputError, match=f"AUTOENC_{name}={value}: should be "):
        read_settings({f"AUTOENC_{name}": value})
