"""A Ray head for tests, on loopback and ports of its own, with a token; ended with the block however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from autoenc.errors import InputError
from autoenc.sweep import doors

RAY = (sys.executable, "-m", "ray.scripts.scripts")


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def head(token: Path, *options: str, ray: Sequence[str] = RAY) -> Iterator[str]:
    """A head that demands the token in this file, and this process ready to join it; its address. Workers find this
    repository and its tests. ``options`` are those of ray start."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))        # sockets' paths may not be long
    port, client, agent = free_ports(3)
    address = f"127.0.0.1:{port}"
    command = [*ray, "start", "--head", f"--port={port}", f"--ray-client-server-port={client}", "--block",
               f"--dashboard-agent-listen-port={agent}", "--include-dashboard=false", "--disable-usage-stats",
               "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *options]
    process = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")       # everything listens on loopback
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]))
        doors.prepare_local()
        try:
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(command, env={**os.environ, "RAY_AUTH_MODE": "token"}, stdout=log,
                                           stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            limit = time.monotonic() + 90
            while not _is_up(address, folder):
                assert process.poll() is None and time.monotonic() < limit, (folder / "log").read_text()
                time.sleep(0.2)
            yield address
        finally:
            if process:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def _is_up(address: str, folder: Path) -> bool:
    with suppress(InputError):
        return bool(doors.knock(address)) and any(folder.glob("session_2*/sockets/raylet"))
    return False
