"""GroupNorm with affine, optional adaptive scale and shift, optional SiLU and optional resampling, as one op.

Every normalisation of an ADM network is one call of `group_norm_silu`. In the up path the skip connection is
passed as a second source, so an implementation need not write the concatenation to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.ops import launchers, native
from admfast.ops.dispatch import Implementation, OpTable
from admfast.ops.norm import cpp, triton
from admfast.ops.norm.grad import RAW_NORMS, GroupNormSiluFn, NormOptions, RawNorm, Resample, apply_resample
from admfast.ops.resample import avg_pool_down, check_resample, nearest_up
from admfast.ops.transforms import apply_autograd, needs_autograd, reason_torch_ops_only


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    resample: Resample = None,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    with_skip: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """Compute `group_norm_silu` in plain PyTorch, in float32, or in float64 for float64 input."""
    source = x if x2 is None else torch.cat([x, x2], dim=1)
    wide = torch.promote_types(source.dtype, torch.float32)
    # The published layer rounds to the input's dtype between norm, affine, SiLU and averaging; here only the
    # result is rounded. The input is made contiguous because torch's channels_last kernel on the CPU computes
    # the variance as E[x^2] - E[x]^2: at mean 100 and deviation 1 its float32 result is off by 4e-3.
    # torch.group_norm is used because F.group_norm rejects groups of one value in a batch of one.
    spatial = (...,) + (None,) * (x.dim() - 2)
    biased = source.to(wide) if x_bias is None else source + x_bias.to(wide)[spatial]
    y = torch.group_norm(biased.contiguous(), groups, weight.to(wide), bias.to(wide), eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(wide)[spatial]) + shift.to(wide)[spatial]
    if silu:
        y = F.silu(y)
    if resample == "down":
        y = avg_pool_down(y)
    y = y.to(_wider_dtype(source, dtype), memory_format=_memory_format(source))
    y = nearest_up(y) if resample == "up" else y
    return (y, apply_resample(source, resample)) if with_skip else y


def _wider_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the wider of two dtypes, x's and another, or x's for None."""
    return x.dtype if dtype is None else torch.promote_types(x.dtype, dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the channels_last format if `x` has it, else contiguous; vmap can't tell and gets contiguous."""
    if torch._C._functorch.is_batchedtensor(x):
        return torch.contiguous_format
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim(), torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    resample: Resample = None,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    with_skip: bool = False,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Any:
    """Compute `y = act(GN(x + x_bias) * (1 + scale) + shift)`, optionally resampled by two.

    `GN(x) = (x - mean) / sqrt(var + eps) * weight + bias`, with mean and var over each of `groups` groups of
    channels and all positions; `act(u)` is `u * sigmoid(u)` with `silu`, else `u`. Source: Wu & He 2018 for
    GN, Dhariwal & Nichol 2021 (section 3.1, adaptive group normalisation) for the order of scale, shift and
    SiLU.

    Args:
        x: [N, C1, *spatial], float16, bfloat16, float32 or float64, one to three spatial dimensions.
        weight, bias: [C] with C = C1 + C2; any floating dtype.
        groups: number of groups G; must divide C.
        eps: added to the variance (biased); finite, 0 or more.
        scale, shift: [N, C], both or neither.
        silu: apply SiLU.
        resample: None, "up" (nearest, 2x) or "down" (mean over blocks of 2; the last of an odd size is
            dropped). It is applied to the activated output, in every spatial dimension except the first of
            three.
        x2: [N, C2, *spatial], a second source whose channels follow those of `x`.
        x_bias: [C] or [N, C], added to the input first: the bias of the convolution that made it.
        with_skip: return `(y, skip)`, where skip is the input `[x, x2]` itself, resampled in the same way. It
            excludes x_bias.
        dtype: y is in the wider of this dtype and x's; None: in x's.
        impl: name of an implementation (see `admfast info`); None: chosen automatically.

    Returns:
        y [N, C, *resampled], channels_last if `x` (and `x2`) is. With `with_skip`, `(y, skip)`;
        skip has the shape of y and the dtype of x.

    Raises:
        InvalidArgument: for shapes that don't fit, `groups` that doesn't divide C, a tensor that isn't
            floating or is on another device than x, or a dimension of size 1 that would be halved.
        Unavailable: for a named implementation that can't serve the call.

    Accumulates in float32 (float64 for float64 input). Twice differentiable in x, x2, weight, bias, scale,
    shift and x_bias; in forward mode only with `reference`.
    """
    options: dict[str, Any] = dict(scale=scale, shift=shift, silu=silu, resample=resample, x2=x2)
    options |= dict(x_bias=x_bias, dtype=dtype)
    _check(x, weight, bias, groups, eps, options)
    if x_bias is not None and with_skip:
        raise invalid("x_bias", tuple(x_bias.shape), "None with with_skip")
    if dtype is not None:
        options["dtype"] = _wider_dtype(x, dtype)
    entry = TABLE.choose(impl, x, weight, bias, groups, eps, **options)
    return entry.forward(x, weight, bias, groups, eps, **options, with_skip=with_skip)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, options: dict[str, Any]) -> None:
    """Reject arguments that no implementation could compute."""
    scale, shift, x2, resample = (options[name] for name in ("scale", "shift", "x2", "resample"))
    checks.float_tensor("x", x)
    x_bias, dtype = options["x_bias"], options["dtype"]
    tensors = dict(weight=weight, bias=bias, scale=scale, shift=shift, x2=x2, x_bias=x_bias)
    for name, tensor in tensors.items():
        if tensor is not None or name in ("weight", "bias"):
            checks.float_tensor(name, tensor, x.device)
    checks.whole_number("groups", groups, 1, allow_tensor=False)
    checks.finite_float("eps", eps, least=0, allow_tensor=False)
    if not 3 <= x.dim() <= 5:
        raise invalid("x.shape", tuple(x.shape), "[N, C, *spatial] with one to three spatial dimensions")
    channels = x.shape[1]
    if x2 is not None:
        if x2.dim() != x.dim() or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            allowed = f"must equal x's {tuple(x.shape)} but for the channels"
            raise invalid("x2.shape", tuple(x2.shape), allowed)
        if x2.dtype != x.dtype:
            raise invalid("x2.dtype", x2.dtype, f"must equal x's {x.dtype}")
        channels += x2.shape[1]
    if channels % groups:
        raise invalid("groups", groups, f"must divide the {channels} channels")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise invalid(f"{name}.shape", tuple(value.shape), f"must be ({channels},)")
    if (scale is None) != (shift is None):
        raise invalid("scale, shift", (scale is not None, shift is not None), "give both or neither")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.shape != (x.shape[0], channels):
            raise invalid(f"{name}.shape", tuple(tensor.shape), f"must be {(x.shape[0], channels)}")
    if x_bias is not None and x_bias.shape not in ((channels,), (x.shape[0], channels)):
        allowed = f"must be ({channels},) or {(x.shape[0], channels)}"
        raise invalid("x_bias.shape", tuple(x_bias.shape), allowed)
    if dtype is not None and not dtype.is_floating_point:
        raise invalid("dtype", dtype, "a floating dtype")
    if resample not in (None, "up", "down"):
        raise invalid("resample", resample, "None, 'up' or 'down'")
    check_resample(x, down=resample == "down")


def _make_forward(raw_name: str, fuses: bool) -> Callable[..., Any]:
    """Return the forward of the op over the pair in RAW_NORMS called `raw_name`.

    fuses: the pair resamples, adds x_bias, writes another dtype and adds the skip's gradient; otherwise torch
    does so before and after it.
    """

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, with_skip: bool, **options: Any
    ) -> Any:
        names = ("resample", "silu", "x2", "x_bias", "dtype")
        resample, silu, x2, x_bias, dtype = (options[name] for name in names)
        sources = x, x2
        out_dtype = _wider_dtype(x, dtype)
        if x_bias is not None and (not fuses or needs_autograd(x_bias)):
            x, x2, x_bias = *_add_x_bias(x, x2, x_bias), None
        if out_dtype != x.dtype and not fuses:
            x = x.to(_wider_dtype(x, out_dtype))
            x2 = None if x2 is None else x2.to(_wider_dtype(x2, out_dtype))
        raw_resample = resample if fuses else None
        tensors = (x, x2, weight, bias, options["scale"], options["shift"])
        with_autograd = needs_autograd(*tensors)
        # Without resampling the skip is x itself, and only its gradient is added in the norm's backward pass.
        raw_skip = with_skip and (raw_resample is not None or (fuses and with_autograd and x2 is None))
        raw_dtype = out_dtype if fuses and out_dtype != x.dtype else None
        norm_options = NormOptions(groups, eps, silu, raw_resample, raw_skip, raw_dtype)
        if with_autograd:
            y, skip, *_ = apply_autograd(GroupNormSiluFn, *tensors, x_bias, raw_name, norm_options)
        else:
            y, skip, *_ = RAW_NORMS[raw_name].forward(*tensors[:2], x_bias, *tensors[2:], norm_options)
        y = apply_resample(y.to(out_dtype), None if fuses else resample)
        if not with_skip:
            return y
        if not raw_skip:
            skip = apply_resample(sources[0] if x2 is None else torch.cat(sources, dim=1), resample)
        return y, skip

    return forward


def _add_x_bias(x: Tensor, x2: Tensor | None, x_bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return both sources with the bias of their channels added, in float32 at least."""
    spatial_bias = x_bias[(...,) + (None,) * (x.dim() - 2)].to(_wider_dtype(x, torch.float32))
    if x2 is None:
        return x + spatial_bias, None
    first, second = spatial_bias.split([x.shape[1], x2.shape[1]], dim=-1 - (x.dim() - 2))
    return x + first, x2 + second


def _reason_torch_ops_only(*arguments: Any, **options: Any) -> str | None:
    return reason_torch_ops_only(*(t for t in (*arguments, *options.values()) if isinstance(t, Tensor)))


def _cpp_unsupported(x: Tensor, *arguments: Any, **options: Any) -> str | None:
    return cpp.reason_unsupported(x) or _reason_torch_ops_only(x, *arguments, **options)


def _triton_unsupported(x: Tensor, *arguments: Any, **options: Any) -> str | None:
    reason = _reason_torch_ops_only(x, *arguments, **options)
    return reason or triton.reason_unsupported(x, options.get("x2"))


RAW_NORMS["cpp"] = RawNorm("cpp", cpp.forward, cpp.backward)
RAW_NORMS["triton"] = RawNorm("triton", triton.forward, triton.backward)

TABLE = OpTable(
    "group_norm_silu",
    [
        Implementation(
            "triton",
            _make_forward("triton", True),
            triton.reason_missing,
            _triton_unsupported,
            reason_named_only=launchers.reason_named_only,
        ),
        Implementation("cpp", _make_forward("cpp", False), native.reason_missing, _cpp_unsupported),
        Implementation("reference", group_norm_silu_ref),
    ],
)
