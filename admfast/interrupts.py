"""Signals that end a process early: Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, or are delayed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNAL_STATUS = 128  # a process that a signal ended exits with this plus the signal's number


_writing_files = threading.Event()  # set once there is work that an immediate exit would leave half done


@contextlib.contextmanager
def signals_as_keyboard_interrupt(process: bool = False) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM or SIGHUP; the next ends the process at once.

    Yields a list that gets the number of that signal, if it comes. Signals that are ignored (as by nohup) or
    have a handler already are not changed.
    process: the process runs nothing but this block. Until the block calls `declare_writing`, the first
        signal, also Ctrl-C, ends the process at once: an exception raised during an import may be lost in a
        callback or printed by one, and nothing needs to be finished yet.
    """
    received: list[int] = []
    old_handlers = {number: signal.getsignal(number) for number in _catchable_signals()}
    default_handlers = {signal.SIG_DFL, signal.default_int_handler} if process else {signal.SIG_DFL}
    replaced_handlers = {
        number: handler for number, handler in old_handlers.items() if handler in default_handlers
    }

    def end(number: int, frame: FrameType | None) -> None:
        if process and not _writing_files.is_set():
            with contextlib.suppress(OSError):  # standard error is closed
                os.write(2, f"admfast: {interruption_text(number)}\n".encode())
            os._exit(SIGNAL_STATUS + number)
        if number != signal.SIGINT:
            received.append(number)
        for other_number, handler in replaced_handlers.items():
            signal.signal(other_number, handler)
        raise KeyboardInterrupt

    if process:
        _writing_files.clear()
    for number in replaced_handlers:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in replaced_handlers.items():
            signal.signal(number, handler)


def declare_writing() -> None:
    """Declare that files will now be written: from now on a signal raises KeyboardInterrupt in the block."""
    _writing_files.set()


def interruption_text(number: int) -> str:
    """Return the message about a process that a signal ended."""
    return f"interrupted by {signal.Signals(number).name}"


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Delay signals that would end the process until the block is done."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # getsignal returns None for a handler that was not set from Python, which can't be restored.
    old_handlers = {n: signal.getsignal(n) for n in _catchable_signals() if signal.getsignal(n) is not None}
    for number in old_handlers:
        signal.signal(number, record)
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def _catchable_signals() -> list[int]:
    """Return the signals that end a process; none outside the main thread, as only that one gets them."""
    return ENDING_SIGNALS if threading.current_thread() is threading.main_thread() else []
