"""Measure the groups of a bench one after another, each within its share of the budget, row by row."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.command import MIN_CASE_SECONDS, UNFINISHED, Bench, end_with_parent
from bench.measure import Case, Settings, first_line
from bench.results import ResultFile, Row, conditions, environment, is_final, row_key, was_disturbed

# name: (share of the budget, its cases)
Groups = Mapping[str, tuple[float, Callable[[Settings], Iterable[Case]]]]

# A row's status by the name of the error's class, as the package and the benches each have an `Unavailable`.
STATUS = {
    "Unavailable": "none",
    "WrongResult": "wrong",
    "TooSlow": "too slow",
    "OutOfMemoryError": "oom",
    "MemoryError": "oom",
}
DEVICE_LOST_SIGNS = ("CUDA error: an illegal", "device-side assert", "unspecified launch failure")


@dataclass(frozen=True)
class GroupReport:
    """Numbers of rows of one group: measured now, found from before, and left because the time was over."""

    name: str
    measured: int
    found: int
    left: int


def measure_all(bench: Bench, arguments: argparse.Namespace) -> int:
    """Measure the groups that the arguments name, and return the exit status.

    A worker (`--inside FD`) announces each case on that pipe, and ends when its parent ends.
    """
    watched = arguments.inside >= 0
    if watched:
        end_with_parent()

    def begin(row: Row) -> None:
        if watched:
            os.write(arguments.inside, json.dumps(row).encode() + b"\n")

    try:
        settings = settings_of(arguments)
        groups = select(arguments.only, bench.groups(arguments, settings))
    except ValueError as error:
        print(f"bench.{bench.name}: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    results = ResultFile(Path(arguments.out) / f"{bench.name}.jsonl")
    try:
        reports = list(run(settings, results, arguments.budget, groups, begin))
    except RuntimeError as error:
        print(f"bench.{bench.name}: the device is lost: {error}", file=sys.stderr)
        return 1
    return UNFINISHED if any(report.left for report in reports) else 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings of the arguments; raise ValueError for a value that is not allowed."""
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


def select(only: str | None, groups: Groups) -> Groups:
    """Return the groups in a comma-separated text, all for None; raise ValueError for an unknown name."""
    if only is None:
        return groups
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names or set(names) - set(groups):
        raise ValueError(f"only={only!r}: the groups are {', '.join(groups)}")
    return {name: group for name, group in groups.items() if name in names}


def run(
    settings: Settings,
    results: ResultFile,
    budget: float,
    groups: Groups,
    begin: Callable[[Row], None] = lambda row: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[GroupReport]:
    """Measure every case that has no final row yet, and report group by group.

    Args:
        settings: device and effort.
        results: the file for the rows; cases that it already has are skipped. If one of the cases that are
            measured together is missing, all of them are measured again, so that their ratios fit.
        budget: seconds for all groups together. A row that has begun may take all that is left of them.
        groups: {name: (share, cases)}. Time that a group does not use goes to the following groups.
        begin: called with the first fields of a case's row and its limit in seconds when the case begins, and
            with {} when it has ended.
        clock: returns the present time in seconds.
    """
    end, shares = clock() + budget, {name: share for name, (share, _) in groups.items()}
    fixed_fields = environment(settings.device)

    def limit(case: Case) -> float:
        return min(case.limit, max(MIN_CASE_SECONDS, end - clock()))

    for name, (share, cases) in groups.items():
        deadline = clock() + (end - clock()) * share / sum(shares.values())
        del shares[name]
        counts = {"measured": 0, "found": 0, "left": 0}

        def announce(case: Case, name: str = name) -> None:
            row = _initial_fields(case, name, fixed_fields) | {"limit": limit(case)}
            begin(row | fixed_fields | conditions(settings.device))

        for _, unit in itertools.groupby(cases(settings), lambda case: case.measured_with or case):
            rows = [(case, _initial_fields(case, name, fixed_fields)) for case in unit]
            old_rows = [results.by_key.get(row["key"], {"status": ""}) for _, row in rows]
            if all(
                is_final(old, case.limit) and not (settings.again and was_disturbed(old))
                for (case, _), old in zip(rows, old_rows, strict=True)
            ):
                counts["found"] += len(rows)
                continue
            if clock() >= deadline:
                counts["left"] += len(rows)
                continue
            waiting = []
            for (case, row), old in zip(rows, old_rows, strict=True):
                # A case that can't be measured is not tried again when the others of its unit are.
                if case.measured_with and old["status"] != "ok" and is_final(old, case.limit):
                    case.measured_with.leave_out(case)
                    counts["found"] += 1
                else:
                    waiting.append((case, row, old))
            for case, row, old in waiting:
                announce(case)
                row |= measure_case(case, dataclasses.replace(settings, begin=announce, limit=limit(case)))
                begin({})
                row |= fixed_fields | conditions(settings.device)
                if old["status"] != "ok" or not settings.again or row.get("waited", 1.0) < old["waited"]:
                    results.append(row)
                counts["measured"] += 1
        left_text = f", {counts['left']} left for the next run" if counts["left"] else ""
        print(f"{name}: {counts['measured']} rows, {counts['found']} from before{left_text}", flush=True)
        yield GroupReport(name, **counts)


def _initial_fields(case: Case, group: str, fixed: Row) -> Row:
    """Return the fields of a case's row that are known before it is measured."""
    key = row_key(case.kind, case.dtype, case.provider, case.shape, fixed["device"], fixed["torch"])
    row: Row = {"key": key, "group": group, "kind": case.kind, "dtype": case.dtype}
    return row | {"provider": case.provider, "shape": dict(case.shape)} | case.note


def measure_case(case: Case, settings: Settings) -> Row:
    """Return the fields of one case's row; any error becomes the row's status and reason.

    Raises:
        RuntimeError: the device is lost, for example after an illegal access: all later rows would be wrong.
    """
    row: Row
    try:
        row = {"status": "ok"} | case.measure(settings)
    except Exception as error:  # the failure of one row must not prevent the next ones
        if any(sign in str(error) for sign in DEVICE_LOST_SIGNS):
            raise
        full = "can't allocate memory" in str(error)  # the message of torch's CPU allocator
        status = "oom" if full else STATUS.get(type(error).__name__, "error")
        kind = f"{type(error).__name__}: " if status == "error" else ""
        row = {"status": status, "reason": kind + first_line(error)}
        if status == "too slow":
            row["limit"] = settings.limit
    gc.collect()  # a traceback keeps the tensors of its frames alive
    if settings.cuda:
        torch.cuda.empty_cache()
    return row
