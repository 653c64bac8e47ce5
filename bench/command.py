"""The command line that every bench shares: device, folder, budget, groups; rows and a table at the end.

Exit status: 0 when every row asked for is there, 3 when the budget ended first (run again to go on), 2 for a
wrong argument, 1 when the device was lost.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.case import Settings
from bench.results import ResultFile, Row, device_name
from bench.runner import Groups, run, select

UNFINISHED = 3


@dataclass(frozen=True)
class Own:
    """What one bench has beside the flags of all: its own flags, and the groups that they come to.

    `groups` raises ValueError for values that are not allowed.
    """

    flags: Callable[[argparse.ArgumentParser], None]
    groups: Callable[[argparse.Namespace, Settings], Groups]


def bench_main(
    name: str,
    summary: str,
    groups: Groups,
    render: Callable[[Sequence[Row]], str],
    argv: Sequence[str] | None,
    after: Callable[[Sequence[Row], Path], None] | None = None,
    own: Own | None = None,
) -> int:
    """Parse the command line of `python -m bench.NAME`, measure, write NAME.jsonl and NAME.md.

    `after` is called with all rows and the folder at the end, for what a bench makes beside its table. With
    `own` flags the groups follow from them, and `groups` only lists their names. Returns the exit status.
    """
    parser = _parser(name, summary, groups)
    if own is not None:
        own.flags(parser)
    arguments = parser.parse_args(argv)
    try:
        settings = _settings(arguments)
        chosen = select(arguments.only, groups if own is None else own.groups(arguments, settings))
    except ValueError as error:
        print(f"bench.{name}: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    folder = Path(arguments.out)
    results = ResultFile(folder / f"{name}.jsonl")
    print(f"{device_name(settings.device)}: {','.join(chosen)} in {arguments.budget:g} s, to {folder}")
    left, status = 0, 0
    try:
        for report in run(settings, results, arguments.budget, chosen, say=_say):
            left += report.left
    except KeyboardInterrupt:
        print("stopped")
        status = UNFINISHED
    except RuntimeError as error:
        print(f"bench.{name}: the device is lost: {error}", file=sys.stderr)
        status = 1
    (folder / f"{name}.md").write_text(render(results.rows), encoding="utf-8")
    if after is not None:
        after(results.rows, folder)
    bad = [row for row in results.rows if row["status"] in ("wrong", "error")]
    for row in bad:
        _say(f"{row['status']}: {row['key']}: {row['reason']}")
    status = status or (UNFINISHED if left else 0)
    print(f"{len(results.rows)} rows, {left} left, {len(bad)} wrong or in error")
    return status


def run_as_program(main: Callable[[], int]) -> None:
    """Exit with the status of `main`; a stop from outside is an exception, so that the table is written."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


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


def _parser(name: str, summary: str, groups: Groups) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=summary)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        default=f"out/{name}",
        help=f"folder for {name}.jsonl and {name}.md (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds for all groups (default: %(default)s)"
    )
    parser.add_argument("--only", metavar="GROUP,...", help=f"some of {','.join(groups)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="a few small rows a group, to try the machinery out"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure rows that waited for a CPU over 5 %% of their time once more; the calmer one stays",
    )
    return parser
