"""Time a new process to its first image, with empty and with filled caches, and to its second image."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.sampling.pipeline import Pipeline
from bench.measure import Case, Settings, refuse_work, run_in_process
from bench.results import Row
from bench.sampling.subject import Inputs, Subject, find_subject, step_flop

# Enough for a whole chunk of embeddings on a GPU; on a CPU a step of a large model takes seconds.
STEPS = {"cuda": 25, "cpu": 2}
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
LIMIT = 600.0  # seconds of a row: two processes


def cases(
    settings: Settings, pairs: Sequence[tuple[Subject, int]], precision: str, compiled: bool = False
) -> Iterator[Case]:
    """Yield a case for every preset, at its smallest batch; if `compiled`, also one for the compiled step."""
    smallest: dict[str, int] = {}
    for subject, batch in pairs:
        smallest[subject.name] = min(batch, smallest.get(subject.name, batch))
    for name, batch in smallest.items():
        shape = {"system": name, "batch": batch, "steps": STEPS[settings.device.type]}
        for provider in ("admfast", "admfast, compiled")[: 1 + compiled]:
            arguments = shape | {"precision": precision, "compile": provider != "admfast"}
            yield Case("start", precision, provider, shape, partial(_measure, arguments), limit=LIMIT)


def _measure(arguments: Mapping[str, Any], settings: Settings) -> Row:
    flop = step_flop(find_subject(arguments["system"])) * arguments["batch"] * arguments["steps"]
    refuse_work(flop, arguments["precision"], settings)
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / part) for name, part in CACHES.items()}
        cold, warm = (first_image({**arguments, "device": str(settings.device)}, caches) for _ in range(2))
    # The time to make the weights is left out, because a user reads them from a file.
    seconds = [round(t["import_s"] + t["prepare_s"] + t["first_s"], 3) for t in (cold, warm)]
    row = {"ms": round(1e3 * seconds[0], 1), "cold_s": seconds[0], "kept_s": seconds[1]}
    row["warm_s"] = warm["second_s"]
    return row | {key: warm[key] for key in ("import_s", "prepare_s", "first_s")}


def first_image(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, float]:
    """Return the seconds of each part of a new process, as `print_seconds` prints them."""
    call = f"print_seconds({time.time()!r}, **{dict(arguments)!r})"
    code = f"from bench.sampling.startup import print_seconds; {call}"
    return run_in_process(code, os.environ | dict(environment))


def pipeline(subject: Subject, device: torch.device, precision: str, compile: bool) -> Pipeline:
    """Return the preset's pipeline with random weights."""
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


def print_seconds(
    since: float,
    system: str,
    batch: int,
    steps: int,
    precision: str,
    device: str = "cpu",
    compile: bool = False,
) -> None:
    """Sample twice and print how long each part took, in seconds; since: when the process began (Unix)."""
    times = [since, time.time()]
    torch_device, subject = torch.device(device), find_subject(system)

    def note_time() -> None:
        if torch_device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.time())

    inputs = Inputs.of(subject, batch, torch_device)
    subject.networks(torch_device)  # makes the weights, which are cached for the pipeline
    note_time()
    pipe = pipeline(subject, torch_device, precision, compile)
    note_time()
    classes = None if inputs.labels is None or pipe.num_classes is None else inputs.labels.tolist()
    for _ in range(2):
        pipe.sample(classes, range(batch), steps=steps, low_res=inputs.low_res, batch_size=10**6)
        note_time()
    names = ("import_s", "weights_s", "prepare_s", "first_s", "second_s")
    spans = zip(names, times, times[1:], strict=False)
    print(json.dumps({name: round(end - begin, 4) for name, begin, end in spans}))
