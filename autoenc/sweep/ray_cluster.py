"""A Ray cluster: joined or started, what it has, calls on it. Only this, run_ray.py and worker.py import Ray, this one
without Tune."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from typing import Any

from autoenc.custom import Caller, for_workers
from autoenc.errors import InputError
from autoenc.interrupts import leave_warnings_to_us, take_signals
from autoenc.sweep.packing import Cluster, Node
from autoenc.sweep.parts import Resources

# Before ray is imported: Tune's own files, its own signal handler and its chatter are not wanted.
os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
               "TUNE_FORCE_TRIAL_CLEANUP_S": "3", "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
               "RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
               "TUNE_RESULT_BUFFER_LENGTH": "1", "RAY_AIR_NEW_OUTPUT": "0"}
# Ray starts workers at niceness 15: whatever else is busy on the machine would leave them, and their GPU, a thirtieth
# of a core. A script that trains has its shell's niceness; so have they, and who wants less says nice.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray._private import parameter
from ray.autoscaler.sdk import request_resources

FOR_TRIALS = {"PL_DISABLE_FORK": "1"}       # the variables that Tune gives every trial
GROWTH_SECONDS = 900.0          # for a cluster that grows on demand to bring its first node


@contextmanager
def cluster(address: str | None, dashboard_host: str | None = "127.0.0.1", slots: int | None = None,
            first: Resources | None = None) -> Iterator[Cluster]:
    """Join the Ray cluster at ``address``, or (None) start a local one and end it with the block. Who gets in is
    :mod:`autoenc.sweep.doors`' matter, before this module is imported. ``dashboard_host``: where the dashboard of a
    local one listens; None: it has none. ``slots``: as in :class:`Cluster`. ``first``: it grows on demand, and what
    :func:`grown` waits for.

    Raises :class:`InputError` where Ray cannot start or join.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\.")
    own = {}
    if address is None:
        own = {"dashboard_host": dashboard_host} if dashboard_host else {"include_dashboard": False}
        os.environ |= FOR_TRIALS
        _take_any_agent_port()
    leave_warnings_to_us()
    # Tune takes a second to load, and Ray seconds to start, in which this process waits.
    loading = threading.Thread(target=_load_tune, args=(address is None,))
    loading.start()
    try:
        try:
            with quiet():
                context = ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False,
                                   configure_logging=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = _why(error)
            raise InputError(f"--address {address}: cannot join: {why}" if address else
                             f"a local Ray cannot be started: {why}") from None
        finally:
            loading.join()
            take_signals()           # ray.init takes SIGTERM for itself
        total = ray.cluster_resources() if first is None else grown(first)
        url = context.dashboard_url
        yield Cluster(int(total.get("CPU", 0)), total.get("GPU", 0.0), f"http://{url}" if url else None,
                      address is None, slots, first is not None, _metrics_url(context.address_info), nodes())
    finally:
        with quiet():
            ray.shutdown()           # also of a cluster that was joined in part: at its end Tune would ask it for keys


def _load_tune(ready_workers: bool) -> None:
    """``ready_workers``: have Tune's trials run in the processes that Ray keeps ready. Tune gives its trials
    environment variables, by which Ray takes them to need processes of their own, whose start takes a second. Here
    every process inherits them from this one; not so on nodes that were there before."""
    with suppress(ImportError, AttributeError):              # another version of Ray: as it always was
        from ray.tune.execution import class_cache

        from autoenc.sweep import run_ray  # noqa: F401

        if ready_workers and FOR_TRIALS.items() >= class_cache.DEFAULT_ENV_VARS.items():
            class_cache.DEFAULT_ENV_VARS.clear()
            class_cache.ENV_VARS_TO_PROPAGATE.clear()


def _take_any_agent_port() -> None:
    """Let the dashboard's agent listen wherever there is a port. It wants 52365 of the host: beside another Ray it
    tries for four seconds, for which everything waits, and then does without. `ray.init` has no argument for it."""
    parameter.RayParams.__init__ = partialmethod(parameter.RayParams.__init__, dashboard_agent_listen_port=0)


def _why(error: Exception) -> str:
    """Why Ray cannot be joined, in one line."""
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) == 2:
        (theirs, their_python), (ours, our_python) = versions
        return (f"it runs Ray {theirs} on Python {their_python}, this command Ray {ours} on Python {our_python}, and "
                "both must be the same: run the command in the environment that the cluster was started from, or start "
                "the cluster from this one")
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nodes() -> tuple[Node, ...]:
    found = []
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        kinds = sorted(name.partition(":")[2] for name in has if name.startswith("accelerator_type:"))
        if has:
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], int(has.get("CPU", 0)), has.get("GPU", 0.0),
                              kinds[0] if kinds else ""))
    return tuple(found)


def grown(first: Resources) -> dict[str, float]:
    """The resources of a cluster that grows on demand, once it has those of a first trial: it may have no worker yet.

    Raises :class:`InputError` where it has not brought them within ``GROWTH_SECONDS``.
    """
    wanted = {"CPU": float(first.cpus)} | ({"GPU": float(first.gpus)} if first.gpus not in ("auto", 0) else {})
    until = time.monotonic() + GROWTH_SECONDS
    while any((total := ray.cluster_resources()).get(name, 0.0) < much for name, much in wanted.items()):
        if time.monotonic() > until:
            asked = ", ".join(f"{much:g} {name}" for name, much in wanted.items())
            raise InputError(f"--grow: the cluster has not brought what one trial needs ({asked}) within "
                             f"{GROWTH_SECONDS / 60:g} minutes; ray status on its head says why")
        request_resources(bundles=[wanted])
        time.sleep(1)
    request_resources(bundles=[])               # from here on the trials that wait ask for it
    return total


def _metrics_url(node: dict[str, Any]) -> str | None:
    host, port = node.get("node_ip_address", ""), node.get("metrics_export_port")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics" if host and port else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Ray's processes print while starting and ending out of the person's terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def call(cpus: int, gpus: float, function: Callable[..., Any], *task: Any, seconds: float,
         kind: str | None = None) -> Any:
    """What ``function(*task, cpus, device)`` returns, called in a process of its own with these resources, on a node
    with GPUs of this kind.

    Raises what it raises, RayError where its process died, TimeoutError after so many seconds.
    """
    # An actor rather than a task: to end a task by force that has just ended crashes Ray's driver.
    caller = ray.remote(num_cpus=cpus, num_gpus=gpus, accelerator_type=kind)(Caller).remote()
    try:
        return ray.get(caller.call.remote(for_workers(), function, *task, cpus, "cuda" if gpus else "cpu"),
                       timeout=seconds)
    finally:
        with suppress(Exception):               # Ray itself is gone
            ray.kill(caller)
