"""Several hosts on one machine: network namespaces with addresses, host names and node-local folders of their own.

Everything lives in one process namespace, which ends with the test's process however that ends: no process, namespace
or bridge stays behind. Linux, as root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NETWORK = "10.77.0"
# The first process of the site: it takes in orphans, is the switch that the hosts are connected to, and ends with its
# standard input. /local is each host's own disk; everything else is shared.
SITE = """\
trap '' CHLD
hostname login
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip link add switch type bridge
ip addr add {network}.100/24 dev switch
ip link set switch up
echo ready
exec cat
"""
HOST = """\
hostname {name}
mount -t tmpfs -o size=2g tmpfs {folder}/local
ip link set lo up
echo $$
exec cat
"""
WIRE = """\
ip link add {name} type veth peer name eth0 netns {pid}
ip link set {name} master switch up
nsenter --target {pid} --net ip addr add {network}.{number}/24 dev eth0
nsenter --target {pid} --net ip link set eth0 up
nsenter --target {pid} --net ip route add default via {network}.100
"""


class Site:
    """The folder is shared by all hosts; ``home`` and ``local`` (each host's own disk) are in it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.home, self.local = folder, folder / "home", folder / "local"
        self.home.mkdir()
        self.local.mkdir()
        numbered = {name: number for number, name in enumerate(names, start=1)}
        addresses = {"login": 100, **numbered}
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{number} {name}" for name, number in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self._holders: list[subprocess.Popen] = []
        self._first = self._hold(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts"],
                                 SITE.format(folder=folder, network=NETWORK))
        self._inside = {"login": _child(self._first)}
        for name, number in numbered.items():
            holder = self._hold([*self.on("login"), "unshare", "--net", "--uts", "--mount"],
                                HOST.format(folder=folder, name=name))
            self._inside[name] = _child(holder)
            (folder / f"{name}.pid").write_text(self.said)
            wire = WIRE.format(name=name, pid=self.said, network=NETWORK, number=number)
            subprocess.run([*self.on("login"), "sh", "-ec", wire], check=True, capture_output=True, text=True)

    def _hold(self, command: list[str], script: str) -> subprocess.Popen:
        """Run a script that ends by waiting for us, until it says its line."""
        holder = subprocess.Popen([*command, "sh", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        self._holders.append(holder)
        self.said = holder.stdout.readline().strip()
        if not self.said:
            raise OSError(holder.communicate()[1].strip())
        return holder

    def on(self, name: str) -> list[str]:
        """The beginning of a command that is to run on this host."""
        target = self._inside[name] if hasattr(self, "_inside") else _child(self._first)
        return ["nsenter", f"--target={target}", "--pid", "--mount", "--net", "--uts"]

    def processes(self, name: str) -> list[int]:
        """All that runs on a host, but for what holds it."""
        place = Path(f"/proc/{self._inside[name]}/ns/net").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (entry / "ns" / "net").readlink() == place:
                    found.append(int(entry.name))
        return sorted({*found} - {self._inside[name]})

    def left(self, name: str, besides: str = "slurmd", seconds: float = 30) -> list[str]:
        """The commands that still run on a host, but for its daemon, and what lies on its disk, once that is nothing or
        the seconds are over: workers and helpers of a Ray that is gone take a moment to notice."""
        limit = time.monotonic() + seconds
        while True:
            found = []
            for pid in self.processes(name):
                with suppress(OSError):
                    found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
            disk = subprocess.run([*self.on(name), "ls", str(self.local)], check=True, capture_output=True, text=True)
            found = [words for words in found if words and besides not in words] + disk.stdout.split()
            if not found or time.monotonic() > limit:
                return found
            time.sleep(0.5)

    def kill(self, name: str) -> None:
        """The host loses its power: all of its processes are gone."""
        while pids := self.processes(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def close(self) -> None:
        for holder in reversed(self._holders):
            with suppress(OSError):
                holder.stdin.close()
        for holder in self._holders:
            holder.wait(20)


def _child(process: subprocess.Popen) -> int:
    """What unshare --fork and nsenter --pid have started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@contextmanager
def site(names: list[str]) -> Iterator[Site]:
    """Hosts with these names; the test is skipped where there can be none."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("ip", "nsenter", "unshare")):
        pytest.skip("hosts in network namespaces need root, iproute2 and util-linux")
    folder = Path(tempfile.mkdtemp(prefix="site", dir="/tmp"))       # short: sockets' paths have 107 characters
    made = None
    try:
        try:
            made = Site(folder, names)
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        if made:
            made.close()
        shutil.rmtree(folder, ignore_errors=True)
