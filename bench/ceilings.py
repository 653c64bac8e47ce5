"""`python -m bench.ceilings`: measure the speed that this machine reaches with torch and not this package."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from bench.command import Bench, bench_main

NAMES = ("graph", "copy", "sampler", "matmul", "attention", "conv", "norm")


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return the groups in the order in which they run, with their shares of the budget.

    Time that a group does not use goes to the next ones, so the quick ones come first. Norms come last,
    because the time of their compilation is the least predictable.
    """
    from bench.ops import attention, matmul_and_conv, memory, norm, update

    cases = (memory.graphs, memory.copies, update.ceilings, matmul_and_conv.matmul_ceilings)
    cases += (attention.ceilings, matmul_and_conv.conv_ceilings, norm.ceilings)
    return dict(zip(NAMES, zip((0.02, 0.06, 0.06, 0.08, 0.2, 0.36, 0.22), cases, strict=True), strict=True))


BENCH = Bench("ceilings", "Measure the speed that this machine can reach.", NAMES, groups)
main = functools.partial(bench_main, BENCH)

if __name__ == "__main__":
    sys.exit(main())
