"""Convolution with frozen weights and an added residual, on the form of the weights that runs fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from admfast.errors import invalid
from admfast.ops import native
from admfast.ops.conv import epilogue, forms
from admfast.ops.conv.forms import CONVOLUTIONS, ConvOptions, Direction
from admfast.ops.conv.grad import ConvFn
from admfast.ops.conv.int8 import conv_int8_ref
from admfast.ops.dispatch import (
    Implementation,
    OpTable,
    choices_are_recorded,
    impl_setting,
    record_choices,
    report_choice,
)
from admfast.ops.layout import channels_last, is_channels_last
from admfast.ops.transforms import (
    apply_autograd,
    constant_while_tracing,
    has_op_observer,
    in_autocast,
    needs_autograd,
    plain_eager_mode,
)


def conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 1,
) -> Tensor:
    """Compute `FoldedConv` in plain PyTorch, in float32, or in float64 for float64 input."""
    wide = torch.promote_types(x.dtype, torch.float32)
    convolution = CONVOLUTIONS[weight.dim() - 2]
    y = convolution(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding)
    if residual is not None:
        check_residual(residual, y.shape)
        y = y + residual.to(wide)
    return y.to(x.dtype)


class FoldedConv:
    """`y = conv([x, x2], weight) + bias (+ residual)` with frozen weights, and the forms derived from them.

    The convolution is torch's: a cross-correlation with zero padding. When an implementation first runs, it
    derives the form of the weights that it needs, and keeps it. The input's gradient is a convolution too,
    with forms of its own. Differentiable in x and residual any number of times, never in weight and bias; in
    forward mode and under vmap through torch's own convolution. Accumulates in float32 or wider.

    NaN or infinity in x reaches the outputs that depend on it. With the implementation `winograd` it also
    reaches the other outputs of their 4x4 tiles; the tiling begins at the upper left corner of the image.
    With `int8` it reaches all outputs of its image.

    Args:
        weight: [C_out, C_in, *kernel], one to three spatial dimensions, any floating dtype, on the device of
            the inputs. It is kept, not copied: call `refold` after its values have changed. `conv.weight` and
            `conv.bias` are the given tensors.
        bias: [C_out] or None.
        stride, padding: one number for each spatial dimension, or one for all.
        dtype: dtype of inputs, outputs and products; None: that of `weight`.
        impl: name of an implementation (see `admfast info`); None: chosen by shape.
        split: number of input channels of the first of two sources. The sources are convolved separately and
            the results added, so that no concatenation is written to memory. 0: one source; an `x2` is
            concatenated to `x`.
        rows: order of the output channels, as indices of the rows of `weight`; None: unchanged.
        int8: compute 3x3 convolutions in two dimensions of stride 1 and padding 1, and their gradients, from
            8-bit numbers (`conv_int8_ref`); `impl` then names an implementation of `conv_int8`. Not in
            forward mode, under vmap or while torch's operations are counted or traced.
        spare_memory: don't choose an implementation whose form is larger than the weights (`winograd`: four
            times as large, in each direction that runs).

    Raises:
        InvalidArgument: for shapes, dtypes or devices that don't fit, and an unknown `impl`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
        split: int = 0,
        rows: Sequence[int] | None = None,
        spare_memory: bool = False,
        int8: bool = False,
    ):
        if weight.dim() - 2 not in CONVOLUTIONS or not weight.dtype.is_floating_point or not weight.numel():
            allowed = "floating [C_out, C_in, *kernel] with one to three spatial dimensions"
            raise invalid("weight", f"{weight.dtype} {tuple(weight.shape)}", allowed)
        self.dtype = weight.dtype if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise invalid("dtype", dtype, "a floating dtype")
        if impl is not None:
            (INT8 if int8 else TABLE).find(impl)
        dims = weight.dim() - 2
        geometry = (per_dimension(stride, dims, "stride", 1), per_dimension(padding, dims, "padding", 0))
        check_bias(weight, bias)
        self._set_weights(weight, bias)
        self.options = ConvOptions(*geometry, self.dtype, impl, split, rows, spare_memory, int8)
        channel_slices = [slice(split), slice(split, None)] if split else [slice(None)]
        # One direction per source.
        self.directions = [Direction(weight, self.options, _run, channels) for channels in channel_slices]
        self._bias = None
        if bias is not None:
            with plain_eager_mode():
                self._bias = self._reordered(bias).to(weight.device, self.dtype, copy=True)

    def _reordered(self, bias: Tensor) -> Tensor:
        return bias if self.options.rows is None else bias[self.options.rows]

    def __call__(self, x: Tensor, residual: Tensor | None = None, x2: Tensor | None = None) -> Tensor:
        """Convolve `x` [N, C_in, *spatial] and add `residual` [N, C_out, *out], of the same dtype and device.

        x2: the second source, [N, C_in2, *spatial]. Returns [N, C_out, *out], channels-last if `x` is (with
        `split`: if `x2` is). Autocast has no effect. Raises InvalidArgument for arguments that don't fit, and
        Unavailable for a named implementation that can't serve the call.
        """
        if in_autocast(x.device):  # otherwise torch would compute in another dtype
            with torch.autocast(x.device.type, enabled=False):
                return self(x, residual, x2)
        if len(self.directions) == 1:
            x = x if x2 is None else torch.cat([x, x2], dim=1)
            return self.conv_source(0, x, residual)
        if x2 is None:
            raise invalid("x2", None, "a tensor: the weights are split for two sources")
        y, second = self.conv_source(0, x, residual), self.directions[1]
        in_place = is_channels_last(x2) and is_channels_last(y) and not needs_autograd(x2, y)
        if in_place and _choose_cached(second, x2, y).name == "matmul":
            return forms.add_matmul(second, x2, y)
        return self.conv_source(1, x2, y)

    def derive_forms(self) -> None:
        """Derive the forms that calls on a GPU run on, which otherwise are derived at the first call."""
        for direction in self.directions:
            if direction.impl is None:
                direction.form(_fastest_on_any_device(direction) or "library")

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the convolution of `x` without its bias, and the bias, if a kernel of its own would add it.

        The norm that reads the result then adds it as its `x_bias`. Otherwise return the convolution with its
        bias, and None.
        """
        fusible = len(self.directions) == 1 and not in_autocast(x.device)
        if fusible and self._bias is not None and epilogue.can_serve(x.device.type, x, self._bias, None):
            if _choose_cached(self.directions[0], x, None).name == "library":
                return self.conv_source(0, x, None, with_bias=False), self._bias
        return self(x), None

    def conv_source(self, index: int, x: Tensor, residual: Tensor | None, with_bias: bool = True) -> Tensor:
        """Return the convolution of source `index`, in the layout of `x`; only source 0 adds the bias."""
        bias = self._bias if with_bias and index == 0 else None
        y = _run(self.directions[index], x, bias, residual)
        return channels_last(y) if is_channels_last(x) else y.contiguous()

    def refold(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take new weights and bias, and rewrite all derived forms in the same memory.

        Raises InvalidArgument if a shape, the weights' device, or the presence of the bias has changed.
        """
        old = self.weight
        if weight.shape != old.shape or weight.device != old.device:
            now, before = (f"{tuple(t.shape)} on {t.device}" for t in (weight, old))
            raise invalid("weight", now, f"must stay {before}")
        if (bias is None) != (self.bias is None):
            shape = None if bias is None else tuple(bias.shape)
            raise invalid("bias", shape, "must be None if and only if it was None before")
        check_bias(weight, bias)
        self._set_weights(weight, bias)
        if bias is not None and self._bias is not None:
            with plain_eager_mode():
                self._bias.copy_(self._reordered(bias))
        for direction in self._all_directions():
            direction.refold(weight)

    def _set_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._folded_version = self._version_sum()

    def _version_sum(self) -> int:
        """Return the number of writes to weight and bias that torch has counted; 0 for inference tensors."""
        tensors = [t for t in (self.weight, self.bias) if t is not None]
        return 0 if self.weight.is_inference() else sum(t._version for t in tensors)

    @property
    def is_current(self) -> bool:
        """True if torch has counted no write to weight and bias since they were folded."""
        return self._version_sum() == self._folded_version

    def forms(self) -> list[Tensor]:
        """Return the forms that have been derived from the weights so far."""
        return [form for direction in self._all_directions() for form in direction.forms.values()]

    def _all_directions(self) -> list[Direction]:
        return [direction for forward in self.directions for direction in forward.with_opposite()]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle only weights, bias and options; the result derives its own forms."""
        bias = None if self.bias is None else self.bias.detach()
        return functools.partial(FoldedConv, **vars(self.options)), (self.weight.detach(), bias)


def per_dimension(value: int | tuple[int, ...], dims: int, name: str, least: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension; `value` may be one for all. Raises InvalidArgument."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
    if len(values) != dims or any(not isinstance(v, int) or v < least for v in values):
        raise invalid(name, value, f"one whole number of at least {least}, or {dims} of them")
    return values


def _check(direction: Direction, x: Tensor, residual: Tensor | None) -> None:
    """Reject inputs that no implementation could compute."""
    weight = direction.source_weight
    if x.dim() != weight.dim() or x.shape[1] != direction.in_channels:
        dims = len(direction.kernel)
        allowed = f"[N, {direction.in_channels}, *spatial] with {dims} spatial dimensions"
        raise invalid("x.shape", tuple(x.shape), allowed)
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and t.dtype != direction.dtype:
            raise invalid(f"{name}.dtype", t.dtype, f"must be {direction.dtype}")
        if t is not None and t.device != weight.device:
            raise invalid(f"{name}.device", str(t.device), f"must be {weight.device}, where the weights are")
    shape = direction.out_shape(x)
    if min(shape[2:]) < 1:
        raise invalid("x.shape", tuple(x.shape), f"a kernel of {direction.kernel} does not fit into it")
    if residual is not None:
        check_residual(residual, tuple(shape))


def check_residual(residual: Tensor, shape: Sequence[int]) -> None:
    """Reject a residual of another shape than the output's; one that broadcasts would be added silently."""
    if residual.shape != shape:
        raise invalid("residual.shape", tuple(residual.shape), f"must be {tuple(shape)}")


def check_bias(weight: Tensor, bias: Tensor | None) -> None:
    """Reject a bias that isn't one number for each output channel."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise invalid("bias.shape", tuple(bias.shape), f"must be {tuple(weight.shape[:1])}")


# Which implementation runs


def find_fastest(direction: Direction, x: Tensor) -> str:
    """Return the name of the implementation that was measured to be the fastest for a call.

    Milliseconds on one thread of a 2.3 GHz Xeon with AVX-512, float32, channels-last, weights not in a cache:

        channels, side, batch       library   packed   winograd
        192 -> 192, 64, 4                61       61         23
        384 -> 384, 32, 4                60       60         21
        576 -> 576, 16, 4                36       35         12
        768 -> 768,  8, 4                20       18        9.4
        768 -> 768,  8, 2                12       10        7.7
        768 -> 768,  8, 1               6.9      5.2        6.5
        512 -> 512,  8, 1               3.0      1.9       1.7
        128 -> 128,  8, 1              0.24     0.22      0.20
         64 ->  64,  8, 1              0.14     0.13      0.07
        256 -> 256,  4, 1              0.33     0.30      0.42
         64 ->  64,  4, 1              0.05     0.11      0.05
        192 -> 192,  5, 4              0.93     0.76       0.85
         32 ->   1, 32, 1              0.21     0.20      0.13
          1 ->  32, 32, 1              0.13     0.13      0.09
          3 -> 192, 64, 1              0.93     0.59      0.95

    `winograd` is slower in three cases. With few tiles, most of the time goes into reading its weights, which
    are four times as large. With tiles less than half full, most of its products are wasted. With few input
    and many output channels, there are too few products to pay for the output transform. `packed` has an
    overhead of 0.1 ms per call. A 1x1 convolution as a matrix product takes as long as the library's, within
    10 %, and uses the same weights for every batch size. In bfloat16 without AMX, packed weights are faster
    only at batch 1.

    If something counts or traces torch's operations, `library` or `matmul` is chosen, which consist of them.

    On a GPU torch gives cuDNN a transposed copy of a one-dimensional channels-last input; a matrix product
    needs no copy.
    """
    if x.device.type == "cpu" and not has_op_observer() and _direct_is_faster(direction, x):
        return "direct"
    if (name := _fastest_on_any_device(direction)) is not None:
        return name
    if x.device.type != "cpu" or has_op_observer():
        return "library"
    if x.dtype != torch.float32 or len(direction.kernel) != 2:
        return "library"
    if direction.options.spare_memory or forms.winograd_unsupported(direction, x) is not None:
        return "packed"
    n, _, height, width = x.shape
    tiles = n * -(-height // 4) * -(-width // 4)
    weights = direction.in_channels * direction.out_channels
    enough_tiles = tiles >= 8 or weights <= (2**18 if tiles >= 4 else 2**12)
    enough_channels = direction.in_channels >= 8 or direction.out_channels <= 64
    winograd_pays = enough_tiles and enough_channels and n * height * width >= 8 * tiles
    return "winograd" if winograd_pays and uses_vector_loops() else "packed"


def _fastest_on_any_device(direction: Direction) -> str | None:
    """Return the implementation that is the fastest for a direction on every device; None if none is."""
    return "matmul" if forms.matmul_unsupported(direction) is None else None


def _direct_is_faster(direction: Direction, x: Tensor) -> bool:
    """Tell whether the direct convolution is faster than the library's: with AMX, except for few inputs."""
    supported = forms.direct_unsupported(direction, x) is None
    return direction.in_channels >= 16 and native.uses_amx() and supported


@constant_while_tracing
@functools.cache
def uses_vector_loops() -> bool:
    """Tell whether the compiled loops use vectors; without them, loops take 560 ms, the library 510."""
    return native.reason_missing() is None and native.ops().cpu_instruction_set() != "generic"


def _choose(direction: Direction, x: Tensor) -> Implementation:
    """Return the implementation for a call, of `conv_int8` or of `conv`."""
    if not direction.options.int8:
        return TABLE.choose(direction.impl, direction, x)
    use_int8 = (
        forms.int8_unsupported_direction(direction) is None
        and not has_op_observer()
        and forms.reason_torch_conv_only() is None
    )
    return INT8.choose(direction.impl, direction, x) if use_int8 else TABLE.choose(None, direction, x)


def _choose_cached(direction: Direction, x: Tensor, residual: Tensor | None) -> Implementation:
    """Return the implementation for a call. Check and choose once for each kind of input."""
    # The key below doesn't include transforms and traces.
    if torch.compiler.is_compiling() or forms.reason_torch_conv_only() or has_op_observer():
        _check(direction, x, residual)
        return _choose(direction, x)
    residual_key = None if residual is None else (residual.shape, residual.dtype, residual.device)
    key = (x.shape, x.dtype, x.device, residual_key, impl_setting())
    cached = direction.choices.get(key)
    if cached is None:
        _check(direction, x, residual)
        with record_choices() as choices:
            entry = _choose(direction, x)
        direction.choices[key] = entry, choices[0]
        return entry
    entry, choice = cached
    if choices_are_recorded():
        report_choice(choice)
    return entry


def _run(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _choose_cached(direction, x, residual).forward(direction, x, bias, residual)


def _with_autograd(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `run`, which torch can't differentiate, in `ConvFn` where a gradient or a trace is recorded."""

    def forward(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return ConvFn.apply(x, bias, residual, direction.key)
        if needs_autograd(x, residual):
            return apply_autograd(ConvFn, x, bias, residual, direction)
        return run(direction, x, bias, residual)

    return forward


def _reference(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    weight = direction.weight().to(direction.dtype)
    return conv_ref(x, weight, bias, residual, stride=direction.stride, padding=direction.padding)


def _reference_int8(direction: Direction, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return conv_int8_ref(x, direction.weight(), bias, residual)


# "library" serves every call, so the entries after it run only if named, or if `find_fastest` returns them.
TABLE = OpTable(
    "conv",
    [
        Implementation(
            "packed", _with_autograd(forms.run_packed), forms.packed_missing, forms.packed_unsupported
        ),
        Implementation("library", forms.run_library),
        Implementation(
            "winograd", _with_autograd(forms.run_winograd), native.reason_missing, forms.winograd_unsupported
        ),
        Implementation(
            "direct", _with_autograd(forms.run_direct), native.reason_missing, forms.direct_unsupported
        ),
        Implementation("matmul", forms.run_matmul, reason_unsupported=forms.matmul_unsupported),
        Implementation("reference", _reference),
    ],
    prefer=find_fastest,
)
INT8 = OpTable(
    "conv_int8",
    [
        Implementation("cpp", _with_autograd(forms.run_int8), native.reason_missing, forms.int8_unsupported),
        Implementation("reference", _with_autograd(_reference_int8)),
    ],
)
