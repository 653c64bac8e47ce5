"""Networks that derive faster forms of their own parameters, and notice when these have changed.

A folded network has the parameters, the state dict and the code of the published one. Its convolutions keep
beside their weights a form that runs faster, and the projections of the embedding lie side by side. Nothing
of it is saved; nothing of it is used in training mode, or by other parameters than those it was derived from
(`torch.func.functional_call`). Trainable parameters get their gradients where these are asked for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from admfast import host
from admfast.errors import invalid
from admfast.models.fold.options import FoldOptions
from admfast.models.fold.projections import Projected, Projections
from admfast.models.fold.values import Values
from admfast.models.hooks import Survey, hooked, hooks_made, parts, spared, survey
from admfast.ops.layout import channels_together
from admfast.ops.transforms import deriving, in_program

# Pipelines on several threads may share a network.
FOLDING = threading.RLock()
WINOGRAD_BYTES = 16  # a weight, in each direction that runs
TORSO = ("input_blocks", "middle_block", "output_blocks")


class _State(NamedTuple):
    """A snapshot that tells whether a network changed, but for writes that torch doesn't count (`Values`).

    places: where parameters and buffers lie, of which kind they are, and the convolutions' forms. versions:
    how often torch saw the parameters written to. modes: which modules train. trained: which parameters do.
    """

    places: list[object]
    versions: list[int]
    modes: list[bool]
    trained: list[bool]


class FoldableNet(nn.Module):
    """A network that folds, the base of `UNet` and `Classifier`.

    `fold_generation` answers whether anything changed that a prepared step depends on: it rises whenever what
    a step reads lies in other memory, is no longer there, or is used in another way.
    """

    directions: int = 1  # in which its convolutions run when images are sampled
    torso: tuple[str, ...] = TORSO  # where its blocks lie, the input blocks first
    fold_options: FoldOptions | None = None
    fold_dtype: torch.dtype | None = None
    training_dtype: torch.dtype | None = None  # of the torso while it isn't folded; None: its parameters'
    fold_generation: int = 0
    _fold_state: _State | None = None
    _fold_values: Values | None = None
    _fold_by_layer: bool = False
    _fold_survey: Survey | None = None
    fold_hooks_made: int | None = None  # by torch, when it was last found as built; None where it wasn't
    _fold_convolutions: tuple[Any, ...] = ()  # of the torso
    _kinds: tuple[type, ...] = ()  # classes of all modules as built
    _fold_done: torch.cuda.Event | None = None
    _projections: Projections | None = None
    projected_width: int  # columns of all projections together

    def _lay_out_projections(self) -> None:
        """Give every residual block its columns among all projections; to be called once it is built."""
        total = 0
        for block in self._projecting():
            width = block.emb_layers[1].out_features
            block.projection = slice(total, total + width)
            total += width
        self.projected_width = total
        self._kinds = tuple(map(type, [self, *parts(self)]))

    def _projecting(self) -> list[Any]:
        """Return the residual blocks, in order."""
        return [module for module in self.modules() if hasattr(module, "emb_layers")]

    def _convolutions(self) -> list[tuple[str, Any]]:
        """Return the convolutions that fold, with their names."""
        return [(name, m) for name, m in self.named_modules() if hasattr(type(m), "fold_weights")]

    def fold(self, options: FoldOptions | None = None, dtype: torch.dtype | None = None) -> None:
        """Derive the forms that run, with the torso's convolutions in `dtype`.

        Folding again renews the values in the same memory where options and dtype stay, so that captured
        graphs hold.

        Raises: InvalidArgument where parameters were made in inference mode.
        """
        options, dtype = options or FoldOptions(), dtype or self._parameter_dtype()
        check_ordinary("parameters", self)
        with FOLDING, deriving():
            if self.fold_options is not None and (options, dtype) != (self.fold_options, self.fold_dtype):
                self.unfold()
            self.fold_options, self.fold_dtype = options, dtype
            # Before anything is derived: what is written meanwhile is a change.
            self._fold_values = Values(self.parameters())
            spared = self._spared()
            for name, module in self._convolutions():
                kind = dtype if self._in_torso(name) else module.weight.dtype
                module.fold_weights(options, kind, name in spared)
            if options.has("embeddings"):
                self._project_together()
            self._fold_convolutions = tuple(m for name, m in self._convolutions() if self._in_torso(name))
            self._settle(self._look())
            device = next(self.parameters()).device
            if device.type == "cuda":
                self._fold_done = torch.cuda.current_stream(device).record_event()

    def _project_together(self) -> None:
        """Lay the projections of all blocks side by side, if all are the linear layers that they were."""
        layers: list[Any] = [getattr(block.emb_layers, "1", None) for block in self._projecting()]
        if not layers or any(type(layer) is not nn.Linear or layer.bias is None for layer in layers):
            self._projections = None
        elif self._projections is None or not self._projections.refold(layers):
            self._projections = Projections(layers)

    def _spared(self) -> set[str]:
        """Name the convolutions that must do without a Winograd form.

        The forms of a network take at most a sixth of the memory that the process may use, so that those of a
        guided cascade, three networks, leave half of it free. The smallest convolutions come first: they run
        at the highest resolutions.
        """
        size = WINOGRAD_BYTES * self.directions
        sizes = sorted((size * module.weight.numel(), name) for name, module in self._convolutions())
        left, spared = host.memory() // 6, set()
        for size, name in sizes:
            left -= size
            if left < 0:
                spared.add(name)
        return spared

    def refold(self) -> None:
        """Renew what was derived, in place, whether or not a change can be seen; see `Pipeline.refresh`."""
        if self.fold_options is not None:
            self.fold(self.fold_options, self.fold_dtype)

    def ensure_folded(self, options: FoldOptions | None, dtype: torch.dtype) -> None:
        """Fold where that isn't done, or where parameters were moved, replaced or written to since.

        Writes that torch doesn't count are found by comparing values (see `Values`), but not while a CUDA
        graph is captured or torch.compile traces, which allow no reading.
        A network is left unfolded where `options` is None.
        """
        with FOLDING:
            if self._fold_done is not None and not torch.cuda.is_current_stream_capturing():
                # This stream must not read what that of another thread has yet to write.
                torch.cuda.current_stream(next(self.parameters()).device).wait_event(self._fold_done)
            made = hooks_made()
            found = survey(self)
            self._notice(found)
            self.fold_hooks_made = None if self.altered else made
            state = self._look(found.modules)
            known = self._fold_state
            if options is None:
                if self.fold_options is not None:
                    self.unfold()
                    state = self._look()
                self._settle(state)
            elif (options, dtype) != (self.fold_options, self.fold_dtype) or known is None:
                self.fold(options, dtype)
            elif (state.places, state.versions) != (known.places, known.versions) or not self._holds():
                self.fold(options, dtype)
            else:
                self._settle(state)

    def unfold(self) -> None:
        """Drop what was derived."""
        with FOLDING:
            if self.fold_options is not None:
                self.fold_generation += 1
            for _, module in self._convolutions():
                module.unfold()
            self.fold_options, self.fold_dtype, self._fold_done = None, None, None
            self._projections, self._fold_state, self._fold_values = None, None, None
            self._fold_convolutions = ()

    def _holds(self) -> bool:
        """Tell whether the parameters hold the values that were folded, where these may be read."""
        return self._fold_values is None or not _reads() or self._fold_values.hold()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network, whose forms are renewed first where torch counted a write to its parameters.

        While it trains they are dropped instead: each step would derive them anew, and use none. The rows of
        a prepared step do without: `ensure_folded` has looked before the first.
        """
        # A trace would be guarded by what it reads, or hold what is derived in it.
        if not (torch.compiler.is_compiling() or in_program() or spared()):
            values = self._fold_values
            if values is not None and values.written() and _reads():
                with FOLDING:
                    if self._fold_values is values and values.written():  # another thread may have been here
                        if self.training:
                            self.unfold()
                        else:
                            self.refold()
        return super().__call__(*args, **kwargs)

    def _look(self, modules: Sequence[nn.Module] | None = None) -> _State:
        """Look the network over, all of whose modules may be given; felt at every call."""
        places: list[object] = []
        modes: list[bool] = []
        tensors: list[Tensor] = []
        buffers: list[Tensor] = []
        for module in [self, *parts(self)] if modules is None else modules:
            held = module.__dict__
            for parameter in held["_parameters"].values():
                if parameter is not None:
                    tensors.append(parameter)
            if held["_buffers"]:
                buffers.extend(buffer for buffer in held["_buffers"].values() if buffer is not None)
            # A part of the network that was moved alone, or put in another's place, has lost its form.
            places.append(held.get("_folded"))
            modes.append(held["training"])
        places += [(id(t), t.data_ptr(), t.dtype, t.device) for t in tensors + buffers]
        versions = [t._version for t in tensors]
        return _State(places, versions, modes, [t.requires_grad for t in tensors])

    def _notice(self, found: Survey) -> None:
        """Take note of hooks and of modules put in by others; steps made before such a change are over."""
        if found != self._fold_survey:
            self.fold_generation += 1
        self._fold_survey = found

    @property
    def hooked(self) -> bool:
        """Tell whether, when it was last made ready, a hook watched the network or some module in it."""
        return self._fold_survey is not None and self._fold_survey.hooked

    @property
    def altered(self) -> bool:
        """Tell whether, when it was last made ready, it had hooks, or modules that it wasn't built with."""
        found = self._fold_survey
        return found is not None and (found.hooked or found.kinds != self._kinds)

    def _settle(self, state: _State) -> None:
        """Take this for the present state, and count it where a step made before can't be used any more."""
        before = self._fold_state
        if before is None or (before.places, *before[2:]) != (state.places, *state[2:]):
            self.fold_generation += 1
        self._fold_state = state

    def _in_torso(self, name: str) -> bool:
        return name.partition(".")[0] in self.torso

    def _parameter_dtype(self) -> torch.dtype:
        blocks = self._modules[self.torso[0]]
        assert blocks is not None
        found: Tensor | None = next(blocks.parameters(), None)
        if found is None:  # in a replica of DataParallel they are attributes
            weights = (getattr(module, "weight", None) for module in blocks.modules())
            found = next(weight for weight in weights if isinstance(weight, Tensor))
        return found.dtype

    def _replicate_for_data_parallel(self) -> Any:
        """A copy that shares no module with this network, nor what was derived from this one's parameters."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.fold_options, replica._projections, replica._fold_convolutions = None, None, ()
        return replica

    @property
    def is_folded(self) -> bool:
        """Tell whether forwards run on what was derived: most often the first convolution knows."""
        return self.fold_options is not None and any(
            module.folded is not None for module in self._fold_convolutions
        )

    @property
    def torso_dtype(self) -> torch.dtype:
        """The dtype in which the input, middle and output blocks run."""
        if self.is_folded and self.fold_dtype is not None:
            return self.fold_dtype
        return self.training_dtype or self._parameter_dtype()

    @property
    def projects(self) -> bool:
        """Tell whether the embedding is projected to all blocks at once."""
        found = self._projections
        return found is not None and not self._fold_by_layer and self.is_folded and found.usable

    def projected(self, emb: Tensor) -> Tensor | Projected:
        """The embedding [N, E] as the blocks take it: projected to all of them where that is folded."""
        if self._projections is None or hooked(()) or not self.projects:  # hooks on every module there is
            return emb
        return self._projections(emb)

    def projections(self, emb: Tensor | Projected) -> Tensor:
        """Return the projections [N, projected_width] of what `embedded` gave; the network `projects`."""
        if isinstance(emb, Tensor):  # a hook that came while images are sampled
            assert self._projections is not None
            emb = self._projections(emb)
        return emb.values

    def entering(self, x: Tensor) -> Tensor:
        """Return images as the torso takes them: in its dtype, with their channels together.

        Convolutions hand that layout on whatever the layout of their weights. A training step of the digits
        model takes 640 ms with it and 700 without (batch 32, one thread, EPYC), under autocast 448 and 521.
        """
        if (
            not x.is_floating_point()
        ):  # the output, which gets the dtype of x, would lose all but whole numbers
            raise invalid("x.dtype", x.dtype, "a floating dtype")
        x = x.to(self.torso_dtype)
        options = self.fold_options if self.is_folded else None
        together = x.dim() == 4 if options is None else x.dim() > 3 and options.has("channels_last")
        return channels_together(x) if together else x

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving or converting the network leaves what was derived behind.
        self.unfold()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        if self.fold_options is not None:
            self.refold()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith(("fold_", "_fold_", "_project"))}


def check_ordinary(name: str, net: nn.Module) -> None:
    """Refuse parameters made in inference mode: no gradient can pass them, and their changes go unseen."""
    if any(parameter.is_inference() for parameter in net.parameters()):
        raise invalid(name, "made in inference mode", "build it outside of torch.inference_mode()")


def _reads() -> bool:
    """Tell whether values may be read now: neither a trace nor the capture of a CUDA graph allows it."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def projecting_by_layer(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Let every block project the embedding itself within the block, where hooks see its layer."""
    found = [net for net in networks if isinstance(net, FoldableNet)]
    for net in found:
        net._fold_by_layer = True
    try:
        yield
    finally:
        for net in found:
            net._fold_by_layer = False
