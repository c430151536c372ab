"""A race as it stands, for the report: every figure is read and worked out once."""

from __future__ import annotations

from autoenc.sweep.race import Race
from autoenc.sweep.standing import Run, Standing
from autoenc.table import Row


class Snapshot(Standing):
    """Good for as long as the race does not move."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.spec, self.start, self.rungs = race.spec, race.start, race.rungs
        self.trials, self.runs = list(race.trials), dict(race.runs)
        self._found: dict[tuple[str, int | None], Row] = {}

    def figures_of(self, run: Run, epoch: int | None = None) -> Row:
        key = run.id, epoch
        if key not in self._found:
            self._found[key] = self.race.figures_of(run, epoch)
        return self._found[key]
