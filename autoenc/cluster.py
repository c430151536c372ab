"""A Ray cluster on the hosts of a batch job (LSF, Slurm), for as long as one command runs. For the scripts in cluster/:

    python -m autoenc.cluster run python tune_runner.py sweeps/phase1_4.yaml

starts Ray on every host of the job, waits until they have joined, runs the command with ``--address HOST:PORT``, passes
the scheduler's signals on to it and ends what it has started, and no other Ray of the same user.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from autoenc.allocation import Allocation, allocation
from autoenc.errors import InputError, command
from autoenc.interrupts import WARNINGS
from autoenc.rayhosts import INTERRUPTED, POLL_SECONDS, STAY, Cluster, read_settings, say
from autoenc.sweep import doors

AGAIN = 99                      # exit code with which an LSF job asks to be put into the queue again (bsub -Q 99)


def run(words: list[str]) -> int:
    """Run a command on a cluster of its own; its exit code, or AGAIN. Raises :class:`InputError` outside of a job, for
    wrong settings, and where no head comes up."""
    job, settings = allocation(), read_settings()
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")     # prepare_local shuts a Ray in on its machine
    doors.prepare_local()
    cluster, before = Cluster(job, settings), _trained(words)
    try:
        address = cluster.start()
        code, signals = cluster.attend([*words, "--address", address])
    finally:
        cluster.end()
    # Out of time, by the command's own clock or the scheduler's warning; not what a person or scancel ended.
    if code == INTERRUPTED and set(signals) <= set(WARNINGS):
        return _resubmit(job, settings.resubmit, _trained(words) > before)
    if code == INTERRUPTED:
        say("submit the same job again to go on")
    return code


def _trained(words: list[str]) -> int:
    """A measure of what the store of the command's output folder holds; it grows with every epoch."""
    output = "outputs"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--output" or word.startswith("--output="):
            output = word.partition("=")[2] or following
    return sum(path.stat().st_size for path in Path(output).expanduser().glob("store/*/metrics.csv"))


def _resubmit(job: Allocation, wanted: bool, progress: bool) -> int:
    """Put a job whose time is over into the queue again, if asked and if that leads anywhere; the exit code."""
    if not wanted:
        say("the job's time is over: submit the same job again to go on (AUTOENC_RESUBMIT=1 does so by itself)")
    elif not progress:
        say("the job's time is over before one epoch was trained: not submitted again; give it more time")
    elif job.scheduler == "LSF":
        say("the job's time is over: it ends with exit code 99, for LSF to run it again (bsub -Q 99)")
        return AGAIN
    else:
        say("the job's time is over: back into the queue with it")
        asked = subprocess.run(["scontrol", "requeue", job.job], capture_output=True, text=True, check=False)
        if asked.returncode:
            say(f"scontrol requeue {job.job}: {asked.stderr.strip()}: submit the same job again to go on")
    return INTERRUPTED


def node(words: list[str]) -> int:
    """On each host: run ``ray start --block`` with these options in a temporary folder of its own, until the end of
    standard input, or SIGTERM."""
    folder, *options = words
    # A scheduler's warnings and bkill's first signal reach every process of a job; the sweep is to end before its Ray.
    for number in (signal.SIGINT, signal.SIGHUP, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
    # On SIGTERM Ray waits 30 s for services to move to other hosts; here there are none. And its workers would give way
    # (niceness 15) to whoever shares the host.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        os.environ.pop(name, None)
    path = Path(folder)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid():
        raise InputError(f"{folder}: belongs to another user; name another folder with AUTOENC_TMP")
    path.chmod(0o700)                           # Ray opens its own folder, within, to everybody
    over = threading.Event()

    def listen() -> None:
        with os.fdopen(0, "rb", buffering=0) as stdin:
            if stdin.readline() == STAY:                    # else it is not what runs the job, but /dev/null
                stdin.readall()
                over.set()

    signal.signal(signal.SIGTERM, lambda number, frame: over.set())
    process = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false",
                                f"--temp-dir={path / 's'}", *options], stdin=subprocess.DEVNULL)
    threading.Thread(target=listen, daemon=True).start()
    try:
        while process.poll() is None and not over.wait(POLL_SECONDS):
            pass
        process.terminate()
        return process.wait()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main(arguments: list[str]) -> int:
    commands = {"run": run, "node": node}
    if len(arguments) < 2 or arguments[0] not in commands:
        raise InputError("usage: python -m autoenc.cluster run COMMAND [ARGUMENT ...]   (in an LSF or Slurm job)")
    return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    command(main)
