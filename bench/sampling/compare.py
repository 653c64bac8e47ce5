"""Comparison of contenders on one batch: each must pass a trial, then their steps are timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.measure import (
    Case,
    Sample,
    Settings,
    first_line,
    quantiles,
    refuse_work,
    round_to_5_digits,
    sample_in_turns,
)
from bench.ops.matmul_and_conv import PRODUCT_FLOP, product_taker
from bench.profile import trace_steps
from bench.results import PRODUCT_DTYPE, Row
from bench.sampling.contender import STEPS_PER_CHUNK, Contender, Entry, sampling_trial
from bench.sampling.subject import Subject, step_flop
from bench.sampling.weights import shared_state

# Seconds of one sample, and number of samples of each contender.
SAMPLE_SECONDS = {"cuda": 0.1, "cpu": 0.4}
ROUNDS = 9
TRACED_STEPS = 5
# Seconds that a contender may take to pass its trial, without and with compilation.
TRIAL_SECONDS, COMPILE_SECONDS = 300.0, 3600.0


@dataclass(eq=False)
class Comparison:
    """Contenders on the same weights and batch, which are all measured when the first row is requested.

    budget: seconds after which no further round begins; a round takes one sample of each. make_trial:
    returns the trial that each must pass. passes: operations of a step over those of a sampling step.
    """

    kind: str
    subject: Subject
    batch: int
    entries: Sequence[Entry]
    budget: float = 60.0
    make_trial: Callable[[Subject, int, torch.device], Any] = sampling_trial
    passes: int = 1
    results: dict[Entry, Row | Exception] = field(default_factory=dict)
    left_out: set[tuple[str, str]] = field(default_factory=set)

    @property
    def flop(self) -> int:
        """Operations of one step of the batch."""
        return step_flop(self.subject) * self.batch * self.passes

    def cases(self) -> list[Case]:
        """Return a case for each contender."""
        return [self.case(entry) for entry in self.entries]

    def case(self, entry: Entry) -> Case:
        """Return the case of one contender."""
        shape = {"system": self.subject.name, "batch": self.batch}
        limit = self.budget + (COMPILE_SECONDS if entry.compiles else TRIAL_SECONDS)
        measure = partial(self.row_of, entry)
        return Case(
            self.kind, entry.dtype, entry.name, shape, measure, dict(entry.note), limit, measured_with=self
        )

    def leave_out(self, case: Case) -> None:
        """Leave the contender of a case out of the comparison."""
        self.left_out.add((case.provider, case.dtype))

    def row_of(self, entry: Entry, settings: Settings) -> Row:
        """Return the row of one contender, or raise its error; measure all of them at the first call."""
        if not self.results:
            try:
                self._measure(settings)
            except Exception as error:  # the trial itself failed, so no contender can be measured
                self.results = dict.fromkeys(self.entries, error.with_traceback(None))
        result = self.results[entry]
        if isinstance(result, Exception):
            raise result
        return result

    def _measure(self, settings: Settings) -> None:
        """Measure all contenders: find the row or the error of each."""
        flop = self.flop
        refuse_work(flop * len({0, self.batch - 1}) / self.batch, "fp32", settings)
        trial = self.make_trial(self.subject, self.batch, settings.device)
        ready: dict[Entry, Contender] = {}
        rows: dict[Entry, Row] = {}
        for entry in self.entries:
            if (entry.name, entry.dtype) in self.left_out:
                continue
            settings.begin(self.case(entry))
            try:
                refuse_work(flop, entry.dtype, settings)
                ready[entry], rows[entry] = self._prepare(entry, trial)
            except Exception as error:
                # Without its traceback, whose frames keep the contender's memory.
                self.results[entry] = error.with_traceback(None)
            _free_memory(settings)
        takers: dict[Entry | str, Callable[[int], Sample]]
        takers = {entry: contender.time_steps for entry, contender in ready.items()}
        if not settings.cuda:
            takers |= {name: product_taker(name) for name in sorted(map(product_of, ready))}
        samples = sample_in_turns(
            takers,
            0.005 if settings.quick else SAMPLE_SECONDS[settings.device.type],
            2 if settings.quick else ROUNDS,
            steps_per_chunk=STEPS_PER_CHUNK,
            max_steps=self.subject.steps,
            budget=min(self.budget, settings.limit / 2),
        )
        for entry, contender in ready.items():
            rows[entry] |= self.times_of(samples[entry])
            if settings.cuda:
                host = quantiles([sample.host_ms for sample in samples[entry]])["ms"]
                rows[entry] |= {"host_ms": host} | _count_launches(contender)
            else:
                rows[entry]["cpu_ms"] = quantiles([sample.cpu_ms for sample in samples[entry]])["ms"]
                rows[entry] |= _rate_of_products(rows[entry], samples[product_of(entry)])
        for entry, row in rows.items():
            ratios = {f"{o.name} {o.dtype}": paired_ratio(rows[o], row) for o in rows if o != entry}
            row["faster_than"] = ratios
        self.results |= rows
        ready.clear()
        _free_memory(settings)

    def _prepare(self, entry: Entry, trial: Any) -> tuple[Contender, Row]:
        """Return a contender that has passed its trial, and the first fields of its row."""
        contender = entry.make(self.subject, trial.inputs)
        cuda = trial.inputs.x.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with contender.running():
            contender.ready()
            error = trial.check(contender.run_trial(trial), entry.dtype)
        row: Row = {"rel_err": float(f"{error:.2e}"), "steps": self.subject.steps} | contender.note()
        if cuda:
            torch.cuda.synchronize()
            # Its own memory, and the float32 weights that all contenders share.
            own_bytes = torch.cuda.max_memory_allocated() - before
            row["peak_mb"] = round((own_bytes + self._shared_bytes(trial.inputs.x.device)) / 1e6, 1)
        return contender, row

    def _shared_bytes(self, device: torch.device) -> int:
        configs = [config for config in (self.subject.net, self.subject.classifier) if config is not None]
        states = (shared_state(config, seed, device) for seed, config in enumerate(configs))
        return sum(value.nbytes for state in states for value in state.values())

    def times_of(self, samples: Sequence[Sample]) -> Row:
        """Return the fields that follow from the samples: median time per step, and rates."""
        row = quantiles([sample.ms for sample in samples])
        flop = self.flop
        return row | {
            "samples": len(samples),
            "rounds_ms": [round_to_5_digits(sample.ms) for sample in samples],
            "waited": round(sum(sample.waited for sample in samples) / len(samples), 3),
            "flop": flop,
            "tflops": round_to_5_digits(flop / row["ms"] / 1e9),
            "images_per_s": round_to_5_digits(1e3 * self.batch / (row["ms"] * self.subject.steps)),
        }


def product_of(entry: Entry) -> str:
    """Return the dtype of the matrix products with which a contender's rate is compared."""
    return PRODUCT_DTYPE.get(entry.dtype, entry.dtype)


def _rate_of_products(row: Row, products: Sequence[Sample]) -> Row:
    """Return the rate of the products between the rounds, and the step's share of it; medians over rounds."""
    rates = [PRODUCT_FLOP / sample.ms / 1e9 for sample in products]
    steps = [row["flop"] / ms / 1e9 for ms in row["rounds_ms"]]
    shares = [step / rate for step, rate in zip(steps, rates, strict=True)]
    return {"product_tflops": quantiles(rates)["ms"], "product_share": quantiles(shares)["ms"]}


def paired_ratio(slower: Row, faster: Row) -> float:
    """Return the median over the rounds of the slower row's time divided by the faster row's."""
    pairs = zip(slower["rounds_ms"], faster["rounds_ms"], strict=True)
    return quantiles([a / b for a, b in pairs])["ms"]


def _count_launches(contender: Contender) -> Row:
    """Return the numbers of launches by the host and of kernels for one step."""
    try:
        trace: Any = trace_steps(contender, TRACED_STEPS)
    except RuntimeError as error:  # a host may not allow profiling
        return {"trace": first_line(error)}
    return {"launches": round(trace.launches, 1), "kernels": round(trace.kernels, 1)}


def _free_memory(settings: Settings) -> None:
    gc.collect()
    if settings.cuda:
        torch.cuda.empty_cache()
