"""Trace one call of `Pipeline.sample` and print the files that it enters and the records that carry it.

    python -m tests.tools.trace_sample [--first]

Every Python frame of the package counts, from `Pipeline.sample` to the update op and back, except those
inside a network (its forward and its fold), the classifier's gradient and the ops. The rows of a solver are
kept between calls, so the second call is traced. `--first` traces the first call, which makes the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline

PACKAGE = f"{Path(__file__).resolve().parents[2]}/admfast/"
# Files of networks, the classifier's gradient and ops. Their frames, and all that they call, don't count.
BELOW = ("models/", "ops/", "engine/guidance.py")


@dataclass
class Trace:
    """A trace of a call. `stays` holds each pair (file, the file that called it) once, in order of entry.

    `records` are the names of the dataclasses that were made. `left_out` are files that were entered inside
    networks and ops.
    """

    stays: list[tuple[str, str]] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    @property
    def files(self) -> list[str]:
        """The entered files, in order of entry."""
        return list(dict.fromkeys(name for name, _ in self.stays))


def trace(call: Callable[[], Any]) -> Trace:
    """Run a call and return its trace."""
    found, depth = Trace(), [0]
    stack: list[str] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event not in ("call", "return"):
            return
        name = _name(frame)
        if depth[0]:
            depth[0] += 1 if event == "call" else -1
            if name is not None and event == "call":
                found.left_out.add(name)
            return
        if event == "call" and name is not None and _below(name):
            found.left_out.add(name)
            depth[0] = 1
            return
        if event == "call":
            record = frame.f_locals.get("self")
            if frame.f_code.co_name == "__init__" and dataclasses.is_dataclass(record):
                kind = type(record).__name__
                if type(record).__module__.startswith("admfast") and kind not in found.records:
                    found.records.append(kind)
            caller = next((file for file in reversed(stack) if file), "")
            if name is not None and name != caller and (name, caller) not in found.stays:
                found.stays.append((name, caller))
            stack.append(name or "")
        elif stack:
            stack.pop()

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def _name(frame: FrameType) -> str | None:
    """Return the file of a frame inside the package, or None."""
    name = frame.f_code.co_filename
    return name[len(PACKAGE) :] if name.startswith(PACKAGE) else None


def _below(name: str) -> bool:
    return name.startswith(BELOW)


def traced(pipe: Pipeline, first: bool = False, **settings: Any) -> Trace:
    """Trace `sample` with these settings: the first such call, or the second."""
    settings = {"classes": [3, 1], "seeds": [0, 1], "steps": 3, "guidance": 2.0, **settings}
    if not first:
        pipe.sample(**settings)
    return trace(lambda: pipe.sample(**settings))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what one call of `Pipeline.sample` enters.")
    parser.add_argument("--first", action="store_true", help="trace the first call (default: the second)")
    found = traced(load("digits32", device="cpu", precision="fp32"), parser.parse_args().first)
    print(f"{len(found.files)} files, each with the files that call it:")
    for name in found.files:
        callers = [caller or "the caller" for file, caller in found.stays if file == name]
        print(f"  {name:24} from {', '.join(callers)}")
    print(f"{len(found.records)} records: {', '.join(found.records)}")
    print(f"not counted, inside networks and ops: {', '.join(sorted(found.left_out))}")


if __name__ == "__main__":
    main()
