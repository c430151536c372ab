"""The points of a sweep's space that become candidates beside its arms: those that earlier runs tried, first points
(the runners-up of other sweeps), and then what the searcher draws. The searcher is told how every candidate ended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autoenc import figures
from autoenc.config import Config, make_config
from autoenc.errors import InputError
from autoenc.files import content_hash
from autoenc.sweep.inherit import Candidate, make_candidate
from autoenc.sweep.past import Past
from autoenc.sweep.search import Searcher, sampled_names
from autoenc.sweep.space import project
from autoenc.sweep.standing import Run, Standing

DRAWS = 100                          # points drawn in vain (all known already) before a space counts as exhausted


class Points:
    """Which point comes next, and what the search learns from it."""

    def __init__(self, race: Standing, start: Mapping[str, Any], past: Past,
                 first_points: Sequence[tuple[str, Mapping[str, Any]]], *, key_of: Callable[[Config], str],
                 emit: Callable[..., None]) -> None:
        """Of a race that its arms are in already. ``first_points``: settings, each with where it is from;
        ``key_of(config)``: the id of the run that would serve it."""
        self.searcher: Searcher | None = None            # made for the first draw: Optuna takes its time to load
        self._race, self._spec, self._start = race, race.spec, start
        self._key_of, self._emit = key_of, emit
        self._arms = len(race.trials)
        self._past, self._first_points = past, first_points
        self._drawn = 0                  # points that earlier runs drew
        self._given = 0                  # those of the first points that became candidates
        search = race.spec.search
        self._space = content_hash([race.spec.content["space"], dict(start), search.algorithm, search.seed])
        self._exhausted = past.told("space exhausted", space=self._space)

    @property
    def wanted(self) -> bool:
        """Whether the sweep asks for more points than there are, and its space may have some."""
        return bool(self._spec.space) and not self._exhausted and self._candidates < self._spec.trials

    @property
    def _candidates(self) -> int:
        return len({trial.candidate.name for trial in self._race.trials})

    def drawn_before(self) -> Iterator[Candidate]:
        """The points that earlier runs tried of the same space, as many as this sweep still wants; each is to be in the
        race before the next is asked for."""
        for point, source in self._past.points():
            fits = project(point, self._spec.space, self._start) == point
            candidate = self._candidate(point, source) if fits else None
            if candidate is not None and self._candidates < self._spec.trials:
                self._drawn += source is None
                self._given += source is not None
                yield candidate

    def next(self) -> Candidate | None:
        """A new candidate, where one is due."""
        if not self.wanted:
            return None
        searcher = self._search()
        found = self._first_point(searcher) or self._draw(searcher)
        if found is None:
            self._exhausted = True
            self._emit(event="space exhausted", candidates=len(self._race.runs), space=self._space)
        return found

    def _first_point(self, searcher: Searcher) -> Candidate | None:
        """The next of the first points that is one of the space, and neither the start nor known. They have a third of
        all points at most: those around an older optimum are not to leave nothing for the search."""
        most = math.ceil((self._spec.trials - self._arms) / 3)
        start = self._key_of(make_config(self._start, "start"))
        for source, settings in self._first_points if self._given < most else ():
            point = project(settings, self._spec.space, self._start)
            candidate = self._candidate(point, source) if point is not None else None
            if candidate is not None and self._key_of(candidate.config) not in {start, *self._race.runs}:
                self._given += 1
                searcher.know(candidate)
                self._emit(event="suggested", name=candidate.name, settings=point, **{"from": source})
                return candidate
        return None

    def _draw(self, searcher: Searcher) -> Candidate | None:
        for _ in itertools.count() if self._spec.search.algorithm == "grid" else range(DRAWS):
            drawn = searcher.draw()
            if drawn is None:
                break
            point, optuna_trial = drawn
            candidate = self._candidate(point)
            twin = candidate and self._race.runs.get(self._key_of(candidate.config))
            if candidate is None:
                searcher.refuse(optuna_trial)
            elif twin:                           # known already: its result is learnt from, not trained again
                known = next(trial.candidate for trial in self._race.trials if trial.run is twin)
                searcher.assign(known, optuna_trial)
                if twin.ended:
                    self._tell(known, twin)
            else:
                searcher.assign(candidate, optuna_trial)
                self._emit(event="suggested", name=candidate.name, settings=point)
                return candidate
        return None

    def _search(self) -> Searcher:
        """The searcher; at first it is told of every candidate so far, by its first seed."""
        if self.searcher is None:
            self.searcher = Searcher(self._spec, self._start, self._drawn)
            for trial in self._race.trials:
                if trial.seed == trial.candidate.config.train.seed:
                    self.searcher.know(trial.candidate)
                    if trial.run.ended:
                        self._tell(trial.candidate, trial.run)
        return self.searcher

    def _candidate(self, point: Mapping[str, Any], source: Any = None) -> Candidate | None:
        """A point under the next free name; None where its settings do not go together. ``source``: where it is from,
        if it was not drawn."""
        taken = {trial.candidate.name for trial in self._race.trials}
        told = f"runner-up of {source}" if source else ""
        try:
            return make_candidate(self._spec, self._start, next(sampled_names(taken)), point, told)
        except InputError:
            return None

    # What the searcher learns --------------------------------------------------------------------------------------

    def learn(self, run: Run) -> None:
        """A run ended, as it stands."""
        for trial in self._race.trials:
            if trial.run is run:
                self._tell(trial.candidate, run)

    def know_again(self, run: Run) -> None:
        """A run whose end was learnt goes on: it is one more trial."""
        for trial in self._race.trials:
            if trial.run is run and self.searcher is not None:
                self.searcher.know(trial.candidate)

    def _tell(self, candidate: Candidate, run: Run) -> None:
        if self.searcher is None:
            return
        score, of_run = self._race.score, self._race.figures_of
        values = [score(run, epoch) for epoch in range(1, len(run.rows) + 1)]
        if values and self._spec.objective.metric in figures.AFTER_TRAINING:
            values[-1] = score(run)
        second = [of_run(run).get(item.metric, math.nan) for item in self.searcher.objectives[1:]]
        self.searcher.tell(candidate, run.state, values, *second)
