"""A prepared step: networks, guidance gradient, update and noise, on buffers that never move in memory.

A step is made once for a batch size and a kind of table, filled with a batch, and then run row by row. Its
body reads the row's number from the device, uses that row's timesteps, embeddings and coefficients, and adds
one to the number. So the same body serves every row, and a captured graph of it can be replayed. Between rows
the host does only two things: every `rows_at_a_time` rows it computes the embeddings of the next ones, and it
copies a row's noise if the noise is given.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from admfast import host
from admfast.engine.capture import PRIORITY
from admfast.engine.guidance import LOSS_SCALE, check_frozen, log_probability_gradient
from admfast.engine.numerics import chosen_threads, on_threads
from admfast.engine.options import EngineOptions
from admfast.engine.replay import Replay
from admfast.engine.threads import convolution, threads_for
from admfast.errors import invalid
from admfast.models.fold import FoldableNet
from admfast.models.hooks import skip_hook_checks
from admfast.ops.dispatch import Choice, watch
from admfast.ops.update import COLUMNS, HISTORY, PackedTable, SamplerState, SolverTable, Stream, update_for

EMBEDDING_BYTES = 200 << 20  # maximum memory for the projected embeddings of one network
ROWS = 1000  # tables of up to this many rows share a step


@dataclass(frozen=True)
class StepKey:
    """Cache key of a prepared step: a change in any field requires a new step.

    shape: (N, C, *spatial). guided: some rows have guidance. plain: some rows have none. classes: the network
    gets labels. low_res: shape of an upsampler's condition. saved, history: the table uses these buffers.
    recorded: noise is given, not generated. integer_t: timesteps are integers. stream: of the noise. rows:
    maximum number of rows in a table.
    """

    shape: tuple[int, ...]
    guided: bool
    plain: bool
    classes: bool
    low_res: tuple[int, ...] | None
    saved: bool
    history: bool
    recorded: bool
    integer_t: bool
    stream: int
    rows: int = ROWS

    @classmethod
    def of(cls, batch: Batch, classes: bool) -> StepKey:
        """Return the key of the step that runs this batch. classes: the network takes labels."""
        rows = batch.table.rows
        return cls(
            batch.shape,
            any(batch.guided),
            not all(batch.guided),
            classes and batch.labels is not None,
            None if batch.low_res is None else tuple(batch.low_res.shape),
            saved=any(row.save or row.a_s for row in rows),
            history=any(row.push for row in rows),
            recorded=batch.step_noise is not None,
            integer_t=batch.table.integer_t,
            stream=int(batch.stream),
            rows=-(-len(rows) // ROWS) * ROWS,
        )


class RowNoise(Protocol):
    """The noise of rows: a tensor [rows, N, C, *spatial], or an object that returns it row by row."""

    def __getitem__(self, row: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows to run, and the inputs of their images; tensors are on the network's device.

    table: the rows. shape: (N, C, *spatial). seeds: [N] int64. labels: [N] int64, or None. low_res: condition
    of an upsampler, or None. step_noise: noise of row i at [i], [N, C, *spatial]; None generates it from the
    seeds. scale: factor of the classifier's gradient. guided: for each row, whether the classifier guides it.
    noise_row: counter of the first row's noise. stream: of the noise. impl: name of the update's
    implementation, or None.
    """

    table: SolverTable
    shape: tuple[int, ...]
    seeds: Tensor
    labels: Tensor | None = None
    low_res: Tensor | None = None
    step_noise: RowNoise | None = None
    scale: float = 0.0
    guided: tuple[bool, ...]
    noise_row: int = 0
    stream: int = Stream.STEPS
    impl: str | None = None


class PreparedStep:
    """The step for a `StepKey`: `fill` it with a batch, then `advance` row by row."""

    def __init__(
        self,
        net: FoldableNet,
        classifier: FoldableNet | None,
        key: StepKey,
        device: torch.device,
        options: EngineOptions,
        impl: str | None = None,
    ):
        if classifier is not None and key.guided:
            check_frozen(classifier)
        self.net, self.classifier, self.key = net, classifier if key.guided else None, key
        networks = [part for part in (net, self.classifier) if part is not None]
        self._networks, self.generations = networks, generations_of(networks)
        self._make_buffers(device)
        config: Any = net.config
        self.own_threads = threads_for(convolution(config, key.shape), host.cpus())
        self.asked_threads = options.threads
        self.threads = self._threads()
        parts = {"net": self.net, "classifier": self.classifier}
        self.embeddings = {
            name: RowEmbeddings(part, key.shape[0], options.rows_at_a_time, device)
            for name, part in parts.items()
            if part is not None and part.joins_projections and not part.is_altered
        }
        with watch() as self._once:  # the choice of the update, made once for all rows
            self.update = update_for(self.state, self.table, impl)
        self.choices: dict[bool, list[Choice]] = {}  # the other choices in a row, by whether it is guided
        self.side: torch.cuda.Stream | None = None
        # A body that torch.compile traces can use only one stream.
        if device.type == "cuda" and options.branches and not options.compile and self.classifier is not None:
            self.side = torch.cuda.Stream(device, priority=PRIORITY)
        # The function that runs a row, by whether it is guided: a body, a compiled body, or a graph's replay.
        kinds = [kind for kind, there in ((True, key.guided), (False, key.plain)) if there]
        self.bodies: dict[bool, Callable[[], None]] = {
            # Not the step itself, which would keep itself alive until Python's collector runs.
            kind: partial(PreparedStep.body, weakref.proxy(self), kind)
            for kind in kinds
        }
        self.replays: dict[bool, Replay] = {}  # on a CPU, the bodies that repeat their operations
        self._renewals: list[int] = []  # of the networks, when the replays were recorded
        self._home = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._left: torch.cuda.Event | None = None
        self.compiled = self.captured = False
        self.refused: str | None = None  # why the step isn't captured or compiled, although that is required
        self.memory = self.nbytes  # bytes of memory that the step occupies, without the networks

    def _threads(self) -> int | None:
        """Return the number of threads for a row; None if the device is not a CPU."""
        if self.state.x.device.type != "cpu":
            return None
        return chosen_threads(self.asked_threads, self.own_threads)

    def _make_buffers(self, device: torch.device) -> None:
        """Make every tensor that a row reads or writes, except those of the networks."""
        key = self.key

        def images(*more: int) -> Tensor:
            return torch.zeros((*more, *key.shape), dtype=torch.float32, device=device)

        saved, history = images() if key.saved else None, images(HISTORY) if key.history else None
        self.state = SamplerState(images(), images(), saved, history)
        self.noise = images() if key.recorded else None
        self.low_res = None if key.low_res is None else torch.zeros(key.low_res, device=device)
        self.labels = torch.zeros(key.shape[0], dtype=torch.int64, device=device)
        self.seeds = torch.zeros(key.shape[0], dtype=torch.int64, device=device)
        self.gradient_scale = torch.zeros(1, dtype=torch.float32, device=device)
        # The counters of rows and of noise rows, in one tensor, so that one operation advances both.
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        self.first_row = torch.zeros(1, dtype=torch.int32, device=device)
        dtype = torch.int64 if key.integer_t else torch.float32
        self.timesteps = torch.zeros((2, key.rows), dtype=dtype, device=device)
        host = _no_rows(key.rows)
        self.table = PackedTable(host, host.to(device, torch.float32))
        self.step_noise: RowNoise | None = None
        self.guided: tuple[bool, ...] = ()

    def body(self, guided: bool) -> None:
        """Run the row whose number is in the counter, then advance the counter; the host reads nothing."""
        row, noise_row = self.counters[:1], self.counters[1:]
        x, count = self.state.x, self.key.shape[0]
        t_net, t_clf = self.timesteps.index_select(1, row).expand(2, count)
        embedded = row - self.first_row if self.embeddings else row  # its number among the rows embedded
        gradient = None
        if guided and self.side is not None:
            here = torch.cuda.current_stream(x.device)
            self.side.wait_stream(here)
            try:
                with torch.cuda.stream(self.side):
                    gradient = self._gradient(x, t_clf, embedded)
                out = self._output(x, t_net, embedded)
            finally:
                # Also after an error, such as a lack of memory: a capture with an unjoined stream can't end.
                here.wait_stream(self.side)
        else:
            gradient = self._gradient(x, t_clf, embedded) if guided else None
            out = self._output(x, t_net, embedded)
        self.update(
            self.state,
            out,
            self.table,
            row,
            out2=None,
            grad=gradient,
            seeds=self.seeds,
            noise=self.noise,
            noise_row=noise_row,
            stream=self.key.stream,
        )
        self.counters.add_(1)

    def _output(self, x: Tensor, t: Tensor, embedded: Tensor) -> Tensor:
        extra = {}
        if "net" in self.embeddings:
            extra["projected"] = self.embeddings["net"].at(embedded)
        if self.key.classes:
            extra["y"] = self.labels
        if self.low_res is not None:
            extra["low_res"] = self.low_res
        return self.net(x, t, **extra)

    def _gradient(self, x: Tensor, t: Tensor, embedded: Tensor) -> Tensor:
        assert self.classifier is not None
        embeddings = self.embeddings.get("classifier")
        projected = None if embeddings is None else embeddings.at(embedded)
        return log_probability_gradient(
            self.classifier, x, t, self.labels[:, None], projected, self.gradient_scale
        )

    def fill(self, batch: Batch, x: Tensor) -> None:
        """Copy a batch and its initial images `x` into the buffers; the next row is then the first."""
        device = self.state.x.device
        if device.type == "cuda":
            self._enter(torch.cuda.current_stream(device))
        # If gradients were recorded, a source that requires one would make the buffer require one forever.
        with torch.no_grad():
            self._fill(batch, x)

    def _fill(self, batch: Batch, x: Tensor) -> None:
        table, count = batch.table, len(batch.table)
        self.threads = self._threads()  # the user may have changed torch's number
        if (renewals := [net.fold_count for net in self._networks]) != self._renewals:
            self._renewals = renewals
            for replay in self.replays.values():
                replay.forget()
        self.table.host.copy_(_no_rows(self.key.rows))
        self.table.host[:count] = table.packed.host
        self.table.device.copy_(self.table.host)
        self.state.x.copy_(x)
        for buffer in (self.state.x0, self.state.saved, self.state.history):
            if buffer is not None:
                buffer.zero_()
        self.seeds.copy_(batch.seeds)
        for own, given in ((self.labels, batch.labels), (self.low_res, batch.low_res)):
            if own is not None and given is not None:
                own.copy_(given)
        self.gradient_scale.fill_(batch.scale / LOSS_SCALE)
        self.guided = batch.guided
        self.timesteps[:, :count] = table.timesteps.to(self.timesteps.dtype).to(self.timesteps.device)
        self.counters.copy_(torch.tensor([0, batch.noise_row], dtype=torch.int32, device="cpu"))
        self.step_noise = batch.step_noise

    def _enter(self, stream: torch.cuda.Stream) -> None:
        """Make this stream wait until the last stream that used the buffers is done with them."""
        if self._left is not None:
            stream.wait_event(self._left)
        if stream != self._home:
            # The memory, when freed, returns to the stream that allocated it, which must wait for this one.
            for buffer in self._buffers():
                buffer.record_stream(stream)

    def leave(self) -> None:
        """Mark the end of this stream's work on the buffers; another stream may use them after it."""
        device = self.state.x.device
        if device.type == "cuda":
            self._left = torch.cuda.current_stream(device).record_event()

    def _buffers(self) -> list[Tensor]:
        """Return all tensors on the device, except those of the networks."""
        found = [getattr(self.state, field.name) for field in fields(self.state)]
        found += [self.noise, self.low_res, *(table.values for table in self.embeddings.values())]
        found += [self.labels, self.seeds, self.gradient_scale, self.counters, self.first_row]
        found += [self.timesteps, self.table.device]
        return [buffer for buffer in found if buffer is not None]

    def advance(self, i: int) -> None:
        """Run row i; rows must be run in order, from 0."""
        made = {net.fold_hooks_made for net in self._networks}
        with (
            skip_hook_checks(None if None in made else min(made)),  # type: ignore[type-var]
            contextlib.nullcontext() if self.threads is None else on_threads(self.threads),
        ):
            self._advance(i)

    def _advance(self, i: int) -> None:
        check_generations(self._networks, self.generations)
        chunk = min([table.rows for table in self.embeddings.values()], default=0)
        if chunk and i % chunk == 0:
            self.first_row.fill_(i)
            for name, column in (("net", 0), ("classifier", 1)):
                if name in self.embeddings:
                    labels = self.labels if name == "net" and self.key.classes else None
                    self.embeddings[name].fill(self.timesteps[column, i : i + chunk], labels)
        if self.noise is not None and self.step_noise is not None:
            self.noise.copy_(self.step_noise[i].detach())
        guided = self.guided[i]
        if guided in self.choices:
            self.bodies[guided]()
            return
        with watch() as seen:  # only once for each kind of row
            self.bodies[guided]()
        self.choices[guided] = seen

    def chosen(self) -> list[Choice]:
        """Return the implementations that a row uses, guided or not, whichever uses more of them.

        Operations that torch compiles are not included.
        """
        return [*self._once, *max(self.choices.values(), key=len, default=())]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the networks and the graphs."""
        return sum(buffer.nbytes for buffer in self._buffers())


class RowEmbeddings:
    """The projected embeddings of several rows for all images of a batch: values [rows, N, total]."""

    def __init__(self, net: FoldableNet, count: int, rows: int, device: torch.device):
        width = net.projected_width
        self.rows = max(1, min(rows, EMBEDDING_BYTES // (4 * width * count)))
        self.net, self.count = net, count
        self.values = torch.zeros((self.rows, count, width), dtype=torch.float32, device=device)

    def fill(self, timesteps: Tensor, labels: Tensor | None) -> None:
        """Compute the rows of these timesteps: [rows], for labels [N] or None."""
        rows = len(timesteps)
        t = timesteps[:, None].expand(rows, self.count).flatten()
        y = () if labels is None else (labels.repeat(rows),)
        with torch.no_grad():
            values = self.net.join_projections(self.net.embed_conditions(t, *y))  # type: ignore[operator]
        self.values[:rows] = values.view(rows, self.count, -1)

    def at(self, row: Tensor) -> Tensor:
        """Return the row [N, total] whose number `row` is on the device."""
        return self.values.index_select(0, row)[0]


def generations_of(networks: Sequence[FoldableNet]) -> list[int]:
    """Return each network's `fold_generation`, which increases when steps made for it become invalid."""
    return [net.fold_generation for net in networks]


def check_generations(networks: Sequence[FoldableNet], generations: Sequence[int]) -> None:
    """Reject networks that changed or were folded again between two rows, which would mix two forms."""
    if generations_of(networks) != generations:
        allowed = "its precision, parameters and hooks must not change before sampling ends"
        raise invalid("net", "folded anew while it samples", allowed)


def _no_rows(count: int) -> Tensor:
    """Return a packed table whose rows set everything to 0: [count, columns] float64."""
    table = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device="cpu")
    table[:, COLUMNS.index("push_slot")] = -1
    return table
