"""Inference forms that layers derive from their own parameters: what is derived, and when it is renewed.

A folded network has the parameters, the state dict and the code of the published one. Its convolutions keep
beside their weights a form that runs faster, and the projections of the embedding lie side by side. Nothing
of it is saved; nothing of it is used in training mode, by parameters that require gradients, or by others
than those it was derived from (`torch.func.functional_call`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast import host
from admfast.errors import invalid
from admfast.ops.layout import channels_last

# Pipelines on several threads may share a network.
FOLDING = threading.RLock()
WINOGRAD_BYTES = 16  # a weight, in each direction that runs
TORSO = ("input_blocks", "middle_block", "output_blocks")
PARTS = frozenset({"channels_last", "two_sources", "residual", "qkv_rows", "embeddings"})


@dataclass(frozen=True)
class FoldOptions:
    """How a network folds.

    Attributes:
        conv: implementation of the convolutions by name (see `admfast info`), None for the fastest.
    """

    conv: str | None = None
    # What the ablation bench leaves out, of PARTS:
    #   channels_last: images run with their channels together
    #   two_sources: the 1x1 skip of a concatenation adds up the products of its two sources, which are never
    #     written side by side
    #   residual: a convolution adds the skip to its own result
    #   qkv_rows: rows of legacy qkv weights in the new order (the same bits)
    #   embeddings: the embedding's projections to all blocks in one product
    _without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.conv is not None and not isinstance(self.conv, str):
            raise invalid("conv", self.conv, "the name of an implementation, or None")
        assert self._without <= PARTS, self._without

    def has(self, part: str) -> bool:
        """Return whether a part of PARTS is derived."""
        return part not in self._without


@dataclass(frozen=True)
class Projected:
    """The projections of an embedding to all residual blocks side by side: values [N, total]."""

    values: Tensor


class FoldableNet(nn.Module):
    """A network that folds: what `UNet` and `Classifier` have in common of it."""

    directions: int = 1  # in which its convolutions run when images are sampled
    fold_options: FoldOptions | None = None
    fold_dtype: torch.dtype | None = None
    fold_generation: int = 0  # one more whenever what a step reads lies in new memory, or is no longer there
    _fold_key: tuple[Any, ...] = ()
    _fold_places: tuple[object, ...] = ()
    _fold_by_layer: bool = False
    _fold_done: torch.cuda.Event | None = None
    _projections: tuple[Tensor, Tensor] | None = None
    _projected_from: tuple[tuple[Any, Tensor, Tensor], ...] = ()  # layers, their weights and biases
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
        """The residual blocks, in order."""
        return [module for module in self.modules() if hasattr(module, "emb_layers")]

    def _convolutions(self) -> list[tuple[str, Any]]:
        """The convolutions that fold, with their names."""
        return [(name, m) for name, m in self.named_modules() if hasattr(type(m), "fold_weights")]

    def fold(self, options: FoldOptions | None = None, dtype: torch.dtype | None = None) -> None:
        """Derive the forms that run, with the torso's convolutions in `dtype`.

        Parameters must be frozen. Folding again renews the values in the same memory where options and dtype
        stay, so that captured graphs hold.

        Raises: InvalidArgument where parameters require gradients, or were made in inference mode.
        """
        options, dtype = options or FoldOptions(), dtype or self._parameter_dtype()
        if self._trainable():
            raise invalid("parameters", "trainable", "freeze them first (requires_grad_(False))")
        check_ordinary("parameters", self)
        # What is derived in inference mode could not be written to later.
        with FOLDING, torch.inference_mode(False), torch.no_grad():
            if self.fold_options is not None and (options, dtype) != (self.fold_options, self.fold_dtype):
                self.unfold()
            self.fold_options, self.fold_dtype = options, dtype
            spare = self._spared()
            for name, module in self._convolutions():
                kind = dtype if name.partition(".")[0] in TORSO else module.weight.dtype
                module.fold_weights(options, kind, name in spare)
            if options.has("embeddings"):
                self._fold_projections()
            before, self._fold_places = self._fold_places, self._places()
            self.fold_generation += self._fold_places != before
            self._fold_key = self._key()
            device = next(self.parameters()).device
            if device.type == "cuda":
                self._fold_done = torch.cuda.current_stream(device).record_event()

    def _places(self) -> tuple[object, ...]:
        """Where everything lies that a step reads: tensors by address, derived forms by what holds them."""
        tensors = (*self.parameters(), *(self._projections or ()))
        return [t.data_ptr() for t in tensors], [module._folded for _, module in self._convolutions()]

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

    @property
    def fold_bytes(self) -> int:
        """Bytes of what was derived so far; convolutions derive what they need when they first run."""
        found = sum(module.derived_bytes for _, module in self._convolutions())
        return found + sum(t.nbytes for t in self._projections or ())

    def refold(self) -> None:
        """Renew what was derived, in place; needed by hand after a change of `.data` alone."""
        if self._trainable():
            self.unfold()
        elif self.fold_options is not None:
            self.fold(self.fold_options, self.fold_dtype)

    def ensure_folded(self, options: FoldOptions, dtype: torch.dtype) -> None:
        """Fold where that isn't done, or where parameters were moved, replaced or written to since.

        A network with trainable parameters is left unfolded.
        """
        with FOLDING:
            if self._trainable():
                self.unfold()
                return
            if (options, dtype) != (self.fold_options, self.fold_dtype) or self._fold_key != self._key():
                self.fold(options, dtype)
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
            self._projections, self._projected_from = None, ()
            self._fold_key, self._fold_places = (), ()

    def _walked(self) -> list[nn.Module]:
        """All modules. `modules()` hands each through those around it, which is felt at every call."""
        found: list[nn.Module] = [self]
        for module in found:  # which grows meanwhile
            found.extend(child for child in module._modules.values() if child is not None)
        return found

    def _trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in _parameters_of(self._walked()))

    def form(self) -> tuple[object, ...]:
        """What a step depends on beside its key: under another form it must be made anew."""
        modules = self._walked()
        modes = tuple(module.training for module in modules)
        trained = tuple(parameter.requires_grad for parameter in _parameters_of(modules))
        return self.fold_generation, self.projects, modes, trained

    def _key(self) -> tuple[Any, ...]:
        """What tells that parameters are the same and unwritten, but for writes through `.data`."""
        modules = self._walked()
        parameters = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in _parameters_of(modules))
        # A part of the network that was moved alone, or put in another's place, has lost its form.
        return parameters, tuple(m._folded for m in modules if hasattr(type(m), "fold_weights"))

    def _fold_projections(self) -> None:
        layers = [block.emb_layers[1] for block in self._projecting()]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = torch.cat([layer.bias.detach() for layer in layers])
        kept = self._projections
        if kept is not None and all(_alike(*pair) for pair in zip(kept, (weight, bias), strict=True)):
            kept[0].copy_(weight)
            kept[1].copy_(bias)
        else:
            self._projections = weight, bias
        self._projected_from = tuple((layer, layer.weight, layer.bias) for layer in layers)

    def _parameter_dtype(self) -> torch.dtype:
        return next(self.input_blocks.parameters()).dtype  # type: ignore[union-attr]

    @property
    def is_folded(self) -> bool:
        """Whether forwards run on what was derived: told by the first convolution."""
        return self.fold_options is not None and self.input_blocks[0][0].folded is not None  # type: ignore[index, union-attr]

    @property
    def torso_dtype(self) -> torch.dtype:
        """The dtype in which the input, middle and output blocks run."""
        return self.fold_dtype if self.is_folded and self.fold_dtype is not None else self._parameter_dtype()

    @property
    def projects(self) -> bool:
        """Whether the embedding is projected to all blocks at once."""
        if self._projections is None or self._fold_by_layer or not self.is_folded:
            return False
        # As convolutions do: not for parameters that train, nor under torch.func.functional_call.
        return all(
            layer.weight is weight and layer.bias is bias and not (weight.requires_grad or bias.requires_grad)
            for layer, weight, bias in self._projected_from
        )

    def projected(self, emb: Tensor) -> Tensor | Projected:
        """The embedding [N, E] as the blocks take it: projected to all of them where that is folded."""
        if self._projections is None or not self.projects:
            return emb
        return Projected(F.linear(F.silu(emb), *self._projections))

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


def _parameters_of(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return (p for module in modules for p in module._parameters.values() if p is not None)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


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
