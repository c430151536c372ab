"""Ending in order when the person, the batch system or the clock asks for it; at once when asked again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Ctrl-C; the batch systems' ends and warnings (LSF sends SIGUSR2 at its run limit, Slurm SIGTERM, or what --signal
# asks for); a terminal that is closed.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
RESERVE = 20.0           # seconds before a limit at which everything is brought to its end, however far an epoch is
ECHO = 0.1               # seconds in which the first signal comes twice: from the terminal, and passed on by a wrapper


class Interrupted(KeyboardInterrupt):
    """Somebody wants it to end."""


@dataclass(frozen=True)
class Deadline:
    """When to have ended, on the monotonic clock, and who says so."""

    at: float
    source: str

    @property
    def left(self) -> float:
        """Seconds."""
        return self.at - time.monotonic()


class _Ending:
    """What is known in this process about its end. One for all: signals, too, are the process's."""

    reason = ""                          # why it ends; libraries on the way swallow an exception's message
    clock: threading.Timer | None = None


def interrupted_by() -> str:
    """Who or what ended this process, in words; empty where nobody has."""
    return _Ending.reason


def interrupt(reason: str) -> Interrupted:
    """The exception to raise for a reason; nothing else interrupts the ending then."""
    _Ending.reason = _Ending.reason or reason
    if _Ending.clock is not None:
        _Ending.clock.cancel()
    return Interrupted(_Ending.reason)


def take_signals() -> None:
    """The first signal raises :class:`Interrupted` in the main thread; a second one has its own way, and ends the
    process there and then. To be called again where a library took a signal for itself."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:       # nohup: may the terminal close
            signal.signal(number, _end)


def leave_warnings_to_us() -> None:
    """Let the processes that are started next ignore a batch system's warnings, which reach every process of a job and
    would end them: it is for this one to end them in order. :func:`take_signals` is to follow."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)            # inherited


def _end(number: int, frame: Any) -> None:
    ours = [other for other in SIGNALS if signal.getsignal(other) == _end]
    for other in ours:
        signal.signal(other, signal.SIG_IGN)
    time.sleep(ECHO)
    for other in ours:
        signal.signal(other, signal.SIG_DFL)
    raise interrupt(f"by {signal.Signals(number).name}")


@contextmanager
def limited(seconds: float | None, source: str = "") -> Iterator[Deadline | None]:
    """Interrupt what is still running shortly before the limit is reached; None: there is none."""
    if seconds is None:
        yield None
        return
    seconds = max(seconds - RESERVE, seconds * 2 / 3)

    def reached() -> None:
        _Ending.reason = _Ending.reason or f"{source} is nearly over"
        os.kill(os.getpid(), signal.SIGTERM)

    _Ending.clock = threading.Timer(seconds, reached)
    _Ending.clock.daemon = True
    _Ending.clock.start()
    try:
        yield Deadline(time.monotonic() + seconds, source)
    finally:
        _Ending.clock.cancel()
