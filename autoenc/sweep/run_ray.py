"""One sweep's race run by Ray Tune, and what else a sweep does on a cluster (:mod:`autoenc.sweep.ray_cluster`).

Tune brings workers, their resources, their reuse and their restarts. What runs next, what is stopped and what a result
means is :class:`~autoenc.sweep.race.Race`'s; what happened is the store's. So nothing of Tune's own state is ever read
back, and a sweep that is run again goes on from the store.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.interrupts import Deadline, interrupt, take_signals
from autoenc.sweep import gpu, pace, packing, visible
from autoenc.sweep.driver import Driver
from autoenc.sweep.gauges import Gauges
from autoenc.sweep.packing import Cluster
from autoenc.sweep.pairing import make_pairing, pairing_words
from autoenc.sweep.past import Past
from autoenc.sweep.race import Race
from autoenc.sweep.ray_cluster import call, quiet
from autoenc.sweep.spec import Resources
from autoenc.sweep.store import SweepFolder
from autoenc.sweep.worker import TrialWorker, trial_resources

if TYPE_CHECKING:
    from autoenc.data import Dataset
    from autoenc.settings import DataConfig

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

RESTARTS = 3                    # of a worker that died
WAITING_SECONDS = 30.0          # without any worker until it is said; to start one takes seconds


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
         changed: Callable[[], None], say: Callable[[str], None]) -> Driver:
    """Let Tune run the race, until it is done or for some reason not to go on."""
    cpus, gpus, slots = share(race, here)
    homes = Past(SweepFolder(output, race.spec.name).events()).homes()
    pairing = make_pairing(race.spec, here, _at_once(race), homes)
    if pairing:
        slots = min(slots, sum(pairing.slots.values()))
    images, data = (len(dataset.splits["train"]), dataset.fingerprint) if dataset else (None, "")
    driver = Driver(race, output=str(output), folder=str(folder), threads=cpus, device="cuda" if gpus else "cpu",
                    together=here.together(race.spec.resources, _at_once(race)), pairing=pairing, deadline=deadline,
                    data=data, changed=changed, say=say)
    gauges = Gauges(race, slots, Gauge, images=images, say=say)
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(TrialWorker, trial_resources(cpus, gpus)),
        tune_config=tune.TuneConfig(num_samples=-1, search_alg=_Search(driver), scheduler=_Schedule(driver),
                                    max_concurrent_trials=slots, reuse_actors=True,
                                    trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0,
                                  callbacks=[_Restarts(driver), _Waits(driver, here.local), _Report(gauges)],
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                  failure_config=tune.FailureConfig(max_failures=RESTARTS)),
    )
    try:
        with quiet():
            tuner.fit()
    finally:
        gauges.report()
        shutil.rmtree(scratch, ignore_errors=True)
    return driver


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
    whole, here = here, here.only(spec.resources.kind)
    drawn = spec.space.get("train.precision")
    precisions = {*(config.train.precision for config in waiting), *(drawn.choices if drawn else ())}
    if spec.resources.gpus != 0 and (warning := packing.precision_warning(precisions, here.kinds)):
        say(f"! {warning}")
    if spec.resources.gpus != 0 and (words := pairing_words(make_pairing(spec, here, _at_once(race), {}), spec, here)):
        say(words)
    shared = spec.resources.gpus == "auto" and here.gpus and not here.grows
    enough = here.enough(_at_once(race)) if shared else 1
    if enough == 1 or not (waiting or spec.trials > len(race.runs)):
        return whole
    largest = pace.largest(race)
    try:
        uses = [call(spec.resources.cpus, 1.0, gpu.measure, largest, seconds=gpu.LIMIT_SECONDS, kind=kind)
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


def measured_pace(race: Race, here: Cluster) -> float | None:
    """Seconds an epoch takes of the largest model that waits, about; None where that cannot be measured."""
    try:
        return apart(race, here, pace.measure, pace.largest(race), seconds=pace.LIMIT_SECONDS)
    except Exception:                           # the trials themselves will say what is wrong
        return None


def check_visible(here: Cluster, resources: Sequence[Resources], output: Path, data: Sequence[DataConfig]) -> None:
    """Raise :class:`InputError` where a node that trials with some of these resources may run on does not see the
    output folder or the data."""
    nodes = list(dict.fromkeys(node for each in resources for node in here.only(each.kind).nodes
                               if node.room(*here.share(each, 1)[:2])))

    def everywhere(function: Callable[..., Any], *task: Any, seconds: float) -> list[tuple[str, Any]]:
        calls = {ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(
            node.id, soft=False))(function).remote(*task): node for node in nodes}
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=seconds) if calls else ([], [])
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        answers = []
        for asked, node in calls.items():
            if node.id not in alive:            # trials will not run there either
                continue
            try:
                answer = ray.get(asked) if asked in ended else TimeoutError(f"no answer within {seconds:g} s")
            except Exception as error:
                answer = error
            answers.append((node.host, answer))
        return answers

    visible.check(output, data, everywhere)


def apart(race: Race, here: Cluster, function: Callable[..., Any], *task: Any, seconds: float) -> Any:
    """:func:`autoenc.sweep.ray_cluster.call` with the resources of a trial."""
    cpus, gpus, _ = share(race, here)
    return call(cpus, gpus, function, *task, seconds=seconds, kind=race.spec.resources.kind)


class _Search(Searcher):
    """Hands the race's runs to Tune as they come due."""

    def __init__(self, driver: Driver) -> None:
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

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        ends = True
        with self.driver.watched():
            ends = self.driver.take(self.driver.runs[trial.trial_id], result)
        return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first trial that waits and has no worker on its way: it gets the next one that is free. Those that have
        would get it, too, were they named here, and Tune would end what is being started for them: where to start all
        takes longer than a trial (many slots, a slow file system), many workers would never train."""
        controller = tune_controller._tune_controller                # of workers schedulers are told nothing
        starts, worker_of = controller._actor_manager.is_actor_started, controller._trial_to_actor
        return next((trial for trial in controller.get_trials()
                     if trial.status == "PENDING" and not starts(worker_of.get(trial))), None)


class _Restarts(tune.Callback):
    """Tells of workers that died. One whose node is gone is given back without counting against its trial."""

    def __init__(self, driver: Driver) -> None:
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

    def __init__(self, gauges: Gauges) -> None:
        self.gauges = gauges

    def __reduce__(self) -> tuple:
        return object, ()                       # as for Driver

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self.gauges.refresh()


class _Waits(tune.Callback):
    """Tells, once, of a sweep that stands still because nothing is free for it: others hold it, or a cluster grows; or
    because a busy machine is slow to start its workers."""

    def __init__(self, driver: Driver, local: bool) -> None:
        self.driver = driver
        self.why = "the machine is too busy to start a worker" if local else (
            "what one needs is not free on the cluster; waiting (ray status on its head shows what is taken)")
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
            self.driver.say(f"no trial runs: {self.why}")
