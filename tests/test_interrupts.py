"""Tests that SIGTERM and SIGHUP end a block like Ctrl-C, and that a held-back signal ends it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from admfast.interrupts import delay_signals, signals_as_keyboard_interrupt

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
TWICE = """
import time
from admfast.interrupts import signals_as_keyboard_interrupt
with signals_as_keyboard_interrupt() as came:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("first", *came, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS[1:], ids=lambda number: number.name)
def test_the_first_raises_and_the_second_ends_the_process(number):
    command = [sys.executable, "-c", TWICE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"first {int(number)}\n"
        process.send_signal(number)
        assert process.wait(30) == -number


LOST = """
import sys, time
from admfast.interrupts import signals_as_keyboard_interrupt, declare_writing

class Part:
    def __del__(self):  # Python ignores exceptions here, as in callbacks of an import
        print("ready", flush=True)
        time.sleep(60)

with signals_as_keyboard_interrupt(process=True):
    try:
        if sys.argv[1] == "made":
            declare_writing()
            print("ready", flush=True)
            time.sleep(60)
        Part()
        print("went on", flush=True)
    except KeyboardInterrupt:
        print("raised", flush=True)
"""


@pytest.mark.parametrize("made", ["nothing", "made"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_that_has_made_nothing_ends_at_once(number, made):
    command = [sys.executable, "-c", LOST, made]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    if made == "made":
        assert (process.returncode, out, err) == (0, "raised\n", "")
    else:
        assert (process.returncode, out) == (128 + number, "")
        assert err.startswith("admfast: ") and number.name in err and err.count("\n") == 1


def test_handlers_come_back_and_those_of_others_stay():
    before = [signal.getsignal(number) for number in SIGNALS]
    for process in (False, True):
        with signals_as_keyboard_interrupt(process) as came:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert [signal.getsignal(number) for number in SIGNALS] == before and came == []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_keyboard_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[2])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_what_is_held_back_comes_after_the_block(number):
    done = False
    with pytest.raises(KeyboardInterrupt), signals_as_keyboard_interrupt(), delay_signals():
        os.kill(os.getpid(), number)
        done = True
    assert done


def test_other_threads_get_no_signals_and_set_no_handlers():
    found = []

    def run() -> None:
        with signals_as_keyboard_interrupt() as came, delay_signals():
            found.append(came)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]
