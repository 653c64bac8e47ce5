"""`python -m bench.sampling`: the guided step of every preset, beside its peers and taken apart."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from bench.command import Bench, bench_main
from bench.sampling.flags import add_flags

SHARES = {"matmul": 0.05, "steps": 0.5, "start": 0.15, "ablation": 0.3}


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this bench."""
    add_flags(parser)
    parser.add_argument(
        "--ablate", action="store_true", help="also take our step apart: what each optimisation gives"
    )


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return the groups of a run with their part of the budget; the ablation only where it is asked for."""
    from bench.ops import products
    from bench.sampling import ablation, start
    from bench.sampling.choice import choose

    chosen = choose(arguments, settings)
    more = {"pairs": chosen.pairs, "precision": chosen.precisions[0], "compiled": chosen.compiled}
    cases = {
        "matmul": products.matmul_ceilings,
        "steps": chosen.cases,
        "start": functools.partial(start.cases, **more),
        "ablation": functools.partial(ablation.cases, **more),
    }
    return {name: (SHARES[name], cases[name]) for name in cases if name != "ablation" or arguments.ablate}


SUMMARY = "Measure the guided step of every preset at full size, on random weights, beside its peers."
main = functools.partial(bench_main, Bench("sampling", SUMMARY, tuple(SHARES), groups, flags))

if __name__ == "__main__":
    sys.exit(main())
