"""The command line of every bench, and the process that watches over it.

A bench measures in a worker process, which names each case as it begins. Where a case outlasts its limit the
worker is killed, whatever C code it is in, the case becomes a row "too slow", and another worker goes on from
the rows on the disk. An interrupt or SIGTERM ends a bench at once; what was measured stays.

Exit status: 0 when every row asked for is there, 3 when the budget ended first (run again to go on), 2 for a
wrong argument, 1 when the worker or the device was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import render
from bench.results import ResultFile, Row

UNFINISHED = 3


@dataclass(frozen=True)
class Bench:
    """One bench, `python -m PACKAGE.NAME`.

    names: of its groups. groups: (arguments, settings) to name: (share of the budget, cases); it is called
    in the worker, imports what it measures, and raises ValueError for values that are not allowed. flags:
    adds those that no other bench has.
    """

    name: str
    summary: str
    names: Sequence[str]
    groups: Callable[[argparse.Namespace, Any], Any]
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    package: str = "bench"


def bench_main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; write NAME.jsonl and NAME.md; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser_of(bench).parse_args(argv)
    if arguments.inside is not None:
        from bench.runner import measure_all

        status = measure_all(bench, arguments)
    else:
        status = watch(bench, arguments, argv)
    if status != 2 and (arguments.inside or -1) < 0:
        folder = Path(arguments.out)
        rows = ResultFile(folder / f"{bench.name}.jsonl").rows
        (folder / f"{bench.name}.md").write_text(render(bench.name, rows), encoding="utf-8")
        bad = [row for row in rows if row["status"] in ("wrong", "error", "too slow")]
        for row in bad:
            print(f"{row['status']}: {row['key']}: {row['reason']}")
        print(f"{len(rows)} rows, {len(bad)} wrong, too slow or in error, in {folder}")
    return status


def watch(bench: Bench, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Let workers measure until all is there or the budget is over; return the exit status."""
    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore interrupts
        signal.signal(sign, signal.default_int_handler)
    command = [sys.executable, "-m", f"{bench.package}.{bench.name}", *argv]
    end, path = time.monotonic() + arguments.budget, Path(arguments.out) / f"{bench.name}.jsonl"
    budget = arguments.budget
    try:
        while True:
            status, row = run_worker([*command, "--budget", f"{budget:g}"])
            if row is None:
                return status
            ResultFile(path).append(row)
            print(f"{row['status']}: {row['key']}", flush=True)
            if row["status"] == "error":
                return 1
            budget = max(end - time.monotonic(), 1e-3)
    except KeyboardInterrupt:
        print("stopped")
        return UNFINISHED


def run_worker(command: Sequence[str]) -> tuple[int, Row | None]:
    """Run one worker to its end or to a case's limit; return its exit status, and the row that ended it."""
    read, write = os.pipe()
    process = subprocess.Popen([*command, "--inside", str(write)], pass_fds=(write,), process_group=0)
    os.close(write)
    try:
        row, late = follow(read)
        if row is not None and late:
            return UNFINISHED, row | {"status": "too slow", "reason": f"stopped after {row['limit']:.0f} s"}
        status = process.wait()
        if row is not None and status < 0:
            return 1, row | {"status": "error", "reason": f"the process ended by signal {-status}"}
        return status, None
    finally:
        os.close(read)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # with it, the compile workers that it started
        except ProcessLookupError:
            pass
        process.wait()


def follow(read: int) -> tuple[Row | None, bool]:
    """Follow a worker's cases; return the one in progress at the end, and whether it outlasted its limit."""
    row: Row | None = None
    end, rest = 0.0, b""
    while True:
        patience = None if row is None else max(0.0, end - time.monotonic())
        ready, _, _ = select.select([read], [], [], patience)
        if not ready:
            return row, True
        chunk = os.read(read, 1 << 16)
        if not chunk:
            return row, False
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            row = json.loads(lines[-1]) or None
            end = time.monotonic() + (row["limit"] if row else 0.0)


def parser_of(bench: Bench) -> argparse.ArgumentParser:
    """Return the flags of a bench."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{bench.name}", description=bench.summary)
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--out", default=f"out/{bench.name}", help="folder for rows and table (default: %(default)s)")
    add("--budget", type=float, default=540.0, help="seconds for all groups (default: %(default)s)")
    add("--only", metavar="GROUP,...", help=f"some of {','.join(bench.names)} (default: all)")
    add("--quick", action="store_true", help="a few small rows a group, to try the machinery out")
    add(
        "--again",
        action="store_true",
        help="measure rows that waited for a CPU over 5 %% of their time once more; the calmer one stays",
    )
    # The pipe on which a worker names its cases; without a number, measure here and unwatched.
    add("--inside", type=int, nargs="?", const=-1, help=argparse.SUPPRESS)
    bench.flags(parser)
    return parser
