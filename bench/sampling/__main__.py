"""`python -m bench.sampling`: the guided step of every preset (shared flags: `bench.command`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.case import Settings
from bench.ceilings import matmul
from bench.command import Own, bench_main, run_as_program
from bench.results import Row
from bench.runner import Groups
from bench.sampling import ablation, startup
from bench.sampling.choice import add_flags, choose
from bench.sampling.report import plot, render

# Names and parts of the budget; what they measure follows from the flags.
SHARES = {"matmul": 0.05, "steps": 0.5, "start": 0.15, "ablation": 0.3}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write rows, tables and plot; returns the exit status."""
    names: Groups = {name: (share, lambda settings: ()) for name, share in SHARES.items()}
    summary = "Measure the guided step of every preset at full size, on random weights, beside its peers."
    return bench_main("sampling", summary, names, render, argv, _after, Own(_flags, _groups))


def _flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument(
        "--ablate", action="store_true", help="also take our step apart: what each optimisation gives"
    )


def _groups(arguments: argparse.Namespace, settings: Settings) -> Groups:
    """The groups of a run; the ablation only where it is asked for."""
    chosen = choose(arguments, settings)
    first = chosen.precisions[0]
    found: Groups = {
        "matmul": (SHARES["matmul"], matmul.cases),
        "steps": (SHARES["steps"], chosen.cases),
        "start": (SHARES["start"], lambda s: startup.cases(s, chosen.pairs, first, chosen.compiled)),
    }
    if not arguments.ablate:
        return found
    more = (SHARES["ablation"], lambda s: ablation.cases(s, chosen.pairs, first, chosen.compiled))
    return {**found, "ablation": more}


def _after(rows: Sequence[Row], folder: Path) -> None:
    plot(rows, folder)


if __name__ == "__main__":
    run_as_program(main)
