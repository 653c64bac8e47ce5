"""Recognise and convert the residual blocks and the attention of diffusers' `UNet2DModel`.

Other convolutions and norms are converted in place if they are of torch's own classes. The modules that hold
them and the network's own forward are not changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate.class_conversion import convert, original_class_of
from admfast.accelerate.code_bases import CodeBase
from admfast.accelerate.code_inspection import (
    ALLOWED_NUMBERS,
    LIBRARY_NAMES,
    find_class_difference,
    find_function_difference,
)
from admfast.accelerate.equivalence import Conversion, random_images, random_normal
from admfast.accelerate.layer_conversion import (
    convert_conv,
    convert_norm,
    first_conv_class,
    is_conv,
    is_silu,
    last_conv_class,
)
from admfast.models.hooks import FusedBlock
from admfast.models.layers import ResidualBlock
from admfast.ops.attention import attention

NAMES = LIBRARY_NAMES | {
    *(
        "len",
        "get",
        "deprecate",
        "ValueError",
        "training",
        "shape",
        "contiguous",
        "chunk",
        "output_scale_factor",
    ),
    *("norm1", "conv1", "norm2", "conv2", "dropout", "nonlinearity", "conv_shortcut"),
    *("time_emb_proj", "time_embedding_norm", "skip_time_act", "upsample", "downsample"),
}
RESAMPLING_NAMES = NAMES | {
    *("channels", "norm", "permute", "use_conv", "use_conv_transpose", "conv", "name", "Conv2d_0", "padding"),
    *("interpolate", "dtype", "bfloat16", "float32", "is_torch_version", "to", "max", "zip", "numel", "pow"),
    "pad",
}
ATTENTION_NAMES = LIBRARY_NAMES | {
    *("set", "inspect", "signature", "processor", "__call__", "parameters", "keys", "items", "len", "logger"),
    *("warning", "__class__", "__name__"),
}
PROCESSOR_NAMES = LIBRARY_NAMES | {
    *("len", "get", "deprecate", "ndim", "shape", "view", "transpose", "reshape", "to", "dtype"),
    *("spatial_norm", "group_norm", "norm_cross", "norm_encoder_hidden_states", "norm_q", "norm_k"),
    *("prepare_attention_mask", "to_q", "to_k", "to_v", "to_out", "heads", "scaled_dot_product_attention"),
    *("residual_connection", "rescale_output_factor"),
}
ATTENTION_SUBMODULES = {"group_norm", "to_q", "to_k", "to_v", "to_out"}
LIMITS_FOR_OLD_TORCH = {64, 31}  # numbers in the library's workarounds for old torch: 64 images, 2**31 values
BLOCK_SUBMODULES = {"norm1", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "nonlinearity"}


class DiffusersResBlock(ResidualBlock):
    """diffusers' `ResnetBlock2D`: `(x_skip + branch(x, emb)) / output_scale_factor`.

    The library's own forward runs if a part has a hook or was replaced, or if the block is called in another
    way than the network calls it.
    """

    output_scale_factor: float
    skip_time_act: bool

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if temb is None or args or kwargs or self.must_run_layer_by_layer():
            return super().forward(input_tensor, temb, *args, **kwargs)
        modules: Any = self._modules
        norm, conv, out_norm = modules["norm1"], modules["conv1"], modules["norm2"]
        y = self._forward_fused(
            input_tensor, temb, None, norm, conv, out_norm, modules["dropout"], modules["conv2"]
        )
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    def _project_embedding(self, emb: Tensor) -> Tensor:
        return self._modules["time_emb_proj"](emb if self.skip_time_act else F.silu(emb))  # type: ignore[misc]

    def _connect_skip(self, x: Tensor, x2: Tensor | None) -> Tensor:
        shortcut: Any = self._modules.get("conv_shortcut")
        return x if shortcut is None else shortcut(x)


class DiffusersAttention(FusedBlock):
    """diffusers' `Attention` as self-attention, whose processor calls torch's fused attention.

    `(x + to_out(attention(to_q(h), to_k(h), to_v(h)))) / rescale_output_factor`, h = GN(x). The library's own
    forward runs if it is given more than x, if its processor was changed, or if a part has a hook or was
    replaced.
    """

    heads: int
    processor: Any
    known_call: Any  # the processor's code at the conversion
    rescale_output_factor: float

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states
        other_arguments = [*args, *(value for name, value in kwargs.items() if name != "temb")]
        has_other_arguments = any(value is not None for value in other_arguments) or x.dim() != 4
        if (
            has_other_arguments
            or type(self.processor).__call__ is not self.known_call
            or self.must_run_layer_by_layer()
        ):
            return super().forward(x, *args, **kwargs)
        modules: Any = self._modules
        norm = modules.get("group_norm")
        tokens = (x if norm is None else norm(x)).flatten(2).transpose(1, 2)  # [N, S, C]
        qkv = torch.cat([modules[name](tokens) for name in ("to_q", "to_k", "to_v")], dim=-1)
        product, dropout = modules["to_out"]._modules.values()
        y = dropout(product(attention(qkv, self.heads))).transpose(1, 2).reshape(x.shape)
        y = y + x
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor


def _is_norm(module: Any) -> bool:
    """Tell whether a module is torch's own GroupNorm, with weight and bias."""
    return type(module) is nn.GroupNorm and module.affine


def _resampling(block: Any) -> nn.Module | None:
    """Return the module that resamples in a block, or None."""
    return getattr(block, "upsample", None) or getattr(block, "downsample", None)


def _candidate_conversions(block: Any) -> list[Conversion]:
    if "to_q" in block._modules:
        return [_convert_attention] if _is_attention(block) else []
    return [_convert_block] if _is_block(block) else []


def _is_attention(block: Any) -> bool:
    parts = {name for name, part in block._modules.items() if part is not None}
    products = [block.to_q, block.to_k, block.to_v]
    return (
        parts | {"group_norm"} == ATTENTION_SUBMODULES
        and (block.group_norm is None or _is_norm(block.group_norm))
        and all(isinstance(product, nn.Linear) for product in products)
        and len({product.weight.shape for product in products}) == 1
        and len(block.to_out) == 2
        and type(block.to_out[1]) is nn.Dropout
        and block.residual_connection is True
    )


def _convert_attention(block: Any) -> None:
    if block.group_norm is not None:
        convert_norm(block.group_norm)
    convert(block, DiffusersAttention, known_call=type(block.processor).__call__, _part_types=None)
    block._record_part_types()


def _is_block(block: Any) -> bool:
    shortcut = block._modules.get("conv_shortcut")
    parts = {name for name, part in block._modules.items() if part is not None}
    resampling = _resampling(block)
    return (
        parts - {"conv_shortcut", "upsample", "downsample"} == BLOCK_SUBMODULES
        and all(_is_norm(norm) for norm in (block.norm1, block.norm2))
        and all(is_conv(conv) for conv in (block.conv1, block.conv2))
        and (shortcut is None or is_conv(shortcut))
        and type(block.dropout) is nn.Dropout
        and is_silu(block.nonlinearity)
        and isinstance(block.time_emb_proj, nn.Linear)
        and block.time_embedding_norm in ("default", "scale_shift")
        and isinstance(block.skip_time_act, bool)
        and (resampling is None or _is_resampling(resampling))
    )


def _is_resampling(module: Any) -> bool:
    """Tell whether a module may resample by two without a convolution; the block's trial shows if it does."""
    if not isinstance(module, nn.Module) or [*module.parameters()]:
        return False
    return (
        find_class_difference(
            original_class_of(module), RESAMPLING_NAMES, ALLOWED_NUMBERS | LIMITS_FOR_OLD_TORCH
        )
        is None
    )


def _convert_block(block: Any) -> None:
    resample = "up" if getattr(block, "upsample", None) else "down" if _resampling(block) else None
    for norm in (block.norm1, block.norm2):
        convert_norm(norm)
    for conv in (block.conv1, block.conv2, block._modules.get("conv_shortcut")):
        convert_conv(conv)
    scale_shift = block.time_embedding_norm == "scale_shift"
    convert(block, DiffusersResBlock, resample=resample, use_scale_shift_norm=scale_shift, _part_types=None)
    block._record_part_types()


def _find_difference(block: Any) -> str | None:
    """Say what the code of a block uses beyond the library's code, or return None."""
    if "to_q" not in block._modules:
        return find_class_difference(original_class_of(block), NAMES, ALLOWED_NUMBERS | LIMITS_FOR_OLD_TORCH)
    processor = type(block.processor)
    reason = find_function_difference(vars(processor).get("__call__"), PROCESSOR_NAMES)
    reason = reason and f"{processor.__name__} {reason}"
    return find_class_difference(original_class_of(block), ATTENTION_NAMES) or reason


def _trial_inputs(block: Any, count: int, side: int) -> list[Tensor]:
    """Return images, and an embedding if the block takes one."""
    if "to_q" in block._modules:
        return [random_images(count, block.to_q.in_features, 2, side).to(block.to_q.weight.device)]
    device = block.conv1.weight.device
    x = random_images(count, block.norm1.num_channels, 2, side)
    return [x.to(device), random_normal(count, block.time_emb_proj.in_features, seed=2).to(device)]


def _list_blocks(net: Any) -> list[nn.Module]:
    """Return all residual blocks and attention modules of a network."""
    named = ({"conv1", "conv2"}, {"to_q", "to_k"})
    return [module for module in net.modules() if any(names <= module._modules.keys() for names in named)]


def _convert_other_layers(net: Any, _own_forward_runs: bool) -> None:
    """Convert the convolutions and norms outside these blocks: both ends, and between levels."""
    inside = {id(part) for block in _list_blocks(net) for part in block.modules()}
    convert_conv(net.conv_in, first_conv_class)
    convert_conv(net.conv_out, last_conv_class)
    for module in [module for module in net.modules() if id(module) not in inside]:
        if _is_norm(module):
            convert_norm(module)
        else:
            convert_conv(module)


DIFFUSERS = CodeBase(
    name="diffusers",
    submodules=("conv_in", "time_embedding", "down_blocks", "up_blocks", "conv_out"),
    constructor_names=frozenset({"conv_in", "down_blocks", "up_blocks", "conv_out"}),
    torso=("down_blocks", "mid_block", "up_blocks"),
    candidate_conversions=_candidate_conversions,
    find_difference=_find_difference,
    trial_inputs=_trial_inputs,
    list_blocks=_list_blocks,
    convert_other_layers=_convert_other_layers,
)
