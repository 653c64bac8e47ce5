"""`python -m bench.threads`: time a CPU step on each number of threads, idle and beside a busy process.

OpenMP waits actively, as in a program that imports the package, and passively, as in the commands. The table
of `admfast.engine.threads` comes from its rows of an idle machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from admfast.host import PASSIVE_WAIT, usable_cpus
from bench.command import Bench, bench_main

NAMES = ("active", "passive")
SYSTEMS_AND_BATCHES = (("digits32", 1), ("digits32", 4), ("digits32", 16), ("imagenet64", 1))
# A process that keeps a processor busy until its parent ends.
BUSY_LOOP = "import os\nwhile os.getppid() == {}: pass"
ROUNDS, SAMPLE_SECONDS, LIMIT = 5, 0.3, 300.0


def thread_counts() -> list[int]:
    """Return the numbers of threads to measure: powers of two, all processors, and all but one."""
    powers = {2**i for i in range(usable_cpus().bit_length())}
    return sorted(n for n in powers | {usable_cpus() - 1, usable_cpus()} if 0 < n <= usable_cpus())


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return one group for each way of waiting, with equal shares of the budget."""
    from admfast.engine.threads import convolution_operations, threads_for
    from bench.measure import Case
    from bench.sampling.subject import Inputs, find_subject

    def cases(waiting: str, settings: Any) -> Iterator[Any]:
        for name, batch in (("tiny", 1),) if settings.quick else SYSTEMS_AND_BATCHES:
            work = convolution_operations(
                find_subject(name).net, Inputs.of(find_subject(name), batch, settings.device).x.shape
            )
            for busy in (0, 1):
                found = functools.cache(functools.partial(measure_in_process, name, batch, waiting, busy))
                for count in thread_counts():
                    shape = {"system": name, "batch": batch, "beside": busy, "waiting": waiting}
                    note = {
                        "work": work,
                        "also": "chosen" if threads_for(work, usable_cpus()) == count else "",
                    }
                    row = functools.partial(lambda found, count, settings: found()[str(count)], found, count)
                    yield Case("threads", "fp32", f"{count} threads", shape, row, note, limit=LIMIT)

    if settings.cuda:
        raise ValueError("device='cuda': must be cpu, as only CPU threads are measured")
    return {waiting: (1.0, functools.partial(cases, waiting)) for waiting in NAMES}


def measure_in_process(name: str, batch: int, waiting: str, busy: int) -> dict[str, Any]:
    """Return a row's fields for each number of threads, measured by `print_times` in a new process."""
    from bench.measure import run_in_process

    environment = {key: value for key, value in os.environ.items() if key not in PASSIVE_WAIT}
    environment |= PASSIVE_WAIT if waiting == "passive" else {}
    with ExitStack() as stack:
        for _ in range(busy):
            other = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", BUSY_LOOP.format(os.getpid())])
            )
            stack.callback(other.kill)
        return run_in_process(
            f"from bench.threads import print_times; print_times({name!r}, {batch})", environment
        )


def print_times(name: str, batch: int) -> None:
    """Time steps on each number of threads in turns, and print the fields of their rows."""
    import torch

    from admfast.engine.options import EngineOptions
    from bench.measure import quantiles, round_to_5_digits, sample_in_turns
    from bench.sampling.ours import Ours
    from bench.sampling.subject import Inputs, find_subject

    inputs, samplers = Inputs.of(find_subject(name), batch, torch.device("cpu")), {}
    for count in thread_counts():
        contender = Ours(find_subject(name), inputs, options=EngineOptions(threads=count))
        with contender.running():
            contender.ready()
        contender.time_steps(1)
        samplers[count] = contender.time_steps
    samples = sample_in_turns(
        samplers, SAMPLE_SECONDS, ROUNDS, max_steps=find_subject(name).steps, budget=LIMIT / 4
    )
    times = {count: [one.ms for one in samples_of_count] for count, samples_of_count in samples.items()}
    print(json.dumps({n: quantiles(ms) | {"best_ms": round_to_5_digits(min(ms))} for n, ms in times.items()}))


SUMMARY = "Measure a step on each number of threads, idle and beside a busy process."
main = functools.partial(bench_main, Bench("threads", SUMMARY, NAMES, groups))

if __name__ == "__main__":
    sys.exit(main())
