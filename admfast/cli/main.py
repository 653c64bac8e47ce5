"""The `admfast` command begins here, with nothing imported yet."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        from admfast.host import wait_passively

        if "torch" not in sys.modules:  # which alone reads it, when it is loaded
            wait_passively(os.environ)
        from admfast.cli.commands import run

        status = run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED:  # some versions of typer raise at Ctrl-C, others return this
        print("admfast: interrupted", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
