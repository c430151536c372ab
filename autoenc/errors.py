"""The one exception for input that a person can put right."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

from autoenc.interrupts import interrupted_by, take_signals


class InputError(Exception):
    """What was given (command, sweep file, configuration, data, cluster) is wrong: exit code 2.

    The message names the file, the key and the value, in words for the person who wrote them.
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` where a known name is near, else the known names if they are few."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(known)})" if 0 < len(known) <= 30 else ""


def command(main: Callable[[list[str]], int], interrupted: str = "") -> None:
    """Run a command's ``main(arguments)`` and end the process with the exit codes all commands share:
    2 for wrong input, told in one message without a traceback; 130 when interrupted. ``interrupted``: what is to be
    said then of a command that does not go on where it was."""
    take_signals()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        reason = interrupted_by()
        with suppress(OSError):             # the terminal may be what went
            kept = interrupted or f"what was done is kept; go on with the same command: {shlex.join(sys.orig_argv)}"
            print(f"interrupted{f' ({reason})' if reason else ''}: {kept}", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:
        code = _reader_left()
    except OSError as error:
        # A full disk, a folder that vanished: what is written stays readable.
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was done is kept", file=sys.stderr)
        code = 1
    sys.exit(code)


def _reader_left() -> int:
    """The reader of a pipe (head, less) left: not an error, but the interpreter would flush again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
