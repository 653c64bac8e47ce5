"""Inference forms that layers derive from their own parameters: what is derived, and when it is renewed.

A folded network has the parameters, the state dict and the code of the published one. Its convolutions keep
beside their weights a form that runs faster, and the projections of the embedding lie side by side. Nothing
of it is saved; nothing of it is used in training mode, by parameters that require gradients, or by others
than those it was derived from (`torch.func.functional_call`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.errors import invalid

TORSO = ("input_blocks", "middle_block", "output_blocks")


@dataclass(frozen=True)
class FoldOptions:
    """What is derived; each of it can be switched off alone.

    Attributes:
        conv: implementation of the convolutions by name (see `admfast info`), None for the fastest.
        channels_last: images run with their channels together.
        two_sources: the 1x1 skip of a concatenation adds up the products of its two sources, which are never
            written side by side.
        residual: a convolution adds the skip to its own result.
        qkv_rows: rows of legacy qkv weights in the new order (the same bits).
        subpixel: a 3x3 convolution after nearest doubling as four 2x2 convolutions before it.
        embeddings: the embedding's projections to all blocks in one product.
        memory: bytes that derived weights may take beyond the weights themselves, given to the smallest
            convolutions first, which run at the highest resolutions; None: a third of the host's memory. On
            a CPU it decides which convolutions go by Winograd's algorithm.
    """

    conv: str | None = None
    channels_last: bool = True
    two_sources: bool = True
    residual: bool = True
    qkv_rows: bool = True
    subpixel: bool = False
    embeddings: bool = True
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and (not isinstance(self.memory, int) or self.memory < 0):
            raise invalid("memory", self.memory, "bytes, 0 or more, or None")
        if self.conv is not None and not isinstance(self.conv, str):
            raise invalid("conv", self.conv, "the name of an implementation, or None")


def host_memory() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Projected:
    """The projections of an embedding to all residual blocks side by side: values [N, total]."""

    values: Tensor


class FoldableNet(nn.Module):
    """A network that folds: what `UNet` and `Classifier` have in common of it."""

    fold_options: FoldOptions | None = None
    fold_dtype: torch.dtype | None = None
    fold_generation: int = 0  # one more whenever derived forms lie in new memory
    _fold_key: tuple[Any, ...] = ()
    _projections: tuple[Tensor, Tensor] | None = None
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

    def fold(self, options: FoldOptions | None = None, dtype: torch.dtype | None = None) -> None:
        """Derive what `options` names, with the torso's convolutions in `dtype`.

        Parameters must be frozen. Folding again renews the values in the same memory where options and dtype
        stay, so that captured graphs hold.

        Raises: InvalidArgument where parameters require gradients.
        """
        options, dtype = options or FoldOptions(), dtype or self._parameter_dtype()
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise invalid("parameters", "trainable", "freeze them first (requires_grad_(False))")
        if (options, dtype) != (self.fold_options, self.fold_dtype):
            self.unfold()
            self.fold_generation += 1
        self.fold_options, self.fold_dtype = options, dtype
        spare = self._to_be_spared(options)
        for name, module in self.named_modules():
            if hasattr(module, "fold_weights"):
                kind = dtype if name.partition(".")[0] in TORSO else module.weight.dtype
                module.fold_weights(options, kind, name in spare)  # type: ignore[operator]
        if options.embeddings:
            self._fold_projections()
        self._fold_key = self._key()

    def _to_be_spared(self, options: FoldOptions) -> set[str]:
        """The convolutions for whose Winograd form, sixteen bytes a weight, there is no memory."""
        left = host_memory() // 3 if options.memory is None else options.memory
        spared = set()
        sizes = [(m.weight.numel(), name) for name, m in self.named_modules() if hasattr(m, "fold_weights")]
        for size, name in sorted(sizes):
            left -= 16 * size
            if left < 0:
                spared.add(name)
        return spared

    @property
    def fold_bytes(self) -> int:
        """Bytes of what was derived so far; convolutions derive what they need when they first run."""
        convolutions: list[Any] = [module for module in self.modules() if hasattr(module, "fold_weights")]
        found = sum(module.derived_bytes for module in convolutions)
        return found + sum(t.nbytes for t in self._projections or ())

    def refold(self) -> None:
        """Renew what was derived, in place; needed by hand after a change of `.data` alone."""
        if self.fold_options is not None:
            self.fold(self.fold_options, self.fold_dtype)

    def ensure_folded(self, options: FoldOptions, dtype: torch.dtype) -> None:
        """Fold where that isn't done, or where parameters were replaced or written to since."""
        if (options, dtype) != (self.fold_options, self.fold_dtype) or self._fold_key != self._key():
            self.fold(options, dtype)

    def unfold(self) -> None:
        """Drop what was derived."""
        for module in self.modules():
            if hasattr(module, "fold_weights"):
                module.unfold()  # type: ignore[operator]
        self.fold_options, self.fold_dtype = None, None
        self._projections, self._fold_key = None, ()

    def _key(self) -> tuple[Any, ...]:
        """What tells that parameters are the same and unwritten, but for writes through `.data`."""
        return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in self.parameters())

    def _fold_projections(self) -> None:
        layers = [block.emb_layers[1] for block in self._projecting()]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = torch.cat([layer.bias.detach() for layer in layers])
        if self._projections is None:
            self._projections = weight, bias
        else:
            for kept, value in zip(self._projections, (weight, bias), strict=True):
                kept.copy_(value)

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
        return self._projections is not None and self.is_folded

    def projected(self, emb: Tensor) -> Tensor | Projected:
        """The embedding [N, E] as the blocks take it: projected to all of them where that is folded."""
        if self._projections is None or not self.is_folded:
            return emb
        return Projected(F.linear(F.silu(emb), *self._projections))

    def entering(self, x: Tensor) -> Tensor:
        """Images as the torso takes them: its dtype, channels together where that is folded."""
        x = x.to(self.torso_dtype)
        if self.is_folded and self.fold_options is not None and self.fold_options.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            if x.dim() in formats:
                x = x.contiguous(memory_format=formats[x.dim()])
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
        return {
            k: v for k, v in self.__dict__.items() if not k.startswith(("fold_", "_fold_", "_projections"))
        }
