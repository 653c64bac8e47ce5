"""`python -m bench.peers`: one preset's step beside every peer, compiled ones too; run it again for the next.

A run takes the first preset and batch that has no rows yet, since compiling its peers may take all the time
there is. What was compiled is kept in the folder `peers.cache` beside the rows.

Exit status: 0 when every preset has its rows, 3 when some are left, else as every bench.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.case import Settings
from bench.ceilings import matmul
from bench.command import UNFINISHED, Own, bench_main, run_as_program
from bench.results import ResultFile, device_name, row_key
from bench.runner import Groups
from bench.sampling.choice import PEERS, Choice, add_flags, choose
from bench.sampling.report import render

CACHE = "peers.cache"
SHARES = {"matmul": 0.02, "steps": 0.98}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure one preset and batch, write rows and table; returns the exit status."""
    waiting: list[str] = []

    def groups(arguments: argparse.Namespace, settings: Settings) -> Groups:
        arguments.peers = arguments.peers or ",".join(PEERS)
        folder = Path(arguments.out)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((folder / CACHE).resolve())
        every = choose(arguments, settings)
        left = unmeasured(every, ResultFile(folder / "peers.jsonl"), settings)
        waiting.extend(f"{subject.name}, batch {batch}" for subject, batch in left.pairs[1:])
        # Where nothing is left, what ended in an error is tried again.
        one = replace(left, pairs=left.pairs[:1]) if left.pairs else every
        return {"matmul": (SHARES["matmul"], matmul.cases), "steps": (SHARES["steps"], one.cases)}

    names: Groups = {name: (share, lambda settings: ()) for name, share in SHARES.items()}
    summary = "Measure one preset's guided step beside every peer; run it again for the next preset."
    status = bench_main("peers", summary, names, render, argv, own=Own(add_flags, groups))
    if status == 0 and waiting:
        print(f"run it again for: {'; '.join(waiting)}")
        return UNFINISHED
    return status


def unmeasured(choice: Choice, results: ResultFile, settings: Settings) -> Choice:
    """The choice less every preset and batch whose rows are all there, whatever they say."""
    device, left = device_name(settings.device), []
    for pair in choice.pairs:
        keys = [
            row_key(case.kind, case.dtype, case.provider, case.shape, device)
            for case in replace(choice, pairs=(pair,)).cases(settings)
        ]
        if not all(key in results.by_key for key in keys):
            left.append(pair)
    return replace(choice, pairs=tuple(left))


if __name__ == "__main__":
    run_as_program(main)
