"""The sweep while it runs: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from autoenc.sweep.plan import duration
from autoenc.sweep.race import Race

STYLES = {"running": "cyan", "completed": "green", "stopped": "yellow", "diverged": "red", "failed": "red",
          "waiting": "dim"}


class Progress:
    """Shows a race. :meth:`update` is called after each of its events."""

    def __init__(self, console: Console, race: Race, slots: int) -> None:
        self.console, self.race, self.slots = console, race, slots
        self.began = time.monotonic()
        self._said: dict[str, tuple[str, int]] = {
            run.id: (run.state, len(run.rows)) for run in race.runs.values()}
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the table for the length of the block, and leaves its last state standing."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4, get_renderable=self.table, transient=False) as self._live:
            yield

    def say(self, text: str) -> None:
        """A line that stays, above the table."""
        self.console.print(f"! {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def update(self) -> None:
        if self._live is None:
            for line in self._news():
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """All trials as they stand."""
        metric = self.race.spec.objective.metric
        table = Table(box=None, pad_edge=False, header_style="bold", caption=self._summary(), caption_justify="left")
        for column, justify in (("trial", "left"), ("state", "left"), ("epoch", "right"), (metric, "right"),
                                ("s/epoch", "right"), ("time left", "right")):
            table.add_column(column, justify=justify)
        for trial in self._on_screen():
            run = trial.run
            score, pace = self.race.score(run), run.pace
            left = pace * (run.config.train.epochs - len(run.rows)) if run.state == "running" and pace else None
            table.add_row(
                trial.name, f"[{STYLES[run.state]}]{run.state}[/]", f"{len(run.rows)}/{run.config.train.epochs}",
                "" if math.isnan(score) else f"{score:.5g}", f"{pace:.1f}" if pace else "",
                duration(left) if left else "")
        return table

    def _on_screen(self) -> list:
        """All trials where they fit; else those that run, and the most recent of the others."""
        trials, room = self.race.trials, max(5, self.console.height - 6)
        if len(trials) <= room:
            return trials
        running = [trial for trial in trials if trial.run.state == "running"]
        others = [trial for trial in trials if trial.run.state not in ("running", "waiting")]
        return [*others[-max(0, room - len(running)):], *running]

    def _summary(self) -> str:
        left = self._time_left()
        ended = sum(run.ended for run in self.race.runs.values())
        return (f"{ended} of {len(self.race.runs)} done, {duration(time.monotonic() - self.began)} so far"
                + (f", about {duration(left)} left" if left else ""))

    def _time_left(self) -> float | None:
        paces = [pace for run in self.race.runs.values() if (pace := run.pace)]
        if not paces:
            return None
        average = sum(paces) / len(paces)
        open_runs = [run for run in self.race.runs.values() if not run.ended]
        work = sum((run.config.train.epochs - len(run.rows)) * (run.pace or average) for run in open_runs)
        return work / self.slots

    def _news(self) -> Iterator[str]:
        for trial in self.race.trials:
            run = trial.run
            before = self._said.get(run.id, ("waiting", run.stored))
            now = (run.state, len(run.rows))
            if now == before:
                continue
            self._said[run.id] = now
            score = self.race.score(run)
            figure = "" if math.isnan(score) else f"  {self.race.spec.objective.metric} {score:.5g}"
            if run.state != before[0] and run.state == "running":
                yield f"{trial.name:<16} started" + (f" at epoch {len(run.rows)}" if run.rows else "")
            elif now[1] != before[1] or run.ended:
                left = self._time_left()
                state = f"  {run.state}" if run.ended else ""
                state += f": {run.note}" if run.note and run.ended else ""
                eta = f"  (about {duration(left)} left)" if left and not run.ended else ""
                yield f"{trial.name:<16} epoch {len(run.rows):>3}/{run.config.train.epochs}{figure}{state}{eta}"
