"""Reports on the last call of `sample`: preparation of its steps, implementation of each op, and seconds.

The loop keeps a record (`admfast.sampling.loop.RunRecord`), which costs a few readings of the clock per
batch. The report is made from the record when `Pipeline.last_run` is read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from admfast.engine.numerics import peak_memory
from admfast.files.tables import table
from admfast.ops.dispatch import Choice

if TYPE_CHECKING:
    from admfast.sampling.loop import RunRecord
    from admfast.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Seconds:
    """Seconds that a stage took on the host's clock, summed over its batches.

    On a GPU the host waits for the device after the first and the last row, so device time is included.

    Attributes:
        folding: checking the networks for changes and folding what changed. (`load` also folds, before any
            call.)
        preparing: making the initial noise, making or finding a step, and filling it.
        rows: all rows, without the callbacks between them.
        first_row: the first row of the first batch, included in `rows`. It also derives the forms of the
            weights that the convolutions use.
        callbacks: the user's callback.
    """

    folding: float
    preparing: float
    rows: float
    first_row: float
    callbacks: float


@dataclass(frozen=True)
class OpChoice:
    """Implementation that an op used in a row.

    calls: number of calls in one row, including the gradient's convolutions; for `normal`, which makes x_T,
    in one batch. requested_by: "impl" or "ADMFAST_IMPL" if one of them named the implementation, else None.
    skip_reasons: implementations earlier in the order, each with the reason why it was not used.
    """

    op: str
    implementation: str
    calls: int
    requested_by: str | None = None
    skip_reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        requested = f" (requested by {self.requested_by})" if self.requested_by else ""
        return f"{self.implementation} {self.calls}{requested}"


@dataclass(frozen=True)
class StageReport:
    """Report on the rows of the base model or of the upsampler. Its batch is the largest one of the call.

    Attributes:
        stage: "base" or "upsampler".
        images, batches: numbers in total. batch: images of the largest batch. sides: sides of an image.
        rows, guided_rows: rows of a batch, and in how many of them the classifier's gradient is computed.
        reused_rows: rows that use the last gradient again. null_class_rows, weak_network_rows: rows in which
            the network is evaluated for the null class, and those in which the weak network is.
        not_prepared_reason: why the rows ran without a prepared step; None if one ran them.
        not_replayed_reason: why the step was not repeated as a whole, by a CUDA graph or on a CPU by its
            recorded operations; None if it was.
        not_compiled_reason: why the step was not compiled by torch.compile; None if it was.
        layerwise_networks: networks ("net", "classifier") with blocks that run layer by layer, not fused,
            because a hook watches one of their layers or a layer was replaced.
        folded: whether the network ran on forms derived from its weights.
        policy: name of the precision policy. precision: precision of each part. threads: CPU threads of a
            row, None on a GPU.
        ops: implementations used in one row, a guided one if there are any. Ops inside a compiled step are
            not recorded; convolutions of a network that isn't folded are plain torch, not an op.
        seconds: seconds of each part.
    """

    stage: str
    images: int
    batches: int
    batch: int
    sides: tuple[int, ...]
    rows: int
    guided_rows: int
    reused_rows: int
    null_class_rows: int
    weak_network_rows: int
    not_prepared_reason: str | None
    not_replayed_reason: str | None
    not_compiled_reason: str | None
    layerwise_networks: tuple[str, ...]
    folded: bool
    policy: str
    precision: dict[str, str]
    threads: int | None
    ops: tuple[OpChoice, ...]
    seconds: Seconds

    @property
    def mean_later_row(self) -> float | None:
        """Mean seconds of a row after the first; None if there was only one row."""
        later = self.batches * self.rows - 1
        return (self.seconds.rows - self.seconds.first_row) / later if later else None

    def implementations(self) -> dict[str, dict[str, int]]:
        """Return the number of calls in a row, by op and implementation."""
        calls: dict[str, dict[str, int]] = {}
        for choice in self.ops:
            names = calls.setdefault(choice.op, {})
            names[choice.implementation] = names.get(choice.implementation, 0) + choice.calls
        return calls

    def _guidance_texts(self) -> list[str]:
        """Return how many rows are guided, by each kind of guidance."""
        texts = [f"{self.guided_rows} guided by the classifier"]
        others = {
            "reuse its gradient": self.reused_rows,
            "by the null class": self.null_class_rows,
            "by the weak network": self.weak_network_rows,
        }
        return texts + [f"{count} {text}" for text, count in others.items() if count]

    def cells(self) -> dict[str, str]:
        """Return the stage as one column of the printed table: a cell for each line name."""
        seconds, parts = self.seconds, self.precision
        step = f"one by one: {self.not_prepared_reason}" if self.not_prepared_reason else "by a prepared step"
        layerwise = ", ".join(self.layerwise_networks)
        cells = {
            "images": f"{self.images} of {'x'.join(map(str, self.sides))}, {self.batch} at a time",
            "steps": ", ".join([f"{self.rows} a batch", *self._guidance_texts()]),
            "run": step,
            "replayed": f"no: {self.not_replayed_reason}" if self.not_replayed_reason else "yes",
            "torch.compile": f"no: {self.not_compiled_reason}" if self.not_compiled_reason else "yes",
            "run layer by layer": f"blocks of {layerwise}" if layerwise else "no block",
            "weights": "folded" if self.folded else "as they are",
            "threads": "-" if self.threads is None else str(self.threads),
            "precision": f"{self.policy}: torso {parts['torso']}, classifier {parts['classifier']}",
        }
        for op in self.implementations():
            cells[f"op {op}"] = ", ".join(str(choice) for choice in self.ops if choice.op == op)
        cells |= {
            "seconds folding": f"{seconds.folding:.3f}",
            "seconds preparing": f"{seconds.preparing:.3f}",
            "seconds of all steps": f"{seconds.rows:.3f}",
            "ms of the first step": f"{1e3 * seconds.first_row:.2f}",
            "ms of a later step": "-" if self.mean_later_row is None else f"{1e3 * self.mean_later_row:.2f}",
            "seconds in callbacks": f"{seconds.callbacks:.3f}",
        }
        return cells


@dataclass(frozen=True)
class RunReport:
    """Report on a call of `sample`; `str` gives a readable table, `to_dict` the same facts for programs.

    Attributes:
        device: device of the networks. images: number of images sampled.
        seconds: seconds of the whole call, from the plan to the pixels: those of the stages, `pixels`, and a
            rest (splitting into batches, and batches that ran out of memory).
        pixels: seconds to convert the images to uint8 and copy them to the CPU.
        peak_memory: most bytes that the process had held when the report was read: of tensors on a GPU, or
            of host memory on a CPU.
        stages: the base model's report, then the upsampler's if there is one.
    """

    device: str
    images: int
    seconds: float
    pixels: float
    peak_memory: int
    stages: tuple[StageReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that JSON can hold."""
        return _tuples_to_lists(dataclasses.asdict(self))

    def __str__(self) -> str:
        columns = [stage.cells() for stage in self.stages]
        line_names = list(dict.fromkeys(name for column in columns for name in column))
        lines = [[name, *(column.get(name, "-") for column in columns)] for name in line_names]
        summary = f"{self.images} images sampled in {self.seconds:.3f} s on {self.device}"
        details = f"{self.pixels:.3f} s to pixels, peak memory {self.peak_memory / 1e9:.2f} GB"
        return f"{summary}; {details}\n{table(lines, ['', *(stage.stage for stage in self.stages)])}"


def _tuples_to_lists(value: Any) -> Any:
    """Return a value with its tuples replaced by lists."""
    if isinstance(value, dict):
        return {name: _tuples_to_lists(item) for name, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def make_report(record: RunRecord, pipe: Pipeline) -> RunReport:
    """Return the report on the recorded call of `pipe`, with the peak memory of the process so far."""
    stages = []
    for (name, stage_record), stage_pipe in zip(record.stages.items(), (pipe, pipe.upsampler), strict=False):
        assert stage_pipe is not None
        stages.append(
            StageReport(
                stage=name,
                images=stage_record["images"],
                batches=stage_record["batches"],
                batch=stage_record["batch"],
                policy=stage_pipe.policy.name,
                precision=stage_pipe.policy.parts(),
                ops=_count_choices(stage_record["choices"]),
                seconds=Seconds(**stage_record["seconds"]),
                **stage_record["ran"],
            )
        )
    return RunReport(
        device=str(pipe.device),
        images=record.images,
        seconds=record.seconds,
        pixels=record.pixels,
        peak_memory=peak_memory(pipe.device),
        stages=tuple(stages),
    )


def _count_choices(choices: Iterable[Choice]) -> tuple[OpChoice, ...]:
    """Count the equal choices of a row, grouped by op, the most frequent of an op first."""
    counts = Counter(
        (choice.op, choice.name, choice.requested_by, tuple(choice.skip_reasons.items()))
        for choice in choices
    )
    order: dict[str, int] = {}
    for op, *_ in counts:
        order.setdefault(op, len(order))
    ranked = sorted(counts.items(), key=lambda item: (order[item[0][0]], -item[1]))
    return tuple(
        OpChoice(op, name, count, requested_by, dict(skip_reasons))
        for (op, name, requested_by, skip_reasons), count in ranked
    )
