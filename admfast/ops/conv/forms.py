"""The two directions of a convolution with frozen weights, and the forms of the weights that are derived."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import first_line
from admfast.ops import native
from admfast.ops.conv import epilogue
from admfast.ops.conv.int8 import MOST_TERMS, quantized_weights
from admfast.ops.layout import channels_last, empty_channels_last, is_channels_last
from admfast.ops.transforms import compiled_transform, constant, deriving, in_forward_mode, in_vmap

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

DERIVING = threading.RLock()  # threads that share a network may need a new form at the same time
PANEL = 32  # output channels of a panel of the forms for `direct` and `int8`
SIZES = 2  # input sizes for which a form is kept: that of full batches, and that of a smaller last one

# run(direction, x, bias, residual) -> y, by the implementation that is chosen for the shapes
Run = Callable[["Direction", Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ConvOptions:
    """The settings of a `FoldedConv`. stride, padding: one number for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: torch.dtype
    impl: str | None = None
    split: int = 0
    rows: Sequence[int] | None = None
    spare_memory: bool = False
    int8: bool = False


class Direction:
    """A convolution x -> y, or its transpose dy -> dx, which is a convolution too if the stride is one.

    Forms of the weights are derived on first use and kept in `forms`.

    weight: [C_out, C_in, *kernel], kept and not copied. columns: the slice of input channels that is used.
    other: the direction whose transpose this is, if it is one, with the same weight and columns.
    """

    def __init__(
        self,
        weight: Tensor,
        options: ConvOptions,
        run: Run,
        columns: slice = slice(None),
        other: Direction | None = None,
    ):
        # A transpose may be made while fake tensors are traced, which allow no operation on the weights.
        self.source: Tensor = weight.detach() if other is None else other.source
        self.options, self.columns = options, columns
        self.out_channels, channels, *kernel = weight.shape
        self.in_channels = len(range(channels)[columns])
        if other is not None:
            self.in_channels, self.out_channels = self.out_channels, self.in_channels
        self.kernel, self.stride, self.padding = tuple(kernel), options.stride, options.padding
        self.dtype, self.impl, self.run, self.other = options.dtype, options.impl, run, other
        self.is_transpose = other is not None
        self.renewals = 0
        self.forms: dict[tuple[Any, ...], Tensor] = {}
        self.plans: dict[tuple[Any, ...], Any] = {}
        # A trace holds this string instead of the object. torch keeps compiled traces on disk by their text,
        # so the string has everything that the shape of an output depends on.
        geometry = (self.in_channels, self.out_channels, self.kernel, self.stride, self.padding)
        self.key = f"{next(_count)} {geometry}"
        BY_KEY[self.key] = self

    def source_part(self) -> Tensor:
        """Return the weights of `columns` in the order of `rows`; they are the same for both directions."""
        weight = self.source[:, self.columns]
        return weight if self.options.rows is None else weight[self.options.rows]

    def weight(self) -> Tensor:
        """Return this direction's weights; a transpose's are flipped in space, with channels exchanged."""
        weight = self.source_part()
        return weight.flip(*range(2, weight.dim())).transpose(0, 1) if self.is_transpose else weight

    def transposed(self) -> Direction:
        """Return the other direction."""
        if self.other is None:
            padding = tuple(k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True))
            options = replace(self.options, padding=padding)
            self.other = Direction(self.source, options, self.run, self.columns, self)
        return self.other

    def both(self) -> list[Direction]:
        """Return this direction, and the other one if it exists."""
        return [self] if self.other is None else [self, self.other]

    def state(self) -> tuple[int, int]:
        """Return a fingerprint of the weights: the numbers of renewals, and of writes counted by torch."""
        return self.renewals, 0 if self.source.is_inference() else self.source._version

    def out_shape(self, x: Tensor) -> list[int]:
        """Return the shape [N, C_out, *spatial] of the convolution of `x`."""
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        return [x.shape[0], self.out_channels, *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)]

    def form(self, name: str, *size: int) -> Tensor:
        """Return the form for implementation `name`; `size`: the input's shape, if the form depends on it."""
        key = (name, *size)
        if torch.compiler.is_compiling():
            # Traced code would make the form again at every call; a form that exists is an input of it.
            _make_in_a_trace(self.key, name)
            return self.forms[key]
        found = self.forms.get(key)
        if found is None:
            with DERIVING:
                # If another thread has just made the form, keep it: a captured graph may use it.
                found = self.forms.get(key)
                if found is None:
                    self._forget(name)
                    found = self.forms[key] = self._derived(key)
        return found

    def _forget(self, name: str) -> None:
        """Drop the oldest form of implementation `name` if SIZES of them are kept."""
        same = [key for key in self.forms if key[0] == name]
        if len(same) >= SIZES:
            del self.forms[same[0]]

    def refold(self, weight: Tensor) -> None:
        """Take new weights, and rewrite the existing forms in place."""
        self.source = weight.detach()
        self.renewals += 1
        with DERIVING, deriving():
            for key, form in self.forms.items():
                form.copy_(self._derived(key))

    def _derived(self, key: tuple[Any, ...]) -> Tensor:
        with deriving():
            return _DERIVED[key[0]](self, *key[1:])


BY_KEY: weakref.WeakValueDictionary[str, Direction] = weakref.WeakValueDictionary()
_count = itertools.count()


@constant
def _make_in_a_trace(key: str, name: str) -> bool:
    """Make a form now, while its direction is being traced; return True."""
    direction = BY_KEY[key]
    if (name,) not in direction.forms:
        direction.forms[(name,)] = direction._derived((name,))
    return True


# The form that each implementation derives


def _library_form(direction: Direction) -> Tensor:
    return channels_last(direction.weight().to(direction.dtype, copy=True))


def _matmul_form(direction: Direction) -> Tensor:
    """Return [C_in, C_out]: a product with it reads both matrices along their rows."""
    return direction.weight().flatten(1).t().to(direction.dtype, copy=True).contiguous()


def _winograd_form(direction: Direction) -> Tensor:
    return native.ops().winograd_weights(direction.source_part().float(), direction.is_transpose)


@native.fake("winograd_weights")
def _winograd_weights(weight: Tensor, transposed: bool) -> Tensor:
    c_in, c_out = weight.shape[:2] if transposed else reversed(weight.shape[:2])
    return weight.new_empty((-(-c_out // 32), 36, c_in, 32), dtype=torch.float32)


def _direct_form(direction: Direction) -> Tensor:
    return _in_tiles(direction.weight().to(direction.dtype), 2)


def _int8_form(direction: Direction) -> Tensor:
    return _in_tiles(quantized_weights(direction.weight())[0].to(torch.int8), 4)


def _in_tiles(weight: Tensor, word: int) -> Tensor:
    """Return [panels of 32 outputs, chunks of 16 words, taps, 2, 16 words, 16 outputs, word], with zeros.

    weight: [C_out, C_in, *kernel]. word: number of adjacent input channels that fill 32 bits.
    """
    c_out, c_in, taps = weight.flatten(2).shape
    chunk = 16 * word
    padded = F.pad(weight.flatten(2), (0, 0, 0, -c_in % chunk, 0, -c_out % PANEL))
    split = padded.view(-(-c_out // PANEL), 2, 16, -(-c_in // chunk), 16, word, taps)
    return split.permute(0, 3, 6, 1, 4, 2, 5).contiguous()


def _int8_scales_form(direction: Direction) -> Tensor:
    """Return [2, C_out]: the scale of each output channel's weights, and the sum of their whole numbers."""
    weight, scale = quantized_weights(direction.weight())
    return torch.stack([scale, weight.flatten(1).sum(1)])


def _packed_form(direction: Direction, *size: int) -> Tensor:
    weight = direction.weight().to(direction.dtype).contiguous().to_mkldnn()
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight, direction.padding, direction.stride, (1, 1), 1, size)


_DERIVED: dict[str, Callable[..., Tensor]] = {
    "library": _library_form,
    "matmul": _matmul_form,
    "winograd": _winograd_form,
    "direct": _direct_form,
    "int8": _int8_form,
    "int8_scales": _int8_scales_form,
    "packed": _packed_form,
}


# How each one runs: y [N, C_out, *spatial] from x [N, C_in, *spatial]


def by_library(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by torch's own convolution with channels-last weights; differentiable by torch.

    On a GPU a kernel of ours adds bias and residual in one pass where it can; torch takes one pass for each.
    """
    convolution = CONVOLUTIONS[len(direction.kernel)]
    geometry = (direction.stride, direction.padding)
    weight = direction.form("library")
    if epilogue.serves(x.device.type, x, bias, residual):
        y = convolution(x, weight, None, *geometry)
        if is_channels_last(y):  # as cuDNN's is with such weights
            return epilogue.add(y, bias, residual)
        y = y if bias is None else y + bias.view(-1, *(1,) * len(direction.kernel))
    else:
        y = convolution(x, weight, bias, *geometry)
    return y if residual is None else y + residual


def by_matmul(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by a matrix product that also adds the residual; differentiable by torch."""
    rows = x.movedim(1, -1)  # [N, *spatial, C_in]
    shape = (*rows.shape[:-1], direction.out_channels)
    rows = rows.reshape(-1, direction.in_channels)
    weight = direction.form("matmul")
    if residual is not None and x.device.type == "cpu":
        # Not on a GPU: there addmm adds a bias vector at no cost, but copies a matrix before it adds to it.
        y = torch.addmm(residual.movedim(1, -1).reshape(-1, shape[-1]), rows, weight)
        y = y if bias is None else y + bias
    else:
        y = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        y = y if residual is None else y + residual.movedim(1, -1).reshape(-1, shape[-1])
    return y.reshape(shape).movedim(-1, 1)


def add_matmul(direction: Direction, x: Tensor, y: Tensor) -> Tensor:
    """Add the convolution of `x`, a matrix product, to `y` in place; nothing else may refer to `y`."""
    rows = x.movedim(1, -1).reshape(-1, direction.in_channels)
    total = y.movedim(1, -1).reshape(-1, direction.out_channels)
    total.addmm_(rows, direction.form("matmul"))
    return total.view(y.movedim(1, -1).shape).movedim(-1, 1)


def matmul_supports(direction: Direction, _x: Tensor | None = None) -> str | None:
    """Return why the convolution is not a matrix product; None if it is one."""
    if set(direction.kernel) | set(direction.stride) != {1} or set(direction.padding) != {0}:
        return "not a 1x1 convolution of stride 1 without padding"
    return None


def by_winograd(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by Winograd's F(4x4, 3x3) in C++ (csrc/README.md); channels-last, not recorded by autograd."""
    u = direction.form("winograd")
    return native.ops().conv3x3_winograd(x, u, bias, residual, direction.out_channels)


@native.fake("conv3x3_winograd")
def _winograd(x: Tensor, _u: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def winograd_supports(direction: Direction, x: Tensor) -> str | None:
    """Return why Winograd's convolution can't serve a call; None if it can."""
    return winograd_fits(direction.kernel, direction.stride, direction.padding, x)


def winograd_fits(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], x: Tensor
) -> str | None:
    """Return why Winograd's algorithm can't compute a convolution of `x`; None if it can."""
    if (kernel, stride, padding) != ((3, 3), (1, 1), (1, 1)):
        return "not a 3x3 convolution in two dimensions of stride 1 and padding 1"
    return _not_on_the_cpu(x, torch.float32)


def by_direct(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by sums of small products in C++ (csrc/README.md); channels-last, not recorded by autograd."""
    w = direction.form("direct")
    return native.ops().conv_direct(x, w, bias, residual, direction.out_channels)


@native.fake("conv_direct")
def _direct(x: Tensor, _w: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def direct_supports(direction: Direction, x: Tensor) -> str | None:
    """Return why the direct convolution can't serve a call; None if it can."""
    filters = (direction.kernel, direction.stride, direction.padding)
    if filters != ((3, 3), (1, 1), (1, 1)) and matmul_supports(direction) is not None:
        return "neither a 3x3 convolution of stride 1 and padding 1 nor a 1x1 convolution"
    return _not_on_the_cpu(x, torch.bfloat16)


def by_int8(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by exact sums of products of 8 bits in C++; channels-last, not recorded by autograd.

    `conv_int8_ref` states the numbers. The gradient ignores the rounding of x, and is an 8-bit convolution.
    """
    w, scales = direction.form("int8"), direction.form("int8_scales")
    return native.ops().conv_int8(x, w, scales, bias, residual, direction.out_channels)


@native.fake("conv_int8")
def _int8(x: Tensor, _w: Tensor, _scales: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def int8_fits(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], channels: int
) -> str | None:
    """Return why `conv_int8` doesn't compute a convolution of `channels` inputs; None if it does."""
    if (kernel, stride, padding) != ((3, 3), (1, 1), (1, 1)):
        return "not a 3x3 convolution in two dimensions of stride 1 and padding 1"
    if 9 * channels > MOST_TERMS:
        return f"its sums of {9 * channels} terms exceed 32 bits"
    return None


def int8_misfit(direction: Direction) -> str | None:
    """Return why `conv_int8` doesn't compute a direction; None if it does."""
    return int8_fits(direction.kernel, direction.stride, direction.padding, direction.in_channels)


def int8_supports(direction: Direction, x: Tensor) -> str | None:
    """Return why the compiled `conv_int8` can't serve a call; None if it can."""
    return int8_misfit(direction) or _not_on_the_cpu(x, torch.bfloat16, torch.float32)


def by_packed(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by oneDNN with weights in the layout it wants; channels-last, not recorded by autograd."""
    # Packed for exactly this input shape: for another one oneDNN may want another layout, and then takes up
    # to fifty times as long (101 ms instead of 2 for a 1x1 convolution of 768 to 2304 channels over 8x8).
    weight = direction.form("packed", *x.shape)
    geometry = (direction.padding, direction.stride, (1, 1), 1)
    convolution = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return convolution(x, weight, bias, *geometry, "none", [], "")
    return convolution.binary(x, residual, weight, bias, *geometry, "add", 1.0, None, [], None)


def packed_supports(direction: Direction, x: Tensor) -> str | None:
    """Return why oneDNN's packed convolution can't serve a call; None if it can."""
    if len(direction.kernel) != 2:
        return "not a convolution in two dimensions"
    if set(direction.stride) != {1} or any(
        p > k - 1 for k, p in zip(direction.kernel, direction.padding, strict=True)
    ):
        return "its gradient is not a convolution"
    return _not_on_the_cpu(x, torch.float32)


def _not_on_the_cpu(x: Tensor, *dtypes: torch.dtype) -> str | None:
    """Return why an implementation for `dtypes` on the CPU, without autograd, can't serve `x`, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, this runs on the CPU"
    if x.dtype not in dtypes:
        return f"x is {x.dtype}; {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    return transformed()


def transformed() -> str | None:
    """Return which active transform only torch's own operations support; None if there is none."""
    if torch.compiler.is_compiling():
        return compiled_transform()
    if in_forward_mode():
        return "only torch's own convolution supports forward-mode derivatives"
    if in_vmap():
        return "not under torch.func.vmap"
    return None


@constant
@functools.cache
def packed_missing() -> str | None:
    """Return None if torch has oneDNN's packed convolution and its results are right, else the reason.

    Runs one small convolution, because the ops are internal to torch and may disappear or change.
    """
    try:
        with deriving():
            x = torch.ones(1, 2, 3, 3, dtype=torch.float32, device="cpu")
            weight = x.new_ones(2, 2, 3, 3)
            direction = Direction(weight, ConvOptions((1, 1), (1, 1), x.dtype), by_packed)
            key = ("packed", *x.shape)
            direction.forms[key] = direction._derived(key)  # not by `form`: the first caller may be a trace
            right = all(
                torch.equal(by_packed(direction, x, None, r), by_library(direction, x, None, r))
                for r in (None, torch.ones_like(x))
            )
    except Exception as error:  # torch may raise anything; its text is the reason
        return f"its trial failed: {first_line(error)}"
    return None if right else "its trial gave wrong numbers"
