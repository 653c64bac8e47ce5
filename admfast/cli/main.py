"""Entry point of the `admfast` command; it handles signals before anything slow is imported."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence

from admfast.interrupts import ENDING_SIGNALS, SIGNAL_STATUS, interruption_text, signals_as_keyboard_interrupt

INTERRUPTED = SIGNAL_STATUS + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    The status is 0, that of the command (`verify` returns 1 past its budget), 2 for an error that the user
    can fix, or 128 + the number of the signal that ended it. SIGTERM and SIGHUP end a command as Ctrl-C does:
    finished files stay. If the process is the command itself (`argv` is None), all three end it at once until
    it begins to write files.
    """
    _ready_streams()
    with signals_as_keyboard_interrupt(process=argv is None) as received:
        try:
            from admfast.host import wait_passively

            if "torch" not in sys.modules:  # only torch reads it, when it is imported
                wait_passively(os.environ)
            from admfast.cli.commands import run

            status = run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            status = INTERRUPTED
    if status == INTERRUPTED and received:  # some versions of typer raise at Ctrl-C, others return this
        status = SIGNAL_STATUS + received[0]
    # A training run handles signals itself and returns this status.
    if status - SIGNAL_STATUS in ENDING_SIGNALS:
        print(f"admfast: {interruption_text(status - SIGNAL_STATUS)}", file=sys.stderr)
    return status


def _ready_streams() -> None:
    """Make standard output and error accept all text: characters that their encoding lacks are escaped.

    A closed stream becomes the null device, so that no file opened later gets its descriptor.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    raise SystemExit(main())
