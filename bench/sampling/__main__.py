"""`python -m bench.sampling`: compare the guided step of every preset with its peers; measure its parts."""

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
        "--ablate", action="store_true", help="also measure the gain of each optimisation of our step"
    )


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return the groups with their shares of the budget; the ablation only with `--ablate`."""
    from bench.ops import matmul_and_conv
    from bench.sampling import ablation, startup
    from bench.sampling.choice import choose

    chosen = choose(arguments, settings)
    more = {"pairs": chosen.pairs, "precision": chosen.precisions[0], "compiled": chosen.compiled}
    cases = {
        "matmul": matmul_and_conv.matmul_ceilings,
        "steps": chosen.cases,
        "start": functools.partial(startup.cases, **more),
        "ablation": functools.partial(ablation.cases, **more),
    }
    return {name: (SHARES[name], cases[name]) for name in cases if name != "ablation" or arguments.ablate}


SUMMARY = "Compare the guided step of every preset at full size, on random weights, with its peers."
main = functools.partial(bench_main, Bench("sampling", SUMMARY, tuple(SHARES), groups, flags))

if __name__ == "__main__":
    sys.exit(main())
