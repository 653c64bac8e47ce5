"""`python -m bench.profile`: where the time of a guided step goes, by class of operation and by operation.

By torch's profiler, over steps of `bench.sampling`'s presets on random weights: ours, and the published
code's where a checkout of it is named. Classes and gaps are those of `bench.trace`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.case import Case, Settings
from bench.ceilings.report import conditions
from bench.command import Own, bench_main, run_as_program
from bench.results import Row, markdown_table
from bench.runner import Groups
from bench.sampling.bout import TOGETHER
from bench.sampling.choice import Choice, add_flags, choose
from bench.sampling.contender import Contender, Entry
from bench.sampling.subject import Inputs, Subject
from bench.trace import CLASSES, Trace, traced

# Steps that are profiled: as many as fit into the seconds, and a whole chunk of embeddings where they come
# near.
SECONDS = 1.0
LARGEST_TRACE = 25
LISTED = 12  # operations in the table of each step


def cases(settings: Settings, chosen: Choice) -> Iterator[Case]:
    """A row for every step and who runs it; no trial, as nothing is compared."""
    for bout in chosen.bouts(settings):
        for entry in bout.entries:
            shape = {"system": bout.subject.name, "batch": bout.batch, "step": bout.kind}
            yield Case("profile", entry.dtype, entry.name, shape, _measure(entry, bout.subject, bout.batch))


def _measure(entry: Entry, subject: Subject, batch: int) -> Callable[[Settings], Row]:
    def measure(settings: Settings) -> Row:
        contender = entry.make(subject, Inputs.of(subject, batch, settings.device))
        with contender.running():
            contender.ready()
        plain = contender.take(1)
        steps = steps_for(plain.ms, subject.steps, settings.quick)
        plain = contender.take(steps)
        trace = profiled(contender, steps)
        return row_of(trace, steps) | {"ms": round(plain.ms, 4)} | contender.note()

    return measure


def steps_for(ms: float, longest: int, quick: bool) -> int:
    """How many steps of so many milliseconds are profiled."""
    count = 2 if quick else max(1, min(LARGEST_TRACE, round(1e3 * SECONDS / ms)))
    return min(TOGETHER if count > TOGETHER / 3 else count, longest)


def profiled(contender: Contender, steps: int) -> Trace:
    """The trace of a contender's first steps; the making of embeddings is a class of its own."""

    def some() -> None:
        for i in range(steps):
            contender.step(i)

    with contender.running():
        contender.begin()
        for table in getattr(getattr(contender, "runner", None), "tables", {}).values():
            table.fill = _named("embedding", table.fill)
        return traced(some, contender.device, steps)


def _named(name: str, fn: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        with torch.profiler.record_function(name):
            fn(*arguments)

    return run


def row_of(trace: Trace, steps: int) -> Row:
    """The fields of a trace; what takes longest by name."""
    names = sorted(trace.names.items(), key=lambda item: -item[1][0])[: 4 * LISTED]
    row: Row = {
        "profiled_ms": round(trace.wall_ms, 4),
        "steps": steps,
        "class_ms": {name: round(trace.ms.get(name, 0.0), 4) for name in CLASSES},
        "shares": {name: round(share, 4) for name, share in trace.shares().items()},
        "operations": [[name[:120], round(ms, 4), round(calls, 2)] for name, (ms, calls) in names],
    }
    return row | ({"launches": trace.launches, "kernels": trace.kernels} if trace.kernels else {})


def render(rows: Sequence[Row]) -> str:
    """Markdown for all rows of one file, a section per device where there are several."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"# Where a step's time goes: {device}", conditions(mine), classes_table(mine)]
        for row in mine:
            if row["status"] == "ok":
                parts += [f"## {title(row)}", operations_table(row)]
    return "\n\n".join(parts) + "\n"


def title(row: Row) -> str:
    """Preset, batch, who and precision in words."""
    shape = row["shape"]
    guided = "guided" if shape["step"] == "guided_step" else "without guidance"
    return f"{shape['system']}, batch {shape['batch']}, {guided}, {row['provider']}, {row['dtype']}"


def classes_table(rows: Sequence[Row]) -> str:
    """Milliseconds a step and their share of the profiled step, by class."""
    header = ["step", "ms", "ms profiled", *CLASSES]
    header += ["launches", "kernels"] if any("kernels" in row for row in rows) else []
    lines = []
    for row in rows:
        line: list[object] = [title(row)]
        if row["status"] == "ok":
            line += [row["ms"], row["profiled_ms"]]
            line += [f"{row['class_ms'][name]:.3g} ({row['shares'][name]:.0%})" for name in CLASSES]
            line += [row.get(name) for name in header[3 + len(CLASSES) :]]
        else:
            line += [row["status"], str(row.get("reason", ""))[:120], *[None] * (len(header) - 3)]
        lines.append(line)
    return markdown_table(header, lines)


def operations_table(row: Row) -> str:
    """The operations that take longest, with their calls a step."""
    return markdown_table(
        ("operation", "ms a step", "calls a step"),
        [(f"`{name}`", ms, calls) for name, ms, calls in row["operations"][:LISTED]],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, profile, write rows and tables; returns the exit status."""

    def groups(arguments: argparse.Namespace, settings: Settings) -> Groups:
        chosen = choose(arguments, settings)
        return {"profile": (1.0, lambda s: cases(s, chosen))}

    names: Groups = {"profile": (1.0, lambda settings: ())}
    summary = "Profile the guided step: classes of operations, gaps, operations."
    return bench_main("profile", summary, names, render, argv, own=Own(add_flags, groups))


if __name__ == "__main__":
    run_as_program(main)
