"""Our contender: the step of this package's engine, with given options."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from admfast.engine.engine import Engine
from admfast.engine.guidance import RowGuidance, classifier_guidance
from admfast.engine.numerics import fixed_numerics
from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.engine.step import Batch, PreparedStep
from admfast.ops.dispatch import override_impl, record_choices
from admfast.ops.update import SolverTable
from admfast.sampling.functions import FunctionStep, bind_conditions
from admfast.solvers import ddpm
from bench.results import Row
from bench.sampling.contender import Contender, Entry, Trial
from bench.sampling.subject import Inputs, Subject


class Ours(Contender):
    """A step of the engine.

    precision: name of a policy. options: of the engine. impl_setting: implementations by op, as in
    ADMFAST_IMPL; "" for the default choice.
    """

    def __init__(
        self,
        subject: Subject,
        inputs: Inputs,
        *,
        name: str = "admfast",
        precision: str = "fp32",
        options: EngineOptions | None = None,
        impl_setting: str = "",
    ):
        super().__init__(subject, inputs)
        self.name, self.dtype, self.impl_setting = name, precision, impl_setting
        self.options = options or EngineOptions()
        self.implementations: dict[str, list[str]] = {}

    def prepare(self) -> None:
        self.policy = policy(self.dtype, self.device)
        nets = self.subject.networks(self.device)
        self.engine = Engine(nets[0], nets[1], self.policy, self.options)  # type: ignore[arg-type]
        self.engine.ensure_folded()
        self.table = ddpm().table(self.subject.process(self.subject.steps))
        self.guided = nets[1] is not None and self.inputs.labels is not None
        with self._record_implementations():
            self.begin()

    @contextlib.contextmanager
    def _record_implementations(self) -> Iterator[None]:
        """Record which implementations are chosen within the `with` block."""
        with record_choices() as choices:
            yield
        for choice in choices:
            names = self.implementations.setdefault(choice.op, [])
            if choice.name not in names:
                names.append(choice.name)

    def _runner(
        self, table: SolverTable, guidance_scale: float, noise_row: int, x: Tensor
    ) -> PreparedStep | FunctionStep:
        """Return a prepared step, or a step of plain functions, at the first row of a table."""
        inputs = self.inputs
        net, classifier = self.engine.net, self.engine.classifier
        guidance = RowGuidance(guidance_scale if self.guided else 0.0)
        batch = Batch(
            table=table,
            shape=tuple(x.shape),
            seeds=inputs.seeds,
            labels=inputs.labels,
            low_res=inputs.low_res,
            guidance=(guidance,) * len(table),
            noise_row=noise_row,
        )
        if self.options.prepared:
            step = self.engine.step(batch)
            step.fill(batch, x)
            return step
        gradient = None
        if self.guided and classifier is not None and inputs.labels is not None:
            gradient = classifier_guidance(classifier, inputs.labels, 1.0)
        model = bind_conditions(net, inputs.labels, inputs.low_res)
        return FunctionStep(batch, model, x, classifier_gradient=gradient)

    def run_trial(self, trial: Trial) -> tuple[Tensor, Tensor]:
        runner = self._runner(trial.table, trial.guidance_scale, trial.noise_row, self.inputs.x)
        with self._record_implementations():
            runner.advance(0)
        return runner.state.x.clone(), runner.state.x0.clone()

    def begin(self) -> None:
        self.runner = self._runner(self.table, self.subject.guidance, 0, self.inputs.x)

    def step(self, i: int) -> None:
        self.runner.advance(i)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        tf32 = policy(self.dtype, self.device).tf32
        chosen = override_impl(self.impl_setting) if self.impl_setting else contextlib.nullcontext()
        with torch.no_grad(), fixed_numerics(self.device, tf32), chosen:
            yield

    def name_parts(self) -> None:
        for table in getattr(self.runner, "tables", {}).values():
            table.fill = torch.profiler.record_function("embedding")(table.fill)

    def note(self) -> Row:
        parts = [f"{op} {'+'.join(names)}" for op, names in self.implementations.items()]
        row: Row = {"implementation": ", ".join(parts)}
        refused = getattr(self.runner, "refusal", None)
        return row | ({"refused": refused} if refused else {})


def entry(precision: str, options: EngineOptions | None = None, name: str = "admfast") -> Entry:
    """Return the entry of our step in a precision."""

    make = functools.partial(Ours, name=name, precision=precision, options=options)
    return Entry(name, precision, make, compiles=options is not None and options.compile)
