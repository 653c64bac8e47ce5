"""`python -m bench.gpu`: build, test and measure everything that needs a GPU, within a given time.

Each step runs in a separate process, one after another, and is stopped at its limit or when the time is over.
The result of each step is written to `gpu.json` when it ends. When started again with the same folder, it
skips the steps that passed and continues with the others. It tests the Python that runs it, and downloads
nothing.

Exit status: 0 if nothing failed, 1 if something failed, 2 without a CUDA device or for a wrong argument, 3 if
nothing failed but something ran out of time (start it again), 130 after an interrupt, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.command import interrupt_by_signals, status_of
from bench.gpu.runner import exit_status, run_steps
from bench.gpu.stages import STAGES, Plan, choose
from bench.results import markdown_table

SECONDS_TO_END = 40.0  # seconds that are reserved for ending the last step and this program


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the steps, print the table; return the exit status."""
    arguments = _parser().parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.allow_cpu:
        print(f"bench.gpu: no CUDA device (torch {torch.__version__}); nothing was run", file=sys.stderr)
        return 2
    plan = Plan(Path(arguments.out).resolve(), "cuda" if cuda else "cpu")
    try:
        steps = choose(arguments.stages, plan)
        seconds = 60 * float(arguments.minutes)
        if not seconds > 0:
            raise ValueError(f"minutes={arguments.minutes}: must be above 0")
    except ValueError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    try:
        entries = run_steps(plan, steps, max(seconds - SECONDS_TO_END, seconds / 2))
    except KeyboardInterrupt as interrupt:
        print(f"bench.gpu: stopped; the results so far are in {plan.out}", file=sys.stderr)
        return status_of(interrupt)
    rows = [(name, e["status"], f"{e['seconds']:.0f} s", e["note"]) for name, e in entries.items()]
    print("\n" + markdown_table(("step", "status", "time", "note"), rows) + f"\nresults and log: {plan.out}")
    return exit_status(entries)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)} (default: all)")
    minutes = f"minutes for all, including {SECONDS_TO_END:g} seconds to end (default: 10)"
    parser.add_argument("--minutes", default="10", help=minutes)
    parser.add_argument("--out", default="out/gpu", help="folder for results and log (default: out/gpu)")
    parser.add_argument(
        "--allow-cpu", action="store_true", help="run the stages on a CPU, to test this command"
    )
    return parser


if __name__ == "__main__":
    interrupt_by_signals()
    sys.exit(main())
