"""`python -m bench.training`: compare a training step with the published one, on the same weights and batch.

A step is the loss, all gradients, AdamW and one average of the weights. Before anything is timed, the loss
and gradients of every contender are compared with those of our reference operations in float32. Peak memory
on a CPU is that of two steps in a separate process, less its memory before the network was made.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admfast.diffusion import DiffusionConfig
from admfast.engine.numerics import fixed_numerics, peak_memory
from admfast.models import UNetConfig, build
from admfast.ops.dispatch import override_impl
from admfast.training.learner import Learner
from admfast.training.loss import Batch, make_batch
from admfast.training.recipe import Recipe
from admfast.training.timesteps import timestep_sampler
from admfast.verify.budget import BUDGETS
from bench.command import Bench, bench_main
from bench.measure import Case, Settings, check_error, run_in_process
from bench.results import Row
from bench.sampling import published
from bench.sampling.choice import names_in, precisions_in
from bench.sampling.compare import Comparison
from bench.sampling.contender import Contender, Entry
from bench.sampling.flags import add_published
from bench.sampling.subject import TINY, Inputs, Subject, subjects
from bench.sampling.weights import shared_state

LR, EMA = 1e-4, 0.9999
PASSES = 3  # operations of a step over those of a forward pass: forward, gradient in x, gradient in weights
SECONDS_OF_ALL_ROUNDS = {"cuda": 30.0, "cpu": 150.0}
# By device: the default systems, with the images of a step; other systems get 4.
BATCHES = {"cuda": {"adm64": 32, "imagenet64": 32}, "cpu": {"adm64": 4, "digits32": 32}}
PRECISIONS = {"cuda": ("bf16", "fp16"), "cpu": ("fp32", "bf16")}
ADM64 = Subject(
    "adm64",
    UNetConfig(
        image_size=64,
        model_channels=128,
        out_channels=6,
        num_res_blocks=2,
        attention_resolutions=(4, 8),
        channel_mult=(1, 2, 3, 4),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    ),
    DiffusionConfig(noise_schedule="cosine", steps=1000, learn_sigma=True),
)


def all_subjects() -> dict[str, Subject]:
    """Return all subjects by name."""
    return {ADM64.name: ADM64, TINY.name: TINY} | subjects()


def find_subject(name: str) -> Subject:
    """Return a subject without classifier, and without dropout, whose masks differ from the published."""
    subject = all_subjects()[name]
    net = dataclasses.replace(subject.net, dropout=0.0)
    return dataclasses.replace(subject, net=net, classifier=None, guidance=0.0, steps=1)


def recipe_of(subject: Subject, batch: int, precision: str = "fp32") -> Recipe:
    """Return the recipe of a step: one average, a constant learning rate, uniform timesteps."""
    kind = "diffusion" if subject.low_res_size is None else "upsampler"
    return Recipe(
        kind=kind,  # type: ignore[arg-type]
        network=subject.net,
        process=subject.settings,
        steps=10**6,
        batch_size=batch,
        lr=LR,
        ema=(EMA,),
        precision=precision,
        low_res_size=subject.low_res_size,
    )


def batch_for(subject: Subject, batch: int, device: torch.device) -> Batch:
    """Return random images with timesteps and noise, the same on every device."""
    config, generator = subject.net, torch.Generator().manual_seed(3)
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(batch) * 7 % (config.num_classes or 1)
    recipe = recipe_of(subject, batch)
    sampler = timestep_sampler(recipe.sampler, recipe.process.build().num_timesteps)
    return make_batch(recipe, sampler, range(batch), images, labels, device)


@dataclass(frozen=True)
class StepTrial:
    """Loss and gradient of one batch by reference operations in float32."""

    inputs: Inputs
    outcome: tuple[Tensor, Tensor]

    def check(self, outcome: tuple[Tensor, Tensor], dtype: str) -> float:
        """Return the larger relative error; raise WrongResult if it exceeds the precision's step budget."""
        return max(
            check_error(got, ref, BUDGETS[dtype].step) for got, ref in zip(outcome, self.outcome, strict=True)
        )


@functools.lru_cache(maxsize=1)
def trial_of(subject: Subject, batch: int, device: torch.device) -> StepTrial:
    """Return the trial of a batch; the last one is cached."""
    inputs = Inputs.of(subject, batch, device)
    one = Ours(subject, inputs, "fp32")
    with fixed_numerics(device), override_impl("reference"), torch.enable_grad():
        one.prepare()
        return StepTrial(inputs, one.run_trial(None))


class Trainer(Contender):
    """A contender that trains: `update` makes a step and returns its mean loss."""

    net: nn.Module
    path = ""  # of the published code, for contenders that run it

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with super().running(), torch.enable_grad():
            yield

    def update(self) -> Tensor:
        """Make one step."""
        raise NotImplementedError

    def run_trial(self, trial: Any) -> tuple[Tensor, Tensor]:
        loss = self.update()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.net.parameters()]
        return loss.detach().float(), torch.cat([gradient.float().reshape(-1) for gradient in gradients])

    def begin(self) -> None:
        """Do nothing: a step's time does not depend on the weights, so they need not be reset."""

    def step(self, i: int) -> None:
        self.update()

    @property
    def batch(self) -> int:
        return len(self.inputs.x)

    def note(self) -> Row:
        if self.device.type != "cpu":
            return {}
        arguments = {"path": self.path, "system": self.subject.name, "batch": self.batch}
        arguments |= {"name": self.name, "dtype": self.dtype}
        code = f"from bench.training import print_peak_memory; print_peak_memory(**{arguments!r})"
        return {"peak_mb": run_in_process(code, os.environ)}


class Ours(Trainer):
    """Our training step, `Learner.update`."""

    def __init__(self, subject: Subject, inputs: Inputs, precision: str, compiled: bool = False):
        super().__init__(subject, inputs)
        self.dtype, self.compiled = precision, compiled
        self.name = "admfast, compiled" if compiled else "admfast"

    def prepare(self) -> None:
        net = build(self.subject.net)
        net.load_state_dict(shared_state(self.subject.net, 0, self.device))
        self.net = net.to(self.device).train()
        self.training_batch = batch_for(self.subject, self.batch, self.device)
        self.learner = Learner(recipe_of(self.subject, self.batch, self.dtype), self.net)
        if self.compiled:
            self.learner.ddp_net = torch.compile(self.learner.ddp_net)

    def update(self) -> Tensor:
        with fixed_numerics(self.device):
            return self.learner.update(self.training_batch).terms["loss"].mean()


class Published(Trainer):
    """The published training step: `MixedPrecisionTrainer`, AdamW, `update_ema`.

    It computes in float32 on a CPU and in its own float16 on a GPU. autocast: compute in bfloat16 by
    autocast, channels-last, and without gradient checkpoints, which would recompute in another precision.
    """

    def __init__(self, subject: Subject, inputs: Inputs, path: str, autocast: bool):
        super().__init__(subject, inputs)
        self.path, self.autocast = path, autocast
        self.half = self.device.type == "cuda" and not autocast
        self.dtype = "bf16" if autocast else "fp16" if self.half else "fp32"
        self.name = "published, channels-last" if autocast else "published"

    def prepare(self) -> None:
        code = published.modules(self.path, published.PARTS + published.TRAINING)
        arguments = {key: value for key, value in self.subject.net.to_dict().items() if key != "kind"}
        kind = code.unet.UNetModel if self.subject.low_res_size is None else code.unet.SuperResModel
        net = kind(**arguments, use_fp16=self.half)
        net.load_state_dict(shared_state(self.subject.net, 0, self.device))
        self.net = net.to(self.device).train()
        batch = batch_for(self.subject, self.batch, self.device)
        layout = torch.channels_last if self.autocast else torch.contiguous_format
        if self.autocast:
            self.net.to(memory_format=torch.channels_last)
            published.without_checkpoints(self.net)
        self.images, self.noise = (t.contiguous(memory_format=layout) for t in (batch.images, batch.noise))
        self.t, self.conditions = batch.t, {"y": batch.labels, "low_res": batch.low_res}
        self.conditions = {name: value for name, value in self.conditions.items() if value is not None}
        self.diffusion = code.script_util.create_gaussian_diffusion(**self.subject.settings.to_dict())
        code.fp16_util.logger.logkv_mean = lambda *_: None  # the published logger would make a folder
        self.trainer = code.fp16_util.MixedPrecisionTrainer(model=self.net, use_fp16=self.half)
        self.optimiser = torch.optim.AdamW(self.trainer.master_params, lr=LR, weight_decay=0.0)
        self.average = copy.deepcopy(self.trainer.master_params)
        self.update_ema = code.nn.update_ema

    def update(self) -> Tensor:
        self.trainer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses = self.diffusion.training_losses(
                self.net, self.images, self.t, self.conditions, self.noise
            )
        loss = losses["loss"].mean()
        self.trainer.backward(loss)
        self.trainer.optimize(self.optimiser)
        self.update_ema(self.average, self.trainer.master_params, rate=EMA)
        return loss

    def run_trial(self, trial: Any) -> tuple[Tensor, Tensor]:
        scale = 2.0**self.trainer.lg_loss_scale if self.half else 1.0
        loss, gradient = super().run_trial(trial)
        return loss, gradient / scale


def contender_entries(
    batch_precisions: tuple[str, ...], path: str, device: torch.device, compiled: bool
) -> list[Entry]:
    """Return the contenders of a comparison."""
    ours = [Entry("admfast", name, functools.partial(Ours, precision=name)) for name in batch_precisions]
    if compiled:
        make = functools.partial(Ours, precision=batch_precisions[0], compiled=True)
        ours.append(Entry("admfast, compiled", batch_precisions[0], make, compiles=True))
    plain = functools.partial(Published, path=path, autocast=False)
    fast = functools.partial(Published, path=path, autocast=True)
    theirs = [
        Entry("published", published.precision_on(device), plain),
        Entry("published, channels-last", "bf16", fast),
    ]
    return ours + theirs


def print_peak_memory(path: str, system: str, batch: int, name: str, dtype: str) -> None:
    """Print by how many megabytes two steps of a contender on a CPU raise the peak memory of this process."""
    device, subject = torch.device("cpu"), find_subject(system)
    inputs = Inputs.of(subject, batch, device)
    shared_state(subject.net, 0, device)
    before = peak_memory(device)
    found = contender_entries((dtype,), path, device, "compiled" in name)
    entry = next(entry for entry in found if (entry.name, entry.dtype) == (name, dtype))
    one = entry.make(subject, inputs)
    with one.running():
        one.ready()
        for i in range(2):
            one.step(i)
    print(json.dumps(round((peak_memory(device) - before) / 1e6, 1)))


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this bench."""
    add = parser.add_argument
    add("--systems", metavar="NAME,...", help="presets, or adm64: 64 px, 128 channels (default: by device)")
    add("--batch", metavar="N", type=int, help="images per step (default: by system and device)")
    add("--precisions", metavar="NAME,...", help="precisions of our steps (default: by device)")
    add("--compiled", action="store_true", help="also our step with torch.compile, which takes minutes")
    add_published(parser)


def groups(arguments: argparse.Namespace, settings: Settings) -> Any:
    """Return the groups with their shares of the budget."""
    from bench.ops import matmul_and_conv

    kind = settings.device.type
    batches = {TINY.name: 2} if settings.quick else BATCHES[kind]
    systems = names_in("systems", arguments.systems, all_subjects()) or batches
    precisions = precisions_in(arguments.precisions, settings) or PRECISIONS[kind]
    contenders = contender_entries(
        precisions, arguments.guided_diffusion, settings.device, arguments.compiled
    )

    def steps(settings: Settings) -> Iterator[Case]:
        for name in systems:
            batch = arguments.batch or batches.get(name, 4)
            budget = SECONDS_OF_ALL_ROUNDS[kind]
            one = Comparison("train_step", find_subject(name), batch, contenders, budget, trial_of, PASSES)
            yield from one.cases()

    return {"matmul": (0.1, matmul_and_conv.matmul_ceilings), "steps": (0.9, steps)}


BENCH = Bench(
    "training", "Compare a training step with the published one.", ("matmul", "steps"), groups, flags
)
main = functools.partial(bench_main, BENCH)

if __name__ == "__main__":
    sys.exit(main())
