"""What ends a process early: Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, and can be held back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def like_ctrl_c() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM or SIGHUP; the next ends the process at once.

    Yields a list of the signal that came, if any. A signal that is ignored (as by nohup) or has a handler is
    left alone.
    """
    came: list[int] = []
    ours = [number for number in _in_this_thread() if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for one in ours:
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in ours:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold what would end the process early back until the block is done."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # None stands for a handler that was not set from Python, which could not be put back.
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
    """Return the signals that end a process, in the main thread, where alone they arrive; elsewhere none."""
    return ENDING if threading.current_thread() is threading.main_thread() else []
