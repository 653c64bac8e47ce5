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
PAIRS = (("digits32", 1), ("digits32", 4), ("digits32", 16), ("imagenet64", 1))
# A process that keeps a processor busy until its parent ends.
BUSY = "import os\nwhile os.getppid() == {}: pass"
ROUNDS, SAMPLE_SECONDS, LIMIT = 5, 0.3, 300.0


def counts() -> list[int]:
    """Return the numbers of threads to measure: powers of two, all processors, and all but one."""
    powers = {2**i for i in range(usable_cpus().bit_length())}
    return sorted(n for n in powers | {usable_cpus() - 1, usable_cpus()} if 0 < n <= usable_cpus())


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return one group for each way of waiting, with equal shares of the budget."""
    from admfast.engine.threads import convolution_operations, threads_for
    from bench.measure import Case
    from bench.sampling.subject import Inputs, named

    def cases(waiting: str, settings: Any) -> Iterator[Any]:
        for name, batch in (("tiny", 1),) if settings.quick else PAIRS:
            work = convolution_operations(
                named(name).net, Inputs.of(named(name), batch, settings.device).x.shape
            )
            for busy in (0, 1):
                found = functools.cache(functools.partial(measured, name, batch, waiting, busy))
                for count in counts():
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


def measured(name: str, batch: int, waiting: str, busy: int) -> dict[str, Any]:
    """Return a row's fields for each number of threads, measured by `tell` in a new process."""
    from bench.measure import in_a_process

    environment = {key: value for key, value in os.environ.items() if key not in PASSIVE_WAIT}
    environment |= PASSIVE_WAIT if waiting == "passive" else {}
    with ExitStack() as stack:
        for _ in range(busy):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY.format(os.getpid())]))
            stack.callback(other.kill)
        return in_a_process(f"from bench.threads import tell; tell({name!r}, {batch})", environment)


def tell(name: str, batch: int) -> None:
    """Time steps on each number of threads in turns, and print the fields of their rows."""
    import torch

    from admfast.engine.options import EngineOptions
    from bench.measure import in_turns, quantiles, short
    from bench.sampling.ours import Ours
    from bench.sampling.subject import Inputs, named

    inputs, takers = Inputs.of(named(name), batch, torch.device("cpu")), {}
    for count in counts():
        contender = Ours(named(name), inputs, options=EngineOptions(threads=count))
        with contender.running():
            contender.ready()
        contender.take(1)
        takers[count] = contender.take
    samples = in_turns(takers, SAMPLE_SECONDS, ROUNDS, longest=named(name).steps, budget=LIMIT / 4)
    times = {count: [one.ms for one in taken] for count, taken in samples.items()}
    print(json.dumps({n: quantiles(ms) | {"best_ms": short(min(ms))} for n, ms in times.items()}))


SUMMARY = "Measure a step on each number of threads, idle and beside a busy process."
main = functools.partial(bench_main, Bench("threads", SUMMARY, NAMES, groups))

if __name__ == "__main__":
    sys.exit(main())
