"""Writes a sweep's page anew while it runs, so that it can be watched, at no cost to speak of."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress

LEAST_SECONDS = 15.0
SHARE = 0.02                         # of the time that may go into writing


class Watched:
    """``write(state)`` is called when it is due: at the first change, then when at least ``LEAST_SECONDS`` have gone by
    since, and as many as keep writing below ``SHARE`` of the time."""

    def __init__(self, write: Callable[[str], None], say: Callable[[str], None] = lambda text: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """``say`` is told, once, what kept a page from being written: a picture of a sweep is not worth the sweep."""
        self._write, self._say, self._clock = write, say, clock
        self._due = -float("inf")
        self._failed = False

    def changed(self) -> None:
        """Something happened in the sweep."""
        began = self._clock()
        if began >= self._due:
            self._try("running")
            ended = self._clock()
            self._due = ended + max(LEAST_SECONDS, (ended - began) / SHARE)

    def interrupted(self) -> None:
        """The sweep goes no further for now: the page says so, however new it is."""
        self._try("interrupted")

    def _try(self, state: str) -> None:
        try:
            self._write(state)
            _give_back()
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._say(f"the report could not be written: {type(error).__name__}: {error}")


def _give_back() -> None:
    """Return to the system what a page took: a dozen times its size, of which the C library would keep nearly all, and
    more with every trial that it tells of."""
    gc.collect()
    with suppress(OSError, AttributeError):     # not the GNU C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
