"""Small networks with random weights, none of them zero, and pipelines of these networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from admfast.checkpoints import write_weights
from admfast.diffusion import DiffusionConfig
from admfast.engine.precision import INT8_ISAS, POLICIES
from admfast.engine.step import Batch
from admfast.models import (
    Classifier,
    ClassifierConfig,
    NetConfig,
    UNet,
    UNetConfig,
    Upsampler,
    UpsamplerConfig,
    build,
)
from admfast.models.description import Description
from admfast.ops import native
from admfast.ops.update import SamplerState, SolverTable
from admfast.sampling.functions import FunctionStep
from admfast.sampling.guides import Guide
from admfast.sampling.loop import run_rows
from admfast.sampling.pipeline import Pipeline
from tests.parity.golden import NETWORK_SAMPLES_LIMIT
from tests.tools.random_checkpoint import random_state

SIDE, CLASSES = 8, 4
PROCESS = DiffusionConfig(noise_schedule="linear", steps=1000, learn_sigma=True)
UNET: dict[str, Any] = {
    "image_size": SIDE,
    "in_channels": 1,
    "model_channels": 32,
    "out_channels": 2,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "use_scale_shift_norm": True,
    "num_classes": CLASSES,
}
UPSAMPLER: dict[str, Any] = {**UNET, "image_size": 2 * SIDE, "channel_mult": (1, 1)}
CLASSIFIER: dict[str, Any] = {
    "image_size": SIDE,
    "in_channels": 1,
    "model_channels": 32,
    "out_channels": CLASSES,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "pool": "attention",
}

# Options of the released models: three channels, legacy attention, blocks that resample.
_RELEASED = {
    "image_size": 16,
    "in_channels": 3,
    "num_heads": 1,
    "num_head_channels": 32,
    "resblock_updown": True,
}
SMALL_UNET = UNetConfig(**{**UNET, **_RELEASED, "out_channels": 6, "num_classes": 10})
SMALL_UPSAMPLER = UpsamplerConfig(**{**UPSAMPLER, "attention_resolutions": (), "num_classes": None})
_LEVELS = {"num_res_blocks": 2, "attention_resolutions": (1, 2), "channel_mult": (1, 2, 2)}
SMALL_CLASSIFIER = ClassifierConfig(**{**CLASSIFIER, **_RELEASED, **_LEVELS, "out_channels": 10})
SMALL_NETS = (SMALL_UNET, SMALL_UPSAMPLER, SMALL_CLASSIFIER)


def with_weights(config: NetConfig, seed: int = 0) -> Any:
    """Build the network of `config` in evaluation mode, with nonzero weights drawn from `seed`."""
    net = build(config)
    net.load_state_dict(random_state(config, seed))
    return net


def cpu_precisions() -> list[str]:
    """Return the precisions that this CPU has: all but TF32, and int8 only with products of 8 bits."""
    wide = native.reason_missing() is None and native.instruction_set() in INT8_ISAS
    return [name for name in POLICIES if name != "tf32" and (wide or name != "int8")]


def unet(seed: int = 0, **changes: Any) -> UNet:
    """Return a class-conditional UNet for 8x8 images of one channel, with learned variance."""
    return with_weights(UNetConfig(**{**UNET, **changes}), seed)


def upsampler(seed: int = 0, **changes: Any) -> Upsampler:
    """Return an upsampler to 16x16 images."""
    return with_weights(UpsamplerConfig(**{**UPSAMPLER, **changes}), seed)


def classifier(seed: int = 0, **changes: Any) -> Classifier:
    """Return a classifier of noisy 8x8 images."""
    return with_weights(ClassifierConfig(**{**CLASSIFIER, **changes}), seed)


def pipeline(seed: int = 0, **parts: Any) -> Pipeline:
    """Return a guided pipeline of the small networks, by default with 4 steps and guidance 1."""
    settings = {"classifier": classifier(seed + 1), "guidance": 1.0, "steps": 4, **parts}
    net, process = settings.pop("net", None), settings.pop("diffusion", PROCESS)
    return Pipeline("small", net or unet(seed), process, **settings)


def cascade(low_res_size: int | None = SIDE, seed: int = 0, **parts: Any) -> Pipeline:
    """Return the small pipeline followed by an upsampler of 3 steps."""
    up = Pipeline("small-up", upsampler(seed + 2), PROCESS, steps=3, low_res_size=low_res_size)
    return pipeline(seed, upsampler=up, **parts)


def write(path: Path, net: torch.nn.Module) -> Path:
    """Write a network with its description. A diffusion model's process has 100 steps."""
    settings = DiffusionConfig(noise_schedule="linear", steps=100, learn_sigma=True)
    process = None if net.config.kind == "classifier" else settings
    write_weights(path, net.state_dict(), Description(net.config, process))
    return path


def run_table(
    table: SolverTable,
    model: Any,
    x: Tensor,
    *,
    guidance: Any = None,
    denoised_fn: Any = None,
    dynamic_threshold: float | None = None,
    callback: Any = None,
    every: int = 1,
    seeds: Tensor | None = None,
    **options: Any,
) -> SamplerState:
    """Run a table from x with functions: model(x, t), guidance(x, t) at every row, denoised_fn(x_0)."""
    seeds = torch.zeros(len(x), dtype=torch.int64, device=x.device) if seeds is None else seeds
    batch = Batch(table=table, shape=tuple(x.shape), seeds=seeds, **options)
    guides = [] if guidance is None else [(Guide(guidance), [True] * len(table))]
    watch = SimpleNamespace(callback=callback, every=every, first=0, stage="base")
    step = FunctionStep(batch, model, x, guides, denoised_fn, dynamic_threshold=dynamic_threshold)
    return run_rows(table, step, watch)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal values drawn from `seed`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Assert that float images differ by at most the limit of trajectories against the published code."""
    assert (found - wanted).abs().max() <= NETWORK_SAMPLES_LIMIT * max(1.0, float(wanted.abs().max()))
