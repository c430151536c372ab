"""What a batch system (LSF, Slurm) has given to the job that this process runs in: its hosts and their CPUs."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoenc.errors import InputError

# A block of ports for each job, below those that Linux gives to outgoing connections (32768 and up).
PORTS = range(20000, 32768)
BLOCK = 4

_CPUS = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")


@dataclass(frozen=True)
class Host:
    """A host of the job."""

    name: str
    cpus: int                   # that the job may use on it


@dataclass(frozen=True)
class Allocation:
    """The hosts of a job. Its script runs on the first."""

    scheduler: str              # LSF or Slurm
    job: str                    # its number; of a job array's element, LSF's 77[3]
    hosts: tuple[Host, ...]

    def __str__(self) -> str:
        return f"{self.scheduler} job {self.job}"

    @property
    def tag(self) -> str:
        """The job's number in a form that suits file names."""
        return "-".join(re.findall(r"[0-9]+", self.job))

    def on(self, host: Host, command: list[str]) -> list[str]:
        """The command that runs ``command`` on a host and connects the standard streams to it."""
        if self.scheduler == "LSF":
            return ["blaunch", host.name, *command]
        # A step of its own for each host, beside the job script: one that fails leaves the others alone.
        return ["srun", f"--nodelist={host.name}", "--nodes=1", "--ntasks=1", "--overlap", "--no-kill",
                "--cpu-bind=none", "--export=ALL", "--job-name=ray", *command]

    def ports(self) -> list[range]:
        """Blocks of ports in the order to try them; jobs with near numbers begin with different ones."""
        blocks = [range(first, first + BLOCK) for first in range(PORTS.start, PORTS.stop - BLOCK + 1, BLOCK)]
        first = sum(map(int, re.findall(r"[0-9]+", self.job))) % len(blocks)
        return blocks[first:] + blocks[:first]


def allocation(environ: Mapping[str, str] = os.environ) -> Allocation:
    """The job's hosts, in the scheduler's order.

    Raises :class:`InputError` outside of a job, and where its environment does not tell the hosts.
    """
    if environ.get("SLURM_JOB_ID"):
        return _slurm(environ)
    if environ.get("LSB_JOBID"):
        return _lsf(environ)
    raise InputError("this is no batch job (neither SLURM_JOB_ID nor LSB_JOBID is set): submit the script with sbatch "
                     "or bsub; on one machine run python tune_runner.py itself")


def _lsf(environ: Mapping[str, str]) -> Allocation:
    job, index = environ["LSB_JOBID"], environ.get("LSB_JOBINDEX", "0")
    if index not in ("", "0"):
        job = f"{job}[{index}]"
    path, listed = environ.get("LSB_DJOB_HOSTFILE", ""), environ.get("LSB_MCPU_HOSTS", "")
    try:
        hosts = parse_host_file(Path(path).read_text()) if path else []
    except (OSError, UnicodeDecodeError):
        hosts = []                                          # the variable tells the same
    hosts = hosts or parse_mcpu_hosts(listed)
    if not hosts:
        raise InputError(f"LSF job {job}: no hosts are told: LSB_DJOB_HOSTFILE={path}, LSB_MCPU_HOSTS={listed}")
    return Allocation("LSF", job, tuple(hosts))


def _slurm(environ: Mapping[str, str]) -> Allocation:
    job, listed, cpus = (environ.get(f"SLURM_JOB_{name}", "") for name in ("ID", "NODELIST", "CPUS_PER_NODE"))
    try:
        names = subprocess.run(["scontrol", "show", "hostnames", listed], env=dict(environ), check=True,
                               stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"Slurm job {job}: scontrol show hostnames {listed}: {error}") from None
    counts = parse_cpus_per_node(cpus)
    if not names or len(names) != len(counts):
        raise InputError(f"Slurm job {job}: SLURM_JOB_NODELIST={listed} and SLURM_JOB_CPUS_PER_NODE={cpus} do not tell "
                         "the hosts and their CPUs")
    return Allocation("Slurm", job, tuple(map(Host, names, counts)))


def parse_host_file(text: str) -> list[Host]:
    """Hosts from the file that LSB_DJOB_HOSTFILE names: a line for each slot, with the name of its host."""
    return [Host(name, slots) for name, slots in Counter(text.split()).items()]


def parse_mcpu_hosts(text: str) -> list[Host]:
    """Hosts from LSB_MCPU_HOSTS: ``hostA 4 hostB 2``, names and slots in turn; none where it is anything else."""
    words = text.split()
    names, counts = words[::2], words[1::2]
    if len(names) != len(counts) or not all(re.fullmatch(r"[1-9][0-9]{0,5}", count) for count in counts):
        return []
    slots = Counter[str]()
    for name, count in zip(names, counts, strict=True):
        slots[name] += int(count)
    return [Host(name, count) for name, count in slots.items()]


def parse_cpus_per_node(text: str) -> list[int]:
    """CPUs of each node from SLURM_JOB_CPUS_PER_NODE: ``72(x2),36`` is 72, 72 and 36; else none."""
    counts: list[int] = []
    for part in text.split(","):
        found = _CPUS.fullmatch(part)
        if not found:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts
