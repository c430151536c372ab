"""Measure this project against what a user would write instead, and against bare loops.

    python tests/benchmarks/run.py                        all that needs no images of yours; 80 to 90 minutes
    python tests/benchmarks/run.py replay start           these
    python tests/benchmarks/run.py --list                 what there is
    python tests/benchmarks/run.py --json FILE            the figures of every round
    python tests/benchmarks/run.py --from FILE … --write docs/benchmarks.md      the table of earlier runs into the page

Every figure is a ratio of two things measured in the same run, in turn, several times. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from catalogue import BENCHMARKS
from measure import Benchmark, Options, Skip, summary
from place import REPOSITORY, busy_cores
from table import table_of, write_into

from autoenc.errors import InputError, command, did_you_mean

LOADED = 0.1                     # of the cores, by other work before or after a benchmark: its figures may be off


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:15}{'; '.join(row.what for row in benchmark.rows.values())}")
        return 0
    found = joined([read(Path(name)) for name in options.earlier]) if options.earlier else measure(options)
    table = table_of(found)
    print(f"\n{table}", end="")
    if options.write:
        write_into(Path(options.write), table)
    return 1 if any(entry["failed"] for entry in found["benchmarks"].values()) else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises :class:`InputError`."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="the benchmarks and their figures; runs nothing")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of each (default: 3 to 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every round")
    parser.add_argument("--from", dest="earlier", nargs="+", metavar="FILE", default=[],
                        help="the JSON files of earlier runs instead of measuring; the latest figures count, those "
                             "before stand beside them")
    parser.add_argument("--write", metavar="PAGE", help="put the table between the markers of a Markdown page")
    parser.add_argument("--manifest", type=Path, help="images for the benchmark epochs")
    parser.add_argument("--palette", type=Path, help="their classes")
    parser.add_argument("--image-size", type=int, default=64, help="px that they are trained at (default: 64)")
    parser.add_argument("--limit", type=int, help="so many of them, by hash (default: all)")
    parser.add_argument("--folder", type=Path, help="keep what epochs trains here, and go on with what is there")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            raise InputError(f"{name}: no such benchmark{did_you_mean(name, BENCHMARKS)}")
    if options.repeats is not None and options.repeats < 1:
        raise InputError(f"--repeats {options.repeats}: should be 1 or more")
    if options.earlier and (options.names or options.json):
        raise InputError("--from: takes the figures of earlier runs: name no benchmarks and no --json beside it")
    for path in filter(None, (options.manifest, options.palette)):
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    for file in filter(None, (options.json, options.write, options.folder)):       # hours later it would be too late
        if not Path(file).absolute().parent.is_dir():
            raise InputError(f"{file}: there is no folder {Path(file).absolute().parent}")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is asked for, one after another; the content of the JSON file."""
    asked = Options(options.quick, options.manifest, options.palette, options.image_size, options.limit,
                    options.folder)
    found: dict[str, Any] = {"machine": machine(), "quick": options.quick, "rows": [], "benchmarks": {}}
    for benchmark in [BENCHMARKS[name] for name in dict.fromkeys(options.names)] or BENCHMARKS.values():
        print(f"{benchmark.name} …", file=sys.stderr, flush=True)
        before = found["rows"]
        for rows, how in one(benchmark, asked, options.repeats or benchmark.repeats):
            found["rows"], found["benchmarks"][benchmark.name] = before + rows, how
            if options.json:                     # a later round may be interrupted
                Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def one(benchmark: Benchmark, asked: Options, repeats: int) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The rows of a benchmark, and how it was run: after every round, and at its end."""
    quiet = 0.2 if asked.quick else 3.0
    load, began, rounds = busy_cores(quiet), time.monotonic(), []
    skipped = failed = None

    def so_far() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        notes: dict[str, list[Any]] = {}
        for done in rounds:
            for key, value in done.notes.items():
                notes.setdefault(key, []).append(value)
        rows = [{"benchmark": benchmark.name, **summary(row, [done.pairs[key] for done in rounds])}
                for key, row in benchmark.rows.items()] if rounds else []
        return rows, {"rounds": len(rounds), "seconds": time.monotonic() - began, "load": load, "skipped": skipped,
                      "failed": failed, "notes": notes,
                      "loaded": benchmark.clocked and load > LOADED * (os.cpu_count() or 1)}

    function = getattr(import_module(benchmark.module), benchmark.function)
    try:
        with closing(function(asked)) as steps:
            for done in islice(steps, repeats):
                rounds.append(done)
                print(f"  {len(rounds)} of {repeats}: " + ", ".join(
                    f"{row.what} {row.of(*done.pairs[key]):.3g}" for key, row in benchmark.rows.items()),
                    file=sys.stderr, flush=True)
                yield so_far()
    except Skip as reason:
        skipped = str(reason)
        print(f"  not run: {skipped}", file=sys.stderr)
    except RuntimeError as error:                # the others are measured all the same
        failed = (str(error).splitlines() or ["?"])[0]
        print(f"  failed: {error}", file=sys.stderr)
    load = max(load, busy_cores(quiet))          # what others did before and after it
    yield so_far()


def machine() -> dict[str, Any]:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor() or "unknown")
    said = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpu": gpu(),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "system": platform.platform(), "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "ray", "optuna")},
            "commit": said.stdout.strip() or "unknown",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


def gpu() -> str | None:
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.partition(":")[2].strip() for card in cards for line in card.read_text().splitlines()
             if line.startswith("Model")]
    return ", ".join(names) or None


def read(path: Path) -> dict[str, Any]:
    """The JSON file of an earlier run. Raises :class:`InputError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"machine", "quick", "rows", "benchmarks"} <= found.keys():
            raise ValueError("lacks machine, quick, rows or benchmarks")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--from {path}: is no file of an earlier run: {error}") from None
    return found


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one, in the order of the catalogue; of a benchmark that several ran, the last one's figures, with
    the ratios of those before."""
    machines = {(run["machine"]["cpu"], run["machine"]["cores"], run["machine"]["gpu"]) for run in runs}
    if len(machines) > 1:
        raise InputError("--from: the runs are of different machines; write a table for each")
    last = {name: run for run in runs for name in run["benchmarks"]}
    order = [name for name in BENCHMARKS if name in last]

    def before(row: dict[str, Any]) -> list[float]:
        return [old["ratio"]["median"] for run in runs if run is not last[row["benchmark"]] for old in run["rows"]
                if (old["benchmark"], old["what"]) == (row["benchmark"], row["what"])]

    return {"machine": runs[-1]["machine"], "quick": any(run["quick"] for run in runs),
            "rows": [row | {"before": before(row)} for name in order for row in last[name]["rows"]
                     if row["benchmark"] == name],
            "benchmarks": {name: {"commit": last[name]["machine"]["commit"], **last[name]["benchmarks"][name]}
                           for name in order}}


if __name__ == "__main__":
    command(main, "the rounds that were complete are in the file of --json, if one was named")
