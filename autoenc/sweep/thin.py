"""Keeping the store within its size: checkpoints of trials that nobody will want again give way, their figures stay.

What goes first is what can be missed most easily: all checkpoints of trials that diverged or failed; then the optimiser
states of those that lost and of further seeds, which only a longer budget would go on from; then their weights, which
only another rule would export; last all checkpoints of trials that were stopped. A winner, what is as good by the rule,
the baseline, a person's pick, and all that a sweep still works on, keep everything. Whatever goes can be had again, at
the price of its epochs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from autoenc.sweep.store import Store, SweepFolder

STATES, WEIGHTS = ("latest.pt*",), ("best.pt*", "best_epoch_*", "normalized_epoch_*")
TIERS = (({"broken"}, STATES + WEIGHTS), ({"broken", "lost"}, STATES), ({"broken", "lost"}, WEIGHTS),
         ({"broken", "lost", "stopped"}, STATES + WEIGHTS))  # what goes of whom, what can be missed most first
KEPT = ("winner", "best", "as good", "rule's choice")        # verdicts that a change of the rule may turn into a winner


class StoreBudget:
    """The size that a store may have, for the sweep ``name`` of an output folder while it runs and when it is decided.

    ``gigabytes``: 10⁹ bytes; None: no limit.
    """

    def __init__(self, output: Path, name: str, gigabytes: float | None) -> None:
        self.output, self.name, self.gigabytes = output, name, gigabytes
        self.store = Store(output)
        self._sizes: dict[str, int] = {}
        self._told = False                   # that there is nothing left to give up
        if gigabytes is not None:
            self._measure()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())

    def keep(self, decide: Callable[[], Mapping[str, Any]], changed: str | None = None,
             emit: Callable[..., None] = lambda **event: None) -> str:
        """Bring the store below its limit, as far as nobody loses what is needed. Returns what to tell a person.

        ``decide()``: the decision of this sweep as its trials stand; those that it does not name are at work.
        ``changed``: the one trajectory whose size changed since the last look; None: any may have.
        """
        if self.gigabytes is None:
            return ""
        if changed is not None:
            self._sizes[changed] = size_of(self.store.folder / changed)
        limit = self.gigabytes * 1e9
        if changed is None or self.size > limit:
            self._measure()                                  # other sweeps train here, too, and give up
        before, thinned = self.size, set()
        if before <= limit:
            self._told = False
            return ""
        for key, patterns in self._expendable(decide()):
            if self.size <= limit:
                break
            if self._remove(key, patterns):
                thinned.add(key)
        if not thinned and self._told:                       # nothing new
            return ""
        self._told = self.size > limit
        said = f"the store held {before / 1e9:.3g} GB, more than resources.store_gb {self.gigabytes:g}"
        if thinned:
            emit(event="thinned", trajectories=sorted(thinned), bytes=before - self.size)
            said += (f": gave up checkpoints of {len(thinned)} trainings that did not win "
                     f"({(before - self.size) / 1e9:.3g} GB); their figures stay")
        if self.size > limit:
            said += (f"; the {self.size / 1e9:.3g} GB that are left may still be needed: raise it, or move old sweeps "
                     "and their trainings away")
        return said

    def _measure(self) -> None:
        with suppress(OSError):                              # no store yet
            self._sizes = {folder.name: size_of(folder) for folder in self.store.folder.iterdir()}

    def _expendable(self, decision: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
        """(trajectory, patterns of files), what is missed least first, older ones first."""
        try:
            uses = self._uses(decision)
        except OSError:                                      # what another sweep needs cannot be read
            return []
        keys = sorted(self._sizes, key=lambda key: (_modified(self.store.folder / key), key))
        return [(key, patterns) for wanted, patterns in TIERS for key in keys if uses.get(key, {"lost"}) <= wanted]

    def _uses(self, own: Mapping[str, Any]) -> dict[str, set[str]]:
        """What the sweeps of the output folder think of each trajectory; none that no sweep links to."""
        uses: dict[str, set[str]] = {}
        for path in self.output.iterdir():
            decision = own if path.name == self.name else _decision(SweepFolder(self.output, path.name))
            verdicts = _verdicts(decision) if decision else {}
            for trial, key in _links(path / "trials"):
                uses.setdefault(key, set()).add(verdicts.get(trial, "needed"))
        return uses

    def _remove(self, key: str, patterns: tuple[str, ...]) -> bool:
        """Whether there was something to remove; what somebody trains right now is left alone."""
        folder = self.store.folder / key
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        if not files:
            return False
        try:
            with self.store.lock(key).acquire(timeout=0):
                for file in files:
                    file.unlink(missing_ok=True)
        except (Timeout, OSError):
            return False
        self._sizes[key] = size_of(folder)
        return True


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; one that has several names there counts once."""
    files = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):                          # others write and rename here meanwhile
                status = Path(where, name).lstat()
                files[status.st_ino] = status.st_size
    return sum(files.values())


def _modified(folder: Path) -> float:
    try:
        return (folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0


def _links(folder: Path) -> Iterator[tuple[str, str]]:
    """(trial, trajectory) of a sweep; none in what is no sweep's folder. A link may go meanwhile."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for link in folder.iterdir():
            with suppress(FileNotFoundError):
                if link.is_symlink():
                    yield link.name, link.readlink().name


def _decision(folder: SweepFolder) -> dict[str, Any] | None:
    """A sweep's decision; None where it is at work, or was when it was killed or interrupted."""
    last = next((event for event in reversed(folder.events()) if event.get("event") != "thinned"), {})
    if (folder.path / ".lease").exists() or last.get("event") != "decided":
        return None
    try:
        decision = json.loads((folder.path / "decision.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return decision if isinstance(decision, dict) else None


def _verdicts(decision: Mapping[str, Any]) -> dict[str, str]:
    """Trial -> needed, lost, stopped or broken."""
    found: dict[str, str] = {}
    with suppress(KeyError, TypeError, AttributeError):  # somebody's own idea of a decision: what is not told is needed
        rule = decision["rule"]
        named = {rule["pick"], (rule["baseline"] or {}).get("arm")}
        for row in decision["candidates"]:
            verdict = row.get("standing", row["verdict"])
            use = ("needed" if verdict in KEPT or row["arm"] in named else "broken" if verdict in ("diverged", "failed")
                   else "stopped" if verdict.startswith("behind") else "lost")
            for number, trial in enumerate(row["trials"]):
                found[trial] = "lost" if number and use == "needed" else use     # a further seed is never exported
    return found
