"""Compare a run with its machine: its share of a matrix product's rate, and advice from fixed rules."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from admfast import host
from admfast.checkpoints.describe import count_forward_work, count_guidance_flops
from admfast.engine.numerics import on_threads, own_numerics
from admfast.engine.precision import has_amx
from admfast.engine.threads import GRAIN, convolution, threads_for
from admfast.files.tables import table
from admfast.ops import native
from admfast.sampling.last_run import RunReport, StageReport
from admfast.sampling.pipeline import Pipeline

SIDE = {"cpu": 1024, "cuda": 8192}  # of the product's matrices: large enough for a library's best rate
SECONDS = 0.25  # for which products are measured
NAMED = 3  # pieces of advice at most
_WINOGRAD = " (Winograd's convolutions do with fewer multiplications than are counted)"
MUCH = 0.1  # share of a run's seconds above which a cost is mentioned


@dataclass(frozen=True)
class Rate:
    """Operations per second of a stage's rows, and of a matrix product on the same threads.

    flops: operations of all rows: convolutions and matrix products of the network's forward pass and of the
    classifier's gradient, as in the published networks; a multiply-add counts as 2. seconds: of these rows.
    product: operations per second of the fastest product. side, dtype: of its matrices.
    """

    flops: int
    seconds: float
    product: float
    side: int
    dtype: torch.dtype

    @property
    def reached(self) -> float:
        """Operations per second of the rows."""
        return self.flops / self.seconds

    @property
    def share(self) -> float:
        """Share of the product's rate; can exceed 1, because Winograd's convolutions multiply less."""
        return self.reached / self.product


def rates(report: RunReport, pipe: Pipeline) -> dict[str, Rate]:
    """Measure matrix products in the torso's dtype now; return the rate of each stage of a run of `pipe`."""
    found = {}
    for stage, own in _stages(report, pipe):
        dtype, side = own.policy.torso, SIDE[own.device.type]
        product = product_rate(own.device, dtype, stage.threads, own.policy.tf32, side)
        found[stage.stage] = Rate(_flops(stage, own), stage.seconds.rows, product, side, dtype)
    return found


def product_rate(
    device: torch.device, dtype: torch.dtype, threads: int | None, tf32: bool, side: int
) -> float:
    """Return the operations per second of the fastest of several products of two square matrices.

    threads: on a CPU; None leaves them as they are. tf32: whether CUDA may use TF32. Takes 0.25 s, or the
    time of two products if that is longer.
    """

    def ended() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    on = contextlib.nullcontext() if threads is None else on_threads(threads)
    with torch.no_grad(), own_numerics(device, tf32), on:
        factor = torch.ones(side, side, dtype=dtype, device=device)
        torch.mm(factor, factor)  # the first call of a library is slow
        best, until = float("inf"), ended() + SECONDS
        while best == float("inf") or time.perf_counter() < until:
            began = ended()
            torch.mm(factor, factor)
            best = min(best, ended() - began)
    return 2 * side**3 / best


def profile_text(report: RunReport, pipe: Pipeline) -> str:
    """Return the share of the machine's rate of each stage, and advice, as text to print below the report."""
    lines = []
    for name, rate in rates(report, pipe).items():
        dtype = str(rate.dtype).removeprefix("torch.")
        product = f"best product of two {rate.side}x{rate.side} {dtype} matrices, measured now"
        lines += [
            (name, "operations of the steps", f"{rate.flops / 1e9:,.1f} GFLOP"),
            ("", "reached", f"{rate.reached / 1e9:,.1f} GFLOP/s"),
            ("", product, f"{rate.product / 1e9:,.1f} GFLOP/s"),
            ("", "share of this rate", f"{100 * rate.share:.2g} %{_WINOGRAD if rate.share > 1 else ''}"),
        ]
    advice = [f"- {text}" for text in helps(report, pipe)] or ["- no rule applies"]
    return "\n".join([table(lines), "", "What would help:", *advice])


def helps(report: RunReport, pipe: Pipeline) -> list[str]:
    """Return at most three pieces of advice that would make the run faster, the most important first."""
    found: dict[str, None] = {}
    rules = (_of_implementations, _of_steps, _of_precision, _of_size, _of_seconds)
    for rule in rules:
        for stage, own in _stages(report, pipe):
            found |= dict.fromkeys(rule(stage, own))
    return list(found)[:NAMED]


def _stages(report: RunReport, pipe: Pipeline) -> Iterator[tuple[StageReport, Pipeline]]:
    """Yield every stage with the pipeline of its network."""
    for stage, own in zip(report.stages, (pipe, pipe.upsampler), strict=False):
        assert own is not None
        yield stage, own


def _flops(stage: StageReport, own: Pipeline) -> int:
    """Return the operations of all rows of a stage."""
    total = stage.rows * count_forward_work(own.config, sides=stage.sides).flops
    if stage.guided_rows:
        classifier: Any = own.classifier
        total += stage.guided_rows * count_guidance_flops(classifier.config, stage.sides)
    return stage.images * total


# The rules: each yields sentences of advice


def _of_implementations(stage: StageReport, own: Pipeline) -> Iterator[str]:
    asked = {choice.asked_by: None for choice in stage.ops if choice.asked_by}
    for name in asked:
        ops = {choice.op: None for choice in stage.ops if choice.asked_by == name}
        yield f"{name} names the implementation of {', '.join(ops)}: without it the fastest is used"
    on_cpu = own.device.type == "cpu"
    reason = native.reason_missing() if on_cpu else native.reason_missing_cuda()
    if reason is not None:
        yield f"the compiled extension is not used ({reason}): see `admfast info`"


def _of_steps(stage: StageReport, own: Pipeline) -> Iterator[str]:
    if stage.unprepared:
        yield f"steps ran one by one, without a prepared step ({stage.unprepared})"
    if not stage.folded:
        yield "the network was not folded: EngineOptions(fold=FoldOptions()) is the default"
    if stage.by_parts:
        yield f"blocks of {', '.join(stage.by_parts)} ran layer by layer: a hook, or a replaced module"
    if own.device.type == "cuda" and stage.unreplayed and not stage.unprepared:
        yield f"the host launched every operation, without a CUDA graph ({stage.unreplayed})"


def _of_precision(stage: StageReport, own: Pipeline) -> Iterator[str]:
    half = own.policy.torso in (torch.bfloat16, torch.float16)
    if own.device.type == "cpu" and half and not own.policy.int8 and not has_amx():
        yield f"precision {own.policy.name} on a CPU without AMX: auto would be fp32, with Winograd"
    if own.device.type == "cuda" and not half and not own.policy.tf32:
        yield "precision fp32 on a GPU: auto would be bf16"


def _of_size(stage: StageReport, own: Pipeline) -> Iterator[str]:
    if own.device.type != "cpu":
        return
    shape = (stage.batch, own.config.in_channels, *stage.sides)
    work = convolution(own.config, shape)  # type: ignore[arg-type]
    worth = threads_for(work, host.cpus())
    if stage.threads is not None and stage.threads < worth:
        yield f"{stage.threads} threads, though the work is enough for {worth} (OMP_NUM_THREADS, threads=)"
    if work < GRAIN:
        yield f"batches of {stage.batch}: larger ones would share the fixed cost of a call among more images"


def _of_seconds(stage: StageReport, own: Pipeline) -> Iterator[str]:
    seconds = stage.seconds
    if seconds.callbacks > MUCH * seconds.rows:
        yield f"callbacks took {seconds.callbacks:.2f} s, compared with {seconds.rows:.2f} s of steps"
    once = seconds.folding + seconds.preparing + seconds.first_row - (stage.later_row or 0.0)
    if once > MUCH * seconds.rows:
        yield f"the first step and the time before it took {once:.2f} s; later calls save most of that"
