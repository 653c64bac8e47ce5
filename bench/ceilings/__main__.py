"""`python -m bench.ceilings`: measure what this machine can do.

Exit status: 0 when every row asked for is there, 3 when the budget ended first (run again to go on), 2 for a
wrong argument, 1 when the device was lost.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.ceilings.case import Settings
from bench.ceilings.report import render
from bench.ceilings.runner import GROUPS, run, select
from bench.results import ResultFile, device_name

UNFINISHED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write the rows and the table; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        groups = select(arguments.only)
        settings = _settings(arguments)
    except ValueError as error:
        print(f"bench.ceilings: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    folder = Path(arguments.out)
    results = ResultFile(folder / "ceilings.jsonl")
    print(f"{device_name(settings.device)}: {','.join(groups)} in {arguments.budget:g} s, to {folder}")
    left, status = 0, 0
    try:
        for report in run(settings, results, arguments.budget, groups, say=_say):
            left += report.left
    except KeyboardInterrupt:
        print("stopped")
        status = UNFINISHED
    except RuntimeError as error:
        print(f"bench.ceilings: the device is lost: {error}", file=sys.stderr)
        status = 1
    (folder / "ceilings.md").write_text(render(results.rows), encoding="utf-8")
    bad = [row for row in results.rows if row["status"] in ("wrong", "error")]
    for row in bad:
        _say(f"{row['status']}: {row['key']}: {row['reason']}")
    status = status or (UNFINISHED if left else 0)
    print(f"{len(results.rows)} rows, {left} left, {len(bad)} wrong or in error")
    return status


def _say(line: str) -> None:
    print(line, flush=True)


def _settings(arguments: argparse.Namespace) -> Settings:
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device")
    if arguments.budget <= 0:
        raise ValueError(f"budget={arguments.budget}: must be above 0 seconds")
    seconds = 0.02 if arguments.quick else 0.06 if device.type == "cuda" else 0.3
    return Settings(device, seconds, arguments.quick, arguments.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        default="out/ceilings",
        help="folder for ceilings.jsonl and ceilings.md (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds for all groups (default: %(default)s)"
    )
    parser.add_argument("--only", metavar="GROUP,...", help=f"some of {','.join(GROUPS)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="a few small rows a group, to try the machinery out"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure rows that waited for a CPU over 5 %% of their time once more; the calmer one stays",
    )
    return parser


if __name__ == "__main__":
    # A stop from outside is then an exception too, and the table of what was measured is still written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
