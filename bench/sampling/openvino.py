"""OpenVINO's evaluation of the network, from a trace of the plain one; steps without guidance."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from admfast.engine.step import Batch
from admfast.ops.update import SolverTable
from admfast.sampling.functions import FunctionStep, bind_conditions
from admfast.solvers import ddpm
from bench.measure import Unavailable, first_line
from bench.results import Row
from bench.sampling.contender import Contender, Entry, Trial
from bench.sampling.subject import Inputs, Subject

NAME = "openvino"
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVino(Contender):
    """A step whose network OpenVINO evaluates on the CPU; the update is this package's."""

    name = NAME

    def __init__(self, subject: Subject, inputs: Inputs, precision: str):
        super().__init__(subject, inputs)
        self.dtype = precision

    def prepare(self) -> None:
        if self.device.type != "cpu":
            raise Unavailable("only compared on a CPU")
        try:
            self.package = importlib.import_module("openvino")
        except ImportError as error:
            raise Unavailable(f"openvino can't be imported: {first_line(error)}") from error
        inputs, net = self.inputs, self.subject.networks(self.device)[0]
        t = torch.zeros(len(inputs.x), dtype=torch.int64)
        model = bind_conditions(net, inputs.labels, inputs.low_res)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(lambda x, t: model(x, t), (inputs.x, t), check_trace=False)
        hints = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        converted = self.package.convert_model(traced, example_input=(inputs.x, t))
        self.compiled = self.package.Core().compile_model(converted, "CPU", hints)
        self.table = ddpm().table(self.subject.process(self.subject.steps))

    def _model(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network for a whole batch."""
        return torch.from_numpy(self.compiled((x.numpy(), t.long().numpy()))[0])

    def _runner(self, table: SolverTable, noise_row: int) -> FunctionStep:
        batch = Batch(
            table=table,
            shape=tuple(self.inputs.x.shape),
            seeds=self.inputs.seeds,
            noise_row=noise_row,
        )
        return FunctionStep(batch, self._model, self.inputs.x)

    def run_trial(self, trial: Trial) -> tuple[Tensor, Tensor]:
        runner = self._runner(trial.table, trial.noise_row)
        runner.advance(0)
        return runner.state.x.clone(), runner.state.x0.clone()

    def begin(self) -> None:
        self.runner = self._runner(self.table, 0)

    def step(self, i: int) -> None:
        self.runner.advance(i)

    def note(self) -> Row:
        return {"implementation": f"openvino {self.package.get_version().split('-')[0]}"}


def entry(precision: str) -> Entry:
    """Return the entry of OpenVINO in a precision."""
    make: Any = functools.partial(OpenVino, precision=precision)
    return Entry(NAME, precision, make)
