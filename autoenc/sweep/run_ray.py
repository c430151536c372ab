"""The only module that imports Ray: a cluster to run on, and one sweep's race run on it by Ray Tune.

Tune brings workers, their resources, their reuse and their restarts. What runs next, what is stopped and what a result
means is :class:`~autoenc.sweep.race.Race`'s; what happened is the store's. So nothing of Tune's own state is ever read
back, and a sweep that is run again goes on from the store.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoenc.errors import InputError
from autoenc.sweep.race import Race
from autoenc.sweep.spec import Resources
from autoenc.sweep.standing import Run
from autoenc.sweep.work import Task, work

# Before ray is imported: Tune's own files, its own signal handler and its chatter are not wanted.
os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
               "TUNE_FORCE_TRIAL_CLEANUP_S": "3", "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
               "RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
               "TUNE_RESULT_BUFFER_LENGTH": "1", "RAY_AIR_NEW_OUTPUT": "0"}
# A head that refuses our token is asked so many times, a second apart (Ray's default is 20).
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "8")


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


# Ray reads its authentication mode when it is imported, and turns it on by itself only for clusters that it starts.
# Set any later, a head would demand the token that its own driver does not send.
if "ray" not in sys.modules and ("RAY_AUTH_TOKEN" in os.environ or _token_file().is_file()):
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

RESTARTS = 3                    # of a worker that died
PROBE_SECONDS = 5


@dataclass(frozen=True)
class Cluster:
    cpus: int
    gpus: float
    dashboard: str | None
    local: bool

    def share(self, resources: Resources, runs: int) -> tuple[int, float, int]:
        """CPUs and GPUs of one trial and the number of slots, for so many runs.

        Raises :class:`InputError` where the cluster can never give what one trial asks for.
        """
        gpus = resources.gpus
        if gpus == "auto":
            # As many GPUs as there are; several trials share one only when there are more trials than GPUs.
            gpus = 0.0 if not self.gpus else 1.0 if runs <= self.gpus else 0.5
        if resources.cpus > self.cpus:
            raise InputError(f"resources.cpus: {resources.cpus} a trial, but the cluster has {self.cpus}")
        if gpus > self.gpus:
            raise InputError(f"resources.gpus: {gpus:g} a trial, but the cluster has {self.gpus:g}")
        slots = self.cpus // resources.cpus
        if gpus:
            slots = min(slots, int(self.gpus / gpus + 1e-9))
        return resources.cpus, float(gpus), max(1, slots)


@contextmanager
def cluster(address: str | None) -> Iterator[Cluster]:
    """Join the Ray cluster at ``address``, or start a local one and end it with the block.

    Raises :class:`InputError` where nobody answers.
    """
    local = address in (None, "", "local")
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\.")
    if local:
        _prepare_token()
    else:
        _probe(address)
    try:
        with _quiet():
            context = ray.init(address="local" if local else address, logging_level=logging.ERROR,
                               log_to_driver=False, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"a local Ray cannot be started: {first}" if local else
                         f"--address {address}: cannot join: {first} (is {_token_file()} its token?)") from None
    # ray.init takes SIGTERM for itself; from here on it ends the sweep in order, like Ctrl-C.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        total = ray.cluster_resources()
        url = context.dashboard_url
        yield Cluster(int(total.get("CPU", 0)), total.get("GPU", 0.0), f"http://{url}" if url else None, local)
    finally:
        with _quiet():
            ray.shutdown()
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _probe(address: str) -> None:
    """Where nobody listens, or something that is no Ray head, Ray itself blocks for minutes: look first."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InputError(f"--address {address}: should be HOST:PORT, as printed by ray start --head, or auto, or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: nobody listens there ({error})") from None
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PROBE_SECONDS)
        except grpc.FutureTimeoutError:
            raise InputError(f"--address {address}: what listens there is no Ray head (its port is 6379 by default; "
                             "8265 is the dashboard's)") from None


def _prepare_token() -> None:
    """Ray demands a token of everyone who talks to the cluster; make it ours alone before Ray writes one for all."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = _token_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)     # no home to keep it in: for this run only
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


@contextmanager
def _quiet() -> Iterator[None]:
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


def run(race: Race, here: Cluster, *, folder: Path, output: Path,
        changed: Callable[[], None] = lambda: None) -> None:
    """Run all that the race still asks for. ``changed`` is called after every event of it.

    Raises KeyboardInterrupt when interrupted, OSError where a worker could not write the store.
    """
    resources = race.spec.resources
    cpus, gpus, slots = here.share(resources, max(1, len(race.runs)))
    driver = _Driver(race, output=str(output), threads=cpus, changed=changed,
                     device="cuda" if gpus else "cpu")
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(_Trainable, {"CPU": cpus, "GPU": gpus}),
        tune_config=tune.TuneConfig(num_samples=-1, search_alg=_Search(driver), scheduler=_Schedule(driver),
                                    max_concurrent_trials=slots, reuse_actors=True,
                                    trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0,
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                  failure_config=tune.FailureConfig(max_failures=RESTARTS)),
    )
    try:
        with _quiet():
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if driver.broken:
        raise OSError(driver.broken)


class _Driver:
    """What scheduler and searcher share: which Tune trial stands for which run."""

    def __init__(self, race: Race, *, output: str, threads: int, device: str,
                 changed: Callable[[], None]) -> None:
        self.race, self.changed = race, changed
        self.output, self.threads, self.device = output, threads, device
        self.runs: dict[str, Run] = {}
        self.broken = ""                        # why no worker can go on: a full disk, a folder that is gone

    def __reduce__(self) -> tuple:
        return object, ()                       # Tune pickles what it is given in order to restore it; never done here

    def task(self, run: Run) -> dict[str, Any]:
        return {"task": asdict(Task(key=run.key, output=self.output, config=run.config.flat(), threads=self.threads,
                                    device=self.device, measure=self.race.needs_measuring(), keep=run.keep))}

    def end(self, trial_id: str, result: dict[str, Any]) -> None:
        run = self.runs[trial_id]
        status = result["outcome"]
        if status == "broken":
            self.broken = result["note"]
        if not run.ended:
            self.race.finish(run, "failed" if status == "broken" else status, result.get("note", ""))
        self.changed()


class _Search(Searcher):
    """Hands the race's runs to Tune as they come due."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.driver.broken or self.driver.race.done:
            return Searcher.FINISHED
        run = self.driver.race.next()
        self.driver.changed()
        if run is None:
            return Searcher.FINISHED if self.driver.race.done else None
        self.driver.runs[trial_id] = run
        return self.driver.task(run)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        pass                                    # the scheduler has seen it, also the one that stopped the trial

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        run = self.driver.runs[trial_id]
        if error and not run.ended:
            self.driver.race.finish(run, "failed", f"its worker died {RESTARTS + 1} times")
            self.driver.changed()

    def save(self, checkpoint_path: str) -> None:
        pass                                    # the store is the truth; nothing of Tune's is ever restored

    def restore(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class _Schedule(FIFOScheduler):
    """Passes every epoch to the race, which says whether to go on."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        run = self.driver.runs[trial.trial_id]
        if self.driver.broken:
            return TrialScheduler.STOP
        if "outcome" in result:
            self.driver.end(trial.trial_id, result)
            return TrialScheduler.STOP
        row = {name.removeprefix("row/"): value for name, value in result.items() if name.startswith("row/")}
        if not row:                             # weights trained once more for a decision made before
            return TrialScheduler.CONTINUE
        stop = self.driver.race.report(run, row)
        self.driver.changed()
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class _Trainable(tune.Trainable):
    """One worker: trains a task an epoch a step. A worker is used again for the next task, torch and data loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        self.steps: Iterator[dict[str, Any]] = work(Task(**config["task"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        return next(self.steps)

    def cleanup(self) -> None:
        with suppress(Exception):
            self.steps.close()
