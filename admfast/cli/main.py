"""The `admfast` command begins here, with nothing imported yet."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence

from admfast.interrupts import ENDING, SIGNALLED, interrupted_by, like_ctrl_c

INTERRUPTED = SIGNALLED + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 for what the user can mend, 128 + the signal that ended it.

    SIGTERM and SIGHUP end a command as Ctrl-C does: what is finished stays. Where the process is the command
    (`argv` is None) they end it at once as long as it has made nothing.
    """
    _ready_streams()
    with like_ctrl_c(process=argv is None) as came:
        try:
            from admfast.host import wait_passively

            if "torch" not in sys.modules:  # which alone reads it, when it is loaded
                wait_passively(os.environ)
            from admfast.cli.commands import run

            status = run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            status = INTERRUPTED
    if status == INTERRUPTED and came:  # some versions of typer raise at Ctrl-C, others return this
        status = SIGNALLED + came[0]
    if status - SIGNALLED in ENDING:  # a training run answers signals itself, and returns the status
        print(f"admfast: {interrupted_by(status - SIGNALLED)}", file=sys.stderr)
    return status


def _ready_streams() -> None:
    """Let standard output and error take every text: what their encoding lacks (in a path) is escaped.

    One that is closed becomes the null device, so that no file gets its descriptor.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    raise SystemExit(main())
