"""Cases of the convolutions and of the kernel after them: examples, small cases, the networks' shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops import launchers
from admfast.ops.cases import Case, Draw, OpCases
from admfast.ops.conv import FoldedConv, conv
from admfast.ops.layout import channels_last

ODD: Case = dict(n=2, c_in=20, c_out=40, spatial=(9, 7), bias=True, residual=True)
SMALL = (
    ODD,
    ODD | dict(bias=False, residual=False, layout="contiguous"),
    dict(n=1, c_in=3, c_out=5, spatial=(6, 6), kernel=1, bias=True),
    dict(n=3, c_in=33, c_out=6, spatial=(5, 4), residual=True),
)
# Full and partly filled blocks; a bias that is read in vectors, and element by element.
EPILOGUE_CASES: tuple[Case, ...] = (
    dict(n=2, channels=16, spatial=(16, 8)),
    dict(n=1, channels=65, spatial=(7, 5)),
    dict(n=3, channels=6, spatial=(19, 23), residual=False),
    dict(n=1, channels=3, spatial=(2, 5, 3), bias=False),
    dict(n=2, channels=96, spatial=(13, 11)),
)
# For each model: the operations of its forward for one image (1e9), then its six most expensive 3x3 and two
# most expensive 1x1 shapes (three and one for the classifiers). A shape is written
# "channels in > channels out @ side * count"; it has stride 1, padding (kernel - 1) / 2 and a square input.
# The query-key-value projections of attention are listed as 1x1 convolutions over side * side tokens.
_NETWORKS = """
unet64 219.356 3x3 192>192@64*10 384>384@32*9 384>384@64*2 384>192@64*3 576>576@16*9 576>576@32*2
  1x1 384>1152@32*7 576>1728@16*7
unet128 613.856 3x3 256>256@128*9 512>256@128*3 256>256@64*9 512>512@64*2 512>512@32*6 768>768@32*2
  1x1 512>256@128*3 512>1536@32*5
unet256 2239.666 3x3 256>256@256*9 512>256@256*3 256>256@128*9 512>512@64*8 512>512@128*2 1024>512@64*2
  1x1 512>256@256*3 1024>512@64*2
unet512 3964.670 3x3 256>256@256*8 256>256@512*2 128>128@512*7 512>256@256*2 256>128@512*2 384>128@512*1
  1x1 512>256@256*2 256>128@512*2
up64_256 1263.285 3x3 192>192@256*9 384>192@256*3 192>192@128*9 384>384@64*8 384>384@128*2 768>384@64*2
  1x1 384>192@256*3 768>384@64*2
up128_512 5009.570 3x3 192>192@512*9 384>192@512*3 192>192@256*9 384>384@128*8 384>384@256*2 768>384@128*2
  1x1 384>192@512*3 768>384@128*2
clf64 38.158 3x3 128>128@64*8 256>256@32*7 384>384@16*7
1x1 256>768@32*4
clf128 42.081 3x3 128>128@128*4 128>128@64*6 256>256@32*3
1x1 256>768@32*2
clf256 146.697 3x3 128>128@256*4 128>128@128*6 256>256@64*3
1x1 256>768@32*2
clf512 225.534 3x3 64>64@512*4 128>128@256*3 128>128@128*6
1x1 64>128@256*1
"""


def _shapes() -> list[tuple[str, int, int, int, int, float]]:
    shapes, model, total, kernel = [], "", 0.0, 3
    for word in _NETWORKS.split():
        if word in ("3x3", "1x1"):
            kernel = int(word[0])
        elif "@" in word:
            *sizes, count = map(int, word.translate(str.maketrans(">@*", "   ")).split())
            c_in, c_out, side = sizes
            operations = 2 * c_in * c_out * kernel**2 * side**2
            shapes.append((model, kernel, c_in, c_out, side, round(count * operations / total / 1e7, 2)))
        elif word[0].isalpha():
            model = word
        else:
            total = float(word)
    return shapes


# (model, kernel, channels in, channels out, side, share of the model's operations in percent)
SHAPES = _shapes()
REAL: dict[str, Case] = {
    f"{model} {k}x{k} {c_in}>{c_out}@{side}": dict(
        c_in=c_in, c_out=c_out, spatial=(side, side), kernel=k, bias=True
    )
    for model, k, c_in, c_out, side, _ in SHAPES
}


def arguments(
    draw: Draw,
    dtype: torch.dtype,
    *,
    n: int = 2,
    c_in: int = 64,
    c_out: int = 64,
    spatial: tuple[int, ...] = (8, 8),
    kernel: int = 3,
    bias: bool = False,
    residual: bool = False,
    layout: str = "channels_last",
) -> dict[str, Any]:
    """Make the arguments of a convolution of stride 1 that keeps its input's size."""
    weight = draw(c_out, c_in, *[kernel] * len(spatial)) / (c_in * kernel ** len(spatial)) ** 0.5
    call: dict[str, Any] = {"x": draw(n, c_in, *spatial).to(dtype), "weight": weight.to(dtype)}
    if bias:
        call["bias"] = draw(c_out).to(dtype)
    if residual:
        call["residual"] = draw(n, c_out, *spatial).to(dtype)
    if layout == "channels_last":
        call |= {name: channels_last(t) for name, t in call.items() if name in ("x", "residual")}
    return call | dict(padding=kernel // 2)


def run_folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    padding: int = 0,
    impl: str | None = None,
    **options: Any,
) -> Tensor:
    """Convolve with a `FoldedConv` made for this call."""
    return FoldedConv(weight, bias, padding=padding, impl=impl, **options)(x, residual)


def run_epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, impl: str) -> Tensor:
    """Add bias and residual to `y`; the kernel does so in place."""
    if impl != "reference":
        summed: Tensor = launchers.launcher("conv_epilogue", "conv_epilogue_sums_fwd")(y, bias, residual)[0]
        return summed
    result = y if bias is None else y + bias.view(-1, *(1,) * (y.dim() - 2))
    return result if residual is None else result + residual


def epilogue_arguments(
    draw: Draw,
    dtype: torch.dtype,
    *,
    n: int = 1,
    channels: int = 16,
    spatial: tuple[int, ...] = (4, 4),
    bias: bool = True,
    residual: bool = True,
) -> dict[str, Any]:
    """Make the output of a convolution, and the bias and residual to add to it."""
    y, other = (channels_last(draw(n, channels, *spatial).to(dtype)) for _ in range(2))
    return dict(y=y, bias=draw(channels).to(dtype) if bias else None, residual=other if residual else None)


def _epilogue_cases(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, **geometry: Any
) -> Any:
    """Return the epilogue cases of a convolution; the last adds the results of two sources."""
    if x.dim() < 4:
        return []  # in one dimension a matrix product adds bias and residual itself
    sizes = zip(
        x.shape[2:], weight.shape[2:], *(geometry[name] for name in ("stride", "padding")), strict=True
    )
    spatial = tuple((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)
    case = dict(channels=len(weight), spatial=spatial)
    return [case | dict(bias=bias is not None, residual=residual is not None), case | dict(bias=False)]


def _wrong(trainable: bool) -> list[tuple[dict[str, Any], str]]:
    """Return arguments that every implementation rejects, for weights that are trained or frozen."""
    x, weight, bias = torch.ones(2, 64, 8, 8), torch.ones(64, 64, 3, 3), torch.ones(64)
    replacements: list[tuple[dict[str, Any], str]] = [
        (dict(bias=torch.ones(1)), "bias.shape"),
        (dict(bias=torch.ones(64, 1)), "bias.shape"),
        (dict(x=x.long()), "x.dtype"),
        (dict(residual=x.double()), "residual.dtype"),
        (dict(residual=x.to("meta")), "residual.device"),
        (dict(impl="fastest"), "impl"),
    ]
    replacements += [(dict(stride=value), "stride") for value in (0, (1,))]
    replacements += [(dict(padding=value), "padding") for value in (-1, (1.5, 1), "same")]
    shapes = [(), (64,), (64, 64), (1, 1, 8, 8), (1, 64, 1, 1), (3, 64, 8, 8), (1, 1, 64, 8, 8)]
    replacements += [(dict(residual=torch.ones(shape)), "residual.shape") for shape in shapes]
    if trainable:
        replacements += [(dict(weight=value), "weight.shape") for value in (weight[:, 1:], weight[..., 0])]
        replacements += [(dict(x=torch.ones(64, 8)), "weight.shape")]
        for name, value in dict(weight=weight, bias=bias).items():
            replacements += [(dict([(name, value.double())]), f"{name}.dtype")]
            replacements += [(dict([(name, value.to("meta"))]), f"{name}.device")]
        return replacements
    replacements += [
        (dict(weight=value), "weight") for value in (weight[..., 0, 0], weight[:, :0], weight.long())
    ]
    replacements += [(dict(x=value), "x.shape") for value in (x[:, 1:], x[..., 0], torch.ones(2, 64, 8, 0))]
    replacements += [(dict(x=x.double()), "x.dtype"), (dict(dtype=torch.bfloat16), "x.dtype")]
    return [*replacements, (dict(dtype=torch.int32), "dtype"), (dict(x=x.to("meta")), "x.device")]


def _call_winograd_ops(
    call_op: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **geometry: Any,
) -> None:
    call_op("winograd_weights", weight, True)
    u = call_op("winograd_weights", weight, False)
    call_op("conv3x3_winograd", x, u, bias, residual, len(weight))
    convolution = FoldedConv(weight, bias, **geometry)
    call_op("folded_conv", x, bias, residual, convolution.directions[0].key)


def _call_tiled_op(
    name: str,
    forms: tuple[str, ...],
    call_op: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **geometry: Any,
) -> None:
    direction = FoldedConv(weight, bias, **geometry).directions[0]
    call_op(name, x, *map(direction.form, forms), bias, residual, len(weight))


_call_direct_op = functools.partial(_call_tiled_op, "conv_direct", ("direct",))
_call_int8_op = functools.partial(_call_tiled_op, "conv_int8", ("int8", "int8_scales"))


def _call_train_ops(
    call_op: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **_geometry: Any,
) -> None:
    dy = torch.ones_like(call_op("conv3x3_winograd_once", x, weight, bias, residual, False))
    call_op("conv3x3_winograd_once", dy, weight, None, None, True)
    call_op("conv3x3_winograd_weight_grad", x, dy)


def _call_epilogue_launchers(
    call_op: Callable[..., Any], y: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    call_op("conv_epilogue_fwd", y, bias, residual)
    call_op("conv_epilogue_sums_fwd", y, bias, residual)


CASES = [
    OpCases(
        "conv",
        run_folded,
        arguments,
        SMALL,
        REAL,
        functools.partial(_wrong, False),
        differentiable=("x", "residual"),
        call_raw_ops={"winograd": _call_winograd_ops, "direct": _call_direct_op},
    ),
    OpCases(
        "conv_int8",
        functools.partial(run_folded, int8=True),
        arguments,
        (ODD, SMALL[1], ODD | dict(c_in=70, spatial=(4, 16))),
        {name: case for name, case in REAL.items() if name.startswith("unet64 3x3")},
        functools.partial(_wrong, False),
        differentiable=("x", "residual"),
        call_raw_ops={"cpp": _call_int8_op},
    ),
    OpCases(
        "conv_train",
        conv,
        arguments,
        SMALL,
        wrong=functools.partial(_wrong, True),
        differentiable=("x", "weight", "bias", "residual"),
        call_raw_ops={"winograd": _call_train_ops},
    ),
    OpCases(
        "conv_epilogue",
        run_epilogue,
        epilogue_arguments,
        EPILOGUE_CASES,
        call_raw_ops={"triton": _call_epilogue_launchers},
        # As chosen; and with statistics for a norm in two passes, because nothing fits into MAX_REREAD_BYTES.
        launch_settings=({}, {"MAX_REREAD_BYTES": 0}),
        cases_from_call=_epilogue_cases,
        launched_by="conv_train",
    ),
]
