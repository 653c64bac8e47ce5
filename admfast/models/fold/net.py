"""Networks that derive faster forms of their own parameters, and notice when these have changed.

A folded network has the parameters, the state dict and the code of the published one. Its convolutions keep
beside their weights a form that runs faster, and the projections of the embedding lie side by side. Nothing
of it is saved; nothing of it is used in training mode, by parameters that require gradients, or by others
than those it was derived from (`torch.func.functional_call`).
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
from admfast.ops.layout import channels_last
from admfast.ops.transforms import deriving

# Pipelines on several threads may share a network.
FOLDING = threading.RLock()
WINOGRAD_BYTES = 16  # a weight, in each direction that runs
TORSO = ("input_blocks", "middle_block", "output_blocks")


class _State(NamedTuple):
    """A snapshot that tells whether a network changed; changes through `.data` in place are not seen.

    places: where the parameters lie, of which kind they are, and the convolutions' forms. versions: how often
    torch saw them written to. modes: which modules train. trained: which parameters do.
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
    fold_options: FoldOptions | None = None
    fold_dtype: torch.dtype | None = None
    training_dtype: torch.dtype | None = None  # of the torso while it isn't folded; None: its parameters'
    fold_generation: int = 0
    _fold_state: _State | None = None
    _fold_by_layer: bool = False
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

    def _projecting(self) -> list[Any]:
        """Return the residual blocks, in order."""
        return [module for module in self.modules() if hasattr(module, "emb_layers")]

    def _convolutions(self) -> list[tuple[str, Any]]:
        """Return the convolutions that fold, with their names."""
        return [(name, m) for name, m in self.named_modules() if hasattr(type(m), "fold_weights")]

    def fold(self, options: FoldOptions | None = None, dtype: torch.dtype | None = None) -> None:
        """Derive the forms that run, with the torso's convolutions in `dtype`.

        Parameters must be frozen. Folding again renews the values in the same memory where options and dtype
        stay, so that captured graphs hold.

        Raises: InvalidArgument where parameters require gradients, or were made in inference mode.
        """
        options, dtype = options or FoldOptions(), dtype or self._parameter_dtype()
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise invalid("parameters", "trainable", "freeze them first (requires_grad_(False))")
        check_ordinary("parameters", self)
        with FOLDING, deriving():
            if self.fold_options is not None and (options, dtype) != (self.fold_options, self.fold_dtype):
                self.unfold()
            self.fold_options, self.fold_dtype = options, dtype
            spared = self._spared()
            for name, module in self._convolutions():
                kind = dtype if name.partition(".")[0] in TORSO else module.weight.dtype
                module.fold_weights(options, kind, name in spared)
            if options.has("embeddings"):
                layers = [block.emb_layers[1] for block in self._projecting()]
                if self._projections is None or not self._projections.refold(layers):
                    self._projections = Projections(layers)
            self._settle(self._look())
            device = next(self.parameters()).device
            if device.type == "cuda":
                self._fold_done = torch.cuda.current_stream(device).record_event()

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
        """Renew what was derived, in place; needed by hand after a change of `.data` alone."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            self.unfold()
        elif self.fold_options is not None:
            self.fold(self.fold_options, self.fold_dtype)

    def ensure_folded(self, options: FoldOptions | None, dtype: torch.dtype) -> None:
        """Fold where that isn't done, or where parameters were moved, replaced or written to since.

        A network with trainable parameters is left unfolded, as is every network where `options` is None.
        """
        with FOLDING:
            state = self._look()
            known = self._fold_state
            if options is None or True in state.trained:
                if self.fold_options is not None:
                    self.unfold()
                    state = self._look()
                self._settle(state)
            elif (options, dtype) != (self.fold_options, self.fold_dtype) or known is None:
                self.fold(options, dtype)
            elif (state.places, state.versions) != (known.places, known.versions):
                self.fold(options, dtype)
            else:
                self._settle(state)
            if self._fold_done is not None and not torch.cuda.is_current_stream_capturing():
                # The streams of other threads must not read what this one has yet to write.
                torch.cuda.current_stream(next(self.parameters()).device).wait_event(self._fold_done)

    def unfold(self) -> None:
        """Drop what was derived."""
        with FOLDING:
            if self.fold_options is not None:
                self.fold_generation += 1
            for _, module in self._convolutions():
                module.unfold()
            self.fold_options, self.fold_dtype, self._fold_done = None, None, None
            self._projections, self._fold_state = None, None

    def _look(self) -> _State:
        """Look the network over; felt at every call, and `modules()` would pass each through many hands."""
        modules: list[nn.Module] = [self]
        places: list[object] = []
        for module in modules:  # which grows meanwhile
            modules.extend(child for child in module._modules.values() if child is not None)
            # A part of the network that was moved alone, or put in another's place, has lost its form.
            places.append(module.__dict__.get("_folded"))
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        places += [(id(p), p.data_ptr(), p.dtype, p.device) for p in parameters]
        return _State(
            places,
            [p._version for p in parameters],
            [module.training for module in modules],
            [p.requires_grad for p in parameters],
        )

    def _settle(self, state: _State) -> None:
        """Take this for the present state, and count it where a step made before can't be used any more."""
        before = self._fold_state
        if before is None or (before.places, *before[2:]) != (state.places, *state[2:]):
            self.fold_generation += 1
        self._fold_state = state

    def _parameter_dtype(self) -> torch.dtype:
        return next(self.input_blocks.parameters()).dtype  # type: ignore[union-attr]

    @property
    def is_folded(self) -> bool:
        """Tell whether forwards run on what was derived: told by the first convolution."""
        return self.fold_options is not None and self.input_blocks[0][0].folded is not None  # type: ignore[index, union-attr]

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
        return self._projections(emb) if self._projections is not None and self.projects else emb

    def entering(self, x: Tensor) -> Tensor:
        """Images as the torso takes them: its dtype, channels together where that is folded."""
        x = x.to(self.torso_dtype)
        if self.is_folded and self.fold_options is not None and self.fold_options.has("channels_last"):
            x = channels_last(x) if x.dim() > 3 else x
        return x

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
