"""The Triton implementation of `group_norm_silu`: when it can run, and its raw ops.

`admfast_triton::group_norm_silu_fwd` and `_bwd` are opaque to tracers: each has a fake, and no autograd of
its own. If nothing traces, the launchers are called directly, because a call through the dispatcher takes the
host longer than the small kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops import channel_sums, launchers
from admfast.ops.layout import empty_channels_last, is_channels_last
from admfast.ops.native import unused_namespace
from admfast.ops.transforms import constant_while_tracing, is_intercepted


@constant_while_tracing
@functools.cache
def reason_missing() -> str | None:
    """Return None if the kernels can run on some device, else the reason."""
    reason = launchers.reason_missing()
    if reason is None:
        _register()
    return reason


def reason_unsupported(x: Tensor, x2: Tensor | None) -> str | None:
    """Return None if the kernels can read the sources, else the reason."""
    device = "cpu" if launchers.uses_interpreter() else "cuda"
    if x.device.type != device:
        return f"x is on {x.device.type}, this runs on {device}"
    if x.dtype not in launchers.DTYPES:
        return f"x is {x.dtype}; float32, float16 or bfloat16"
    for name, source in (("x", x), ("x2", x2)):
        if source is not None and not is_channels_last(source):
            return f"{name} is not dense channels-last"
    return None


def forward(
    x: Tensor, x2: Tensor | None, x_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the raw forward (see `RawNorm`)."""
    *affine, options = rest
    modes = (options.groups, options.eps, options.silu, options.resample)
    with_skip = options.skip and options.resample is not None
    if is_intercepted(x):
        op = _OPS[0].group_norm_silu_fwd
        y, skip, mean, rstd = op(x, x2, x_bias, *affine, *modes, with_skip, options.dtype)
    else:
        attached = [channel_sums.find_attached(s) for s in (x, x2) if s is not None and x_bias is None]
        sums = tuple(attached) if all(statistics is not None for statistics in attached) else ()
        y, skip, mean, rstd = _launchers()[0](x, x2, x_bias, *affine, *modes, with_skip, options.dtype, sums)
    return y, x.view_as(x) if options.skip and not with_skip else skip, mean, rstd


def backward(
    dy: Tensor, dskip: Tensor | None, x: Tensor, x2: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run the raw backward (see `RawNorm`)."""
    *tensors, options, sums = rest
    if is_intercepted(x):
        modes = (options.silu, options.resample, sums)
        op = _OPS[0].group_norm_silu_bwd
        dx, dx2, s1, s2 = op(dy, dskip, x, x2, *tensors, *modes)
        return dx, None if x2 is None else dx2, s1, s2
    return _launchers()[1](dy, dskip, x, x2, *tensors, options.silu, options.resample, sums)


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the raw launchers, forward and backward; this imports triton."""
    names = {"group_norm": "group_norm_silu_fwd", "group_norm_bwd": "group_norm_silu_bwd"}
    forward, backward = (launchers.launcher(file, name) for file, name in names.items())
    return forward, backward


_LIBRARIES: list[torch.library.Library] = []  # an op lives as long as its library
_OPS: list[Any] = []  # the namespace of these ops


def _register() -> None:
    """Register the raw ops, with the launchers as implementations and fakes for tracers."""
    namespace = unused_namespace("admfast_triton", "group_norm_silu_fwd")
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    _OPS.append(getattr(torch.ops, namespace))
    affine = "Tensor? x_bias, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift"
    library.define(
        f"group_norm_silu_fwd(Tensor x, Tensor? x2, {affine}, int groups, float eps, bool silu, "
        "str? resample, bool skip, ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        f"group_norm_silu_bwd(Tensor dy, Tensor? dskip, Tensor x, Tensor? x2, {affine}, Tensor mean, "
        "Tensor rstd, bool silu, str? resample, bool sums) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    dispatch_key = "CompositeExplicitAutograd"
    library.impl("group_norm_silu_fwd", lambda *arguments: _launchers()[0](*arguments), dispatch_key)
    library.impl("group_norm_silu_bwd", _bwd, dispatch_key)
    torch.library.register_fake(f"{namespace}::group_norm_silu_fwd", _fwd_fake, lib=library)
    torch.library.register_fake(f"{namespace}::group_norm_silu_bwd", _bwd_fake, lib=library)


def _bwd(*arguments: Any) -> tuple[Tensor, ...]:
    dx, dx2, s1, s2 = _launchers()[1](*arguments)
    return dx, dx.new_empty(0) if dx2 is None else dx2, s1, s2


def _fwd_fake(x: Tensor, x2: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    groups, _eps, _silu, resample, skip, dtype = rest[-6:]
    num_unresampled = x.dim() - min(x.dim() - 2, 2)
    shape = [x.shape[0], x.shape[1] + (0 if x2 is None else x2.shape[1]), *x.shape[2:num_unresampled]]
    for size in x.shape[num_unresampled:]:
        shape.append(size if resample is None else 2 * size if resample == "up" else size // 2)
    mean, rstd = (
        x.new_empty(sizes, dtype=torch.float32) for sizes in ([2, x.shape[0], groups], [x.shape[0], groups])
    )
    skip_output = empty_channels_last(shape, x) if skip else x.new_empty(0)
    y = empty_channels_last(shape, x if dtype is None else x.new_empty(0, dtype=dtype))
    return y, skip_output, mean, rstd


def _bwd_fake(
    dy: Tensor, _dskip: Tensor | None, x: Tensor, x2: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    sums = [x.shape[0], dy.shape[1]] if rest[-1] else [0]
    s1, s2 = (x.new_empty(sums, dtype=torch.float32) for _ in range(2))
    dx2 = x.new_empty(0) if x2 is None else empty_channels_last(x2.shape, x)
    return empty_channels_last(x.shape, x), dx2, s1, s2
