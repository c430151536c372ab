"""A real Slurm (Debian's) whose nodes are hosts in network namespaces, on a munge key of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hosts import Site, site

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
CONF = """\
ClusterName=tiny
SlurmctldHost=login
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2
ReturnToService=2
SlurmdTimeout=10
NodeName={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Nodes that are up; commands run on the host ``login``."""

    def __init__(self, where: Site, nodes: list[str], cpus: int) -> None:
        self.site, self.folder, self.daemons = where, where.folder, {}
        for name in ("munge", "state", "cgroup"):
            (self.folder / name).mkdir()
        kept = self.folder / "munge"
        (kept / "key").write_bytes(os.urandom(256))
        (kept / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, nodes=",".join(nodes), cpus=cpus))
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\n")
        self._start("login", "munged", "--foreground", "--force", f"--key-file={kept}/key", f"--socket={kept}/socket",
                    f"--pid-file={kept}/pid", f"--log-file={kept}/log", f"--seed-file={kept}/seed")
        self._wait((kept / "socket").exists)
        self._start("login", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for name in nodes:
            self.boot(name)

    def boot(self, node: str) -> None:
        """Start a node's daemon; returns when Slurm counts the node as idle."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf")
        self._wait(lambda: self.run("sinfo", "-h", "-n", node, "-o", "%T", check=False).strip() == "idle")

    def _start(self, host: str, *command: str) -> None:
        with (self.folder / f"{command[0]}-{host}.log").open("ab") as log:
            self.daemons[host, command[0]] = subprocess.Popen(
                [*self.site.on(host), *command], env=self.environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def environ(self) -> dict[str, str]:
        """Of this Slurm, and of no job or Ray that the tests may themselves run in."""
        others = ("SLURM", "SBATCH", "SRUN", "LSB_", "RAY_", "AUTOENC_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        return kept | {"SLURM_CONF": f"{self.folder}/slurm.conf", "HOME": str(self.site.home)}

    def run(self, *command: str, check: bool = True, **environ: str) -> str:
        """What a command on the login host says."""
        return self.on("login", *command, check=check, **environ)

    def on(self, host: str, *command: str, check: bool = True, **environ: str) -> str:
        done = subprocess.run([*self.site.on(host), *command], env=self.environ() | environ, text=True, timeout=120,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}")
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, …"""
        return self.shown(job)["JobState"]

    def shown(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "show", "job", job, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _wait(self, ready, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [" on ".join(reversed(key)) for key, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log")))
                pytest.fail(f"no Slurm came up ({', '.join(ended) or 'in time'}):\n{logs}")
            time.sleep(0.2)


@contextmanager
def slurm(nodes: list[str], cpus: int) -> Iterator[Slurm]:
    """A Slurm with these nodes, each of so many CPUs; the test is skipped where there can be none."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (Debian: slurmctld, slurmd, slurm-client, munge)")
    with site(nodes) as where:
        yield Slurm(where, nodes, cpus)
