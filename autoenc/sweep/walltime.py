"""How long this process may still run: by ``--wall-time``, and by the batch job that it runs in (Slurm, LSF).

A limit that a scheduler does not tell, or tells in a way not known here, is none: asking never fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from autoenc.errors import InputError

LONGEST = 364 * 86400           # seconds; Slurm gives a job without limit an end time 365 days after its start
ANSWER_SECONDS = 5.0            # for a scheduler's command; the commands themselves wait minutes for a lost controller

_MINUTES = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_CLOCK = re.compile(r"([0-9]+):([0-9]+):([0-9]+)")
_DAYS = re.compile(r"([0-9]+)-([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")
_SHORT = re.compile(r"([0-9]+):([0-9]+)")
# ``0:57 L``; with LSB_HMS_TIME_FORMAT=Y ``00:57:00 L``
_LSF = re.compile(r"([0-9]+):([0-9]+)(?::([0-9]+))?(?:\s*([A-Z]))?")


@dataclass(frozen=True)
class Limit:
    """An end that is set from outside."""

    seconds: float              # left from now, 0 or more
    source: str                 # in words: "--wall-time 90", "Slurm job 1234", "LSF job 77"


def time_left(option: str | None, environ: Mapping[str, str] = os.environ) -> Limit | None:
    """The nearer of ``--wall-time``'s limit (None: not given), counted from now, and the batch job's own.

    None where there is neither. Raises :class:`InputError` as :func:`parse_wall_time` does.
    """
    given = None if option is None else Limit(parse_wall_time(option), f"--wall-time {option}")
    limits = [limit for limit in (given, job_limit(environ)) if limit is not None]
    return min(limits, key=lambda limit: limit.seconds, default=None)


def parse_wall_time(text: str) -> float:
    """Seconds, more than 0, from minutes (``90``, ``1.5``) or from Slurm's ``H:MM:SS`` and ``D-HH[:MM[:SS]]``.

    Raises :class:`InputError` for anything else, and for more than 364 days. ``10:30`` is refused: to Slurm these are
    minutes and seconds, to LSF hours and minutes.
    """
    given = text.strip()
    if _MINUTES.fullmatch(given):
        seconds = 60 * float(given)
    elif (found := _CLOCK.fullmatch(given)):
        seconds = _seconds(0, *found.groups())
    elif (found := _DAYS.fullmatch(given)):
        seconds = _seconds(*found.groups())
    elif (found := _SHORT.fullmatch(given)):
        first, last = found.groups()
        raise InputError(f"--wall-time {text}: minutes and seconds to Slurm, hours and minutes to LSF: "
                         f"write 0:{first}:{last} or {given}:00")
    else:
        raise InputError(f"--wall-time {text}: should be minutes (90), or H:MM:SS (1:30:00), or D-HH:MM (1-12:00)")
    if not 0 < seconds <= LONGEST:
        raise InputError(f"--wall-time {text}: should be more than 0, and {LONGEST // 86400} days at most")
    return seconds


def job_limit(environ: Mapping[str, str] = os.environ) -> Limit | None:
    """The limit of the batch job that this environment belongs to; None outside of one, and where it has none or cannot
    be asked within seconds."""
    return _slurm_limit(environ) or _lsf_limit(environ)


def _slurm_limit(environ: Mapping[str, str]) -> Limit | None:
    job = environ.get("SLURM_JOB_ID", "")
    if not _is_number(job):
        return None
    end = environ.get("SLURM_JOB_END_TIME")                   # Slurm 23.02 and later
    if end is not None:
        seconds = float(end) - time.time() if _is_number(end) else 0.0
        if not 0 < seconds <= LONGEST:
            return None                                       # the environment of a job that is over, or has no limit
    else:
        array, index = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
        # The last task of an array has the array's own number, which stands for all of them.
        asked = f"{array}_{index}" if _is_number(array) and _is_number(index) else job
        seconds = parse_slurm_time_left(_ask(["squeue", "-h", "-j", asked, "-o", "%L"], environ))
    return None if seconds is None else Limit(seconds, f"Slurm job {job}")


def _lsf_limit(environ: Mapping[str, str]) -> Limit | None:
    job, index = environ.get("LSB_JOBID", ""), environ.get("LSB_JOBINDEX", "0")
    if not _is_number(job):
        return None
    if _is_number(index) and int(index):                      # a job array's element; 0 for other jobs
        job = f"{job}[{index}]"
    seconds = parse_lsf_time_left(_ask(["bjobs", "-noheader", "-o", "time_left", job], environ))
    return None if seconds is None else Limit(seconds, f"LSF job {job}")


def parse_slurm_time_left(text: str) -> float | None:
    """Seconds from what ``squeue -o %L`` prints for one job: ``[D-][HH:]MM:SS``; None for ``UNLIMITED``, ``NOT_SET``,
    ``INVALID`` (beyond the limit) and whatever else it may print."""
    text = text.strip()
    if (found := _SHORT.fullmatch(text)):
        return _believable(_seconds(0, 0, *found.groups()))
    if (found := _CLOCK.fullmatch(text)):
        return _believable(_seconds(0, *found.groups()))
    if (found := _DAYS.fullmatch(text)) and found[4]:
        return _believable(_seconds(*found.groups()))
    return None


def parse_lsf_time_left(text: str) -> float | None:
    """Seconds from what ``bjobs -o time_left`` prints for one job: ``H:M L``, rounded down to the minute by LSF.

    ``L`` and ``X`` come with the time to the run limit. ``E`` comes with the time to an estimate (``bsub -We``) that is
    nearer; LSF ends no job there, and does not tell its limit: None, as for ``-`` (no limit) and whatever else it may
    print. Source: IBM Spectrum LSF 10.1, bjobs, TIME_LEFT.
    """
    found = _LSF.fullmatch(text.strip())
    if not found or found[4] not in (None, "L", "X"):
        return None
    return _believable(_seconds(0, found[1], found[2], found[3]))


def _seconds(days: str | int, hours: str | int, minutes: str | None, seconds: str | None) -> float:
    # Not int: Python refuses to read one of thousands of digits, which a float takes for infinity.
    return 86400 * float(days) + 3600 * float(hours) + 60 * float(minutes or 0) + float(seconds or 0)


def _believable(seconds: float) -> float | None:
    return seconds if seconds <= LONGEST else None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def _ask(command: list[str], environ: Mapping[str, str]) -> str:
    """What a scheduler's command prints; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=ANSWER_SECONDS, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
