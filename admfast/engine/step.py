"""A prepared step: networks, guidance gradient, update and noise, on buffers that never move in memory.

A step is made once for a batch size and a kind of table, filled with a batch, and then run row by row. Its
body reads the row's number from the device, uses that row's timesteps, embeddings and coefficients, and adds
one to the number. So the same body serves every row of a kind (`RowKind`: what it computes for its guidance),
and a captured graph of it can be replayed. Between rows the host does only two things: every `rows_at_a_time`
rows it computes the embeddings of the next ones, and it copies a row's noise if the noise is given.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from admfast import host
from admfast.engine.capture import CAPTURE_PRIORITY
from admfast.engine.guidance import (
    RowGuidance,
    RowKind,
    check_frozen,
    guided_coefficients,
    label_weights,
    log_probability_gradient,
)
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

    shape: (N, C, *spatial). kinds: those of the rows. with_labels: the network gets labels. low_res: shape of
    an upsampler's condition. saved, history: the table uses these buffers. noise_given: noise is given, not
    generated. integer_t: timesteps are integers. stream: of the noise. max_rows: maximum number of rows in a
    table.
    """

    shape: tuple[int, ...]
    kinds: tuple[RowKind, ...]
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
            tuple(sorted(set(batch.kinds))),
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
    seeds. guidance: that of each row; () for none. noise_row: counter of the first row's noise. stream: of
    the noise. impl: name of the update's implementation, or None.
    """

    table: SolverTable
    shape: tuple[int, ...]
    seeds: Tensor
    labels: Tensor | None = None
    low_res: Tensor | None = None
    step_noise: RowNoise | None = None
    guidance: tuple[RowGuidance, ...] = ()
    noise_row: int = 0
    stream: int = Stream.STEPS
    impl: str | None = None

    @property
    def row_guidance(self) -> tuple[RowGuidance, ...]:
        """The guidance of each row, also if there is none."""
        return self.guidance or (RowGuidance(),) * len(self.table)

    @functools.cached_property
    def kinds(self) -> tuple[RowKind, ...]:
        """The kind of each row."""
        guidance = self.row_guidance
        kinds = {id(row): row.kind for row in {id(row): row for row in guidance}.values()}
        return tuple(kinds[id(row)] for row in guidance)

    @property
    def uses_classifier(self) -> bool:
        return any(row.scale for row in self.guidance)


class PreparedStep:
    """The step for a `StepKey`: `fill` it with a batch, then `advance` row by row."""

    def __init__(
        self,
        net: FoldableNet,
        classifier: FoldableNet | None,
        weak: FoldableNet | None,
        key: StepKey,
        device: torch.device,
        options: EngineOptions,
        impl: str | None = None,
    ):
        kinds = key.kinds
        self.net, self.key = net, key
        self.classifier = classifier if any(kind.gradient for kind in kinds) else None
        self.weak = weak if any(kind.weak for kind in kinds) else None
        if self.classifier is not None:
            check_frozen(self.classifier)
        networks = [network for network in (net, self.classifier, self.weak) if network is not None]
        self.networks, self.generations = networks, fold_generations(networks)
        self._make_buffers(device)
        config: Any = net.config
        self.default_threads = threads_for(convolution_operations(config, key.shape), host.usable_cpus())
        self.requested_threads = options.threads
        self.threads = self._threads()
        null_net = net if any(kind.null for kind in kinds) else None
        network_by_name = {"net": net, "null": null_net, "weak": self.weak, "classifier": self.classifier}
        self.embeddings = {
            name: RowEmbeddings(network, key.shape[0], options.rows_at_a_time, device)
            for name, network in network_by_name.items()
            if network is not None and network.joins_projections and not network.is_altered
        }
        # Without them, networks compute the embeddings of a row from its timesteps.
        self._needs_timesteps = any(
            network is not None and name not in self.embeddings for name, network in network_by_name.items()
        )
        with record_choices() as self._update_choices:  # the choice of the update, made once for all rows
            self.update = choose_update(self.state, self.table, impl)
        self.choices: dict[RowKind, list[Choice]] = {}  # the other choices in a row of each kind
        self.classifier_stream: torch.cuda.Stream | None = None
        # A body that torch.compile traces can use only one stream.
        if device.type == "cuda" and options.branches and not options.compile and self.classifier is not None:
            self.classifier_stream = torch.cuda.Stream(device, priority=CAPTURE_PRIORITY)
        # The function that runs a row of each kind: a body, a compiled body, or a graph's replay.
        self.bodies: dict[RowKind, Callable[[], None]] = {
            # Not the step itself, which would keep itself alive until Python's collector runs.
            kind: partial(PreparedStep.body, weakref.proxy(self), kind)
            for kind in kinds
        }
        self.replays: dict[RowKind, Replay] = {}  # on a CPU, the bodies that repeat their operations
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
        self.kept_gradient = images() if any(kind.kept for kind in key.kinds) else None
        numbers: dict[str, Any] = dict(dtype=torch.int64, device=device)
        self.labels, self.seeds = torch.zeros(key.shape[0], **numbers), torch.zeros(key.shape[0], **numbers)
        self.null_labels: Tensor | None = None
        if any(kind.null for kind in key.kinds):
            config: Any = self.net.config
            self.null_labels = torch.full((key.shape[0],), config.num_classes - 1, **numbers)
        self.label_weights: Tensor | None = None
        if self.classifier is not None:
            num_classes: int = self.classifier.config.out_channels  # type: ignore[union-attr, assignment]
            self.label_weights = label_weights(self.labels, num_classes)
        # The counters of rows, of noise rows and of rows of the embeddings at hand are in one tensor, so that
        # one operation advances all.
        self.counters = torch.zeros(3, dtype=torch.int32, device=device)
        dtype = torch.int64 if key.integer_t else torch.float32
        self.timesteps = torch.zeros((2, key.max_rows), dtype=dtype, device=device)
        shares = any(kind.null and kind.weak for kind in key.kinds)
        self.weak_shares = torch.zeros(key.max_rows if shares else 0, dtype=torch.float32, device=device)
        host_rows = _zero_rows(key.max_rows)
        self.table = PackedTable(host_rows, host_rows.to(device, torch.float32))
        self.step_noise: RowNoise | None = None
        self.kinds: tuple[RowKind, ...] = ()

    def body(self, kind: RowKind) -> None:
        """Run the row whose number is in the counter, then advance the counter; the host reads nothing."""
        row, noise_row = self.counters[:1], self.counters[1:2]
        x, batch_size = self.state.x, self.key.shape[0]
        # Networks that get embeddings ignore the timesteps.
        t = self.timesteps.index_select(1, row) if self._needs_timesteps else self.timesteps[:, :1]
        t_net, t_clf = t.expand(2, batch_size)
        gradient = self.kept_gradient if kind.kept else None
        if kind.gradient and self.classifier_stream is not None:
            current_stream = torch.cuda.current_stream(x.device)
            self.classifier_stream.wait_stream(current_stream)
            try:
                with torch.cuda.stream(self.classifier_stream):
                    gradient = self._guidance_gradient(x, t_clf)
                out, out2 = self._net_outputs(kind, x, t_net)
            finally:
                # Also after an error, such as a lack of memory: a capture with an unjoined stream can't end.
                current_stream.wait_stream(self.classifier_stream)
        else:
            if kind.gradient:
                gradient = self._guidance_gradient(x, t_clf)
            out, out2 = self._net_outputs(kind, x, t_net)
        self.update(
            self.state,
            out,
            self.table,
            row,
            out2=out2,
            grad=gradient,
            seeds=self.seeds,
            noise=self.noise,
            noise_row=noise_row,
            stream=self.key.stream,
        )
        self.counters.add_(1)

    def _net_outputs(self, kind: RowKind, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the network's output, and the second output with which the update mixes it, or None."""
        out = self._net_output("net", self.net, x, t)
        null = self._net_output("null", self.net, x, t) if kind.null else None
        if not kind.weak:
            return out, null
        assert self.weak is not None
        weak = self._net_output("weak", self.weak, x, t)
        if null is None:
            return out, weak
        return out, torch.lerp(null, weak, self.weak_shares.index_select(0, self.counters[:1]))

    def _net_output(self, name: str, net: FoldableNet, x: Tensor, t: Tensor) -> Tensor:
        kwargs = {}
        if name in self.embeddings:
            kwargs["projected"] = self._embedding(name)
        if (labels := self._labels_of(name)) is not None:
            kwargs["y"] = labels
        if self.low_res is not None:
            kwargs["low_res"] = self.low_res
        return net(x, t, **kwargs)

    def _labels_of(self, name: str) -> Tensor | None:
        """Return the labels that an evaluation by this name gets."""
        if name == "null":
            return self.null_labels
        net = {"net": self.net, "weak": self.weak}.get(name)
        takes_labels = net is not None and net.config.num_classes is not None  # type: ignore[union-attr]
        return self.labels if takes_labels and self.key.with_labels else None

    def _embedding(self, name: str) -> Tensor:
        return self.embeddings[name].select_row(self.counters[2:])

    def _guidance_gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the classifier's gradient, and keep it if later rows use it again."""
        assert self.classifier is not None and self.label_weights is not None
        projected = self._embedding("classifier") if "classifier" in self.embeddings else None
        gradient = log_probability_gradient(self.classifier, x, t, self.label_weights, projected)
        return gradient if self.kept_gradient is None else self.kept_gradient.copy_(gradient)

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
        if (fold_counts := [net.fold_count for net in self.networks]) != self._fold_counts:
            self._fold_counts = fold_counts
            for replay in self.replays.values():
                replay.forget()
        self.table.host.copy_(_zero_rows(self.key.max_rows))
        self.table.host[:num_rows] = guided_coefficients(table.packed.host, batch.row_guidance)
        self.table.device.copy_(self.table.host)
        self.state.x.copy_(x)
        for buffer in (self.state.x0, self.state.saved, self.state.history):
            if buffer is not None:
                buffer.zero_()
        self.seeds.copy_(batch.seeds)
        for buffer, values in ((self.labels, batch.labels), (self.low_res, batch.low_res)):
            if buffer is not None and values is not None:
                buffer.copy_(values)
        if self.label_weights is not None:
            self.label_weights.copy_(label_weights(self.labels, self.label_weights.shape[1]))
        self.kinds = batch.kinds
        if len(self.weak_shares):
            shares = torch.tensor(
                [row.weak_share for row in batch.row_guidance], dtype=torch.float32, device="cpu"
            )
            self.weak_shares[:num_rows] = shares.to(self.weak_shares.device)
        self.timesteps[:, :num_rows] = table.timesteps.to(self.timesteps.dtype).to(self.timesteps.device)
        self.counters.copy_(torch.tensor([0, batch.noise_row, 0], dtype=torch.int32, device="cpu"))
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
        buffers += [self.labels, self.null_labels, self.label_weights, self.seeds, self.kept_gradient]
        buffers += [self.counters, self.timesteps, self.weak_shares, self.table.device]
        return [buffer for buffer in buffers if buffer is not None]

    def advance(self, i: int) -> None:
        """Run row i; rows must be run in order, from 0."""
        hook_counts = {net.fold_hooks_made for net in self.networks}
        with (
            skip_hook_checks(None if None in hook_counts else min(hook_counts)),  # type: ignore[type-var]
            contextlib.nullcontext() if self.threads is None else on_threads(self.threads),
        ):
            self._advance(i)

    def _advance(self, i: int) -> None:
        check_fold_generations(self.networks, self.generations)
        chunk = min([table.rows for table in self.embeddings.values()], default=0)
        if chunk and i % chunk == 0:
            self.counters[2:].zero_()
            self.fill_embeddings(i, chunk)
        if self.noise is not None and self.step_noise is not None:
            self.noise.copy_(self.step_noise[i].detach())
        kind = self.kinds[i]
        if kind in self.choices:
            self.bodies[kind]()
            return
        with record_choices() as choices:  # only once for each kind of row
            self.bodies[kind]()
        self.choices[kind] = choices

    def fill_embeddings(self, first: int, count: int) -> None:
        """Compute the embeddings of `count` rows, beginning with row `first`."""
        for name, embeddings in self.embeddings.items():
            timesteps = self.timesteps[int(name == "classifier"), first : first + count]
            embeddings.fill(timesteps, self._labels_of(name))

    def implementation_choices(self) -> list[Choice]:
        """Return the implementations in a row of the kind that has the most.

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
