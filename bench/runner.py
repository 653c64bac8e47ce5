"""Runs the groups of a bench one after another, each inside its share of the budget, one row at a time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from bench.case import Case, Settings, Unavailable, WrongResult, first_line
from bench.results import Conditions, ResultFile, Row, environment, row_key

Cases = Callable[[Settings], Iterable[Case]]

# name: (share of the budget, its cases)
Groups = Mapping[str, tuple[float, Cases]]


@dataclass(frozen=True)
class GroupReport:
    """What became of one group: rows measured now, found from before, and left because its share was over."""

    name: str
    measured: int
    found: int
    left: int
    seconds: float


def select(only: str | None, groups: Groups) -> dict[str, tuple[float, Cases]]:
    """The groups named in a comma-separated text, all for None; raises ValueError on an unknown name."""
    if only is None:
        return dict(groups)
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in groups]
    if unknown or not names:
        raise ValueError(f"only={only!r}: the groups are {', '.join(groups)}")
    return {name: group for name, group in groups.items() if name in names}


def run(
    settings: Settings,
    results: ResultFile,
    budget: float,
    groups: Groups,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[GroupReport]:
    """Measure every case that has no final row yet, and report group by group.

    Args:
        settings: device and effort.
        results: the file rows go to; cases it already holds are skipped.
        budget: seconds for all groups together. A row that has begun is finished.
        groups: name to (share, cases).
        say: prints one line a group.
        clock: the present time in seconds.
    """
    end = clock() + budget
    weights = {name: weight for name, (weight, _) in groups.items()}
    fixed, conditions = environment(settings.device), Conditions(settings.device)
    for name, (weight, cases) in groups.items():
        begin = clock()
        deadline = begin + (end - begin) * weight / sum(weights.values())
        del weights[name]
        measured = found = left = 0
        for case in cases(settings):
            key = row_key(case.kind, case.dtype, case.provider, case.shape, fixed["device"])
            again = settings.again and results.disturbed(key)
            if results.done(key) and not again:
                found += 1
            elif clock() >= deadline and not case.measured():
                left += 1
            else:
                row = {"key": key, "group": name} | measure_case(case, settings) | fixed | conditions.now()
                if not again or row.get("waited", 1.0) < results.by_key[key]["waited"]:
                    results.append(row)
                measured += 1
        report = GroupReport(name, measured, found, left, clock() - begin)
        rest = f", {left} left for the next run" if left else ""
        say(f"{name}: {measured} rows in {report.seconds:.0f} s, {found} from before{rest}")
        yield report


def measure_case(case: Case, settings: Settings) -> Row:
    """The row of one case; whatever goes wrong in it becomes the row's status and reason.

    Raises:
        RuntimeError: the device itself is lost (an illegal access, say): every later row would be false.
    """
    row: Row = {"kind": case.kind, "dtype": case.dtype, "provider": case.provider, "shape": dict(case.shape)}
    row |= case.note
    try:
        row |= {"status": "ok"} | case.measure(settings)
    except Unavailable as error:
        row |= {"status": "none", "reason": str(error)}
    except WrongResult as error:
        row |= {"status": "wrong", "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        row |= {"status": "oom", "reason": first_line(error)}
    except Exception as error:  # a row must never cost the rows after it
        if _device_lost(error):
            raise
        full = "can't allocate memory" in str(error)  # how torch's CPU allocator says it
        row |= {
            "status": "oom" if full else "error",
            "reason": f"{type(error).__name__}: {first_line(error)}",
        }
    if row["status"] != "ok":
        gc.collect()  # a traceback keeps the tensors of its frames alive
    if settings.cuda:
        torch.cuda.empty_cache()
    return row


def _device_lost(error: Exception) -> bool:
    text = str(error)
    return any(
        sign in text
        for sign in ("CUDA error: an illegal", "device-side assert", "unspecified launch failure")
    )
