"""Recognise and convert the blocks of EDM's networks (Karras et al. 2022), which deepinv also uses.

EDM builds ADM, DDPM++ and NCSN++ from one block, `UNetBlock`, with a convolution class that resamples before
it convolves. Networks whose resampling filter is longer than a mean of two (NCSN++) stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate.class_conversion import convert, original_class_of
from admfast.accelerate.code_bases import CodeBase
from admfast.accelerate.code_inspection import LIBRARY_NAMES, find_class_difference
from admfast.accelerate.equivalence import Conversion, random_images, random_normal
from admfast.accelerate.layer_conversion import SelfCheckingConv, convert_norm, first_conv_class, is_norm
from admfast.models.layers import ResidualBlock
from admfast.ops.attention import attention
from admfast.ops.resample import avg_pool_down, nearest_up

CONV_NAMES = LIBRARY_NAMES | {
    *("weight", "bias", "resample_filter", "to", "dtype", "shape", "fused_resample", "up", "down"),
    *("conv2d", "conv_transpose2d", "mul", "tile", "in_channels", "out_channels", "max", "add_", "reshape"),
}
BLOCK_NAMES = LIBRARY_NAMES | {
    *("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj", "num_heads"),
    *("dropout", "training", "skip_scale", "adaptive_scale", "silu", "unsqueeze", "to", "dtype", "chunk"),
    *("addcmul", "add_", "reshape", "shape", "unbind", "transpose", "scaled_dot_product_attention"),
    *("AttentionOp", "apply", "einsum"),
}
BLOCK_SUBMODULES = {"norm0", "conv0", "affine", "norm1", "conv1"}
ATTENTION_BLOCK_SUBMODULES = BLOCK_SUBMODULES | {"norm2", "qkv", "proj"}
FILTER_LENGTH = 2  # length of the filter that resamples as ADM does


class EdmConv(SelfCheckingConv):
    """EDM's convolution, padded with zeros; it first resamples x by two if `up` or `down`."""

    follows_input_dtype = True
    stride = dilation = (1, 1)
    groups = 1
    padding_mode = "zeros"
    up: bool
    down: bool
    padding: tuple[int, int]

    def forward(self, x: Tensor, *options: Any, **keywords: Any) -> Tensor:
        if self.up:
            x = nearest_up(x)
        elif self.down:
            x = avg_pool_down(x)
        return self.convolve(x, *options, **keywords)

    def convolve(self, x: Tensor, residual: Tensor | None = None, any_order: bool = False) -> Tensor:
        """Convolve x without resampling, and add the residual."""
        folded = self.folded
        if folded is None or folded.dtype == x.dtype:
            return super().forward(x, residual, any_order=any_order)
        y = self._conv_forward(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )
        return y if residual is None else residual + y

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding)

    def has_reordered_rows(self, x: Tensor) -> bool:
        """Tell whether `convolve(x, any_order=True)` returns channels in the order of `rows`."""
        folded = self.folded
        return folded is not None and folded.dtype == x.dtype and folded.options.rows is not None


class EdmBlock(ResidualBlock):
    """EDM's `UNetBlock`: `s (x_skip + branch(x, emb))`, then `s (x + proj(attention(qkv(GN(x)))))`.

    Rows of qkv are ordered (head, channel, 3). The program's own forward runs if a part has a hook or was
    replaced.
    """

    dropout: float
    skip_scale: float
    has_skip_scale: bool  # skip_scale != 1; kept because a trace can't compare a NumPy scalar
    num_heads: int

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.must_run_layer_by_layer():
            return super().forward(x, emb)
        modules: Any = self._modules
        conv, out_conv = modules["conv0"].convolve, modules["conv1"].convolve
        x = self._forward_fused(
            x, emb, None, modules["norm0"], conv, modules["norm1"], self._dropout, out_conv
        )
        x = self._scale_output(x)
        return self._scale_output(self._add_attention(x)) if self.num_heads else x

    def _scale_output(self, x: Tensor) -> Tensor:
        return x * self.skip_scale if self.has_skip_scale else x

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _project_embedding(self, emb: Tensor) -> Tensor:
        return self._modules["affine"](emb)  # type: ignore[misc]

    def _connect_skip(self, x: Tensor, x2: Tensor | None) -> Tensor:
        skip: Any = self._modules.get("skip")
        return x if skip is None or skip.weight is None else skip.convolve(x)

    def _add_attention(self, x: Tensor) -> Tensor:
        modules: Any = self._modules
        product, h = modules["qkv"], modules["norm2"](x)
        qkv = product(h, any_order=True).flatten(2).transpose(1, 2)  # [N, S, 3C]
        if not product.has_reordered_rows(h):
            qkv = qkv.unflatten(-1, (self.num_heads, -1, 3)).movedim(-1, 2).flatten(2)
        h = attention(qkv, self.num_heads)
        return modules["proj"](h.transpose(1, 2).reshape(x.shape), x)


def _is_conv(module: Any) -> bool:
    """Tell whether a module is EDM's convolution or its resampling without weights, with the known filter."""
    if not hasattr(module, "weight") or "resample_filter" not in module._buffers:
        return False
    if module._modules or find_class_difference(original_class_of(module), CONV_NAMES):
        return False
    up, down = getattr(module, "up", None), getattr(module, "down", None)
    if not (isinstance(up, bool) and isinstance(down, bool)):
        return False
    if getattr(module, "fused_resample", False) and (up or down):
        return False
    return _filter_length(module) == (FILTER_LENGTH if up or down else 0)


def _filter_length(module: nn.Module) -> int:
    """Return the length of a convolution's resampling filter, 0 if it does not resample."""
    filters = module._buffers.get("resample_filter")
    return 0 if filters is None else filters.shape[-1]


def _candidate_conversions(block: Any) -> list[Conversion]:
    skip = block._modules.get("skip")
    parts = {name for name, part in block._modules.items() if part is not None} - {"skip"}
    heads = getattr(block, "num_heads", None)
    is_known = (
        parts == (ATTENTION_BLOCK_SUBMODULES if heads else BLOCK_SUBMODULES)
        and all(is_norm(block._modules[name]) for name in parts if name.startswith("norm"))
        and all(_is_conv(block._modules[name]) for name in parts & {"conv0", "conv1", "qkv", "proj"})
        and (skip is None or _is_conv(skip))
        and isinstance(getattr(block, "adaptive_scale", None), bool)
        and all(math.isfinite(getattr(block, name)) for name in ("dropout", "skip_scale"))
        and not block.conv1.up | block.conv1.down
    )
    return [_convert_block] if is_known else []


def _convert_block(block: Any) -> None:
    resample = "up" if block.conv0.up else "down" if block.conv0.down else None
    for name, part in block._modules.items():
        if name.startswith("norm"):
            convert_norm(part)
        elif part is not None and name not in ("affine", "qkv"):
            _convert_conv(part)
    if block.num_heads:
        rows = torch.arange(len(block.qkv.weight), device="cpu").view(block.num_heads, -1, 3)
        _convert_conv(block.qkv, rows=rows.permute(2, 0, 1).flatten().tolist())
    convert(
        block, EdmBlock, resample=resample, use_scale_shift_norm=block.adaptive_scale,
        has_skip_scale=bool(block.skip_scale != 1), _part_types=None,
    )  # fmt: skip
    block._record_part_types()


def _convert_conv(conv: Any, ours: type[nn.Module] = EdmConv, **attributes: Any) -> None:
    """Convert a convolution; leave one without weights, which only resamples, as it is."""
    if conv.weight is not None:
        sides = conv.weight.shape[2:]
        convert(conv, ours, padding=tuple(side // 2 for side in sides), **attributes)


def _trial_inputs(block: Any, count: int, side: int) -> list[Tensor]:
    """Return images and an embedding."""
    device = block.norm0.weight.device
    x = random_images(count, len(block.norm0.weight), 2, side)
    return [x.to(device), random_normal(count, block.affine.weight.shape[1], seed=2).to(device)]


def _list_blocks(net: Any) -> list[nn.Module]:
    """Return the blocks: unlike single layers, they have submodules."""
    return [block for blocks in (net.enc, net.dec) for block in blocks.children() if [*block.children()]]


def _convert_other_layers(net: Any, _own_forward_runs: bool) -> None:
    """Convert the convolutions and norms of EDM's own classes that are in no block: first and last layers."""
    first = next(iter(net.enc.children()))
    single = [layer for layers in (net.enc, net.dec, net) for layer in layers.children()]
    for layer in single:
        if "resample_filter" in layer._buffers and _is_conv(layer):
            _convert_conv(layer, first_conv_class(EdmConv) if layer is first else EdmConv)
        elif "num_groups" in vars(layer) and is_norm(layer):
            convert_norm(layer)


def _find_refusal(net: nn.Module) -> str | None:
    longest = max(map(_filter_length, net.modules()))
    return (
        f"it resamples by a filter of {longest} taps, not {FILTER_LENGTH}"
        if longest > FILTER_LENGTH
        else None
    )


EDM = CodeBase(
    name="EDM",
    submodules=("map_noise", "map_layer0", "map_layer1", "enc", "dec"),
    constructor_names=frozenset({"map_noise", "map_layer0", "enc", "dec"}),
    torso=("enc", "dec"),
    candidate_conversions=_candidate_conversions,
    find_difference=lambda block: find_class_difference(original_class_of(block), BLOCK_NAMES),
    trial_inputs=_trial_inputs,
    list_blocks=_list_blocks,
    convert_other_layers=_convert_other_layers,
    find_refusal=_find_refusal,
)
