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
from admfast.ops.conv.int8 import MAX_TERMS, quantized_weights
from admfast.ops.layout import channels_last, empty_channels_last, is_channels_last
from admfast.ops.transforms import (
    constant_while_tracing,
    in_forward_mode,
    in_vmap,
    plain_eager_mode,
    reason_compiled_transform,
)

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

FORMS_LOCK = threading.RLock()  # threads that share a network may need a new form at the same time
PANEL = 32  # output channels of a panel of the forms for `direct` and `int8`
MAX_INPUT_SIZES = (
    2  # input sizes for which a form is kept: that of full batches, and that of a smaller last one
)

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

    weight: [C_out, C_in, *kernel], kept and not copied. channel_slice: the input channels that are used.
    opposite: the direction whose transpose this is, with the same weight and channels; None if this is none.
    """

    def __init__(
        self,
        weight: Tensor,
        options: ConvOptions,
        run: Run,
        channel_slice: slice = slice(None),
        opposite: Direction | None = None,
    ):
        # A transpose may be made while fake tensors are traced, which allow no operation on the weights.
        self.source_weight: Tensor = weight.detach() if opposite is None else opposite.source_weight
        self.options, self.channel_slice = options, channel_slice
        self.out_channels, channels, *kernel = weight.shape
        self.in_channels = len(range(channels)[channel_slice])
        if opposite is not None:
            self.in_channels, self.out_channels = self.out_channels, self.in_channels
        self.kernel, self.stride, self.padding = tuple(kernel), options.stride, options.padding
        self.dtype, self.impl, self.run, self.opposite = options.dtype, options.impl, run, opposite
        self.is_transpose = opposite is not None
        self.refold_count = 0
        self.forms: dict[tuple[Any, ...], Tensor] = {}
        self.choices: dict[tuple[Any, ...], Any] = {}
        # A trace holds this string instead of the object. torch keeps compiled traces on disk by their text,
        # so the string has everything that the shape of an output depends on.
        geometry = (self.in_channels, self.out_channels, self.kernel, self.stride, self.padding)
        self.key = f"{next(_next_number)} {geometry}"
        DIRECTIONS_BY_KEY[self.key] = self

    def selected_weight(self) -> Tensor:
        """Return the weights of `channel_slice`, reordered as `rows` says; both directions have the same."""
        weight = self.source_weight[:, self.channel_slice]
        return weight if self.options.rows is None else weight[self.options.rows]

    def weight(self) -> Tensor:
        """Return this direction's weights; a transpose's are flipped in space, with channels exchanged."""
        weight = self.selected_weight()
        return weight.flip(*range(2, weight.dim())).transpose(0, 1) if self.is_transpose else weight

    def transposed(self) -> Direction:
        """Return the opposite direction; make it at the first call."""
        if self.opposite is None:
            padding = tuple(k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True))
            options = replace(self.options, padding=padding)
            self.opposite = Direction(self.source_weight, options, self.run, self.channel_slice, self)
        return self.opposite

    def with_opposite(self) -> list[Direction]:
        """Return this direction, and the opposite one if it exists."""
        return [self] if self.opposite is None else [self, self.opposite]

    def weights_version(self) -> tuple[int, int]:
        """Return the number of refolds, and of writes to the weights that torch has counted."""
        return self.refold_count, 0 if self.source_weight.is_inference() else self.source_weight._version

    def out_shape(self, x: Tensor) -> list[int]:
        """Return the shape [N, C_out, *spatial] of the convolution of `x`."""
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        return [x.shape[0], self.out_channels, *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)]

    def form(self, name: str, *size: int) -> Tensor:
        """Return the form for implementation `name`; `size`: the input's shape, if the form depends on it."""
        key = (name, *size)
        if torch.compiler.is_compiling():
            # Traced code would make the form again at every call; a form that exists is an input of it.
            _make_form_while_tracing(self.key, name)
            return self.forms[key]
        form = self.forms.get(key)
        if form is None:
            with FORMS_LOCK:
                # If another thread has just made the form, keep it: a captured graph may use it.
                form = self.forms.get(key)
                if form is None:
                    self._drop_oldest_form(name)
                    form = self.forms[key] = self._derive(key)
        return form

    def _drop_oldest_form(self, name: str) -> None:
        """Drop the oldest form of implementation `name` if there are MAX_INPUT_SIZES of them."""
        same_kind = [key for key in self.forms if key[0] == name]
        if len(same_kind) >= MAX_INPUT_SIZES:
            del self.forms[same_kind[0]]

    def refold(self, weight: Tensor) -> None:
        """Take new weights, and rewrite the existing forms in place."""
        self.source_weight = weight.detach()
        self.refold_count += 1
        with FORMS_LOCK, plain_eager_mode():
            for key, form in self.forms.items():
                form.copy_(self._derive(key))

    def _derive(self, key: tuple[Any, ...]) -> Tensor:
        with plain_eager_mode():
            return _DERIVE_FORM[key[0]](self, *key[1:])


DIRECTIONS_BY_KEY: weakref.WeakValueDictionary[str, Direction] = weakref.WeakValueDictionary()
_next_number = itertools.count()


@constant_while_tracing
def _make_form_while_tracing(key: str, name: str) -> bool:
    """Make a form while its direction is traced; return True."""
    direction = DIRECTIONS_BY_KEY[key]
    if (name,) not in direction.forms:
        direction.forms[(name,)] = direction._derive((name,))
    return True


# The form that each implementation derives


def _library_form(direction: Direction) -> Tensor:
    return channels_last(direction.weight().to(direction.dtype, copy=True))


def _matmul_form(direction: Direction) -> Tensor:
    """Return [C_in, C_out]: a product with it reads both matrices along their rows."""
    return direction.weight().flatten(1).t().to(direction.dtype, copy=True).contiguous()


def _winograd_form(direction: Direction) -> Tensor:
    return native.ops().winograd_weights(direction.selected_weight().float(), direction.is_transpose)


@native.fake("winograd_weights")
def _fake_winograd_weights(weight: Tensor, transposed: bool) -> Tensor:
    c_in, c_out = weight.shape[:2] if transposed else reversed(weight.shape[:2])
    return weight.new_empty((-(-c_out // 32), 36, c_in, 32), dtype=torch.float32)


def _direct_form(direction: Direction) -> Tensor:
    return _to_tiles(direction.weight().to(direction.dtype), 2)


def _int8_form(direction: Direction) -> Tensor:
    return _to_tiles(quantized_weights(direction.weight())[0].to(torch.int8), 4)


def _to_tiles(weight: Tensor, word: int) -> Tensor:
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


_DERIVE_FORM: dict[str, Callable[..., Tensor]] = {
    "library": _library_form,
    "matmul": _matmul_form,
    "winograd": _winograd_form,
    "direct": _direct_form,
    "int8": _int8_form,
    "int8_scales": _int8_scales_form,
    "packed": _packed_form,
}


# How each one runs: y [N, C_out, *spatial] from x [N, C_in, *spatial]


def run_library(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by torch's own convolution with channels-last weights; differentiable by torch.

    On a GPU a kernel of ours adds bias and residual in one pass where it can; torch takes one pass for each.
    """
    convolution = CONVOLUTIONS[len(direction.kernel)]
    geometry = (direction.stride, direction.padding)
    weight = direction.form("library")
    if epilogue.can_serve(x.device.type, x, bias, residual):
        y = convolution(x, weight, None, *geometry)
        if is_channels_last(y):  # as cuDNN's is with such weights
            return epilogue.add_in_place(y, bias, residual)
        y = y if bias is None else y + bias.view(-1, *(1,) * len(direction.kernel))
    else:
        y = convolution(x, weight, bias, *geometry)
    return y if residual is None else y + residual


def run_matmul(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
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


def matmul_unsupported(direction: Direction, _x: Tensor | None = None) -> str | None:
    """Return why the convolution is not a matrix product; None if it is one."""
    if set(direction.kernel) | set(direction.stride) != {1} or set(direction.padding) != {0}:
        return "not a 1x1 convolution of stride 1 without padding"
    return None


def run_winograd(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by Winograd's F(4x4, 3x3) in C++ (csrc/README.md); channels-last, not recorded by autograd."""
    u = direction.form("winograd")
    return native.ops().conv3x3_winograd(x, u, bias, residual, direction.out_channels)


@native.fake("conv3x3_winograd")
def _fake_winograd(x: Tensor, _u: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def winograd_unsupported(direction: Direction, x: Tensor) -> str | None:
    """Return why Winograd's convolution can't serve a call; None if it can."""
    return winograd_unsupported_for(direction.kernel, direction.stride, direction.padding, x)


def winograd_unsupported_for(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], x: Tensor
) -> str | None:
    """Return why Winograd's algorithm can't compute a convolution of `x`; None if it can."""
    if (kernel, stride, padding) != ((3, 3), (1, 1), (1, 1)):
        return "not a 3x3 convolution in two dimensions of stride 1 and padding 1"
    return _unsupported_on_cpu(x, torch.float32)


def run_direct(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by sums of small products in C++ (csrc/README.md); channels-last, not recorded by autograd."""
    w = direction.form("direct")
    return native.ops().conv_direct(x, w, bias, residual, direction.out_channels)


@native.fake("conv_direct")
def _fake_direct(x: Tensor, _w: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def direct_unsupported(direction: Direction, x: Tensor) -> str | None:
    """Return why the direct convolution can't serve a call; None if it can."""
    geometry = (direction.kernel, direction.stride, direction.padding)
    if geometry != ((3, 3), (1, 1), (1, 1)) and matmul_unsupported(direction) is not None:
        return "neither a 3x3 convolution of stride 1 and padding 1 nor a 1x1 convolution"
    return _unsupported_on_cpu(x, torch.bfloat16)


def run_int8(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by exact sums of products of 8 bits in C++; channels-last, not recorded by autograd.

    `conv_int8_ref` states the numbers. The gradient ignores the rounding of x, and is an 8-bit convolution.
    """
    w, scales = direction.form("int8"), direction.form("int8_scales")
    return native.ops().conv_int8(x, w, scales, bias, residual, direction.out_channels)


@native.fake("conv_int8")
def _fake_int8(x: Tensor, _w: Tensor, _scales: Tensor, _bias: Any, _residual: Any, channels: int) -> Tensor:
    return empty_channels_last((x.shape[0], channels, *x.shape[2:]), x)


def int8_unsupported_for(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], channels: int
) -> str | None:
    """Return why `conv_int8` doesn't compute a convolution of `channels` inputs; None if it does."""
    if (kernel, stride, padding) != ((3, 3), (1, 1), (1, 1)):
        return "not a 3x3 convolution in two dimensions of stride 1 and padding 1"
    if 9 * channels > MAX_TERMS:
        return f"its sums of {9 * channels} terms exceed 32 bits"
    return None


def int8_unsupported_direction(direction: Direction) -> str | None:
    """Return why `conv_int8` doesn't compute a direction; None if it does."""
    return int8_unsupported_for(direction.kernel, direction.stride, direction.padding, direction.in_channels)


def int8_unsupported(direction: Direction, x: Tensor) -> str | None:
    """Return why the compiled `conv_int8` can't serve a call; None if it can."""
    return int8_unsupported_direction(direction) or _unsupported_on_cpu(x, torch.bfloat16, torch.float32)


def run_packed(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Convolve by oneDNN with weights in the layout it wants; channels-last, not recorded by autograd."""
    # Packed for exactly this input shape: for another one oneDNN may want another layout, and then takes up
    # to fifty times as long (101 ms instead of 2 for a 1x1 convolution of 768 to 2304 channels over 8x8).
    weight = direction.form("packed", *x.shape)
    geometry = (direction.padding, direction.stride, (1, 1), 1)
    convolution = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return convolution(x, weight, bias, *geometry, "none", [], "")
    return convolution.binary(x, residual, weight, bias, *geometry, "add", 1.0, None, [], None)


def packed_unsupported(direction: Direction, x: Tensor) -> str | None:
    """Return why oneDNN's packed convolution can't serve a call; None if it can."""
    if len(direction.kernel) != 2:
        return "not a convolution in two dimensions"
    if set(direction.stride) != {1} or any(
        p > k - 1 for k, p in zip(direction.kernel, direction.padding, strict=True)
    ):
        return "its gradient is not a convolution"
    return _unsupported_on_cpu(x, torch.float32)


def _unsupported_on_cpu(x: Tensor, *dtypes: torch.dtype) -> str | None:
    """Return why an implementation for `dtypes` on the CPU, without autograd, can't serve `x`, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, this runs on the CPU"
    if x.dtype not in dtypes:
        return f"x is {x.dtype}; {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    return reason_torch_conv_only()


def reason_torch_conv_only() -> str | None:
    """Return which active transform only torch's own operations support; None if there is none."""
    if torch.compiler.is_compiling():
        return reason_compiled_transform()
    if in_forward_mode():
        return "only torch's own convolution supports forward-mode derivatives"
    if in_vmap():
        return "not under torch.func.vmap"
    return None


@constant_while_tracing
@functools.cache
def packed_missing() -> str | None:
    """Return None if torch has oneDNN's packed convolution and its results are right, else the reason.

    Runs one small convolution, because the ops are internal to torch and may disappear or change.
    """
    try:
        with plain_eager_mode():
            x = torch.ones(1, 2, 3, 3, dtype=torch.float32, device="cpu")
            weight = x.new_ones(2, 2, 3, 3)
            direction = Direction(weight, ConvOptions((1, 1), (1, 1), x.dtype), run_packed)
            key = ("packed", *x.shape)
            direction.forms[key] = direction._derive(key)  # not by `form`: the first caller may be a trace
            is_correct = all(
                torch.equal(run_packed(direction, x, None, r), run_library(direction, x, None, r))
                for r in (None, torch.ones_like(x))
            )
    except Exception as error:  # torch may raise anything; its text is the reason
        return f"its trial failed: {first_line(error)}"
    return None if is_correct else "its trial gave wrong numbers"
