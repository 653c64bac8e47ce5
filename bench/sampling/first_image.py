"""`python -m bench.sampling.first_image`: one fresh process until its first image; prints one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.sampling.pipeline import Pipeline
from bench.sampling.subject import TINY, Inputs, Subject, subjects


def pipeline(subject: Subject, device: torch.device, precision: str, compile: bool) -> Pipeline:
    """The preset's pipeline on random weights, laid out as `admfast.load` does."""
    net, classifier = subject.networks(device)
    for part in (net, classifier):
        if part is not None:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Pipeline(
        subject.name,
        net,
        subject.diffusion,
        classifier,
        guidance=subject.guidance,
        steps=subject.steps,
        low_res_size=subject.low_res_size,
        policy=policy(precision, device),
        options=EngineOptions(compile=compile),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Sample twice and print how long each part took, in seconds."""
    imported = time.time()
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    subject = TINY if arguments.system == TINY.name else subjects()[arguments.system]
    inputs = Inputs.of(subject, arguments.batch, device)
    subject.networks(device)  # the weights stay for the pipeline
    if device.type == "cuda":
        torch.cuda.synchronize()
    made = time.time()
    pipe = pipeline(subject, device, arguments.precision, arguments.compile)
    if device.type == "cuda":
        torch.cuda.synchronize()
    prepared = time.time()
    times = [prepared]
    for _ in range(2):
        classes = None if inputs.labels is None or pipe.num_classes is None else inputs.labels.tolist()
        pipe.sample(
            classes, range(arguments.batch), steps=arguments.steps, low_res=inputs.low_res, batch_size=10**6
        )
        times.append(time.time())
    found = {
        "import_s": imported - arguments.since,
        "weights_s": made - imported,
        "prepare_s": prepared - made,
        "first_s": times[1] - times[0],
        "second_s": times[2] - times[1],
    }
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", default=TINY.name, help="preset (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="of the networks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps an image (default: %(default)s)")
    parser.add_argument("--since", type=float, default=time.time(), help="when it was started, in Unix time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
