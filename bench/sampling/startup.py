"""How long a fresh process takes to its first image: with empty caches, with kept ones, and once it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.case import Case, Measure, Settings
from bench.results import Row
from bench.sampling.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
# Enough for a whole chunk of embeddings on a GPU; on a CPU a step of a large model takes seconds.
STEPS = {"cuda": 25, "cpu": 2}
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """A row for every preset, at its smallest batch; another for the compiled step where that is wanted."""
    smallest: dict[str, tuple[Subject, int]] = {}
    for subject, batch in pairs:
        kept = smallest.get(subject.name)
        if kept is None or batch < kept[1]:
            smallest[subject.name] = subject, batch
    steps = STEPS[settings.device.type]
    for subject, batch in smallest.values():
        shape = {"system": subject.name, "batch": batch, "steps": steps}
        yield Case("start", precision, "admfast", shape, _measure(shape, precision))
        if compiled:
            yield Case(
                "start", precision, "admfast, compiled", shape, _measure(shape, precision, "--compile")
            )


def _measure(shape: Mapping[str, object], precision: str, *more: str) -> Measure:
    def measure(settings: Settings) -> Row:
        flags = [text for key, value in shape.items() for text in (f"--{key}", str(value))]
        flags += ["--device", str(settings.device), "--precision", precision, *more]
        with tempfile.TemporaryDirectory() as folder:
            caches = {name: str(Path(folder) / part) for name, part in CACHES.items()}
            first = first_image(flags, caches)
            again = first_image(flags, caches)
        cold, kept = _until_image(first), _until_image(again)
        row = {"ms": round(1e3 * cold, 1), "cold_s": cold, "kept_s": kept, "warm_s": again["second_s"]}
        return row | {key: again[key] for key in ("import_s", "prepare_s", "first_s")}

    return measure


def first_image(flags: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Run `bench.sampling.first_image` in a process of its own; raises RuntimeError with what it said."""
    since = ("--since", f"{time.time():.6f}")
    command = [sys.executable, "-m", "bench.sampling.first_image", *flags, *since]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | dict(environment), capture_output=True, text=True
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"the process ended with {done.returncode}: {lines[-1] if lines else 'silent'}")
    return json.loads(lines[-1])


def _until_image(times: Mapping[str, float]) -> float:
    """Seconds from the start to the image, but for making weights, which a user reads from a file."""
    return round(times["import_s"] + times["prepare_s"] + times["first_s"], 3)
