"""Contenders of a comparison: each runs one guided step, after a trial that it must pass."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from admfast.diffusion import GaussianDiffusion
from admfast.engine.guidance import classifier_guidance
from admfast.engine.numerics import own_numerics
from admfast.engine.step import Batch
from admfast.ops.dispatch import using
from admfast.ops.update import SolverTable, Stream, normal
from admfast.sampling.functions import FunctionStep, conditioned
from admfast.sampling.guides import Guide
from admfast.solvers import ddpm
from admfast.verify.budget import BUDGETS
from bench.measure import Sample, checked, sample
from bench.results import Row
from bench.sampling.subject import Inputs, Subject

# Of ten steps the one before the last: x after it is the x_0 found there, with noise and guidance of the same
# order, so that an error of the network isn't hidden behind an x_t that is handed through.
TRIAL_STEPS, TRIAL_INDEX = 10, 1
# Steps whose embeddings the engine makes at a time: a sample that comes near holds a whole number of them.
TOGETHER = 25
GUIDANCE_SIZE = 0.3  # root mean square of what the trial's guidance moves x by


class Contender(abc.ABC):
    """Run the steps of one batch.

    dtype: the precision it is listed under. classifier_dtype: where the classifier has another.
    """

    name: str
    dtype: str

    def __init__(self, subject: Subject, inputs: Inputs):
        self.subject, self.inputs = subject, inputs
        self.device = inputs.x.device
        self._prepared = False

    def ready(self) -> None:
        """Prepare where that isn't done."""
        if not self._prepared:
            self.prepare()
            self._prepared = True

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make what the steps need; raises Unavailable where it can't be had."""

    @abc.abstractmethod
    def outcome(self, trial: Trial) -> tuple[Tensor, Tensor]:
        """(x after the trial's step, the x_0 found in it), for all images."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Go back before the first step; not timed."""

    @abc.abstractmethod
    def step(self, i: int) -> None:
        """Run step i; steps come in order, from 0."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run what is inside as everything of it runs; by default cuDNN searches its algorithms."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with torch.no_grad():
                yield
        finally:
            torch.backends.cudnn.benchmark = before

    def note(self) -> Row:
        """Return what its row says of how it ran."""
        return {}

    def name_parts(self) -> None:
        """Name the parts that a profiler can't tell apart, after `begin`; by default none."""
        return None

    def take(self, count: int) -> Sample:
        """The time of the first `count` steps."""
        with self.running():
            self.begin()
            return sample(self.step, count)


@dataclass(frozen=True)
class Trial:
    """One step on given images, noise and guidance, whose outcome is known from the plain float32 network.

    process, index: the step. scale: of the guidance. ends: the images that are compared, with x_next and x0
    for these.
    """

    process: GaussianDiffusion
    table: SolverTable
    index: int
    inputs: Inputs
    noise: Tensor
    scale: float
    ends: tuple[int, ...]
    x_next: Tensor
    x0: Tensor

    def check(self, outcome: tuple[Tensor, Tensor], dtype: str) -> float:
        """The larger relative error of x and x_0; raises WrongResult past the budget of the precision."""
        ends = list(self.ends)
        pairs = zip(outcome, (self.x_next, self.x0), strict=True)
        return max(checked(got[ends], ref, BUDGETS[dtype].step) for got, ref in pairs)

    @property
    def noise_row(self) -> int:
        """The counter of the step's noise: its number among all rows."""
        return TRIAL_STEPS - 1 - self.index


@functools.lru_cache(maxsize=1)
def sampling_trial(subject: Subject, batch: int, device: torch.device) -> Trial:
    """The trial of a preset's batch, kept until another is asked for."""
    return make_trial(subject, Inputs.of(subject, batch, device))


def make_trial(subject: Subject, inputs: Inputs) -> Trial:
    """The trial for a batch; the first and the last image go through the reference."""
    process = subject.process(TRIAL_STEPS)
    whole = ddpm().table(process)
    table = SolverTable(whole.solver, whole.rows[-1 - TRIAL_INDEX :][:1], integer_t=whole.integer_t)
    row_number = TRIAL_STEPS - 1 - TRIAL_INDEX
    noise = normal(inputs.seeds, inputs.x.shape[1:], row_number, Stream.STEPS)
    ends = tuple(sorted({0, len(inputs.x) - 1}))
    few, device = inputs.part(list(ends)), inputs.x.device
    net, classifier = subject.networks(device)
    model = conditioned(net, few.labels, few.low_res)
    shape = tuple(few.x.shape)
    batch = Batch(
        table=table, shape=shape, seeds=few.seeds, step_noise=noise[None, list(ends)], guided=(False,)
    )

    def run(scale: float) -> tuple[Tensor, Tensor]:
        guides = []
        if classifier is not None and few.labels is not None:
            guides.append((Guide(classifier_guidance(classifier, few.labels, scale)), (True,)))
        step = FunctionStep(batch, model, few.x, guides)
        step.advance(0)
        return step.state.x.clone(), step.state.x0.clone()

    with own_numerics(device), using("reference"), torch.no_grad():
        scale = 0.0
        if classifier is not None:
            moved = run(1.0)[0] - run(0.0)[0]
            scale = GUIDANCE_SIZE / float(moved.square().mean().sqrt())
        x_next, x0 = run(scale)
    return Trial(process, table, TRIAL_INDEX, inputs, noise, scale, ends, x_next, x0)


@dataclass(frozen=True, eq=False)
class Entry:
    """A contender before it is made: what its row is called, how it is made, whether that takes minutes."""

    name: str
    dtype: str
    make: Callable[[Subject, Inputs], Contender]
    note: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
