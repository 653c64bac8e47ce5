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
from admfast.engine.capture import CAPTURE_PRIORITY
from admfast.engine.guidance import LOSS_SCALE, check_frozen, log_probability_gradient
from admfast.engine.numerics import choose_threads, on_threads
from admfast.engine.options import EngineOptions
from admfast.engine.replay import Replay
from admfast.engine.threads import convolution_operations, threads_for
from admfast.errors import invalid
from admfast.models.fold import FoldableNet
from admfast.models.hooks import skip_hook_checks
from admfast.ops.dispatch import Choice, record_choices
from admfast.ops.update import COLUMNS, HISTORY, PackedTable, SamplerState, SolverTable, Stream, choose_update

EMBEDDING_BYTES = 200 << 20  # maximum memory for the projected embeddings of one network
ROWS_GRANULARITY = 1000  # tables of up to this many rows share a step


@dataclass(frozen=True)
class StepKey:
    """Cache key of a prepared step: a change in any field requires a new step.

    shape: (N, C, *spatial). guided: some rows have guidance. unguided: some rows have none. with_labels: the
    network gets labels. low_res: shape of an upsampler's condition. saved, history: the table uses these
    buffers. noise_given: noise is given, not generated. integer_t: timesteps are integers. stream: of the
    noise. max_rows: maximum number of rows in a table.
    """

    shape: tuple[int, ...]
    guided: bool
    unguided: bool
    with_labels: bool
    low_res: tuple[int, ...] | None
    saved: bool
    history: bool
    noise_given: bool
    integer_t: bool
    stream: int
    max_rows: int = ROWS_GRANULARITY

    @classmethod
    def of(cls, batch: Batch, takes_labels: bool) -> StepKey:
        """Return the key of the step that runs this batch. takes_labels: the network takes labels."""
        rows = batch.table.rows
        return cls(
            batch.shape,
            any(batch.guided),
            not all(batch.guided),
            takes_labels and batch.labels is not None,
            None if batch.low_res is None else tuple(batch.low_res.shape),
            saved=any(row.save or row.a_s for row in rows),
            history=any(row.pushes for row in rows),
            noise_given=batch.step_noise is not None,
            integer_t=batch.table.integer_t,
            stream=int(batch.stream),
            max_rows=-(-len(rows) // ROWS_GRANULARITY) * ROWS_GRANULARITY,
        )


class RowNoise(Protocol):
    """The noise of rows: a tensor [rows, N, C, *spatial], or an object that returns it row by row."""

    def __getitem__(self, row: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows to run, and the inputs of their images; tensors are on the network's device.

    table: the rows. shape: (N, C, *spatial). seeds: [N] int64. labels: [N] int64, or None. low_res: condition
    of an upsampler, or None. step_noise: noise of row i at [i], [N, C, *spatial]; None generates it from the
    seeds. guidance_scale: factor of the classifier's gradient. guided: whether it guides each row.
    noise_row: counter of the first row's noise. stream: of the noise. impl: name of the update's
    implementation, or None.
    """

    table: SolverTable
    shape: tuple[int, ...]
    seeds: Tensor
    labels: Tensor | None = None
    low_res: Tensor | None = None
    step_noise: RowNoise | None = None
    guidance_scale: float = 0.0
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
        networks = [network for network in (net, self.classifier) if network is not None]
        self._networks, self.generations = networks, fold_generations(networks)
        self._make_buffers(device)
        config: Any = net.config
        self.default_threads = threads_for(convolution_operations(config, key.shape), host.usable_cpus())
        self.requested_threads = options.threads
        self.threads = self._threads()
        network_by_name = {"net": self.net, "classifier": self.classifier}
        self.embeddings = {
            name: RowEmbeddings(network, key.shape[0], options.rows_at_a_time, device)
            for name, network in network_by_name.items()
            if network is not None and network.joins_projections and not network.is_altered
        }
        with record_choices() as self._update_choices:  # the choice of the update, made once for all rows
            self.update = choose_update(self.state, self.table, impl)
        self.choices: dict[bool, list[Choice]] = {}  # the other choices in a row, by whether it is guided
        self.classifier_stream: torch.cuda.Stream | None = None
        # A body that torch.compile traces can use only one stream.
        if device.type == "cuda" and options.branches and not options.compile and self.classifier is not None:
            self.classifier_stream = torch.cuda.Stream(device, priority=CAPTURE_PRIORITY)
        # The function that runs a row, by whether it is guided: a body, a compiled body, or a graph's replay.
        kinds = [guided for guided, has_rows in ((True, key.guided), (False, key.unguided)) if has_rows]
        self.bodies: dict[bool, Callable[[], None]] = {
            # Not the step itself, which would keep itself alive until Python's collector runs.
            guided: partial(PreparedStep.body, weakref.proxy(self), guided)
            for guided in kinds
        }
        self.replays: dict[bool, Replay] = {}  # on a CPU, the bodies that repeat their operations
        self._fold_counts: list[int] = []  # of the networks, when the replays were recorded
        self._allocation_stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._last_use: torch.cuda.Event | None = None
        self.compiled = self.captured = False
        self.refusal: str | None = None  # why the step isn't captured or compiled, although that is required
        self.memory = self.nbytes  # bytes of memory that the step occupies, without the networks

    def _threads(self) -> int | None:
        """Return the number of threads for a row; None if the device is not a CPU."""
        if self.state.x.device.type != "cpu":
            return None
        return choose_threads(self.requested_threads, self.default_threads)

    def _make_buffers(self, device: torch.device) -> None:
        """Make every tensor that a row reads or writes, except those of the networks."""
        key = self.key

        def images(*leading_sizes: int) -> Tensor:
            return torch.zeros((*leading_sizes, *key.shape), dtype=torch.float32, device=device)

        saved, history = images() if key.saved else None, images(HISTORY) if key.history else None
        self.state = SamplerState(images(), images(), saved, history)
        self.noise = images() if key.noise_given else None
        self.low_res = None if key.low_res is None else torch.zeros(key.low_res, device=device)
        self.labels = torch.zeros(key.shape[0], dtype=torch.int64, device=device)
        self.seeds = torch.zeros(key.shape[0], dtype=torch.int64, device=device)
        self.gradient_factor = torch.zeros(1, dtype=torch.float32, device=device)
        # The counters of rows and of noise rows, in one tensor, so that one operation advances both.
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        self.first_row = torch.zeros(1, dtype=torch.int32, device=device)
        dtype = torch.int64 if key.integer_t else torch.float32
        self.timesteps = torch.zeros((2, key.max_rows), dtype=dtype, device=device)
        host_rows = _zero_rows(key.max_rows)
        self.table = PackedTable(host_rows, host_rows.to(device, torch.float32))
        self.step_noise: RowNoise | None = None
        self.guided: tuple[bool, ...] = ()

    def body(self, guided: bool) -> None:
        """Run the row whose number is in the counter, then advance the counter; the host reads nothing."""
        row, noise_row = self.counters[:1], self.counters[1:]
        x, batch_size = self.state.x, self.key.shape[0]
        t_net, t_clf = self.timesteps.index_select(1, row).expand(2, batch_size)
        embedding_row = (
            row - self.first_row if self.embeddings else row
        )  # among the rows that have embeddings
        gradient = None
        if guided and self.classifier_stream is not None:
            current_stream = torch.cuda.current_stream(x.device)
            self.classifier_stream.wait_stream(current_stream)
            try:
                with torch.cuda.stream(self.classifier_stream):
                    gradient = self._guidance_gradient(x, t_clf, embedding_row)
                out = self._net_output(x, t_net, embedding_row)
            finally:
                # Also after an error, such as a lack of memory: a capture with an unjoined stream can't end.
                current_stream.wait_stream(self.classifier_stream)
        else:
            gradient = self._guidance_gradient(x, t_clf, embedding_row) if guided else None
            out = self._net_output(x, t_net, embedding_row)
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

    def _net_output(self, x: Tensor, t: Tensor, embedding_row: Tensor) -> Tensor:
        kwargs = {}
        if "net" in self.embeddings:
            kwargs["projected"] = self.embeddings["net"].select_row(embedding_row)
        if self.key.with_labels:
            kwargs["y"] = self.labels
        if self.low_res is not None:
            kwargs["low_res"] = self.low_res
        return self.net(x, t, **kwargs)

    def _guidance_gradient(self, x: Tensor, t: Tensor, embedding_row: Tensor) -> Tensor:
        assert self.classifier is not None
        embeddings = self.embeddings.get("classifier")
        projected = None if embeddings is None else embeddings.select_row(embedding_row)
        return log_probability_gradient(
            self.classifier, x, t, self.labels[:, None], projected, self.gradient_factor
        )

    def fill(self, batch: Batch, x: Tensor) -> None:
        """Copy a batch and its initial images `x` into the buffers; the next row is then the first."""
        device = self.state.x.device
        if device.type == "cuda":
            self._wait_for_last_use(torch.cuda.current_stream(device))
        # If gradients were recorded, a source that requires one would make the buffer require one forever.
        with torch.no_grad():
            self._fill(batch, x)

    def _fill(self, batch: Batch, x: Tensor) -> None:
        table, num_rows = batch.table, len(batch.table)
        self.threads = self._threads()  # the user may have changed torch's number
        if (fold_counts := [net.fold_count for net in self._networks]) != self._fold_counts:
            self._fold_counts = fold_counts
            for replay in self.replays.values():
                replay.forget()
        self.table.host.copy_(_zero_rows(self.key.max_rows))
        self.table.host[:num_rows] = table.packed.host
        self.table.device.copy_(self.table.host)
        self.state.x.copy_(x)
        for buffer in (self.state.x0, self.state.saved, self.state.history):
            if buffer is not None:
                buffer.zero_()
        self.seeds.copy_(batch.seeds)
        for buffer, values in ((self.labels, batch.labels), (self.low_res, batch.low_res)):
            if buffer is not None and values is not None:
                buffer.copy_(values)
        self.gradient_factor.fill_(batch.guidance_scale / LOSS_SCALE)
        self.guided = batch.guided
        self.timesteps[:, :num_rows] = table.timesteps.to(self.timesteps.dtype).to(self.timesteps.device)
        self.counters.copy_(torch.tensor([0, batch.noise_row], dtype=torch.int32, device="cpu"))
        self.step_noise = batch.step_noise

    def _wait_for_last_use(self, stream: torch.cuda.Stream) -> None:
        """Make this stream wait until the last stream that used the buffers has finished with them."""
        if self._last_use is not None:
            stream.wait_event(self._last_use)
        if stream != self._allocation_stream:
            # The memory, when freed, returns to the stream that allocated it, which must wait for this one.
            for buffer in self._buffers():
                buffer.record_stream(stream)

    def mark_last_use(self) -> None:
        """Mark the end of this stream's work on the buffers; another stream may use them after it."""
        device = self.state.x.device
        if device.type == "cuda":
            self._last_use = torch.cuda.current_stream(device).record_event()

    def _buffers(self) -> list[Tensor]:
        """Return all tensors on the device, except those of the networks."""
        buffers = [getattr(self.state, field.name) for field in fields(self.state)]
        buffers += [self.noise, self.low_res, *(table.values for table in self.embeddings.values())]
        buffers += [self.labels, self.seeds, self.gradient_factor, self.counters, self.first_row]
        buffers += [self.timesteps, self.table.device]
        return [buffer for buffer in buffers if buffer is not None]

    def advance(self, i: int) -> None:
        """Run row i; rows must be run in order, from 0."""
        hook_counts = {net.fold_hooks_made for net in self._networks}
        with (
            skip_hook_checks(None if None in hook_counts else min(hook_counts)),  # type: ignore[type-var]
            contextlib.nullcontext() if self.threads is None else on_threads(self.threads),
        ):
            self._advance(i)

    def _advance(self, i: int) -> None:
        check_fold_generations(self._networks, self.generations)
        chunk = min([table.rows for table in self.embeddings.values()], default=0)
        if chunk and i % chunk == 0:
            self.first_row.fill_(i)
            for name, column in (("net", 0), ("classifier", 1)):
                if name in self.embeddings:
                    labels = self.labels if name == "net" and self.key.with_labels else None
                    self.embeddings[name].fill(self.timesteps[column, i : i + chunk], labels)
        if self.noise is not None and self.step_noise is not None:
            self.noise.copy_(self.step_noise[i].detach())
        guided = self.guided[i]
        if guided in self.choices:
            self.bodies[guided]()
            return
        with record_choices() as choices:  # only once for each kind of row
            self.bodies[guided]()
        self.choices[guided] = choices

    def implementation_choices(self) -> list[Choice]:
        """Return the implementations in a row of the kind (guided or not) that has more of them.

        Operations that torch compiles are not included.
        """
        return [*self._update_choices, *max(self.choices.values(), key=len, default=())]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the networks and the graphs."""
        return sum(buffer.nbytes for buffer in self._buffers())


class RowEmbeddings:
    """The projected embeddings of several rows for all images of a batch: values [rows, N, total]."""

    def __init__(self, net: FoldableNet, batch_size: int, rows: int, device: torch.device):
        width = net.projected_width
        self.rows = max(1, min(rows, EMBEDDING_BYTES // (4 * width * batch_size)))
        self.net, self.batch_size = net, batch_size
        self.values = torch.zeros((self.rows, batch_size, width), dtype=torch.float32, device=device)

    def fill(self, timesteps: Tensor, labels: Tensor | None) -> None:
        """Compute the rows of these timesteps: [rows], for labels [N] or None."""
        rows = len(timesteps)
        t = timesteps[:, None].expand(rows, self.batch_size).flatten()
        y = () if labels is None else (labels.repeat(rows),)
        with torch.no_grad():
            values = self.net.join_projections(self.net.embed_conditions(t, *y))  # type: ignore[operator]
        self.values[:rows] = values.view(rows, self.batch_size, -1)

    def select_row(self, row: Tensor) -> Tensor:
        """Return the row [N, total] whose number `row` is on the device."""
        return self.values.index_select(0, row)[0]


def fold_generations(networks: Sequence[FoldableNet]) -> list[int]:
    """Return each network's `fold_generation`, which increases when steps made for it become invalid."""
    return [net.fold_generation for net in networks]


def check_fold_generations(networks: Sequence[FoldableNet], generations: Sequence[int]) -> None:
    """Reject networks that were folded again between two rows, which would mix two forms."""
    if fold_generations(networks) != generations:
        allowed = "its precision, parameters and hooks must not change before sampling ends"
        raise invalid("net", "folded anew while it samples", allowed)


def _zero_rows(count: int) -> Tensor:
    """Return a packed table of rows that set everything to 0: [count, columns] float64."""
    table = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device="cpu")
    table[:, COLUMNS.index("push_slot")] = -1
    return table
