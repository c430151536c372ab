"""The only module that imports Ray: a cluster to run on, and one sweep's race run on it by Ray Tune.

Tune brings workers, their resources, their reuse and their restarts. What runs next, what is stopped and what a result
means is :class:`~autoenc.sweep.race.Race`'s; what happened is the store's. So nothing of Tune's own state is ever read
back, and a sweep that is run again goes on from the store.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.custom import arrive, for_workers
from autoenc.errors import InputError
from autoenc.interrupts import Deadline, interrupt, leave_warnings_to_us, take_signals
from autoenc.sweep import gpu, packing, plan, visible
from autoenc.sweep.gauges import Gauges
from autoenc.sweep.packing import Cluster, Node
from autoenc.sweep.race import Race
from autoenc.sweep.spec import Resources
from autoenc.sweep.standing import Run
from autoenc.sweep.work import Task, work

if TYPE_CHECKING:
    from autoenc.data import Dataset
    from autoenc.settings import DataConfig

# Before ray is imported: Tune's own files, its own signal handler and its chatter are not wanted.
os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
               "TUNE_FORCE_TRIAL_CLEANUP_S": "3", "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
               "RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
               "TUNE_RESULT_BUFFER_LENGTH": "1", "RAY_AIR_NEW_OUTPUT": "0"}

import ray
from ray import tune
from ray.autoscaler.sdk import request_resources
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

RESTARTS = 3                    # of a worker that died
WAITING_SECONDS = 30.0          # without any worker until it is said; to start one takes seconds
GROWTH_SECONDS = 900.0          # for a cluster that grows on demand to bring its first node


@contextmanager
def cluster(address: str | None, dashboard_host: str = "127.0.0.1", slots: int | None = None,
            first: Resources | None = None) -> Iterator[Cluster]:
    """Join the Ray cluster at ``address``, or (None) start a local one and end it with the block. Who gets in is
    :mod:`autoenc.sweep.doors`' matter, before this module is imported. ``slots``: as in :class:`Cluster`. ``first``: it
    grows on demand, and what :func:`grown` waits for.

    Raises :class:`InputError` where Ray cannot start or join.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\.")
    own = {"dashboard_host": dashboard_host} if address is None else {}
    leave_warnings_to_us()
    try:
        try:
            with _quiet():
                context = ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False,
                                   configure_logging=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = _why(error)
            raise InputError(f"--address {address}: cannot join: {why}" if address else
                             f"a local Ray cannot be started: {why}") from None
        finally:
            take_signals()           # ray.init takes SIGTERM for itself
        total = ray.cluster_resources() if first is None else grown(first)
        url = context.dashboard_url
        yield Cluster(int(total.get("CPU", 0)), total.get("GPU", 0.0), f"http://{url}" if url else None,
                      address is None, slots, first is not None, _metrics_url(context.address_info), _nodes())
    finally:
        with _quiet():
            ray.shutdown()           # also of a cluster that was joined in part: at its end Tune would ask it for keys


def _why(error: Exception) -> str:
    """Why Ray cannot be joined, in one line."""
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
    if len(versions) == 2:
        (theirs, their_python), (ours, our_python) = versions
        return (f"it runs Ray {theirs} on Python {their_python}, this command Ray {ours} on Python {our_python}, and "
                "both must be the same: run the command in the environment that the cluster was started from, or start "
                "the cluster from this one")
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nodes() -> tuple[Node, ...]:
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


def run(race: Race, here: Cluster, *, folder: Path, output: Path, deadline: Deadline | None = None,
        dataset: Dataset | None = None, changed: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None) -> Cluster:
    """Run all that the race still asks for. ``changed`` is called after every event of it, ``say`` with what a person
    should know. No epoch is begun that would not end before the ``deadline``. ``dataset``: what workers must find
    when they open the data; without it they are believed.

    Where trials share a GPU by ``gpus: auto`` and one runs out of its memory, all end after their epoch and go on from
    the store with half as many on a GPU. Returns the cluster as it was shared in the end.

    Raises KeyboardInterrupt when interrupted or when the deadline ends it, OSError where the output cannot be written.
    """
    while True:
        driver = _fit(race, here, folder, output, deadline, dataset, changed, say)
        if driver.broken:
            raise driver.broken
        if driver.out_of_time and not race.done:
            raise interrupt(f"{deadline.source} is nearly over")
        if not driver.crowded:
            return here
        here = replace(here, packing=driver.together // 2)
        say(f"{', '.join(driver.crowded)}: out of GPU memory with {packing.trials(driver.together)} a GPU; the sweep "
            f"goes on from the store with {here.packing}")


def _fit(race: Race, here: Cluster, folder: Path, output: Path, deadline: Deadline | None, dataset: Dataset | None,
         changed: Callable[[], None], say: Callable[[str], None]) -> _Driver:
    """Let Tune run the race, until it is done or for some reason not to go on."""
    cpus, gpus, slots = share(race, here)
    images, data = (len(dataset.splits["train"]), dataset.fingerprint) if dataset else (None, "")
    driver = _Driver(race, output=str(output), folder=str(folder), threads=cpus, device="cuda" if gpus else "cpu",
                     together=here.together(race.spec.resources, _at_once(race)), deadline=deadline, data=data,
                     gauges=Gauges(race, slots, Gauge, images=images, say=say), changed=changed, say=say)
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(_Trainable, {"CPU": cpus, "GPU": gpus} | _of_kind(race.spec.resources)),
        tune_config=tune.TuneConfig(num_samples=-1, search_alg=_Search(driver), scheduler=_Schedule(driver),
                                    max_concurrent_trials=slots, reuse_actors=True,
                                    trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0,
                                  callbacks=[_Restarts(driver), _Waits(driver), _Report(driver)],
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                  failure_config=tune.FailureConfig(max_failures=RESTARTS)),
    )
    try:
        with _quiet():
            tuner.fit()
    finally:
        driver.gauges.report()
        shutil.rmtree(scratch, ignore_errors=True)
    return driver


def _of_kind(resources: Resources) -> dict[str, float]:
    """What makes Ray keep to nodes with GPUs of the kind that was asked for: they all have one of it to give."""
    return {f"accelerator_type:{resources.accelerator}": 0.001} if resources.accelerator else {}


def share(race: Race, here: Cluster) -> tuple[int, float, int]:
    """CPUs and GPUs of one trial of a race, and how many run at once (see :meth:`Cluster.share`)."""
    return here.share(race.spec.resources, _at_once(race))


def _at_once(race: Race) -> int:
    """How many runs there may be at once: those known, and points that are still to be drawn."""
    return max(1, len(race.runs), race.spec.trials)


def pack(race: Race, here: Cluster, say: Callable[[str], None]) -> Cluster:
    """The cluster with as many trials on a GPU as fit and pay, by a measurement of the largest of those that wait, on a
    GPU of each kind. Nothing is measured where GPUs are given by number, or where there are enough of them.

    ``say`` is told, in one line, what was chosen and why; where nothing can be measured, it is one trial a GPU. It is
    also told of precisions that do not suit the GPUs.
    """
    spec, waiting = race.spec, [run.config for run in race.runs.values() if not run.ended]
    whole, here = here, here.only(spec.resources.accelerator)
    drawn = spec.space.get("train.precision")
    precisions = {*(config.train.precision for config in waiting), *(drawn.choices if drawn else ())}
    if spec.resources.gpus != 0 and (warning := packing.precision_warning(precisions, here.kinds)):
        say(f"! {warning}")
    if spec.resources.gpus != 0 and (warning := packing.pairing_warning(spec.decision.repeats, here.kinds)):
        say(f"! {warning}")
    shared = spec.resources.gpus == "auto" and here.gpus and not here.grows
    enough = here.enough(_at_once(race)) if shared else 1
    if enough == 1 or not waiting:
        return whole
    largest = max(waiting, key=lambda config: (plan.parameters(config), config.train.batch_size)).flat()
    try:
        uses = [_call(spec.resources.cpus, 1.0, gpu.measure, largest, seconds=gpu.LIMIT_SECONDS, kind=kind)
                for kind in here.kinds or [None]]
    except Exception as error:                  # of Ray's many kinds, and what training raises
        cause = getattr(error, "cause", None) or error
        first = (str(cause).strip().splitlines() or [""])[0]
        say(f"1 trial a GPU: what one takes cannot be measured ({type(cause).__name__}: {first}); resources.gpus: 0.5 "
            "would run two")
        return replace(whole, packing=1)
    number, words = packing.choose(uses, here.beside(spec.resources.cpus), enough)
    say(words)
    return replace(whole, packing=number)


def check_visible(here: Cluster, resources: Sequence[Resources], output: Path, data: Sequence[DataConfig]) -> None:
    """Raise :class:`InputError` where a node that trials with some of these resources may run on does not see the
    output folder or the data."""
    nodes = list(dict.fromkeys(node for each in resources for node in here.only(each.accelerator).nodes
                               if node.room(*here.share(each, 1)[:2])))

    def everywhere(function: Callable[..., Any], *task: Any, seconds: float) -> list[tuple[str, Any]]:
        calls = {ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(
            node.id, soft=False))(function).remote(*task): node for node in nodes}
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=seconds) if calls else ([], [])
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        answers = []
        for call, node in calls.items():
            if node.id not in alive:            # trials will not run there either
                continue
            try:
                answer = ray.get(call) if call in ended else TimeoutError(f"no answer within {seconds:g} s")
            except Exception as error:
                answer = error
            answers.append((node.host, answer))
        return answers

    visible.check(output, data, everywhere)


def apart(race: Race, here: Cluster, function: Callable[..., Any], *task: Any, seconds: float) -> Any:
    """What ``function(*task, threads, device)`` returns, called in a process of its own with the resources of a trial.

    Raises what it raises, RayError where its process died, TimeoutError after so many seconds.
    """
    cpus, gpus, _ = share(race, here)
    return _call(cpus, gpus, function, *task, seconds=seconds, kind=race.spec.resources.accelerator)


def _call(cpus: int, gpus: float, function: Callable[..., Any], *task: Any, seconds: float,
          kind: str | None = None) -> Any:
    """The same with these resources, on a node with GPUs of this kind."""
    # An actor rather than a task: to end a task by force that has just ended crashes Ray's driver.
    caller = ray.remote(num_cpus=cpus, num_gpus=gpus, accelerator_type=kind)(_Caller).remote()
    try:
        return ray.get(caller.call.remote(for_workers(), function, *task, cpus, "cuda" if gpus else "cpu"),
                       timeout=seconds)
    finally:
        with suppress(Exception):               # Ray itself is gone
            ray.kill(caller)


class _Caller:
    def call(self, own: dict[str, tuple[str, str, bytes]], function: Callable[..., Any], *task: Any) -> Any:
        arrive(own)
        return function(*task)


class _Driver:
    """What scheduler, searcher and callback share: which Tune trial stands for which run, and why no more may start."""

    def __init__(self, race: Race, *, output: str, folder: str, threads: int, device: str, together: int,
                 deadline: Deadline | None, data: str, gauges: Gauges, changed: Callable[[], None],
                 say: Callable[[str], None]) -> None:
        self.race, self.deadline, self.gauges, self.changed, self.say = race, deadline, gauges, changed, say
        self.output, self.folder, self.threads, self.device, self.data = output, folder, threads, device, data
        self.runs: dict[str, Run] = {}
        self.together = together                # trials that share a GPU, by gpus: auto
        self.crowded: list[str] = []            # trials that ran out of a shared GPU's memory
        self.broken: OSError | None = None      # the disk is full, the folder gone: nobody can go on
        self.out_of_time = False

    def __reduce__(self) -> tuple:
        return object, ()                       # Tune pickles what it is given in order to restore it; never done here

    def task(self, run: Run) -> dict[str, Any]:
        task = Task(key=run.key, output=self.output, config=run.config.flat(), threads=self.threads,
                    device=self.device, after=self.race.wanted_after(run), keep=run.keep, data=self.data)
        return {"task": asdict(task), "own": for_workers(), "folder": self.folder}

    def next(self) -> Run | None:
        if self.over:
            return None
        quickest = min((run.pace for run in self.race.runs.values() if run.pace), default=None)
        self.out_of_time = not self._time_for(quickest)
        if self.out_of_time:
            return None
        run = self.race.next()
        self.changed()
        return run

    @property
    def over(self) -> bool:
        """Whether nothing more will be started."""
        return self.broken is not None or self.out_of_time or bool(self.crowded) or self.race.done

    def take(self, run: Run, result: dict[str, Any]) -> bool:
        """What a worker said of its run; whether the trial ends here."""
        if self.broken or run.ended:
            return True
        if "outcome" in result:
            self.end(run, result["outcome"], result.get("note", ""))
            return True
        ends = False
        row = {name.removeprefix("row/"): value for name, value in result.items() if name.startswith("row/")}
        if "warning" in result:
            self.race.note("warning", run, note=result["warning"])
            self.say(f"{self.race.name_of(run)}: {result['warning']}")
        elif "waiting" in result:
            self.say(f"{self.race.name_of(run)}: {result['waiting']} trains it, too; waiting")
        elif row:
            ends = self.race.report(run, row) is not None
        else:
            run.trained += 1                    # once more, for a checkpoint that is not kept
        if not ends and not run.at_end and (self.crowded or not self._time_for(run.pace)):
            self.race.pause(run)
            self.out_of_time = self.out_of_time or not self.crowded
            ends = True
        self.changed()
        return ends

    def end(self, run: Run, status: str, note: str) -> None:
        if status == "broken":
            raise OSError(note)
        if status == "failed" and self.together > 1 and packing.out_of_gpu_memory(note):
            self.crowded.append(self.race.name_of(run))
            run.read()
            self.race.note("out of memory", run, note=note)
            self.race.pause(run)
        else:
            self.race.finish(run, status, note)
        self.changed()

    def _time_for(self, pace: float | None) -> bool:
        """Whether one more epoch at this pace would end in time, also one that takes somewhat longer."""
        return self.deadline is None or self.deadline.left > 1.25 * (pace or 0.0) + 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep why the output could not be written: raised within Tune it would be lost among its own errors."""
        try:
            yield
        except OSError as error:
            self.broken = self.broken or error


class _Search(Searcher):
    """Hands the race's runs to Tune as they come due."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        with self.driver.watched():
            run = self.driver.next()
            if run is not None:
                self.driver.runs[trial_id] = run
                return self.driver.task(run)
        return Searcher.FINISHED if self.driver.over else None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        pass                                    # the scheduler has seen it, also the one that stopped the trial

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        run = self.driver.runs[trial_id]
        if error and not run.ended:
            with self.driver.watched():
                self.driver.end(run, "failed", f"its worker died {RESTARTS + 1} times")

    def save(self, checkpoint_path: str) -> None:
        pass                                    # the store is the truth; nothing of Tune's is ever restored

    def restore(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class _Schedule(FIFOScheduler):
    """Passes everything that workers say to the race, which says whether to go on."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        ends = True
        with self.driver.watched():
            ends = self.driver.take(self.driver.runs[trial.trial_id], result)
        return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE


class _Restarts(tune.Callback):
    """Tells of workers that died. One whose node is gone is given back without counting against its trial."""

    def __init__(self, driver: _Driver) -> None:
        self.driver = driver
        self.nodes: dict[str, str] = {}         # trial -> the node that its last result came from

    def setup(self, **info: Any) -> None:
        take_signals()                          # Tune has taken SIGUSR1, to end as if the sweep were over

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.nodes[trial.trial_id] = result.get("node_id", "")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        run, node = self.driver.runs[trial.trial_id], self.nodes.get(trial.trial_id, "")
        if node and node not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
            trial.max_failures += 1
            note = "its node is gone"
        else:
            note = f"its worker died, attempt {trial.num_failures + 1} of {trial.max_failures + 1}"
        with self.driver.watched():
            self.driver.race.note("restarted", run, note=note)
            self.driver.say(f"{self.driver.race.name_of(run)}: {note}; goes on after epoch {len(run.rows)}")


class _Report(tune.Callback):
    """Keeps the gauges up to date: Tune's loop comes by here ten times a second, whether anything happened or not."""

    def __init__(self, driver: _Driver) -> None:
        self.driver = driver

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self.driver.gauges.refresh()


class _Waits(tune.Callback):
    """Tells, once, of a sweep that stands still because nothing is free for it: others hold it, or a cluster grows."""

    def __init__(self, driver: _Driver) -> None:
        self.driver = driver
        self.since: float | None = None         # from when on trials waited and none ran
        self.told = False

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        states = {trial.status for trial in trials}
        if self.told or "PENDING" not in states or "RUNNING" in states:
            self.since = None
        elif self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() > self.since + WAITING_SECONDS:
            self.told = True
            self.driver.say("no trial runs: what one needs is not free on the cluster; waiting (ray status on its head "
                            "shows what is taken)")


class _Trainable(tune.Trainable):
    """One worker: trains a task an epoch a step. A worker is used again for the next task, torch and data loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        arrive(config["own"])
        said = visible.not_seen(config["folder"])
        self.steps: Iterator[dict[str, Any]] = \
            iter([{"outcome": "broken", "note": said}]) if said else work(Task(**config["task"]))
        self.node = ray.get_runtime_context().get_node_id()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        return {**next(self.steps), "node_id": self.node}

    def cleanup(self) -> None:
        with suppress(Exception):
            self.steps.close()
