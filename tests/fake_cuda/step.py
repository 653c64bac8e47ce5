"""`python -m tests.fake_cuda.step`: run prepared steps on a device that isn't there, and print what they did.

A process of its own: the device must be loaded before torch, and Triton's kernels must not be interpreted.
Prints one line of JSON for each run in RUNS.
"""

from __future__ import annotations

from tests.fake_cuda import device

if __name__ == "__main__":
    device.load()

import collections
import dataclasses
import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from admfast.engine.engine import Engine
from admfast.engine.guidance import RowGuidance
from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.engine.step import Batch, PreparedStep
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, build
from admfast.solvers import ddpm
from bench.sampling.subject import Subject, subjects
from tests.fake_cuda.counting import Counted, Launch, Like, counting

CUDA = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A step to run: subject (see `subjects`, and `small`), images, precision, attention, guided or not."""

    subject: str
    batch: int
    precision: str = "bf16"
    attention: str = "flash"
    guided: bool = True


RUNS = (
    *(Run("small", 2, precision) for precision in ("fp32", "tf32", "fp16", "bf16", "auto")),
    *(Run("small", 2, "bf16", attention) for attention in ("efficient", "cudnn", "xformers")),
    *(Run("small", 3, precision, guided=False) for precision in ("fp32", "fp16")),
    Run("imagenet64", 1, "auto"),
    Run("imagenet256", 8),
    Run("imagenet256", 8, guided=False),
    Run("imagenet256-up", 1, "fp16"),
    Run("imagenet512", 1, "tf32", guided=False),
)


def small() -> Subject:
    """Return a guided step of small networks with every kind of block of the released ones."""
    options: dict[str, Any] = dict(
        image_size=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        num_head_channels=32,
        use_scale_shift_norm=True,
        resblock_updown=True,
        attention_resolutions=(16,),
    )
    net = UNetConfig(model_channels=64, out_channels=6, num_classes=10, **options)
    classifier = ClassifierConfig(model_channels=32, out_channels=10, pool="attention", **options)
    return dataclasses.replace(subjects()["imagenet64"], name="small", net=net, classifier=classifier)


def network(config: NetConfig) -> nn.Module:
    """Build a network on the meta device."""
    with torch.device("meta"):
        return build(config).requires_grad_(False)


def moved(net: nn.Module) -> nn.Module:
    """Move a network to the device; under FakeTensorMode."""
    return net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=CUDA))


def counted(run: Run) -> tuple[PreparedStep, Counted, int]:
    """Run two rows and count the second; also return how many forms of weights were derived after folding."""
    subject = small() if run.subject == "small" else subjects()[run.subject]
    config, classifier = subject.net, subject.classifier if run.guided else None
    networks = [None if c is None else network(c) for c in (config, classifier)]
    table = ddpm().table(subject.process(4))
    shape = (run.batch, config.in_channels, *(config.image_size,) * config.dims)
    with device.h100(run.attention), FakeTensorMode():
        numbers = torch.zeros(run.batch, dtype=torch.int64, device=CUDA)
        low_res = None
        if subject.low_res_size is not None:
            low_res = torch.empty(*shape[:2], *(subject.low_res_size,) * config.dims, device=CUDA)
        batch = Batch(
            table=table,
            shape=shape,
            seeds=numbers,
            labels=None if config.num_classes is None and classifier is None else numbers,
            low_res=low_res,
            guidance=(RowGuidance(float(classifier is not None)),) * len(table),
        )
        parts: Any = [None if net is None else moved(net) for net in networks]
        engine = Engine(*parts, policy(run.precision, CUDA), EngineOptions(graph=False))
        engine.ensure_folded()
        with torch.no_grad(), engine.borrow_step(batch) as step:
            step.fill(batch, torch.empty(shape, device=CUDA))
            early = forms(parts)
            for i in range(2):
                with counting() as found:
                    step.advance(i)
        return step, found, forms(parts) - early


def forms(networks: list[Any]) -> int:
    """Return how many forms the convolutions of the networks have derived from their weights."""
    modules = [module for net in networks if net is not None for module in net.modules()]
    folded = [module.folded for module in modules if getattr(module, "folded", None) is not None]
    return sum(len(conv.forms()) for conv in folded)


def told(run: Run) -> dict[str, Any]:
    """Run a step and return what it did, in words and numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors' addresses, by which parameters are known
        step, found, derived_late = counted(run)
    images = step.state.x.numel()
    inner = found.of("convolution", "norm")
    return {
        **dataclasses.asdict(run),
        "chosen": sorted({f"{choice.op} {choice.name}" for choice in step.implementation_choices()}),
        "read_back": found.read_back,
        "derived_late": derived_late,
        "side_priority": getattr(step.classifier_stream, "priority", None),
        "launches": found.count(),
        "bytes": {kind: found.nbytes(kind) for kind in sorted({launch.kind for launch in found.launches})},
        "names": summed((launch.name, launch.count) for launch in found.launches),
        "turned": [str(launch) for launch in found.of("copy") if turns(launch, images)],
        "not_channels_last": sorted(
            {f"{launch.name} {t}" for launch in inner for t in apart(launch, images)}
        ),
        "dtypes": sorted({str(t.dtype)[6:] for launch in inner for t in large(launch, images)}),
    }


def summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Add up the numbers of each name."""
    total: collections.Counter[str] = collections.Counter()
    for name, number in pairs:
        total[name] += number
    return dict(total.most_common())


def large(launch: Launch, images: int) -> list[Like]:
    """Return the tensors of a launch that are larger than the images of the step are."""
    return [t for t in (*launch.read, *launch.written) if t.elements > 2 * images]


def turns(launch: Launch, images: int) -> bool:
    """Tell whether a copy of something large changes its layout."""
    return launch.name != "cat" and len({t.strides for t in large(launch, images)}) > 1


def apart(launch: Launch, images: int) -> list[Like]:
    """Return a convolution's images, and a norm's large ones, whose channels don't lie together."""
    found = large(launch, images) if launch.kind == "norm" else [*launch.read, *launch.written]
    return [t for t in found if len(t.shape) == 4 and min(t.shape[1:]) > 1 and t.strides[1] != 1]


if __name__ == "__main__":
    for each in RUNS:
        print(json.dumps(told(each)), flush=True)
