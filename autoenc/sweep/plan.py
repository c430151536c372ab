"""What a person sees before a sweep starts and after it ended. Text only; nothing is computed here that matters."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoenc.config import Config
from autoenc.errors import InputError
from autoenc.settings import SPLAT_COLUMNS, SPLAT_ENTRY, SPLAT_HIDDEN, SPLAT_KERNEL
from autoenc.sweep.decide import compounded, number
from autoenc.sweep.final import Remark
from autoenc.sweep.inherit import Candidate, Winner
from autoenc.sweep.race import Race
from autoenc.sweep.spec import Spec

MOST_VERDICTS = 6            # in words, below the table
STATE_BYTES, WEIGHTS_BYTES = 4 * 3, 4        # a parameter: in latest.pt with two moments of AdamW; in best.pt


def show_chain(console: Console, rows: Sequence[tuple[Spec, list[str], Winner | None]]) -> None:
    """Which sweeps will run, which stand, and why."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("sweep", "state", "why"):
        table.add_column(column, overflow="fold")
    for spec, reasons, winner in rows:
        state = "will run" if reasons else "stands"
        why = "; ".join(reasons) if reasons else f"winner {winner.provenance.get('arm')}"
        table.add_row(spec.name, f"[{'yellow' if reasons else 'green'}]{state}[/]", escape(why))
    console.print(table)


def show_plan(console: Console, spec: Spec, arms: Sequence[Candidate], parent: Winner | None, race: Race | None,
              slots: int | None, pace: tuple[float | None, str], data: str, reasons: Sequence[str],
              free: int) -> None:
    """The plan of one sweep: inherited winner, arms as differences, budget at most, slots, data. ``pace``: seconds an
    epoch, and how they are known."""
    console.print()
    console.rule(f"[bold]{spec.name}[/]", align="left")
    if spec.description:
        console.print(f"[dim]{escape(spec.description)}[/]")
    if parent is not None:
        console.print(f"starts from  {parent.sweep}: winner [bold]{parent.provenance.get('arm')}[/]")
    elif spec.inherits:
        console.print(f"starts from  {spec.inherits.name}: its winner, once that has run")
    else:
        console.print("starts from  base.yaml")
    if reasons and reasons != ["has no winner yet"]:
        console.print(f"runs because {escape('; '.join(reasons))}")
    if data:
        console.print(f"data         {escape(data)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm")
    table.add_column("differs from its start by", overflow="fold")
    table.add_column("stored epochs", justify="right")
    table.add_column("hypothesis", overflow="fold", style="dim")
    for arm in arms:
        stored = race.runs[race.key_of(arm.config)].stored if race else 0
        changes = ", ".join(f"{key} {value}" for key, value in arm.settings.items()) or "nothing"
        table.add_row(arm.name, escape(changes), f"{stored} of {arm.config.train.epochs}", escape(arm.hypothesis))
    if not any(arm.hypothesis for arm in arms):
        table.columns.pop()
    console.print(table)
    budget = "decided: nothing to train" if not reasons else _budget(
        spec, arms, race, slots, pace, free)
    if spec.takes_over and race and reasons and all(run.at_end for run in race.runs.values()):
        budget = "nothing to train: the winner is taken over as it was trained"
    elif race and reasons and race.idle:
        budget = "nothing to train: the store holds all of it"
    console.print(f"budget       {budget}")
    console.print("rule         " + rule_in_words(spec))


def _budget(spec: Spec, arms: Sequence[Candidate], race: Race | None, slots: int | None,
            pace: tuple[float | None, str], free: int) -> str:
    sampled = spec.trials - len(arms) if spec.space else 0
    default = spec.config.get("train.epochs", Config().train.epochs)
    each = max((arm.config.train.epochs for arm in arms), default=default)
    first = sum(arm.config.train.epochs for arm in arms) + max(0, sampled) * each
    if race:
        first -= sum(run.config.train.epochs if run.ended else run.stored for run in race.runs.values())
    repeats = max(0, (spec.decision.repeats - 1) * each * spec.trials - (race.stored_repeats if race else 0))
    most = max(0, first) + repeats
    said = [f"at most {most} epochs" + (f" ({repeats} of them further seeds for the finalists)" if repeats else "")]
    sizes = [parameters(arm.config) for arm in arms]
    disk = (STATE_BYTES + WEIGHTS_BYTES) * spec.decision.repeats * (
        sum(sizes) + max(0, sampled) * max(sizes, default=0))
    beside = " beside what models of one's own take" if any(arm.config.model.kind == "custom" for arm in arms) else ""
    said.append(f"{megabytes(disk)} on disk{beside} ({megabytes(free)} free)")
    if slots:
        said.append(f"{slots} at a time")
    if pace[0] and slots:
        said.append(f"about {duration(most * pace[0] / slots)} {pace[1]}")
    return ", ".join(said)


def check_space(spec: Spec, race: Race, slots: int, output: Path) -> None:
    """Raises :class:`InputError` where the checkpoints of the trials that are sure to run find no room: found out now
    rather than hours into the sweep."""
    begun = [run for run in race.runs.values() if not run.ended and not run.rows]
    sizes = sorted((parameters(run.config) for run in begun), reverse=True)
    # Beside what stays, each slot writes its next state beside the last one.
    need = min(sum(sizes) * (STATE_BYTES + WEIGHTS_BYTES), 1e9 * (spec.resources.store_gb or math.inf)) \
        + sum(sizes[:slots]) * STATE_BYTES
    free = free_space(output)
    if need > free:
        raise InputError(f"--output {output}: {megabytes(free)} free, and the checkpoints of {spec.name} need "
                         f"{megabytes(need)}: make room, or choose another --output")


def free_space(output: Path) -> int:
    """Bytes that may still be written below a folder that need not exist yet."""
    return shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free


def megabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.0f} GB"


def parameters(config: Config) -> int:
    """Parameters of the model, by its architecture's arithmetic: known before torch is loaded, biases left out; 0 where
    only the model knows (kind custom)."""
    model = config.model
    if model.kind == "custom":
        return 0
    if config.takes_splats:
        return _splat_parameters(config)
    channels = [model.base_channels * 2**level for level in range(model.downsampling_steps)]
    latent = model.latent_channels
    total = 9 * channels[-1] ** 2 * 2 + channels[-1] * latent * (3 if model.variational else 2)
    for inner, outer in zip(channels, [3, *channels], strict=False):
        total += 9 * outer * inner + 16 * inner**2                   # encoder: conv 3×3, conv 4×4
        narrow = outer if outer != 3 else channels[0]
        total += 16 * inner * narrow + 9 * narrow**2                 # decoder: transposed conv 4×4, conv 3×3
    return total + 27 * channels[0]


def _splat_parameters(config: Config) -> int:
    model, (down, up) = config.model, config.splat_filters
    inside = down[-1] * (config.data.splats // 2**len(down) if model.pool == "none" else 1)
    total = SPLAT_HIDDEN * (inside + model.latent_dim * (3 if model.variational else 2)
                            + SPLAT_ENTRY * config.data.splats)
    for channels in ((SPLAT_COLUMNS[model.splat_target], *down), (SPLAT_ENTRY * 2**len(up), *up)):
        for inner, outer in pairwise(channels):
            total += SPLAT_KERNEL * outer * inner
            if model.kind == "resnet1d":                             # a second convolution, and the shortcut
                total += SPLAT_KERNEL * outer**2 + (inner * outer if inner != outer else 0)
    return total


def rule_in_words(spec: Spec) -> str:
    """The decision rule as a sentence."""
    rule, objective = spec.decision, spec.objective
    words = f"{'smallest' if objective.direction == 'min' else 'largest'} {objective.metric}"
    if rule.within:
        distance = "one standard error" if rule.within == "1se" else f"{100 * rule.share:.3g}%"
        words += f"; whatever is within {distance} of it is as good"
        words += " (if shown over the seeds)" if rule.evidence == "shown" else ""
    if rule.prefer:
        words += ", then " + ", then ".join(
            f"{'smaller' if p.direction == 'min' else 'larger'} {p.metric}"
            + (f" (within {100 * p.within:.3g}%)" if p.within else "") for p in rule.prefer)
    if rule.require:
        words += "; required: " + ", ".join(
            r.metric + ("" if r.min is None else f" ≥ {r.min:g}") + ("" if r.max is None else f" ≤ {r.max:g}")
            for r in rule.require)
    if rule.repeats > 1:
        words += f"; {rule.repeats} seeds for the finalists"
    if rule.pick:
        words += f"; picked by a person: {rule.pick}"
    return words


def show_decision(console: Console, race: Race, decision: Mapping[str, Any], winner: Winner | None,
                  files: Sequence[Path], remarks: Sequence[Remark] = ()) -> None:
    """The decision in words: the table, the reasons, what was stopped, warnings, where the files are."""
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold", title=None)
    metric = race.spec.objective.metric
    extra = [p.metric for p in race.spec.decision.prefer]
    shown = list(dict.fromkeys([metric, *(["val/psnr"] if metric == "val/mse" else []), *extra]))
    rule = race.spec.decision
    judged = any(row["baseline"] for row in decision["candidates"])
    left = ("arm", "standing", *((f"against {rule.baseline.arm}",) if judged else ()))
    for column in (*left, "seeds", "epochs", *shown):
        table.add_column(column, justify="left" if column in left else "right")
    by_name: dict[str, list[dict]] = {}
    for trial in race.trials:
        by_name.setdefault(trial.candidate.name, []).append(race.figures_of(trial.run))
    for row in decision["candidates"]:
        values = []
        for name in shown:
            known = [found[name] for found in by_name[row["arm"]] if name in found]
            values.append(number(sum(known) / len(known)) if known else "")
        style = "bold green" if row["arm"] == decision["winner"] else None
        against = [row["verdict"] if row["baseline"] else ""] if judged else []
        table.add_row(row["arm"], row["standing"], *against, str(len(row["seeds"])), str(row["epochs"]), *values,
                      style=style)
    console.print(table)
    for reason in decision["reasons"]:
        console.print(f"  · {escape(reason)}", highlight=False)
    judged = [row["arm"] for row in decision["candidates"] if row["baseline"]]
    for row in decision["candidates"]:
        if row["standing"].startswith("behind") or row["standing"] in ("diverged", "failed", "collapsed"):
            for reason in row["reasons"]:
                console.print(f"  · {escape(reason)}", highlight=False)
        elif row["arm"] in judged[:MOST_VERDICTS]:
            said = next(reason for reason in row["reasons"] if reason.startswith("against "))
            seeds = row["baseline"]["seeds_needed"]
            told = row["verdict"] + (f" (about {seeds} seeds would tell)" if seeds else "")
            console.print(f"  · {row['arm']}: [bold]{told}[/] {escape(said)}", highlight=False, soft_wrap=True)
    if len(judged) > MOST_VERDICTS:
        console.print(f"  · the verdicts on {len(judged) - MOST_VERDICTS} more are in report.html", highlight=False)
    concessions = dict(winner.provenance.get("concessions") or {}) if winner else {}
    if winner and compounded(list(concessions.values())) > 0:
        parts = ", ".join(f"{name} {100 * share:.3g}%" for name, share in concessions.items() if share > 0)
        total = 100 * compounded(list(concessions.values()))
        console.print(f"  · conceded to preferences so far: {parts}; together {total:.3g}%", highlight=False)
    margin = improving_margin(race.spec)
    late: dict[str, float] = {}
    for record in race.records():
        if record.improving > margin:
            late[record.arm] = max(record.improving, late.get(record.arm, 0.0))
    if late:
        names = ", ".join(f"{arm} ({100 * share:.2g}%)" for arm, share in late.items())
        console.print(f"[yellow]  ! still improving by more than {100 * margin:.2g}% over the last 3 epochs: "
                      f"{names}; more epochs may change the ranking[/]", highlight=False)
    for remark in remarks:
        if remark.warning:
            console.print(f"[yellow]  ! {escape(remark.text)}[/]", highlight=False, soft_wrap=True)
        else:
            console.print(f"  · {escape(remark.text)}", highlight=False, soft_wrap=True)
    trained = sum(run.trained for run in race.runs.values())
    stored = sum(min(run.stored, len(run.rows)) for run in race.runs.values())
    spared = sum(run.spared for run in race.runs.values())
    console.print(f"  · epochs: {trained} trained, {stored} from the store, {spared} spared by early stopping",
                  highlight=False)
    for path in files:
        console.print(f"  → {_near(path)}", highlight=False, soft_wrap=True)


def improving_margin(spec: Spec) -> float:
    """From which share on a trial counts as still improving: the rule's ``within``, else 5%."""
    return spec.decision.share or 0.05


def duration(seconds: float) -> str:
    """Seconds in the largest fitting units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def data_in_words(dataset: Any) -> str:
    """Counts, size, classes, duplicates of a data set."""
    counts = ", ".join(f"{len(index):,} {name}" for name, index in dataset.splits.items())
    splats = "" if dataset.splats is None else f" as {dataset.splats.shape[1]} splats"
    words = f"{len(dataset.images):,} images of {dataset.images.shape[1]} px{splats} ({counts})"
    if dataset.duplicates:
        words += f", {dataset.duplicates:,} exact duplicates (kept on one side of the split)"
    if dataset.classes:
        words += f", {len(dataset.classes)} classes"
    return words


def _near(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)

