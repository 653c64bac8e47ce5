"""`python -m bench.gpu`: everything that needs a GPU, in one command that knows how long it may take.

Stages run one after another as processes of their own, each stopped when its share of the time is over. What
was reached is written to `gpu.json` as it goes; a second run into the same folder skips what is finished and
goes on with the rest. The Python it is run with is the one it tests: nothing is downloaded.

Exit status: 0 when nothing failed, 3 when nothing failed but something ran out of time (run it again), 1 when
something failed, 2 without a CUDA device or for a wrong argument, 130 and 143 after an interrupt and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.command import interrupt_by_signals, status_of
from bench.gpu.runner import exit_status, run_stages
from bench.gpu.stages import STAGES, Plan, choose
from bench.results import markdown_table

ENDING = 40.0  # seconds that a step which was stopped, and this program, may take to end


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the stages, print the table; returns the exit status."""
    arguments = _parser().parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.allow_cpu:
        print(f"bench.gpu: no CUDA device (torch {torch.__version__}); nothing was run", file=sys.stderr)
        return 2
    try:
        stages = choose(arguments.stages)
        budget = seconds(arguments.budget, arguments.minutes)
    except ValueError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    plan = Plan(Path(arguments.out).resolve(), "cuda" if cuda else "cpu")
    try:
        entries = run_stages(plan, stages, budget, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt as interrupt:
        print(f"bench.gpu: stopped; what was reached is in {plan.out}", file=sys.stderr)
        return status_of(interrupt)
    rows = [(name, e["status"], f"{e['seconds']:.0f} s", e.get("note", "")) for name, e in entries.items()]
    print("\n" + markdown_table(("stage", "status", "time", "note"), rows) + f"\nresults and log: {plan.out}")
    return exit_status(entries)


def seconds(budget: str | None, minutes: str) -> float:
    """Return the seconds to share among the stages; raises ValueError for what is no positive number."""
    name, text, unit = ("budget", budget, 1) if budget else ("minutes", minutes, 60)
    value = float(text) * unit
    if not value > 0:
        raise ValueError(f"{name}={text}: must be above 0")
    return value if budget else max(value - ENDING, value / 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    names = ",".join(stage.name for stage in STAGES)
    environ = os.environ.get
    parser.add_argument("--stages", default=environ("STAGES"), help=f"some of {names} (STAGES; default: all)")
    parser.add_argument(
        "--minutes",
        default=environ("MINUTES") or "10",
        help=f"minutes for all, the last {ENDING:g} s of them to end in (MINUTES; default: 10)",
    )
    parser.add_argument(
        "--budget", default=environ("BUDGET"), help="seconds for all, in place of minutes (BUDGET)"
    )
    parser.add_argument("--out", default=environ("OUT") or "out/gpu", help="folder (OUT; default: out/gpu)")
    parser.add_argument("--allow-cpu", action="store_true", help="run the stages on a CPU, to try them out")
    return parser


if __name__ == "__main__":
    interrupt_by_signals()
    sys.exit(main())
