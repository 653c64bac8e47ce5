"""Base class of contenders, which run guided steps, and the trial that each of them must pass."""

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
from admfast.engine.numerics import fixed_numerics
from admfast.engine.step import Batch
from admfast.ops.dispatch import override_impl
from admfast.ops.update import SolverTable, Stream, normal
from admfast.sampling.functions import FunctionStep, bind_conditions
from admfast.sampling.guides import Guide
from admfast.solvers import ddpm
from admfast.verify.budget import BUDGETS
from bench.measure import Sample, check_error, sample
from bench.results import Row
from bench.sampling.subject import Inputs, Subject

# The trial is the last but one of ten steps. After it, x is mostly the x_0 found in it, with noise and
# guidance of similar size. In earlier steps x stays mostly x_t, which would hide an error of the network.
TRIAL_STEPS, TRIAL_INDEX = 10, 1
# Steps whose embeddings the engine makes at a time; a sample has a multiple of it if it has enough steps.
STEPS_PER_CHUNK = 25
GUIDANCE_SIZE = 0.3  # root mean square of the change of x by the trial's guidance


class Contender(abc.ABC):
    """A program that runs the steps of one batch.

    name, dtype: the provider and the precision in its row.
    """

    name: str
    dtype: str

    def __init__(self, subject: Subject, inputs: Inputs):
        self.subject, self.inputs = subject, inputs
        self.device = inputs.x.device
        self._prepared = False

    def ready(self) -> None:
        """Call `prepare` if that has not been done."""
        if not self._prepared:
            self.prepare()
            self._prepared = True

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make everything that the steps need; raise Unavailable if that is impossible."""

    @abc.abstractmethod
    def run_trial(self, trial: Trial) -> tuple[Tensor, Tensor]:
        """Return (x after the trial's step, the x_0 found in it), for all images."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Go back to the state before the first step; this is not timed."""

    @abc.abstractmethod
    def step(self, i: int) -> None:
        """Run step i; steps come in order, from 0."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set this contender's numerics within the `with` block; by default, let cuDNN search algorithms."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with torch.no_grad():
                yield
        finally:
            torch.backends.cudnn.benchmark = before

    def note(self) -> Row:
        """Return further fields of its row, about how it ran."""
        return {}

    def name_parts(self) -> None:
        """Name parts that a profiler can't distinguish; called after `begin`. By default there are none."""
        return None

    def time_steps(self, count: int) -> Sample:
        """Time the first `count` steps together."""
        with self.running():
            self.begin()
            return sample(self.step, count)


@dataclass(frozen=True)
class Trial:
    """One step with given images, noise and guidance, and its result by the plain float32 network.

    process, index: the step. ends: indices of the images that are compared. x_next, x0: the result for these
    images.
    """

    process: GaussianDiffusion
    table: SolverTable
    index: int
    inputs: Inputs
    noise: Tensor
    guidance_scale: float
    ends: tuple[int, ...]
    x_next: Tensor
    x0: Tensor

    def check(self, outcome: tuple[Tensor, Tensor], dtype: str) -> float:
        """Return the larger relative error of x and x_0; raise WrongResult if it exceeds dtype's budget."""
        ends = list(self.ends)
        pairs = zip(outcome, (self.x_next, self.x0), strict=True)
        return max(check_error(got[ends], ref, BUDGETS[dtype].step) for got, ref in pairs)

    @property
    def noise_row(self) -> int:
        """The counter of the step's noise: the number of its row."""
        return TRIAL_STEPS - 1 - self.index


@functools.lru_cache(maxsize=1)
def sampling_trial(subject: Subject, batch: int, device: torch.device) -> Trial:
    """Return the trial of a preset's batch; the last one is cached."""
    return make_trial(subject, Inputs.of(subject, batch, device))


def make_trial(subject: Subject, inputs: Inputs) -> Trial:
    """Return the trial of a batch; the reference computes its first and its last image."""
    process = subject.process(TRIAL_STEPS)
    full_table = ddpm().table(process)
    table = SolverTable(
        full_table.solver, full_table.rows[-1 - TRIAL_INDEX :][:1], integer_t=full_table.integer_t
    )
    row_number = TRIAL_STEPS - 1 - TRIAL_INDEX
    noise = normal(inputs.seeds, inputs.x.shape[1:], row_number, Stream.STEPS)
    ends = tuple(sorted({0, len(inputs.x) - 1}))
    end_inputs, device = inputs.part(list(ends)), inputs.x.device
    net, classifier = subject.networks(device)
    model = bind_conditions(net, end_inputs.labels, end_inputs.low_res)
    shape = tuple(end_inputs.x.shape)
    batch = Batch(table=table, shape=shape, seeds=end_inputs.seeds, step_noise=noise[None, list(ends)])

    def run(guidance_scale: float) -> tuple[Tensor, Tensor]:
        guides = []
        if classifier is not None and end_inputs.labels is not None:
            guides.append(
                (Guide(classifier_guidance(classifier, end_inputs.labels, guidance_scale)), (True,))
            )
        step = FunctionStep(batch, model, end_inputs.x, guides)
        step.advance(0)
        return step.state.x.clone(), step.state.x0.clone()

    with fixed_numerics(device), override_impl("reference"), torch.no_grad():
        guidance_scale = 0.0
        if classifier is not None:
            moved = run(1.0)[0] - run(0.0)[0]
            guidance_scale = GUIDANCE_SIZE / float(moved.square().mean().sqrt())
        x_next, x0 = run(guidance_scale)
    return Trial(process, table, TRIAL_INDEX, inputs, noise, guidance_scale, ends, x_next, x0)


@dataclass(frozen=True, eq=False)
class Entry:
    """A contender before it is made: name and dtype of its row, how to make it, and whether it compiles."""

    name: str
    dtype: str
    make: Callable[[Subject, Inputs], Contender]
    note: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
