"""`python -m bench.programs --programs FOLDER`: time other programs with their own and accelerated networks.

FOLDER has checkouts under the names of their repositories. Each core of a program runs in a separate process,
unmodified and with `admfast.accelerate`, in turns and from the same seed; a row with a wrong result has no
time. Modules that a program imports but its core does not need (MPI, torchvision) are replaced by empty ones.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.command import Bench, bench_main
from bench.program_cores import ADMFAST_PACKAGE, PROGRAMS, images, load_core, result_of

PROGRAMS_PATH = "ADMFAST_PROGRAMS"
ROUNDS = 5
# Each pixel times 1 + 1e-6 changes a result about as much as rounding; an error may be ten times as large.
INPUT_CHANGE, MAX_ERROR_RATIO = 1e-6, 10

# The process of one program


def print_measurements(folder: str, program: str, part: str, threads: int, rounds: int) -> None:
    """Measure a part of a program in this process; print one line of JSON."""
    import torch

    import admfast.accelerate

    torch.set_num_threads(threads)
    chosen = PROGRAMS[program]
    net, core = load_core(folder, program, part)
    variants = {"program": (net, core), "accelerated": (admfast.accelerate(copy.deepcopy(net)), core)}
    if part in chosen.packaged:
        variants["package"] = chosen.parts[part](ADMFAST_PACKAGE)
        variants["package"][0].load_state_dict(net.state_dict())
        variants["package"][0].eval()
    x = images()

    def run(variant: str, x: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        result = result_of(*variants[variant], x)
        return result, time.perf_counter() - began

    expected, _ = run("program", x)
    largest = float(expected.abs().max())
    changed, _ = run("program", x * (1 + INPUT_CHANGE))
    first_runs = {variant: run(variant, x) for variant in variants if variant != "program"}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, times in seconds.items():
            times.append(run(variant, x)[1])
    measurements = {
        "error": {
            variant: float((found - expected).abs().max()) / largest
            for variant, (found, _) in first_runs.items()
        },
        "nudge": float((changed - expected).abs().max()) / largest,
        "first": {variant: seconds_taken for variant, (_, seconds_taken) in first_runs.items()},
        "runs": admfast.accelerate.report(variants["accelerated"][0]).partition("\n")[0],
        "ms": {variant: [1e3 * value for value in values] for variant, values in seconds.items()},
    }
    print(json.dumps(measurements))


# The bench


@functools.cache
def measure_part(folder: str, program: str, part: str, threads: int, rounds: int) -> dict[str, Any]:
    """Return the measurements of one part, made by `print_measurements` in a new process."""
    from bench.measure import run_in_process

    arguments = (folder, program, part, threads, rounds)
    code = f"from bench.programs import print_measurements; print_measurements(*{arguments!r})"
    return run_in_process(code, os.environ)  # type: ignore[no-any-return]


def row(arguments: tuple[Any, ...], provider: str, settings: Any) -> dict[str, Any]:
    """Return the row of one way to run a program's core."""
    from bench.measure import WrongResult, round_to_5_digits

    found = measure_part(*arguments, 1 if settings.quick else ROUNDS)
    fields: dict[str, Any] = {"ms": round_to_5_digits(statistics.median(found["ms"][provider]))}
    if provider != "program":
        error = fields["rel_err"] = found["error"][provider]
        if not error <= MAX_ERROR_RATIO * found["nudge"]:  # NaN is wrong
            raise WrongResult(
                f"error {error:.1e}; scaling x by 1 + {INPUT_CHANGE:g} makes {found['nudge']:.1e}"
            )
    if provider == "accelerated":
        fields["runs_on"] = found["runs"].partition(":")[2].strip()
    return fields


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return one group for each program whose checkout exists."""
    from bench.measure import Case

    if settings.cuda:
        raise ValueError("device='cuda': must be cpu, on which the programs' cores are measured")
    folder = Path(arguments.programs)
    available = [
        name for name, program in PROGRAMS.items() if all((folder / root).is_dir() for root in program.roots)
    ]
    if not available:
        raise ValueError(f"programs={str(folder)!r}: must be a folder with one of {', '.join(PROGRAMS)}")

    def cases(name: str, settings: Any) -> Iterator[Any]:
        for part in PROGRAMS[name].parts:
            for threads in (1, 2):
                where = (str(folder.resolve()), name, part, threads)
                for provider in variants_of(name, part):
                    shape = {"program": name, "core": part, "threads": threads}
                    yield Case("program", "fp32", provider, shape, functools.partial(row, where, provider))

    return {name: (1.0, functools.partial(cases, name)) for name in available}


def variants_of(program: str, part: str) -> tuple[str, ...]:
    """Return the ways in which a part can run."""
    packaged = part in PROGRAMS[program].packaged
    return ("program", "accelerated", "package") if packaged else ("program", "accelerated")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of checkouts."""
    parser.add_argument(
        "--programs",
        metavar="FOLDER",
        default=os.environ.get(PROGRAMS_PATH, "programs"),
        help=f"checkouts, named after their repositories (default: {PROGRAMS_PATH}, or programs)",
    )


SUMMARY = "Measure other programs with their own networks and with accelerated ones."
main = functools.partial(bench_main, Bench("programs", SUMMARY, tuple(PROGRAMS), groups, add_flags))

if __name__ == "__main__":
    sys.exit(main())
