"""Time a fresh process to its first image: with empty caches, with kept ones, and once it runs.

`python -m bench.sampling.start` is one such process; it prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.sampling.pipeline import Pipeline
from bench.measure import Case, Settings
from bench.results import Row
from bench.sampling.subject import TINY, Inputs, Subject, subjects

ROOT = Path(__file__).resolve().parents[2]
# Enough for a whole chunk of embeddings on a GPU; on a CPU a step of a large model takes seconds.
STEPS = {"cuda": 25, "cpu": 2}
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
LIMIT = 600.0  # seconds of a row: two processes


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """A row for every preset, at its smallest batch; another for the compiled step where that is wanted."""
    smallest: dict[str, int] = {}
    for subject, batch in pairs:
        smallest[subject.name] = min(batch, smallest.get(subject.name, batch))
    for name, batch in smallest.items():
        shape = {"system": name, "batch": batch, "steps": STEPS[settings.device.type]}
        for who, more in (("admfast", ()), ("admfast, compiled", ("--compile",)))[: 1 + compiled]:
            yield Case("start", precision, who, shape, partial(_measure, shape, precision, more), limit=LIMIT)


def _measure(shape: Mapping[str, object], precision: str, more: Sequence[str], settings: Settings) -> Row:
    flags = [text for key, value in shape.items() for text in (f"--{key}", str(value))]
    flags += ["--device", str(settings.device), "--precision", precision, *more]
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / part) for name, part in CACHES.items()}
        cold, kept = (first_image(flags, caches) for _ in range(2))
    # Without making weights, which a user reads from a file.
    seconds = [round(t["import_s"] + t["prepare_s"] + t["first_s"], 3) for t in (cold, kept)]
    row = {"ms": round(1e3 * seconds[0], 1), "cold_s": seconds[0], "kept_s": seconds[1]}
    row["warm_s"] = kept["second_s"]
    return row | {key: kept[key] for key in ("import_s", "prepare_s", "first_s")}


def first_image(flags: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Run this module in a process of its own; raises RuntimeError with what it said."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *flags]
    command += ["--since", f"{time.time():.6f}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | dict(environment), capture_output=True, text=True
    )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"the process ended with {done.returncode}: {lines[-1] if lines else 'silent'}")
    return json.loads(lines[-1])


def pipeline(subject: Subject, device: torch.device, precision: str, compile: bool) -> Pipeline:
    """The preset's pipeline on random weights."""
    net, classifier = subject.networks(device)
    return Pipeline(
        subject.name,
        net,
        subject.settings,
        classifier,
        guidance=subject.guidance,
        steps=subject.steps,
        low_res_size=subject.low_res_size,
        policy=policy(precision, device),
        options=EngineOptions(compile=compile),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Sample twice and print how long each part took, in seconds."""
    times = [time.time()]
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    subject = TINY if arguments.system == TINY.name else subjects()[arguments.system]

    def passed() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.time())

    inputs = Inputs.of(subject, arguments.batch, device)
    subject.networks(device)  # the weights stay for the pipeline
    passed()
    pipe = pipeline(subject, device, arguments.precision, arguments.compile)
    passed()
    classes = None if inputs.labels is None or pipe.num_classes is None else inputs.labels.tolist()
    settings = {"steps": arguments.steps, "low_res": inputs.low_res, "batch_size": 10**6}
    for _ in range(2):
        pipe.sample(classes, range(arguments.batch), **settings)
        passed()
    names = ("import_s", "weights_s", "prepare_s", "first_s", "second_s")
    spans = zip([arguments.since, *times], times, strict=False)
    found = {name: round(end - begin, 4) for name, (begin, end) in zip(names, spans, strict=True)}
    print(json.dumps(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--system", default=TINY.name, help="preset (default: %(default)s)")
    add("--batch", type=int, default=1, help="images (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--precision", default="auto", help="of the networks (default: %(default)s)")
    add("--steps", type=int, default=2, help="steps an image (default: %(default)s)")
    add("--since", type=float, default=time.time(), help="when it was started, in Unix time")
    add("--compile", action="store_true", help="torch.compile the step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
