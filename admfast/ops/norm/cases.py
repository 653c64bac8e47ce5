"""Cases of `group_norm_silu`: an example, small cases of odd sizes, and shapes of the released networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops import launchers
from admfast.ops.cases import Case, Draw, OpCases
from admfast.ops.layout import channels_last
from admfast.ops.norm import group_norm_silu

# By name, shapes with unusual groups, channels, positions or dimensions.
SHAPES: dict[str, Case] = {
    "odd": dict(n=1, c1=24, groups=8, spatial=(5, 7)),
    "one group": dict(n=2, c1=6, groups=1, spatial=(4, 5)),
    "a group a channel": dict(n=3, c1=6, groups=6, spatial=(3, 4)),
    # 4 channels per group; the second group has the last channel of x and 3 of x2
    "straddling": dict(n=2, c1=5, c2=7, groups=3, spatial=(3, 6)),
    "wide straddling": dict(n=1, c1=24, c2=12, groups=2, spatial=(6, 6)),
    "1d": dict(n=2, c1=12, groups=4, spatial=(33,)),
    "1d straddling": dict(n=1, c1=4, c2=6, groups=2, spatial=(6,)),
    "3d": dict(n=1, c1=8, groups=2, spatial=(3, 5, 4)),
    "3d odd": dict(n=2, c1=3, c2=5, groups=4, spatial=(2, 7, 3)),
    "one position": dict(n=2, c1=8, groups=2, spatial=(2, 2)),
}
# Together these have two loop trips, three chunks of positions, a group with channels of both sources, and
# odd rows that are dropped and kept.
STRADDLING: Case = dict(n=1, c1=20, c2=10, groups=5, modulated=True, with_skip=True)
SMALL = (
    dict(n=2, c1=24, groups=8, spatial=(17, 31), modulated=True, mean=100),
    STRADDLING | dict(spatial=(5, 7), resample="up"),
    STRADDLING | dict(spatial=(9, 7), resample="down"),
    dict(n=1, c1=3, groups=1, spatial=(37,), silu=False),
    dict(n=2, c1=20, groups=5, spatial=(9, 7), modulated=True, biased="channel", mean=100),
    dict(n=2, c1=20, c2=10, groups=5, spatial=(5, 7), resample="up", biased="image", out=torch.float32),
)
# Norms before a convolution, in 32 groups, as "model channels @ side".
_NETWORKS = """
unet64 192@64   unet256 256@256  unet256 512@256   unet512 128@512  unet128 256@128   unet64 384@32
unet64 576@16   unet64 768@8     unet64 576@64     unet256 512@64   unet256 1024@16   unet512 384@512
up64_256 192@256   up128_512 192@512   clf256 128@256   clf512 64@512
"""


def _real(model: str, size: str) -> tuple[str, Case]:
    channels, side = map(int, size.split("@"))
    return f"{model} {size}", dict(c1=channels, spatial=(side, side))


REAL = dict(_real(*words) for words in zip(*[iter(_NETWORKS.split())] * 2, strict=True))


def arguments(
    draw: Draw,
    dtype: torch.dtype,
    *,
    n: int = 1,
    c1: int = 256,
    c2: int = 0,
    groups: int = 32,
    spatial: tuple[int, ...] = (4, 4),
    modulated: bool = False,
    silu: bool = True,
    resample: str | None = None,
    with_skip: bool = False,
    mean: float = 0,
    biased: str | None = None,
    weights: torch.dtype | None = torch.float32,
    out: torch.dtype | None = None,
) -> dict[str, Any]:
    """Make the arguments; `weights`: dtype of weight and bias (None: that of x)."""

    def source(channels: int, deviation: float) -> Tensor:
        return channels_last((deviation * draw(n, channels, *spatial) + mean).to(dtype))

    call: dict[str, Any] = {"x": source(c1, 1)}
    if c2:
        call["x2"] = source(c2, 2)
    weight, bias = draw(2, c1 + c2)
    weights = dtype if weights is None else weights
    call |= {"weight": (1 + weight).to(weights), "bias": bias.to(weights)}
    if modulated:  # as in a network: two halves of one projection
        call["scale"], call["shift"] = draw(n, 2 * (c1 + c2)).to(weights).chunk(2, dim=1)
    if biased:
        bias_shape = (n, c1 + c2) if biased == "image" else (c1 + c2,)
        call["x_bias"] = (2 * draw(*bias_shape)).to(dtype)
    if out is not None:
        call["dtype"] = out
    return call | dict(groups=groups, silu=silu, resample=resample, with_skip=with_skip)


def wrong() -> list[tuple[dict[str, Any], str]]:
    """Return arguments that every implementation rejects."""
    x, channels, per_image = torch.ones(1, 256, 4, 4), torch.ones(256), torch.ones(1, 256)
    replacements: list[tuple[dict[str, Any], str]] = [
        (dict(weight=torch.ones(255)), "weight.shape"),
        (dict(bias=torch.ones(256, 1)), "bias.shape"),
        (dict(bias=channels.to("meta")), "bias.device"),
        (dict(weight=None), "weight"),
        (dict(scale=per_image), "scale, shift"),
        (dict(shift=per_image), "scale, shift"),
        (dict(scale=channels, shift=per_image), "scale.shape"),
        (dict(scale=per_image, shift=torch.ones(2, 256)), "shift.shape"),
        (dict(x2=x.double()), "x2.dtype"),
        (dict(x2=x), "weight.shape"),
        (dict(x=x[..., :1], resample="down"), "x.shape"),
        (dict(resample="left"), "resample"),
        (dict(x_bias=torch.ones(255)), "x_bias.shape"),
        (dict(x_bias=torch.ones(2, 256)), "x_bias.shape"),
        (dict(x_bias=channels, with_skip=True), "x_bias"),
        (dict(dtype=torch.int64), "dtype"),
    ]
    replacements += [(dict(x=value), "x.shape") for value in (x[0, 0], x[:, :, 0, 0], x[None, None])]
    replacements += [(dict(x2=value), "x2.shape") for value in (x[:, :, :3], torch.ones(2, 256, 4, 4))]
    replacements += [(dict(groups=value), "groups") for value in (0, 3, 2.0, True, None)]
    replacements += [(dict(eps=value), "eps") for value in (-1e-5, float("nan"), "1e-5")]
    for name, value in dict(x=x, x2=x, weight=channels, bias=channels).items():
        replacements += [(dict([(name, value.long())]), f"{name}.dtype"), (dict([(name, "one")]), name)]
    return replacements


def _tensors(call: dict[str, Any]) -> list[Any]:
    return [call.get(name) for name in ("x", "x2", "x_bias", "weight", "bias", "scale", "shift")]


def _call_cpp_ops(call_op: Callable[..., Any], **call: Any) -> None:
    (x, x2, _x_bias, *affine), silu = _tensors(call), call["silu"]
    tensors = x, x2, *affine
    y, mean, rstd = call_op("group_norm_silu_fwd", *tensors, call["groups"], 1e-5, silu)
    call_op("group_norm_silu_bwd", torch.ones_like(y), *tensors, mean, rstd, silu)


def _call_triton_launchers(call_op: Callable[..., Any], **call: Any) -> None:
    tensors, modes = _tensors(call), (call["silu"], call["resample"])
    with_skip = call["resample"] is not None and call.get("x_bias") is None
    forward = (*tensors, call["groups"], 1e-5, *modes, with_skip, call.get("dtype"))
    y, skip, mean, rstd = call_op("group_norm_silu_fwd", *forward)
    call_op("group_norm_silu_bwd", y, skip if with_skip else None, *tensors, mean, rstd, *modes, True)
    if call.get("x_bias") is None:
        _launch_with_sums(*forward)


def _launch_with_sums(x: Tensor, x2: Tensor | None, *rest: Any) -> None:
    """Launch the forward on statistics that the producers of both sources left, if they leave any."""
    add_with_sums = launchers.launcher("conv_epilogue", "conv_epilogue_sums_fwd")
    sums = [add_with_sums(source.clone(), None, None)[1] for source in (x, x2) if source is not None]
    if None not in sums:
        launchers.launcher("group_norm", "group_norm_silu_fwd")(x, x2, *rest, tuple(sums))


def _cases_from_call(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, **call: Any
) -> list[Case]:
    c2 = 0 if call["x2"] is None else call["x2"].shape[1]
    case = dict(c1=x.shape[1], c2=c2, groups=groups, spatial=tuple(x.shape[2:]))
    case |= dict(modulated=call["scale"] is not None, silu=call["silu"], resample=call["resample"])
    if call["x_bias"] is not None:
        case |= dict(biased="channel" if call["x_bias"].dim() == 1 else "image")
    return [case | dict(weights=weight.dtype, out=call["dtype"])]


CASES = [
    OpCases(
        "group_norm_silu",
        group_norm_silu,
        arguments,
        SMALL,
        REAL,
        wrong,
        differentiable=("x", "x2", "weight", "bias", "scale", "shift"),
        call_raw_ops={"cpp": _call_cpp_ops, "triton": _call_triton_launchers},
        # One read, as chosen; two passes, because nothing fits into MAX_REREAD_BYTES, with several tiles per
        # program.
        launch_settings=({}, {"MAX_REREAD_BYTES": 0, "apply_slots": lambda *_: 2}),
        cases_from_call=_cases_from_call,
    )
]
