"""Ending in order: real processes that are sent real signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from autoenc.interrupts import RESERVE

# What a command does; it says when it is up.
WAITS = """
    print("up", flush=True)
    time.sleep(60)
"""
ENDS_IN = """
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep({})
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, subprocess, sys, time\n"
            "from autoenc.errors import command\n"
            "from autoenc.interrupts import leave_warnings_to_us, limited, take_signals\n"
            f"def main(arguments):\n{body}\n    return 0\ncommand(main)"]


@contextmanager
def running(body: str, *arguments: str, **more: object) -> Iterator[subprocess.Popen]:
    """The command, once it is up; a closed terminal is to be heard of, whether or not these tests run under nohup."""
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    with subprocess.Popen([*program(body), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          **more) as process:
        try:
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen, within: float = 10) -> str:
    """Its last words, once it has ended in order."""
    _, said = process.communicate(timeout=within)
    assert process.returncode == 130, said
    assert said.count("\n") >= 1 and "Traceback" not in said
    return said


def how_to_go_on(body: str, *arguments: str) -> str:
    return f": what was done is kept; go on with the same command: {shlex.join([*program(body), *arguments])}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2],
                         ids=lambda number: number.name)
def test_a_signal_ends_it_in_order_and_says_how_to_go_on(number):
    with running(WAITS, "--set", "a b=1") as process:
        process.send_signal(number)
        assert ended(process) == f"interrupted (by {number.name})" + how_to_go_on(WAITS, "--set", "a b=1")


def test_a_terminal_may_close_under_nohup():
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with running(WAITS, **ignoring) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        assert "(by SIGTERM)" in ended(process)


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGUSR2, signal.SIGTERM)])
def test_a_second_signal_ends_it_at_once(numbers):
    with running(ENDS_IN.format(60)) as process:
        process.send_signal(numbers[0])
        assert process.stdout.readline() == "ending\n"
        process.send_signal(numbers[1])
        asked = time.monotonic()
        assert process.wait(10) == -numbers[1] and time.monotonic() - asked < 0.5


@pytest.mark.parametrize("gap", [0, 0.001, 0.01])
def test_a_signal_that_comes_twice_counts_once(gap):
    """Ctrl-C reaches the whole group of a terminal, and launchers pass it on to what they launched."""
    with running(ENDS_IN.format(0.2)) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
        process.send_signal(signal.SIGINT)
        assert "(by SIGINT)" in ended(process)


def test_a_swallowed_reason_is_still_told():
    """A library on the way may raise an interruption anew, without its message."""
    body = """
    try:
        print("up", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None
"""
    with running(body) as process:
        process.send_signal(signal.SIGUSR1)
        assert ended(process).startswith("interrupted (by SIGUSR1): ")


def test_signals_that_a_library_took_are_taken_back():
    body = """
    signal.signal(signal.SIGTERM, lambda *more: None)
    take_signals()
    print("up", flush=True)
    time.sleep(60)
"""
    with running(body) as process:
        process.send_signal(signal.SIGTERM)
        assert "(by SIGTERM)" in ended(process)


def test_the_clock_ends_it_in_time():
    body = """
    with limited(0.9, "--wall-time 0.015") as deadline:
        assert 0 < deadline.left <= 0.6 and deadline.source == "--wall-time 0.015"
        print("up", flush=True)
        time.sleep(60)
"""
    began = time.monotonic()
    with running(body) as process:
        assert ended(process).startswith("interrupted (--wall-time 0.015 is nearly over): ")
    assert 0.6 <= time.monotonic() - began < 5


def test_a_clock_reserves_time_for_the_end():
    body = """
    for seconds, left in ((3600, 3600 - RESERVE), (30, 20)):
        with limited(seconds, "x") as deadline:
            assert left - 1 < deadline.left <= left
    with limited(None) as deadline:
        assert deadline is None
    print("up", flush=True)
""".replace("RESERVE", str(RESERVE))
    with running(body) as process:
        assert process.wait(10) == 0


def test_a_clock_that_is_not_needed_any_more_never_strikes():
    body = """
    with limited(0.3, "x"):
        pass
    print("up", flush=True)
    time.sleep(0.6)
"""
    with running(body) as process:
        assert process.wait(10) == 0


def test_the_clock_does_not_cut_short_an_ending():
    body = """
    with limited(1.2, "x"):
        try:
            print("up", flush=True)
            time.sleep(60)
        finally:
            time.sleep(1.2)
"""
    with running(body) as process:
        process.send_signal(signal.SIGINT)
        assert "(by SIGINT)" in ended(process)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_to_the_whole_job_ends_the_command_and_spares_what_it_started(number):
    """Its own processes are for the command to end, in order."""
    body = """
    leave_warnings_to_us()
    child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(1); print(7)"],
                             stdout=subprocess.PIPE)
    take_signals()
    assert child.stdout.readline() == b"child\\n"
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("the child said", child.communicate()[0], "and ended with", child.wait(), flush=True)
"""
    with running(body, start_new_session=True) as process:
        os.killpg(process.pid, number)
        said = process.stdout.readline()
        assert f"(by {number.name})" in ended(process)
    assert said == "the child said b'7\\n' and ended with 0\n"
