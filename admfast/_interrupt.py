"""Ctrl-C while the command line is still importing torch: one line instead of a traceback.

Imported first of all. While a command starts, sys.argv[0] is "-m", then the path of `admfast/__main__.py`, or
that of the `admfast` script; in a program that merely imports the package nothing is changed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"admfast: interrupted\n")
    os._exit(INTERRUPTED)


def _is_a_command() -> bool:
    folder, name = os.path.split(sys.argv[0])
    of_the_package = name == "__main__.py" and os.path.basename(folder) == "admfast"
    return name == "-m" or os.path.splitext(name)[0] == "admfast" or of_the_package


def begin() -> None:
    """Leave at once on Ctrl-C, if this is the start of a command."""
    python_s_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if python_s_own and threading.current_thread() is threading.main_thread() and _is_a_command():
        signal.signal(signal.SIGINT, _leave)


def end() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, which keeps what is finished."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
