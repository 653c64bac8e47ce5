"""Say how the last call of `sample` ran: what was prepared, what each op ran on, where the seconds went.

The loop takes notes (`admfast.sampling.loop.Notes`), some readings of the clock a batch. The report is made
of them when somebody reads `Pipeline.last_run`.
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
    from admfast.sampling.loop import Notes
    from admfast.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Seconds:
    """Seconds of the host's clock that a stage took, of all its batches together.

    On a GPU the host waits after the first row and after the last: these are the device's seconds too.

    Attributes:
        folding: to look the networks over, and to fold what has changed. (`load` folds too, before any call.)
        preparing: to make the first noise, to make or find a step, and to fill it.
        rows: all rows, without the callbacks between them.
        first_row: the first row of the first batch, one of `rows`: it derives the forms of the weights.
        callbacks: in the user's callback.
    """

    folding: float
    preparing: float
    rows: float
    first_row: float
    callbacks: float


@dataclass(frozen=True)
class OpChoice:
    """An implementation that an op took in a row.

    calls: in one row, the gradient's convolutions included; of `normal`, which makes x_T, in one batch.
    asked_by: "impl" or "ADMFAST_IMPL" where one of them named it, else None. passed_over: the reason against
    each implementation that would have come first.
    """

    op: str
    implementation: str
    calls: int
    asked_by: str | None = None
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        asked = f" ({self.asked_by} asked)" if self.asked_by else ""
        return f"{self.implementation} {self.calls}{asked}"


@dataclass(frozen=True)
class StageReport:
    """Report how the base model's rows ran, or the upsampler's; of batches of several sizes, the largest.

    Attributes:
        stage: "base" or "upsampler".
        images, batches: in all. batch: images of the largest batch. sides: of an image.
        rows, guided_rows: of a batch, and those among them in which the classifier guides.
        unprepared: why rows were calls of functions; None where a prepared step ran them.
        uncaptured: why the step was not replayed as a CUDA graph; None where it was.
        uncompiled: why the step was not made by torch.compile; None where it was.
        by_parts: the networks ("net", "classifier") of which blocks run part by part, as a hook watches
            something, or another module stands in its place.
        folded: whether the network ran on forms that were derived from its weights.
        policy: its name. precision: what each part computes in. threads: of a row, on a CPU.
        ops: what ran in a row, a guided one where there are any. What torch compiled is not known;
            convolutions of a network that isn't folded are torch's own, and no op.
        seconds: where the time went.
    """

    stage: str
    images: int
    batches: int
    batch: int
    sides: tuple[int, ...]
    rows: int
    guided_rows: int
    unprepared: str | None
    uncaptured: str | None
    uncompiled: str | None
    by_parts: tuple[str, ...]
    folded: bool
    policy: str
    precision: dict[str, str]
    threads: int | None
    ops: tuple[OpChoice, ...]
    seconds: Seconds

    @property
    def later_row(self) -> float | None:
        """Return the mean seconds of a row but the first; None where there was one only."""
        later = self.batches * self.rows - 1
        return (self.seconds.rows - self.seconds.first_row) / later if later else None

    def implementations(self) -> dict[str, dict[str, int]]:
        """Return the calls in a row by op and implementation."""
        found: dict[str, dict[str, int]] = {}
        for choice in self.ops:
            names = found.setdefault(choice.op, {})
            names[choice.implementation] = names.get(choice.implementation, 0) + choice.calls
        return found

    def cells(self) -> dict[str, str]:
        """Return the stage as a column of a table, by the names of the lines."""
        seconds, parts = self.seconds, self.precision
        step = f"one by one: {self.unprepared}" if self.unprepared else "by a prepared step"
        cells = {
            "images": f"{self.images} of {'x'.join(map(str, self.sides))}, {self.batch} at a time",
            "rows": f"{self.rows} a batch, {self.guided_rows} guided by the classifier",
            "run": step,
            "CUDA graph": f"no: {self.uncaptured}" if self.uncaptured else "replayed",
            "torch.compile": f"no: {self.uncompiled}" if self.uncompiled else "yes",
            "part by part": ", ".join(self.by_parts) or "no block",
            "weights": "folded" if self.folded else "as they are",
            "threads": "-" if self.threads is None else str(self.threads),
            "precision": f"{self.policy}: torso {parts['torso']}, classifier {parts['classifier']}",
        }
        for op in self.implementations():
            cells[f"op {op}"] = ", ".join(str(choice) for choice in self.ops if choice.op == op)
        cells |= {
            "seconds folding": f"{seconds.folding:.3f}",
            "seconds preparing": f"{seconds.preparing:.3f}",
            "seconds of all rows": f"{seconds.rows:.3f}",
            "ms of the first row": f"{1e3 * seconds.first_row:.2f}",
            "ms of a later row": "-" if self.later_row is None else f"{1e3 * self.later_row:.2f}",
            "seconds in callbacks": f"{seconds.callbacks:.3f}",
        }
        return cells


@dataclass(frozen=True)
class RunReport:
    """Report how a call of `sample` ran; `str` gives a table to read, `to_dict` the same for programs.

    Attributes:
        device: of the networks. images: that came out.
        seconds: of the whole call, from the plan to the pixels; the stages' seconds and `pixels` are parts of
            it, and so is what is in neither: batches that ran out of memory, the cut of the batches.
        pixels: seconds to make uint8 of the images and bring them to the CPU.
        peak_memory: bytes that the process held at most until the report was read.
        stages: the base model's, and the upsampler's where one follows.
    """

    device: str
    images: int
    seconds: float
    pixels: float
    peak_memory: int
    stages: tuple[StageReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        return _plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        columns = [stage.cells() for stage in self.stages]
        names = list(dict.fromkeys(name for column in columns for name in column))
        lines = [[name, *(column.get(name, "-") for column in columns)] for name in names]
        rate = f"{self.images / self.seconds:.3g} images/s" if self.seconds else ""
        ends = f"{self.images} images in {self.seconds:.3f} s on {self.device}, {rate}"
        more = f"{self.pixels:.3f} s to pixels, peak memory {self.peak_memory / 1e9:.2f} GB"
        return f"{ends}; {more}\n{table(lines, ['', *(stage.stage for stage in self.stages)])}"


def _plain(value: Any) -> Any:
    """Return a value with lists in the place of tuples."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def report_of(notes: Notes, pipe: Pipeline) -> RunReport:
    """Return the report of a run of `pipe`, with the memory that the process held so far."""
    stages = []
    for (name, noted), own in zip(notes.stages.items(), (pipe, pipe.upsampler), strict=False):
        assert own is not None
        stages.append(
            StageReport(
                stage=name,
                images=noted["images"],
                batches=noted["batches"],
                batch=noted["batch"],
                policy=own.policy.name,
                precision=own.policy.parts(),
                ops=_counted(noted["choices"]),
                seconds=Seconds(**noted["seconds"]),
                **noted["ran"],
            )
        )
    return RunReport(
        device=str(pipe.device),
        images=notes.images,
        seconds=notes.seconds,
        pixels=notes.pixels,
        peak_memory=peak_memory(pipe.device),
        stages=tuple(stages),
    )


def _counted(choices: Iterable[Choice]) -> tuple[OpChoice, ...]:
    """Count the choices of a row; those of an op come together, the most frequent first."""
    kinds = Counter((one.op, one.name, one.asked_by, tuple(one.passed_over.items())) for one in choices)
    order: dict[str, int] = {}
    for op, *_ in kinds:
        order.setdefault(op, len(order))
    ranked = sorted(kinds.items(), key=lambda item: (order[item[0][0]], -item[1]))
    return tuple(OpChoice(op, name, count, by, dict(over)) for (op, name, by, over), count in ranked)
