"""A bench with a case that never returns to Python, for tests of the watching process."""

from __future__ import annotations

import functools
import sys
from typing import Any

from bench.command import Bench, bench_main


def groups(arguments: Any, settings: Any) -> Any:
    """Return two quick cases and, between them, one that waits in C code."""
    import ctypes

    from bench.measure import Case

    def quick(settings: Any) -> dict[str, Any]:
        return {"ms": 1.0}

    def hang(settings: Any) -> dict[str, Any]:
        if arguments.crash:
            ctypes.CDLL(None).abort()
        ctypes.PyDLL(None).pause()  # holds the interpreter's lock: no Python signal handler runs
        return {}

    def cases(settings: Any) -> Any:
        for name in ("first", "hangs", "last"):
            measure, limit = (hang, arguments.limit) if name == "hangs" else (quick, 60.0)
            yield Case("kind", "fp32", name, {}, measure, limit=limit)

    return {"a": (1.0, cases)}


def flags(parser: Any) -> None:
    """Add flags for the time limit of the hanging case, and for a crash in its place."""
    parser.add_argument("--limit", type=float, default=1.0)
    parser.add_argument("--crash", action="store_true")


main = functools.partial(bench_main, Bench("hanging", "A test.", ("a",), groups, flags, "tests.bench"))

if __name__ == "__main__":
    sys.exit(main())
