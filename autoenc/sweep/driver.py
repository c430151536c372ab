"""A race's runs on workers, whoever brings these: what each of them is told, and what comes of what it says. No Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from autoenc.custom import for_workers
from autoenc.interrupts import Deadline
from autoenc.sweep import packing
from autoenc.sweep.pairing import Pairing
from autoenc.sweep.race import Race
from autoenc.sweep.standing import Run
from autoenc.sweep.work import Task


class Driver:
    """What Tune's scheduler, searcher and callbacks share: which of its trials stands for which run, and why no more
    may start."""

    def __init__(self, race: Race, *, output: str, folder: str, threads: int, device: str, together: int,
                 pairing: Pairing | None, deadline: Deadline | None, data: str,
                 changed: Callable[[], None], say: Callable[[str], None]) -> None:
        self.race, self.deadline, self.changed, self.say = race, deadline, changed, say
        self.output, self.folder, self.threads, self.device, self.data = output, folder, threads, device, data
        self.runs: dict[str, Run] = {}
        self.together = together                # trials that share a GPU, by gpus: auto
        self.pairing = pairing
        self.crowded: list[str] = []            # trials that ran out of a shared GPU's memory
        self.broken: OSError | None = None      # the disk is full, the folder gone: nobody can go on
        self.out_of_time = False

    def __reduce__(self) -> tuple:
        return object, ()                       # Tune pickles what it is given in order to restore it; never done here

    def task(self, run: Run) -> dict[str, Any]:
        task = Task(key=run.key, output=self.output, config=run.config.flat(), threads=self.threads,
                    device=self.device, after=self.race.wanted_after(run), keep=run.keep, data=self.data)
        return {"task": asdict(task), "own": for_workers(), "folder": self.folder, "kind": self._kind(run)}

    def _kind(self, run: Run) -> str | None:
        """Of the GPU that a run must have."""
        if self.pairing is None:
            return self.race.spec.resources.kind
        seed, known = run.config.train.seed, set(self.pairing.homes)
        kind = self.pairing.home(seed, [other.config.train.seed for other in self.race.runs.values()
                                        if other.state == "running" and other is not run])
        if seed not in known:
            self.race.emit(event="seed placed", seed=seed, kind=kind)
        return kind

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
        """What a worker said of its run, as :func:`autoenc.sweep.work.in_text`; whether the trial ends here."""
        if self.broken or run.ended:
            return True
        if "outcome" in result:
            self.end(run, result["outcome"], result.get("note", ""))
            return True
        ends = False
        row = json.loads(result["row"]) if "row" in result else {}
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
