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
from admfast.engine.numerics import fixed_numerics, on_threads
from admfast.engine.precision import has_amx
from admfast.engine.threads import MIN_OPERATIONS_PER_THREAD, convolution_operations, threads_for
from admfast.files.tables import table
from admfast.ops import native
from admfast.sampling.last_run import RunReport, StageReport
from admfast.sampling.pipeline import Pipeline

PRODUCT_SIDE = {
    "cpu": 1024,
    "cuda": 8192,
}  # of the product's matrices: large enough for a library's best rate
MEASURE_SECONDS = 0.25  # for which products are measured
MAX_ADVICE = 3  # pieces of advice at most
_WINOGRAD = " (Winograd's convolutions do with fewer multiplications than are counted)"
_INT8 = " (3x3 convolutions multiply 8-bit numbers, which is faster than this product)"
NOTABLE_SHARE = 0.1  # share of a run's seconds above which a cost is mentioned


@dataclass(frozen=True)
class Rate:
    """Operations per second of a stage's rows, and of a matrix product on the same threads.

    flops: operations of all rows: convolutions and matrix products of the network's forward pass and of the
    classifier's gradient, as in the published networks; a multiply-add counts as 2. seconds: of these rows.
    product: operations per second of the fastest product. side, dtype: of its matrices. int8: whether the
    3x3 convolutions multiplied 8-bit numbers instead.
    """

    flops: int
    seconds: float
    product: float
    side: int
    dtype: torch.dtype
    int8: bool

    @property
    def flops_per_second(self) -> float:
        """Operations per second of the rows."""
        return self.flops / self.seconds

    @property
    def share(self) -> float:
        """Share of the product's rate; can exceed 1 (see `note`)."""
        return self.flops_per_second / self.product

    @property
    def note(self) -> str:
        """Reason why the share may exceed 1, to print after it; empty if there is none."""
        return _INT8 if self.int8 else _WINOGRAD if self.share > 1 else ""


def rates(report: RunReport, pipe: Pipeline) -> dict[str, Rate]:
    """Measure matrix products in the torso's dtype now; return the rate of each stage of a run of `pipe`."""
    rates_by_stage = {}
    for stage, stage_pipe in _stages(report, pipe):
        dtype, side = stage_pipe.policy.torso, PRODUCT_SIDE[stage_pipe.device.type]
        product = measure_product_rate(stage_pipe.device, dtype, stage.threads, stage_pipe.policy.tf32, side)
        flops, int8 = _flops(stage, stage_pipe), stage_pipe.policy.int8
        rates_by_stage[stage.stage] = Rate(flops, stage.seconds.rows, product, side, dtype, int8)
    return rates_by_stage


def measure_product_rate(
    device: torch.device, dtype: torch.dtype, threads: int | None, tf32: bool, side: int
) -> float:
    """Return the operations per second of the fastest of several products of two square matrices.

    threads: on a CPU; None leaves them as they are. tf32: whether CUDA may use TF32. Takes 0.25 s, or the
    time of two products if that is longer.
    """

    def synchronized_time() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    thread_limit = contextlib.nullcontext() if threads is None else on_threads(threads)
    with torch.no_grad(), fixed_numerics(device, tf32), thread_limit:
        factor = torch.ones(side, side, dtype=dtype, device=device)
        torch.mm(factor, factor)  # the first call of a library is slow
        best, end = float("inf"), synchronized_time() + MEASURE_SECONDS
        while best == float("inf") or time.perf_counter() < end:
            start = synchronized_time()
            torch.mm(factor, factor)
            best = min(best, synchronized_time() - start)
    return 2 * side**3 / best


def profile_text(report: RunReport, pipe: Pipeline) -> str:
    """Return the share of the machine's rate of each stage, and advice, as text to print below the report."""
    lines = []
    for name, rate in rates(report, pipe).items():
        dtype = str(rate.dtype).removeprefix("torch.")
        product = f"best product of two {rate.side}x{rate.side} {dtype} matrices, measured now"
        lines += [
            (name, "operations of the steps", f"{rate.flops / 1e9:,.1f} GFLOP"),
            ("", "reached", f"{rate.flops_per_second / 1e9:,.1f} GFLOP/s"),
            ("", product, f"{rate.product / 1e9:,.1f} GFLOP/s"),
            ("", "share of this rate", f"{100 * rate.share:.2g} %{rate.note}"),
        ]
    advice_lines = [f"- {text}" for text in find_advice(report, pipe)] or ["- no rule applies"]
    return "\n".join([table(lines), "", "What would help:", *advice_lines])


def find_advice(report: RunReport, pipe: Pipeline) -> list[str]:
    """Return at most three pieces of advice that would make the run faster, the most important first."""
    sentences: dict[str, None] = {}
    rules = (_advise_implementations, _advise_steps, _advise_precision, _advise_batch_size, _advise_seconds)
    for rule in rules:
        for stage, stage_pipe in _stages(report, pipe):
            sentences |= dict.fromkeys(rule(stage, stage_pipe))
    return list(sentences)[:MAX_ADVICE]


def _stages(report: RunReport, pipe: Pipeline) -> Iterator[tuple[StageReport, Pipeline]]:
    """Yield every stage with the pipeline of its network."""
    for stage, stage_pipe in zip(report.stages, (pipe, pipe.upsampler), strict=False):
        assert stage_pipe is not None
        yield stage, stage_pipe


def _flops(stage: StageReport, stage_pipe: Pipeline) -> int:
    """Return the operations of all rows of a stage."""
    evaluations = stage.rows + stage.null_class_rows
    total = evaluations * count_forward_work(stage_pipe.config, sides=stage.sides).flops
    if stage.weak_network_rows:
        weak: Any = stage_pipe.weak
        total += stage.weak_network_rows * count_forward_work(weak.config, sides=stage.sides).flops
    if stage.guided_rows:
        classifier: Any = stage_pipe.classifier
        total += stage.guided_rows * count_guidance_flops(classifier.config, stage.sides)
    return stage.images * total


# The rules: each yields sentences of advice


def _advise_implementations(stage: StageReport, stage_pipe: Pipeline) -> Iterator[str]:
    requesters = {choice.requested_by: None for choice in stage.ops if choice.requested_by}
    for name in requesters:
        ops = {choice.op: None for choice in stage.ops if choice.requested_by == name}
        yield f"{name} names the implementation of {', '.join(ops)}: without it the fastest is used"
    on_cpu = stage_pipe.device.type == "cpu"
    reason = native.reason_missing() if on_cpu else native.reason_missing_cuda()
    if reason is not None:
        yield f"the compiled extension is not used ({reason}): see `admfast info`"


def _advise_steps(stage: StageReport, stage_pipe: Pipeline) -> Iterator[str]:
    if stage.not_prepared_reason:
        yield f"steps ran one by one, without a prepared step ({stage.not_prepared_reason})"
    if not stage.folded:
        yield "the network was not folded: EngineOptions(fold=FoldOptions()) is the default"
    if stage.layerwise_networks:
        networks = ", ".join(stage.layerwise_networks)
        yield f"blocks of {networks} ran layer by layer: a hook, or a replaced module"
    if stage_pipe.device.type == "cuda" and stage.not_replayed_reason and not stage.not_prepared_reason:
        yield f"the host launched every operation, without a CUDA graph ({stage.not_replayed_reason})"


def _advise_precision(stage: StageReport, stage_pipe: Pipeline) -> Iterator[str]:
    half = stage_pipe.policy.torso in (torch.bfloat16, torch.float16)
    if stage_pipe.device.type == "cpu" and half and not stage_pipe.policy.int8 and not has_amx():
        yield f"precision {stage_pipe.policy.name} on a CPU without AMX: auto would be fp32, with Winograd"
    if stage_pipe.device.type == "cuda" and not half and not stage_pipe.policy.tf32:
        yield "precision fp32 on a GPU: auto would be bf16"


def _advise_batch_size(stage: StageReport, stage_pipe: Pipeline) -> Iterator[str]:
    if stage_pipe.device.type != "cpu":
        return
    shape = (stage.batch, stage_pipe.config.in_channels, *stage.sides)
    work = convolution_operations(stage_pipe.config, shape)  # type: ignore[arg-type]
    useful_threads = threads_for(work, host.usable_cpus())
    if stage.threads is not None and stage.threads < useful_threads:
        used = f"{stage.threads} threads"
        yield f"{used}, though the work is enough for {useful_threads} (OMP_NUM_THREADS, threads=)"
    if work < MIN_OPERATIONS_PER_THREAD:
        yield f"batches of {stage.batch}: larger ones would share the fixed cost of a call among more images"


def _advise_seconds(stage: StageReport, stage_pipe: Pipeline) -> Iterator[str]:
    seconds = stage.seconds
    if seconds.callbacks > NOTABLE_SHARE * seconds.rows:
        yield f"callbacks took {seconds.callbacks:.2f} s, compared with {seconds.rows:.2f} s of steps"
    once_seconds = seconds.folding + seconds.preparing + seconds.first_row - (stage.mean_later_row or 0.0)
    if once_seconds > NOTABLE_SHARE * seconds.rows:
        yield f"the first step and the time before it took {once_seconds:.2f} s; later calls save most of it"
