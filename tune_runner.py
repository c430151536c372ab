#!/usr/bin/env python
"""Run sweeps: python tune_runner.py sweeps/phase1_4.yaml

Runs the phases that a sweep builds on where they are missing or stale, trains its candidates on Ray, decides the winner
by the sweep's rule and writes best_config.yaml, which the next phase inherits.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from autoenc import data
from autoenc.config import DataConfig
from autoenc.errors import InputError, command, did_you_mean
from autoenc.interrupts import Deadline, limited
from autoenc.report import gallery
from autoenc.report.watch import Watched
from autoenc.sweep import doors, export, final, inherit, live, own, pace, plan, walltime
from autoenc.sweep.journal import write_journal
from autoenc.sweep.missed import missed
from autoenc.sweep.phase import Phase, conclude, decide_race, device_kind, open_phase, standing_decision, survey
from autoenc.sweep.race import Race
from autoenc.sweep.spec import Spec
from autoenc.sweep.thin import StoreBudget

if TYPE_CHECKING:
    from autoenc.sweep.run_ray import Cluster


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    output = Path(options.output).expanduser().resolve()
    if options.list:
        from autoenc.report.listing import show_sweeps

        show_sweeps(console, output)
        return 0
    overrides = [inherit.parse_override(text) for text in options.set]
    for sweep in options.sweeps:
        if not Path(sweep).is_file():
            near = did_you_mean(Path(sweep).name, [file.name for file in Path(sweep).parent.glob("*.yaml")])
            raise InputError(f"{sweep}: no such sweep file{near}")
    chains = inherit.load_chains([Path(sweep) for sweep in options.sweeps], options.preset, overrides)
    named = {chain[-1].name for chain in chains}
    specs = in_order(chains)
    check_output(output)
    for notice in dict.fromkeys(notice for spec in specs for notice in spec.notices):
        print(f"note: {notice}", file=sys.stderr)

    limit = walltime.time_left(options.wall_time)
    if options.dry_run:
        return dry_run(console, specs, output)
    check_data(specs)
    with ExitStack() as stack:
        deadline = stack.enter_context(limited(limit.seconds, limit.source)) if limit else None
        runner = Runner(options, console, output, specs, stack, deadline)
        survey(specs, output, runner.dataset)   # what does not fit the data shows before the first phase is trained
        for spec in specs:
            if not runner.run(spec, spec.name in named):
                return 1
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_runner.py", description="Run phase-by-phase sweeps of autoencoders.")
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="sweep files; several run in order")
    parser.add_argument("--list", action="store_true",
                        help="show the sweeps of the output folder: done, running, resumable, stale; run nothing")
    parser.add_argument("--output", default="outputs", metavar="DIR", help="where results go (default: outputs)")
    parser.add_argument("--preset", action="append", default=[], metavar="NAME",
                        help="overlay presets/NAME.yaml; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="[SWEEP:]KEY=VALUE",
                        help="override one setting, for all sweeps that run or for one; repeatable")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDR",
                        help="Ray cluster to join (default: $RAY_ADDRESS, else a local one is started, and ended)")
    parser.add_argument("--slots", metavar="N", help="run at most so many trials at once (default: what there is)")
    parser.add_argument("--grow", action="store_true",
                        help="the cluster brings nodes on demand: run --slots trials at once, whatever it has now")
    parser.add_argument("--insecure", action="store_true", help="join a Ray cluster that demands no token, too")
    parser.add_argument("--dashboard-host", default="127.0.0.1", metavar="HOST",
                        help="where the dashboard of a Ray that is started here listens (default: 127.0.0.1)")
    parser.add_argument("--no-dashboard", action="store_true",
                        help="start Ray without its dashboard: eleven processes less")
    parser.add_argument("--wall-time", metavar="MINUTES",
                        help="end in order, to be gone on with, before so much time is over (a Slurm or LSF job's own "
                             "limit is read where it can be)")
    parser.add_argument("--no-upstream", action="store_true", help="do not run missing or stale upstream sweeps")
    parser.add_argument("--fresh", action="store_true",
                        help="move the named sweeps' results and trajectories aside and train them anew")
    parser.add_argument("--dry-run", action="store_true", help="validate and print the plan; write nothing")
    options = parser.parse_intermixed_args(arguments)       # options may stand between sweeps
    if not options.sweeps and not options.list:
        parser.error("the following arguments are required: SWEEP")
    if options.slots is not None:
        if not re.fullmatch(r"0*[1-9][0-9]{0,5}", options.slots, re.ASCII):
            raise InputError(f"--slots {options.slots}: should be a number of trials at once, 1 or more")
        options.slots = int(options.slots)
    if options.grow and options.slots is None:
        raise InputError("--grow: to how many trials at once? add --slots N")
    if options.grow and options.address in (None, "", "local"):
        raise InputError("--grow: a Ray that is started here does not grow; give the --address of a cluster that does")
    return options


def in_order(chains: list[list[Spec]]) -> list[Spec]:
    """Every sweep once, parents before children, in the order of the command."""
    specs: dict[Path, Spec] = {}
    names: dict[str, Path] = {}
    for chain in chains:
        for spec in chain:
            path = spec.path.resolve()
            if names.setdefault(spec.name, path) != path:
                raise InputError(f"{spec.path}: name: {spec.name!r} is also the name of {names[spec.name]}")
            specs.setdefault(path, spec)
    return list(specs.values())


def check_output(output: Path) -> None:
    """The output folder, or the nearest folder above it that exists, can be written, and outlives a Ray job."""
    if any(part.startswith("_ray_pkg_") for part in output.parts):
        raise InputError(f"--output {output}: lies in the copy of the working directory that Ray makes for a job and "
                         "removes after it; give an absolute path on storage that all nodes see")
    folder = next(path for path in (output, *output.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--output {output}: {folder} is no folder that can be written")


def check_data(specs: list[Spec]) -> None:
    """Look at every data set of the chain before anything starts."""
    for settings in data_settings(specs):
        data.check(settings)


def data_settings(specs: list[Spec]) -> list[DataConfig]:
    """The data sets of the chain, each once."""
    found = []
    for spec in specs:
        start = inherit.starting_point(spec, None)
        settings = inherit.make_candidate(spec, start, "start", {}).config.data
        if settings not in found:
            found.append(settings)
    return found


def dry_run(console: Console, specs: list[Spec], output: Path) -> int:
    check_data(specs)
    phases = survey(specs, output, data.cached)
    plan.show_chain(console, [(p.spec, p.reasons, p.winner) for p in phases])
    for phase in phases:
        start_known = phase.parent is not None or phase.spec.inherits is None
        show_plan(console, phase, phase.race(device_kind(phase.spec)) if phase.dataset and start_known else None)
    if any(phase.dataset is None for phase in phases):
        console.print("\nthe data has not been decoded on this machine yet, so what the store holds is not known",
                      style="dim")
    return 0


def show_plan(console: Console, phase: Phase, race: Race | None, cluster: Cluster | None = None,
              measured: float | None = None) -> None:
    """``measured``: seconds an epoch, where the store does not tell."""
    known = (measured, "at the pace of the largest model, measured now") if measured else (
        _stored_pace(phase, race), "at the stored pace")
    slots = _slots(race, cluster) if race and cluster else None
    words = plan.data_in_words(phase.dataset) if phase.dataset else ""
    if race:
        plan.check_space(phase.spec, race, slots or 1, phase.output)
    plan.show_plan(console, phase.spec, phase.arms, phase.parent, race, slots, known, words, phase.reasons,
                   plan.free_space(phase.output))


def _stored_pace(phase: Phase, race: Race | None) -> float | None:
    return phase.store.seconds_per_epoch([run.key for run in race.runs.values()]) if race else None


def _slots(race: Race, cluster: Cluster) -> int:
    from autoenc.sweep import run_ray

    return run_ray.share(race, cluster)[2]


class Runner:
    """Runs one sweep after another; Ray is started when the first of them needs it, and once."""

    def __init__(self, options: argparse.Namespace, console: Console, output: Path, specs: list[Spec],
                 stack: ExitStack, deadline: Deadline | None) -> None:
        self.options, self.console, self.output, self.specs = options, console, output, specs
        self.stack, self.deadline = stack, deadline
        self.cluster: Cluster | None = None
        self.datasets: dict[str, Any] = {}

    def run(self, spec: Spec, named: bool) -> bool:
        """One sweep; whether it has a winner afterwards."""
        phase = open_phase(spec, self.output, self.dataset)
        if named and self.options.fresh:
            self.set_aside(phase)
            phase = open_phase(spec, self.output, self.dataset)
        if not phase.reasons:
            return self.stand(phase, named)
        if not named and self.options.no_upstream:
            raise InputError(f"{spec.name} must run first ({'; '.join(phase.reasons)}): {self.command_for(spec)}")
        race = phase.race(device_kind(spec, self.cluster))
        if not race.idle:
            self.join_cluster()
            race = phase.race(device_kind(spec, self.cluster))
            self.try_own(race)
            self.share_gpus(race)
        show_plan(self.console, phase, race, self.cluster, self.measured_pace(phase, race))
        with phase.writing() as folder:
            race = phase.race(device_kind(spec, self.cluster), folder.emit)
            folder.link_trials(race)
            if not race.idle:
                self.train(phase, race)
            decision = decide_race(race)
            missing = export.missing_weights(race, decision)
            if missing is not None:
                trial, epoch = missing
                self.console.print(f"{trial.name}: the weights of epoch {epoch} are not kept, training to there again")
                race.reopen(trial.run, epoch)
                self.join_cluster()
                self.train(phase, race)
                if export.missing_weights(race, decision):
                    raise OSError(f"{trial.name}: its weights could not be had again: {trial.run.note}")
            files = conclude(phase, race, decision, folder)
            folder.emit(event="decided", winner=decision["winner"])
            winner = inherit.read_winner(folder.path)
            self.show_arms(phase, race, decision)
            files.append(self.report(phase, race, decision, winner))
            if said := StoreBudget(self.output, spec.name, spec.resources.store_gb).keep(lambda: decision,
                                                                                         emit=folder.emit):
                self.console.print(f"! {said}", style="yellow", soft_wrap=True)
        plan.show_decision(self.console, race, decision, winner, files, self.remarks(phase, race, decision))
        return decision["winner"] is not None

    def try_own(self, race: Race) -> None:
        """Models and losses of one's own are tried on a worker. Raises :class:`InputError`."""
        if not any(run.config.own for run in race.runs.values()):
            return
        from autoenc.sweep import run_ray

        with self.console.status("trying models and losses of one's own …"):
            own.check(race, partial(run_ray.apart, race, self.cluster))

    def share_gpus(self, race: Race) -> None:
        """See how many trials are to share a GPU."""
        if not self.cluster.gpus:
            return
        from autoenc.sweep import run_ray

        with self.console.status("measuring what a trial takes of a GPU …"):
            self.cluster = run_ray.pack(race, self.cluster, partial(
                self.console.print, highlight=False, markup=False, soft_wrap=True))

    def measured_pace(self, phase: Phase, race: Race) -> float | None:
        """Seconds an epoch, measured on a worker; None where the store tells, and where it is not worth it."""
        if self.cluster is None or race.idle or _stored_pace(phase, race) is not None:
            return None
        images, device = len(phase.dataset.splits["train"]), device_kind(phase.spec, self.cluster)
        if not pace.worth_measuring(race, images, device):
            return None
        from autoenc.sweep import run_ray

        with self.console.status("measuring how long an epoch takes …"):
            return run_ray.measured_pace(race, self.cluster)

    def train(self, phase: Phase, race: Race) -> None:
        """Run on the cluster what the race asks for, shown live."""
        from autoenc.sweep import run_ray

        progress = live.Progress(self.console, race, _slots(race, self.cluster))
        linked, budget = len(race.trials), StoreBudget(self.output, phase.spec.name, phase.spec.resources.store_gb)
        ended = {run.id for run in race.runs.values() if run.ended}
        page = Watched(lambda state: self.report_so_far(phase, race, state), progress.say)

        def changed() -> None:
            nonlocal linked
            progress.update()
            if len(race.trials) != linked:
                phase.folder.link(race.trials[linked:])
                linked = len(race.trials)
            for run in [run for run in race.runs.values() if run.ended and run.id not in ended]:
                ended.add(run.id)
                if said := budget.keep(lambda: standing_decision(race), run.key, phase.folder.emit):
                    progress.say(said)
            if any(run.trained for run in race.runs.values()):
                page.changed()

        self.console.print()
        try:
            with progress.shown():
                self.cluster = run_ray.run(
                    race, self.cluster, folder=phase.folder.path, output=self.output, deadline=self.deadline,
                    dataset=phase.dataset, changed=changed, say=progress.say)
        except BaseException:
            with suppress(OSError):             # it may be what there is to tell
                phase.folder.write_trials(race)
                write_journal(phase.folder.path / "optuna.log", race)
            page.interrupted()
            raise
        phase.folder.write_trials(race)

    def show_arms(self, phase: Phase, race: Race, decision: dict[str, Any]) -> None:
        """Pictures of the arms on the same images, for the report; where nothing was trained those that there are stay.
        """
        if self.cluster is None:
            return
        from autoenc.sweep import run_ray

        with self.console.status("comparing the arms' reconstructions …"):
            said = gallery.draw(race, decision, phase.folder.path / "gallery",
                                partial(run_ray.apart, race, self.cluster), self.deadline)
        if said:
            self.console.print(f"! {said}", style="yellow", markup=False, soft_wrap=True)

    def stand(self, phase: Phase, named: bool) -> bool:
        """An unchanged, decided sweep: its tables are written from the store again, nothing is trained."""
        winner = phase.winner
        race = phase.race((winner.provenance.get("device") or {}).get("device") or device_kind(phase.spec))
        if not race.idle:                       # trajectories were removed since: what stands is left as it is
            self.console.print(f"{phase.spec.name}: stands, winner {winner.provenance['arm']}")
            return True
        decision = decide_race(race)
        with phase.writing(wait=30) as folder:  # sweeps started together may look at the same upstream sweep
            folder.link_trials(race)
            folder.write_trials(race)
            folder.write_json("decision.json", decision)
            files = [folder.path / "best_config.yaml", self.report(phase, race, decision, winner)]
        if named:
            self.console.rule(f"[bold]{phase.spec.name}[/]: decided before, nothing to train", align="left")
            plan.show_decision(self.console, race, decision, winner, files, self.remarks(phase, race, decision))
        else:
            self.console.print(f"{phase.spec.name}: stands, winner {winner.provenance['arm']}")
        return True

    def report(self, phase: Phase, race: Race, decision: dict[str, Any], winner: inherit.Winner | None) -> Path:
        from autoenc.report.index import write_index
        from autoenc.report.sweep import write_report

        path = phase.folder.path / "report.html"
        write_report(path, race, decision, winner=winner, dataset_words=plan.data_in_words(phase.dataset),
                     command=self.command_for(phase.spec), remarks=self.remarks(phase, race, decision))
        write_index(self.output)
        return path

    def report_so_far(self, phase: Phase, race: Race, state: str) -> None:
        from autoenc.report.index import write_index
        from autoenc.report.sweep import write_report

        write_report(phase.folder.path / "report.html", race, standing_decision(race), winner=None, state=state,
                     dataset_words=plan.data_in_words(phase.dataset), command=self.command_for(phase.spec))
        write_index(self.output, running=phase.spec.name if state == "running" else None)

    def remarks(self, phase: Phase, race: Race, decision: dict[str, Any]) -> list[final.Remark]:
        return [*final.remarks(race, export.winning_trial(race, decision), phase.parent, self.output),
                *missed(race, decision)]

    def join_cluster(self) -> None:
        """Start Ray, or join the cluster asked for, and see that every sweep's trials fit it."""
        if self.cluster is not None:
            return
        address, insecure = self.options.address, self.options.insecure
        with self.console.status("joining Ray …" if address else "starting Ray …"):
            if address in (None, "", "local"):
                address = None
                doors.prepare_local(insecure=insecure)
            else:
                address = doors.knock(address, insecure=insecure)
            # Only now: Ray reads how to authenticate when it is imported.
            from autoenc.sweep import ray_cluster

            self.cluster = self.stack.enter_context(ray_cluster.cluster(
                address, None if self.options.no_dashboard else self.options.dashboard_host, self.options.slots,
                self.specs[-1].resources if self.options.grow else None))
        for spec in self.specs:
            try:
                self.cluster.share(spec.resources, 1)
            except InputError as error:
                raise InputError(f"{spec.path}: {error}") from None
        if not self.cluster.local:
            from autoenc.sweep import run_ray

            with self.console.status("looking whether every node sees the output folder and the data …"):
                run_ray.check_visible(self.cluster, [spec.resources for spec in self.specs], self.output,
                                      data_settings(self.specs))
        if self.cluster.dashboard:
            self.console.print(f"Ray dashboard {self.cluster.dashboard} (its token: ray get-auth-token)", style="dim")
        if self.cluster.metrics:
            self.console.print(f"gauges for Prometheus {self.cluster.metrics} (docs/dashboard.md)", style="dim")

    def dataset(self, settings: DataConfig) -> Any:
        """The decoded data, prepared once."""
        key = settings.model_dump_json()
        if key not in self.datasets:
            with self.console.status("preparing data …"):
                self.datasets[key] = data.prepare(settings)
        return self.datasets[key]

    def set_aside(self, phase: Phase) -> None:
        """``--fresh``: the sweep's results and its trajectories get out of the way; one that is taken over stays."""
        runs = phase.race(device_kind(phase.spec, self.cluster)).runs.values()
        with phase.writing():
            for key in {run.key for run in runs if not phase.spec.takes_over}:
                phase.store.set_aside(key)
        phase.folder.set_aside()

    def command_for(self, spec: Spec) -> str:
        words = ["python", "tune_runner.py", str(spec.path)]
        words += [word for name in self.options.preset for word in ("--preset", name)]
        words += [word for text in self.options.set for word in ("--set", text)]
        if self.options.output != "outputs":
            words += ["--output", self.options.output]
        return shlex.join(words)


if __name__ == "__main__":
    command(main)
