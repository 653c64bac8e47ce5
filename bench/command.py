"""The command line of every bench, and the process that watches it.

A bench measures in a worker process, which announces each case before it begins. If a case exceeds its limit
or the budget, the worker is killed even inside C code, the case becomes a row "too slow", and another worker
continues from the rows on the disk. An interrupt or SIGTERM ends a bench at once; measured rows are kept.

Exit status: 0 if every requested row exists, 3 if the budget ended first (start again to continue), 2 for a
wrong argument, 1 if the worker or the device was lost, 130 after an interrupt, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import render
from bench.results import ResultFile, Row

UNFINISHED = 3
# Seconds that a case has even if less of the budget is left, and that a worker may take outside its cases.
MIN_CASE_SECONDS, STARTUP_SECONDS = 10.0, 60.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Bench:
    """One bench, `python -m PACKAGE.NAME`.

    group_names: the names of its groups. groups: called with (arguments, settings) in the worker; returns
    {name: (share of the budget, function of the settings that yields cases)}, and raises ValueError for
    values that are not allowed. add_flags: adds the flags of this bench only.
    """

    name: str
    summary: str
    group_names: Sequence[str]
    groups: Callable[[argparse.Namespace, Any], Any]
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    package: str = "bench"


def bench_main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Run a bench by its command line: write NAME.jsonl and NAME.md, and return the exit status."""
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
        failed = [row for row in rows if row["status"] in ("wrong", "error", "too slow")]
        for row in failed:
            print(f"{row['status']}: {row['key']}: {row['reason']}")
        print(f"{len(rows)} rows, {len(failed)} wrong, too slow or in error, in {folder}")
    return status


def watch(bench: Bench, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start workers until all rows exist or the budget is over; return the exit status."""
    interrupt_by_signals()
    command = [sys.executable, "-m", f"{bench.package}.{bench.name}", *argv]
    deadline, path = time.monotonic() + arguments.budget, Path(arguments.out) / f"{bench.name}.jsonl"
    budget = arguments.budget
    try:
        while True:
            status, row = run_worker([*command, "--budget", f"{budget:g}"], deadline + STARTUP_SECONDS)
            if row is None:
                return status
            ResultFile(path).append(row)
            print(f"{row['status']}: {row['key']}", flush=True)
            if row["status"] == "error":
                return 1
            budget = deadline - time.monotonic()
            if budget <= 0:
                return UNFINISHED
    except KeyboardInterrupt as interrupt:
        print("stopped")
        return status_of(interrupt)


def interrupt_by_signals() -> None:
    """Let SIGINT and SIGTERM raise a KeyboardInterrupt with the signal's number."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore interrupts
        signal.signal(sign, interrupt)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status that shells give a process ended by this signal."""
    return 128 + (interrupt.args or (signal.SIGINT,))[0]


@contextlib.contextmanager
def start_process(command: Sequence[str], *pipes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process whose threads wait passively; kill it and its children at the end of the block."""
    from admfast.host import wait_passively  # imports only the standard library

    wait_passively(environment := dict(os.environ))
    process = subprocess.Popen(command, pass_fds=pipes, process_group=0, env=environment)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # also ends its compile workers
        except ProcessLookupError:
            pass
        process.wait()


def supervise(command: Sequence[str], seconds: float) -> int:
    """Run a command until it ends, `seconds` have passed, or a signal comes; return the exit status."""
    interrupt_by_signals()
    try:
        with start_process(command) as process:
            return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return UNFINISHED
    except KeyboardInterrupt as interrupt:
        return status_of(interrupt)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends in any way (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_worker(command: Sequence[str], end: float) -> tuple[int, Row | None]:
    """Run one worker until it ends or a case exceeds its limit; return the exit status, and that case's row.

    The row is None if no case ended the worker. end: the time, by `time.monotonic`, at which the worker is
    stopped even between cases.
    """
    read, write = os.pipe()
    with open(read, "rb", buffering=0), start_process([*command, "--inside", str(write)], write) as process:
        os.close(write)
        row, late = follow_worker(read, end)
        if late and row is None:
            return UNFINISHED, None
        if row is not None and late:
            return UNFINISHED, row | {"status": "too slow", "reason": f"stopped after {row['limit']:.0f} s"}
        status = process.wait()
        if row is not None and status < 0:
            return 1, row | {"status": "error", "reason": f"the process was ended by signal {-status}"}
        return status, None


def follow_worker(read: int, deadline: float) -> tuple[Row | None, bool]:
    """Read a worker's announcements; return the row of the case it ended in, and whether time ran out.

    The row is None between cases. deadline: the time at which to return even between cases.
    """
    row: Row | None = None
    case_deadline, unread = deadline, b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, case_deadline - time.monotonic()))
        if not ready:
            return row, True
        chunk = os.read(read, 1 << 16)
        if not chunk:
            return row, False
        *lines, unread = (unread + chunk).split(b"\n")
        if lines:
            row = json.loads(lines[-1]) or None
            case_deadline = time.monotonic() + row["limit"] if row else deadline


def parser_of(bench: Bench) -> argparse.ArgumentParser:
    """Return the parser of a bench's command line."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{bench.name}", description=bench.summary)
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", default=f"out/{bench.name}", help="folder for rows and table (default: %(default)s)")
    add("--budget", type=float, default=540.0, help="seconds for all groups (default: %(default)s)")
    add("--only", metavar="GROUP,...", help=f"some of {','.join(bench.group_names)} (default: all)")
    add("--quick", action="store_true", help="a few small rows per group, to test the bench itself")
    add(
        "--again",
        action="store_true",
        help="measure again the rows that waited for a CPU for over 5 %% of their time; keep the calmer ones",
    )
    # The pipe on which a worker announces its cases; without a number, measure in this process, unwatched.
    add("--inside", type=int, nargs="?", const=-1, help=argparse.SUPPRESS)
    bench.add_flags(parser)
    return parser
