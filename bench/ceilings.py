"""`python -m bench.ceilings`: measure what this machine can do, with torch and Triton's timer only."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from bench.command import Bench, bench_main

NAMES = ("graph", "copy", "sampler", "matmul", "attention", "conv", "norm")


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return the groups in the order they run, with their part of the budget.

    What a group leaves over goes to those after it, so the quick ones come first; compiled norms come last,
    because a compilation is the least predictable.
    """
    from bench.ops import attention, memory, norm, products, update

    cases = (memory.graphs, memory.copies, update.ceilings, products.matmul_ceilings)
    cases += (attention.ceilings, products.conv_ceilings, norm.ceilings)
    return dict(zip(NAMES, zip((0.02, 0.06, 0.06, 0.08, 0.2, 0.36, 0.22), cases, strict=True), strict=True))


BENCH = Bench("ceilings", "Measure what this machine can do.", NAMES, groups)
main = functools.partial(bench_main, BENCH)

if __name__ == "__main__":
    sys.exit(main())
