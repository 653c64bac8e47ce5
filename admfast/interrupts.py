"""Signals that end a process early: Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, or are delayed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALLED = 128  # plus the signal's number: the exit status of a process that a signal ended


_made = threading.Event()  # set once there is work that an immediate exit would leave half done


@contextlib.contextmanager
def like_ctrl_c(process: bool = False) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM or SIGHUP; the next ends the process at once.

    Yields a list that gets the number of that signal, if it comes. Signals that are ignored (as by nohup) or
    have a handler already are not changed.
    process: the process runs nothing but this block. Until the block calls `making`, the first signal, also
        Ctrl-C, ends the process at once: an exception raised during an import may be lost in a callback or
        printed by one, and nothing needs to be finished yet.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in _in_this_thread()}
    usual = {signal.SIG_DFL, signal.default_int_handler} if process else {signal.SIG_DFL}
    ours = {number: handler for number, handler in before.items() if handler in usual}

    def end(number: int, frame: FrameType | None) -> None:
        if process and not _made.is_set():
            with contextlib.suppress(OSError):  # standard error is closed
                os.write(2, f"admfast: {interrupted_by(number)}\n".encode())
            os._exit(SIGNALLED + number)
        if number != signal.SIGINT:
            came.append(number)
        for one, handler in ours.items():
            signal.signal(one, handler)
        raise KeyboardInterrupt

    if process:
        _made.clear()
    for number in ours:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def making() -> None:
    """Declare that files are about to be made: from now on a signal raises KeyboardInterrupt in the block."""
    _made.set()


def interrupted_by(number: int) -> str:
    """Return the message about a process that a signal ended."""
    return f"interrupted by {signal.Signals(number).name}"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delay signals that would end the process until the block is done."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # getsignal returns None for a handler that was not set from Python, which can't be restored.
    before = {n: signal.getsignal(n) for n in _in_this_thread() if signal.getsignal(n) is not None}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _in_this_thread() -> list[int]:
    """Return the signals that end a process; none outside the main thread, as only that one gets them."""
    return ENDING if threading.current_thread() is threading.main_thread() else []
