"""Ray on the hosts of a batch job: started, waited for, watched while a command runs, and ended."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from autoenc.allocation import Allocation, Host
from autoenc.errors import InputError
from autoenc.interrupts import SIGNALS

INTERRUPTED = 130               # exit code of a command that can be gone on with
# A host's Ray gets this on its standard input and ends with that: srun would answer SIGTERM by SIGKILL to its task.
STAY = b"stay\n"
ROOM = 107 - 66                 # characters for a folder, that the paths of Ray's sockets within leave
HEADLESS_SECONDS = 10.0         # for the command's own end when Ray's head is gone
END_SECONDS = 20.0              # for Ray's own end
POLL_SECONDS = 0.5
_ERROR = re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class Settings:
    """What the environment says about the cluster."""

    cpus: int | None            # AUTOENC_CPUS_PER_HOST; None: what the scheduler gave
    gpus: int | None            # AUTOENC_GPUS_PER_HOST; None: what Ray finds, which heeds CUDA_VISIBLE_DEVICES
    join_seconds: int           # AUTOENC_JOIN_SECONDS
    folder: Path                # AUTOENC_TMP
    resubmit: bool              # AUTOENC_RESUBMIT


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings; a variable that is empty counts as not set. Raises :class:`InputError` for what cannot be one."""
    def number(name: str, least: int, default: int | None) -> int | None:
        text = environ.get(name, "").strip() or default
        if text is not None and not (re.fullmatch(r"[0-9]{1,9}", str(text)) and int(text) >= least):
            raise InputError(f"{name}={text}: should be a whole number, {least} or more")
        return None if text is None else int(text)

    folder = environ.get("AUTOENC_TMP") or "/tmp"
    if not re.fullmatch(r"/[\w./+-]*", folder):
        raise InputError(f"AUTOENC_TMP={folder}: should be an absolute path of plain characters")
    return Settings(number("AUTOENC_CPUS_PER_HOST", 1, None), number("AUTOENC_GPUS_PER_HOST", 0, None),
                    number("AUTOENC_JOIN_SECONDS", 1, 300), Path(folder), number("AUTOENC_RESUBMIT", 0, 0) > 0)


def say(text: str) -> None:
    print(f"cluster: {text}", flush=True)


class Node:
    """A host's Ray: the process here that stands for it, and what it says."""

    def __init__(self, job: Allocation, host: Host, words: list[str]) -> None:
        self.host, self.told = host, False
        self.output = tempfile.TemporaryFile()              # noqa: SIM115
        # In a session of its own: the signals to a job's process group are for the sweep, which ends first.
        self.process = subprocess.Popen(job.on(host, words), stdin=subprocess.PIPE, stdout=self.output,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        with suppress(BrokenPipeError):
            self.process.stdin.write(STAY)
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_words(self) -> str:
        """The error that Ray ended with, or its last lines, each with the host's name before it."""
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - 20000))
        lines = [line for line in self.output.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if _ERROR.match(line)]
        return "\n".join(f"    {self.host.name}: {line}" for line in lines[errors[-1] if errors else -10:])


class Cluster:
    """Ray on the hosts of a job."""

    def __init__(self, job: Allocation, settings: Settings) -> None:
        self.job, self.settings = job, settings
        self.nodes: list[Node] = []

    def start(self) -> str:
        """Start the head and the other hosts' Rays; HOST:PORT of the head.

        Raises :class:`InputError` where the head does not come up; without other hosts it goes on after a limit.
        """
        first, *others = self.job.hosts
        here = own_address(others)
        gcs, dashboard, client, agent = free_ports(self.job, here)
        address = f"{here}:{gcs}"
        self._launch(first, agent, "--head", f"--node-ip-address={here}", f"--port={gcs}", f"--dashboard-host={here}",
                     f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--disable-usage-stats")
        self._wait_for_head(address)
        say(f"{self.job}: Ray's head runs on {first.name}, its dashboard at http://{here}:{dashboard}")
        for host in others:
            self._launch(host, agent, f"--address={address}")
        if others:
            self._wait_for_others(address)
        return address

    def _launch(self, host: Host, agent: int, *options: str) -> None:
        folder = self.settings.folder / f"ray-{os.getuid()}-{self.job.tag}"
        if len(str(folder)) > ROOM:
            raise InputError(f"AUTOENC_TMP={self.settings.folder}: too long: {folder} should have at most {ROOM} "
                             "characters (of a socket's path within it, Linux takes 107)")
        gpus = [] if self.settings.gpus is None else [f"--num-gpus={self.settings.gpus}"]
        self.nodes.append(Node(self.job, host, [
            sys.executable, "-m", "autoenc.cluster", "node", str(folder), *options, *gpus,
            f"--num-cpus={self.settings.cpus or host.cpus}", f"--dashboard-agent-listen-port={agent}"]))

    def _wait_for_head(self, address: str) -> None:
        head, limit = self.nodes[0], time.monotonic() + self.settings.join_seconds
        while not members(address):
            self._check_head()
            if time.monotonic() > limit:
                raise InputError(f"{self.job}: Ray's head on {head.host.name} did not come up within "
                                 f"AUTOENC_JOIN_SECONDS={self.settings.join_seconds}:\n{head.last_words()}")
            time.sleep(POLL_SECONDS)

    def _check_head(self) -> None:
        head = self.nodes[0]
        if head.ended:
            raise InputError(f"{self.job}: Ray's head on {head.host.name} ended with exit code "
                             f"{head.process.returncode}:\n{head.last_words()}")

    def _wait_for_others(self, address: str) -> None:
        """Until every host has joined, or can no longer, or the limit is reached."""
        limit, wanted = time.monotonic() + self.settings.join_seconds, len(self.nodes)
        while len(joined := members(address)) < wanted and time.monotonic() < limit:
            self._check_head()
            self.look()
            if len(joined) >= sum(not node.ended for node in self.nodes):
                break
            time.sleep(POLL_SECONDS)
        say(f"{len(joined)} of {wanted} hosts have joined: {', '.join(sorted(joined))}")
        short = {name.partition(".")[0] for name in joined}
        for node in self.nodes:
            if not node.ended and node.host.name.partition(".")[0] not in short and len(joined) < wanted:
                say(f"{node.host.name} has not joined within AUTOENC_JOIN_SECONDS={self.settings.join_seconds}: "
                    f"beginning without it\n{node.last_words()}")

    def attend(self, words: list[str]) -> tuple[int, list[int]]:
        """Run a command to its end, passing signals on to it; its exit code, and the signals that came."""
        came: list[int] = []
        process: subprocess.Popen | None = None

        def pass_on(number: int, frame: object) -> None:
            came.append(number)
            if process is not None:
                process.send_signal(number)

        for number in SIGNALS:
            signal.signal(number, pass_on)
        process = subprocess.Popen(words)
        for number in came:                     # before there was a process
            process.send_signal(number)
        limit = math.inf
        while (code := _wait(process)) is None:
            if not came:                        # else it ends, and the scheduler may be ending Ray as well
                self.look()
                if self.nodes[0].ended:
                    pass_on(signal.SIGTERM, None)
            elif self.nodes[0].ended:           # the command may wait for it in vain
                limit = min(limit, time.monotonic() + HEADLESS_SECONDS)
            if time.monotonic() > limit:
                pass_on(signal.SIGKILL, None)
        if code < 0:                            # by a signal that came before the command could heed it, or another
            code = INTERRUPTED if -code in came else 128 - code
        return code, came

    def look(self) -> None:
        """Tell, once, of hosts whose Ray has ended."""
        for node in self.nodes:
            if node.ended and not node.told:
                node.told = True
                what = "the sweep cannot go on: submit the same job again" if node is self.nodes[0] else \
                    "going on without it"
                say(f"Ray on {node.host.name} has ended (exit code {node.process.returncode}); {what}\n"
                    f"{node.last_words()}")

    def end(self) -> None:
        """End the Rays that were started here."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)           # it is ending
        for node in reversed(self.nodes):
            with suppress(BrokenPipeError):
                node.process.stdin.close()
        limit = time.monotonic() + END_SECONDS
        for node in self.nodes:
            try:
                node.process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                say(f"Ray on {node.host.name} has not ended in time: left to {self.job.scheduler} to end with the job")


def _wait(process: subprocess.Popen) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(POLL_SECONDS)
    return None


def own_address(others: tuple[Host, ...] | list[Host]) -> str:
    """This host's IP address on the network that leads to the others; Ray's own choice where there are none."""
    for host in others:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host.name, 9))       # sends nothing
            if not (address := probe.getsockname()[0]).startswith("127."):
                return address
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def free_ports(job: Allocation, address: str) -> range:
    """The first of the job's blocks of ports that is free at an address of this host."""
    for block in job.ports():
        with suppress(OSError):
            for port in block:
                socket.create_server((address, port)).close()
            return block
    raise InputError(f"{job}: no free ports at {address}")


def members(address: str) -> list[str]:
    """Names of the hosts that Ray's head at HOST:PORT counts as its own; none while it does not answer."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()      # Ray's client would wait 40 s
    except OSError:
        return []
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.exceptions import RpcError

    with suppress(RpcError):
        nodes = GcsClient(address=address).get_all_node_info(timeout=5)
        return [node.node_manager_hostname for node in nodes.values() if node.state == GcsNodeInfo.ALIVE]
    return []
