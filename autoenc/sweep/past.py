"""What earlier runs of a sweep wrote down in its events.jsonl, as far as a new run has to honour it.

The file may have been cut or edited: an event that lacks something is passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from autoenc.sweep.asha import Stop


class Past:
    """The events of earlier runs, in order."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.events = [event for event in events if isinstance(event, Mapping)]

    def stops(self, metric: str) -> dict[str, Stop]:
        """The stop of every run that was stopped by this figure and not continued afterwards, by the run's id."""
        stops: dict[str, Stop] = {}
        for event in self.events:
            key = event.get("key")
            if event.get("event") == "continued" and isinstance(key, str):
                stops.pop(key, None)
            elif event.get("event") == "stopped" and isinstance(key, str) and event.get("metric") == metric:
                stop = _stop(event)
                if stop is not None:
                    stops[key] = stop
        return stops

    def passed(self, metric: str) -> set[tuple[Any, Any]]:
        """(run, epoch) of every rung at which a run was let go on, so that it is not judged there once more."""
        return {(event.get("key"), event.get("epoch")) for event in self.events
                if isinstance(event.get("key"), str) and type(event.get("epoch")) is int
                and (event.get("event"), event.get("metric", metric)) in (("passed", metric), ("continued", metric))}

    def points(self) -> list[tuple[dict[str, Any], Any]]:
        """The settings of all points that were tried beyond the arms, each with where it is from; None: drawn."""
        return [(event["settings"], event.get("from")) for event in self.events
                if event.get("event") == "suggested" and isinstance(event.get("settings"), dict)]

    def homes(self) -> dict[int, str]:
        """The kind of GPU that the trials of each seed were last kept to."""
        return {event["seed"]: event["kind"] for event in self.events if event.get("event") == "seed placed"
                and type(event.get("seed")) is int and isinstance(event.get("kind"), str)}

    def told(self, kind: str, **content: Any) -> bool:
        """Whether there is an event of this kind with this content."""
        return any(event.get("event") == kind and all(event.get(key) == value for key, value in content.items())
                   for event in self.events)


def _stop(event: Mapping[str, Any]) -> Stop | None:
    epoch, beaten_by = event.get("epoch"), event.get("beaten_by")
    numbers = [event.get(name) for name in ("value", "cutoff", "best")]
    if type(epoch) is not int or not isinstance(beaten_by, list) or not all(map(_is_number, numbers)):
        return None
    return Stop(epoch, *numbers, tuple(key for key in beaten_by if isinstance(key, str)))


def _is_number(value: Any) -> bool:
    """Whether a value can be reckoned with: finite, and no integer beyond all floats."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
