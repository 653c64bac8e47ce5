"""A stub of the published package, built on admfast's networks, for tests without its checkout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNET = """
import torch
from admfast.models import Classifier, ClassifierConfig, UNet, UNetConfig, Upsampler, UpsamplerConfig


class UNetModel(UNet):
    def __init__(self, use_fp16=False, **fields):
        super().__init__(UNetConfig(**fields))

    def convert_to_fp16(self):
        self.convert_torso(torch.float16)


class SuperResModel(Upsampler):
    def __init__(self, use_fp16=False, **fields):
        super().__init__(UpsamplerConfig(**fields))


class EncoderUNetModel(Classifier):
    def __init__(self, use_fp16=False, **fields):
        super().__init__(ClassifierConfig(**fields))
"""
SCRIPT_UTIL = """
import torch
from admfast.diffusion import DiffusionConfig
from admfast.sampling.functions import FunctionStep
from admfast.engine.step import Batch
from admfast.ops.update import SolverTable
from admfast.sampling.guides import Guide
from admfast.solvers import ddpm


class SpacedDiffusion:
    def __init__(self, timestep_respacing="", **settings):
        table = ddpm().table(DiffusionConfig(**settings).build(timestep_respacing))
        self.rows = {row.index: SolverTable("ddpm", (row,), integer_t=table.integer_t) for row in table.rows}

    def p_sample(self, model, x, t, cond_fn=None, model_kwargs=None):
        given = model_kwargs or {}
        guides = [] if cond_fn is None else [(Guide(lambda x, t: cond_fn(x, t, **given)), [True])]
        batch = Batch(
            table=self.rows[int(t[0])],
            shape=tuple(x.shape),
            seeds=torch.zeros(len(x), dtype=torch.int64),
            step_noise=torch.randn_like(x)[None],
        )
        step = FunctionStep(batch, lambda x, t: model(x, t, **given), x, guides)
        step.advance(0)
        return {"sample": step.state.x, "pred_xstart": step.state.x0}


create_gaussian_diffusion = SpacedDiffusion
"""
FILES = {"__init__.py": "", "unet.py": UNET, "script_util.py": SCRIPT_UTIL, "respace.py": ""}


@contextmanager
def published_stub(folder: Path) -> Iterator[str]:
    """Write the stub into a folder like a checkout, and remove its modules from `sys.modules` at the end."""
    package = folder / "guided_diffusion"
    package.mkdir(parents=True)
    for name, text in FILES.items():
        (package / name).write_text(text)
    real_modules = {
        name: module for name, module in sys.modules.items() if name.startswith("guided_diffusion")
    }
    for name in real_modules:
        del sys.modules[name]
    try:
        yield str(folder)
    finally:
        for name in [name for name in sys.modules if name.startswith("guided_diffusion")]:
            del sys.modules[name]
        sys.modules.update(real_modules)
