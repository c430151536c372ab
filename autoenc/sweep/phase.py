"""One sweep from its file to its decision, in steps that read the output folder and write to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.config import Config, DataConfig, check_heads, make_config
from autoenc.errors import InputError
from autoenc.interop import check_counts
from autoenc.sweep import export, inherit
from autoenc.sweep.decide import decide
from autoenc.sweep.inherit import Candidate, Winner
from autoenc.sweep.journal import write_journal
from autoenc.sweep.race import Race
from autoenc.sweep.search import runners_up
from autoenc.sweep.spec import Spec, read_sweep
from autoenc.sweep.store import Store, SweepFolder
from autoenc.trajectory import trajectory_key

if TYPE_CHECKING:
    from autoenc.data import Dataset
    from autoenc.sweep.run_ray import Cluster


@dataclass
class Phase:
    """A sweep in an output folder, its starting configuration made."""

    spec: Spec
    output: Path
    parent: Winner | None
    start: dict[str, Any]
    arms: list[Candidate]
    dataset: Dataset | None            # None: not decoded yet (only in a dry run)
    dataset_of: Callable[[DataConfig], Dataset | None]     # also of a split that a further seed makes anew
    reasons: list[str] = field(default_factory=list)       # why it must run; empty: its result stands
    winner: Winner | None = None       # of its last run
    broken: bool = False               # there is a best_config.yaml, but it cannot be read

    @property
    def data(self) -> DataConfig:
        """The settings of its data set: one for all candidates."""
        return _data_settings(self.spec, self.start, self.arms)

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.output, self.spec.name)

    @property
    def store(self) -> Store:
        return Store(self.output)

    def race(self, device_kind: str, emit: Callable[..., None] = lambda **event: None) -> Race:
        """The sweep's race as the store has it. Writes nothing unless ``emit`` does."""
        parent = self.parent

        def fingerprint(settings: DataConfig) -> str:
            dataset = self.dataset if settings == self.data else self.dataset_of(settings)
            return dataset.fingerprint if dataset else "not decoded yet"

        def key_of(config: Config) -> str:
            if self.spec.takes_over and parent:          # wherever that was trained
                return str(parent.provenance.get("trajectory"))
            return trajectory_key(config, fingerprint(config.data), device_kind)

        return Race(self.spec, self.start, self.arms, key_of=key_of, open_trajectory=self.store.open, emit=emit,
                    past=self.folder.events(), retry=bool(self.reasons),
                    first_points=runners_up(self.output / parent.sweep) if parent and self.spec.space else ())

    @contextmanager
    def writing(self, wait: float = 0) -> Iterator[SweepFolder]:
        """The sweep's folder, for this process alone (see :meth:`SweepFolder.writing`)."""
        with self.folder.writing(wait):
            yield self.folder


def survey(specs: Sequence[Spec], output: Path, dataset_of: Callable[[DataConfig], Dataset | None]) -> list[Phase]:
    """All sweeps of a command as they stand before any of them runs, parents first. What does not fit the data shows
    here. Raises :class:`InputError`."""
    phases: dict[Path, Phase] = {}
    for spec in specs:
        above = phases.get(spec.inherits.resolve()) if spec.inherits else None
        stands = above is None or not above.reasons
        phase = phases[spec.path.resolve()] = open_phase(spec, output, dataset_of, parent_stands=stands)
        if not stands:
            phase.reasons = [f"{above.spec.name} runs first"]
    return list(phases.values())


def open_phase(spec: Spec, output: Path, dataset_of: Callable[[DataConfig], Dataset | None],
               parent_stands: bool = True) -> Phase:
    """Resolve a sweep against what its parent left; ``parent_stands``: False where that will run first, and what it
    left is not to be built on. Raises :class:`InputError` where arms and data do not fit."""
    parent = None
    if spec.inherits and parent_stands:
        parent = inherit.read_winner(output / str(read_sweep(spec.inherits).get("name")))
    start = inherit.starting_point(spec, parent.settings if parent else None)
    arms = inherit.arm_candidates(spec, start)
    if spec.takes_over and parent:
        _check_taken_over(spec, parent, arms[0].config)
    dataset = dataset_of(_data_settings(spec, start, arms))
    if dataset is not None:
        for experiment in spec.experiments:
            check_counts(experiment, len(dataset.classes), len(dataset.label_names))
        for candidate in (*arms, *_ends(spec, start)):
            try:
                check_heads(candidate.config, len(dataset.classes), len(dataset.label_names))
            except InputError as error:
                raise InputError(f"{spec.path}: {candidate.name}: {error}") from None
    try:
        winner, broken = inherit.read_winner(output / spec.name), ""
    except InputError as error:                  # decided anew, out of the store
        winner, broken = None, str(error)
    reasons = [broken] if broken else inherit.stale_reasons(spec, winner, parent,
                                                            dataset.fingerprint if dataset else None)
    return Phase(spec, output, parent, start, arms, dataset, dataset_of, reasons, winner, bool(broken))


def _data_settings(spec: Spec, start: dict[str, Any], arms: Sequence[Candidate]) -> DataConfig:
    return (arms[0].config if arms else inherit.make_candidate(spec, start, "start", {}).config).data


def _check_taken_over(spec: Spec, parent: Winner, config: Config) -> None:
    """Raises :class:`InputError` where something is set that the parent's training would not have computed."""
    theirs = make_config(parent.settings, f"{parent.sweep}/best_config.yaml")
    if config.identity() != theirs.identity():
        changed = {key: value for key, value in config.flat().items() if parent.settings.get(key) != value}
        raise InputError(f"{spec.path}: start: parent takes the winner of {parent.sweep} as it was trained, and other "
                         f"settings train another one: {', '.join(f'{k} {v}' for k, v in changed.items())}")


def _ends(spec: Spec, start: dict[str, Any]) -> Iterator[Candidate]:
    """Candidates at the upper end of each parameter: what they need of the data, some sampled point may need."""
    for key, parameter in spec.space.items() if spec.trials > len(spec.arms) else ():
        for value in parameter.choices if parameter.type == "choice" else (parameter.high,):
            yield inherit.make_candidate(spec, start, f"space.{key}", {**parameter.when, key: value})


def decide_race(race: Race) -> dict[str, Any]:
    """The decision over a race's trials, in the file's order."""
    order = list(dict.fromkeys(trial.candidate.name for trial in race.trials))
    return decide(race.records(), order, race.spec.objective, race.spec.decision)


def standing_decision(race: Race) -> dict[str, Any]:
    """The decision as if the race ended now; whoever could still win is told as good."""
    decision, able = decide_race(race), set() if race.done else set(race.finalists())
    for row in decision["candidates"]:
        if row["arm"] in able and row["standing"] == "worse":
            row["standing"] = "as good"
    return decision


def conclude(phase: Phase, race: Race, decision: dict[str, Any], folder: SweepFolder) -> list[Path]:
    """Write what a decision leaves: trials.csv, decision.json, optuna.log, and the winner's files, which it returns."""
    folder.link_trials(race)
    folder.write_trials(race)
    folder.write_json("decision.json", decision)
    write_journal(folder.path / "optuna.log", race)
    if phase.broken:
        export.set_broken_aside(folder)
    if decision["winner"] is None:
        export.withdraw(folder)
        return []
    return export.export(race, decision, phase.parent, phase.dataset.fingerprint, folder)


def device_kind(spec: Spec, cluster: Cluster | None = None) -> str:
    """The kind of device that a sweep's trials run on (``cpu`` or ``cuda``); before a cluster is there, what this
    machine lets expect."""
    if spec.resources.gpus == 0:
        return "cpu"
    gpus = cluster.gpus if cluster is not None else any(Path("/proc/driver/nvidia/gpus").glob("*"))
    return "cuda" if gpus else "cpu"
