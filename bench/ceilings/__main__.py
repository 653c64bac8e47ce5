"""`python -m bench.ceilings`: measure what this machine can do (the flags are those of `bench.command`)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ceilings.groups import GROUPS
from bench.ceilings.report import render
from bench.command import UNFINISHED, bench_main, run_as_program

__all__ = ["UNFINISHED", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write the rows and the table; returns the exit status."""
    return bench_main("ceilings", "Measure what this machine can do.", GROUPS, render, argv)


if __name__ == "__main__":
    run_as_program(main)
