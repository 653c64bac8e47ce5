"""Recognise and convert the blocks of any copy of the published ADM code."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from torch import Tensor, nn

from admfast.accelerate.class_conversion import convert, original_class_of
from admfast.accelerate.code_bases import CodeBase
from admfast.accelerate.code_inspection import (
    ACTIVATION_NAMES,
    NORM_NAMES,
    PUBLISHED_BLOCK_NAMES,
    find_class_difference,
)
from admfast.accelerate.equivalence import TRIAL_SIZES, Conversion, is_close, random_images, random_normal
from admfast.accelerate.layer_conversion import (
    POINTWISE,
    convert_conv,
    convert_norm,
    first_conv_class,
    is_conv,
    is_norm,
    is_silu,
)
from admfast.models import layers

RES_BLOCK = ("in_layers", "h_upd", "x_upd", "emb_layers", "out_layers", "skip_connection")
ATTENTION_BLOCK = ("norm", "qkv", "attention", "proj_out")


def _candidate_conversions(block: Any) -> list[Conversion]:
    names = set(block._modules)
    if names == set(RES_BLOCK) and _is_res_block(block):
        return [_convert_res_block]
    if names == set(ATTENTION_BLOCK) and _is_attention_block(block):
        return [partial(_convert_attention_block, legacy_order=legacy) for legacy in (True, False)]
    if names in ({"conv"}, {"op"}) and getattr(block, "use_conv", None) is True:
        (conv,) = block._modules.values()
        kind = layers.Upsample if names == {"conv"} else layers.Downsample
        return [partial(_convert_resampling, kind=kind)] if is_conv(conv) else []
    return []


def _is_res_block(block: Any) -> bool:
    inside, outside, projection = (
        tuple(block._modules[n] or ()) for n in ("in_layers", "out_layers", "emb_layers")
    )
    return (
        [len(inside), len(outside), len(projection)] == [3, 4, 2]
        and is_norm(inside[0])
        and is_norm(outside[0])
        and is_conv(inside[2])
        and is_conv(outside[3])
        and all(map(is_silu, (inside[1], outside[1], projection[0])))
        and type(outside[2]) is nn.Dropout
        and isinstance(projection[1], nn.Linear)
        and projection[1].bias is not None
        and (type(block.skip_connection) is nn.Identity or is_conv(block.skip_connection))
        and isinstance(getattr(block, "use_scale_shift_norm", None), bool)
        and isinstance(getattr(block, "use_checkpoint", None), bool)
    )


def _convert_res_block(block: Any) -> None:
    resample = None
    if not isinstance(block.h_upd, nn.Identity):
        resample = "down" if hasattr(block.h_upd, "op") else "up"
    for norm in (block.in_layers[0], block.out_layers[0]):
        convert_norm(norm)
    for conv in (block.in_layers[2], block.out_layers[3], block.skip_connection):
        convert_conv(conv)
    convert(block, layers.ResBlock, resample=resample, projection=slice(0), _part_types=None)
    block._record_part_types()


def _is_attention_block(block: Any) -> bool:
    products = (block.qkv, block.proj_out)
    return (
        is_norm(block.norm)
        and all(type(product) is nn.Conv1d and product.kernel_size == (1,) for product in products)
        and isinstance(_heads(block), int)
        and isinstance(getattr(block, "use_checkpoint", None), bool)
    )


def _heads(block: Any) -> Any:
    return getattr(block.attention, "n_heads", getattr(block, "num_heads", None))


def _convert_attention_block(block: Any, legacy_order: bool) -> None:
    heads = _heads(block)
    rows = layers.legacy_row_order(block.qkv.out_channels, heads) if legacy_order else None
    convert_norm(block.norm)
    convert(block.qkv, POINTWISE, rows=rows)
    convert(block.proj_out, POINTWISE)
    convert(block.attention, layers.Attention, num_heads=heads, legacy_order=legacy_order)
    convert(block, layers.AttentionBlock, _part_types=None)
    block._record_part_types()


def _convert_resampling(block: Any, kind: type[nn.Module]) -> None:
    (conv,) = block._modules.values()
    convert_conv(conv)
    convert(block, kind)


def sequences(net: Any) -> list[nn.Module]:
    """Return the blocks of a network, each a sequence of layers; a block that is used twice appears once."""
    blocks = [*net.input_blocks, net.middle_block, *getattr(net, "output_blocks", ())]
    return list(dict.fromkeys(blocks))


def _list_blocks(net: Any) -> list[nn.Module]:
    """Return the layers of all blocks except the first."""
    stem = [*net.input_blocks[0].children()]
    return [layer for block in sequences(net) for layer in block.children() if layer not in stem]


def _convert_other_layers(net: Any, own_forward_runs: bool) -> None:
    """Convert the network's first convolution and its last layers."""
    for layer in net.input_blocks[0].children():
        convert_conv(layer, first_conv_class if own_forward_runs else None)
    _convert_head(net.out)


def _convert_head(head: nn.Module) -> None:
    """Convert the last layers if they are a norm, SiLU and at least one more layer."""
    if type(head) is nn.Sequential and len(head) > 2 and is_norm(head[0]) and is_silu(head[1]):
        convert_norm(head[0])
        for layer in head:
            convert_conv(layer)
        convert(head, layers.Head, _part_types=None)
        head._record_part_types()  # type: ignore[operator]


def is_published_sequence(sequence: nn.Module) -> bool:
    """Tell whether a sequence runs its layers in order, giving the embedding to those that take it."""
    cls: Any = original_class_of(sequence)
    if not isinstance(sequence, nn.Sequential) or cls is nn.Sequential or "forward" in vars(sequence):
        return False
    return _class_is_published_sequence(cls, cls.forward)


@functools.lru_cache(maxsize=16)
def _class_is_published_sequence(cls: Any, forward: Any) -> bool:
    """Answer `is_published_sequence` for a class with this forward; answers are cached."""
    if find_class_difference(cls, PUBLISHED_BLOCK_NAMES):
        return False
    try:
        return all(
            _gives_emb_only_to(cls, takes_emb, count)
            for takes_emb in _TRIAL_SEQUENCES
            for count, _ in TRIAL_SIZES
        )
    except Exception:  # it needs other layers than these
        return False


# Sequences to try: for each layer, whether it takes the embedding.
_TRIAL_SEQUENCES = ((True, False, True), (True,), (False, True), (True, True, False, True))


def _gives_emb_only_to(cls: Any, takes_emb: tuple[bool, ...], count: int) -> bool:
    """Tell whether a sequence of simple layers gives the expected result for `count` images."""

    class WithEmb(*bases_that_take_emb(cls)):  # type: ignore[misc]
        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return x + 2 * emb

    class WithoutEmb(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    sequence = cls.__new__(cls)
    nn.Module.__init__(sequence)
    x, emb = random_normal(count, 4, seed=1), random_normal(count, 4, seed=2)
    expected = x
    for i, layer_takes_emb in enumerate(takes_emb):
        kind = WithEmb if layer_takes_emb else WithoutEmb
        layer: Any = kind.__new__(kind)
        nn.Module.__init__(layer)
        sequence.add_module(str(i), layer)
        expected = expected + 2 * emb if layer_takes_emb else 3 * expected
    return is_close(sequence(x.clone(), emb.clone()), expected)


def bases_that_take_emb(cls: type) -> tuple[type, ...]:
    """Return the base classes of a class of sequences that torch's Sequential doesn't have; else nn.Module.

    The sequence gives the embedding to layers of these classes.
    """
    bases = [part for part in cls.__mro__[1:] if part not in nn.Sequential.__mro__]
    return tuple(bases) or (nn.Module,)


def _trial_inputs(block: Any, count: int, side: int) -> list[Tensor]:
    """Return images, and an embedding if the block takes one."""
    device = next(block.parameters()).device
    if set(block._modules) == set(RES_BLOCK):
        conv, width = block.in_layers[2], block.emb_layers[1].in_features
        x = random_images(count, conv.in_channels, conv.weight.dim() - 2, side)
        return [x.to(device), random_normal(count, width, seed=2).to(device)]
    weight = next(p for p in block.parameters() if p.dim() > 1)
    dims = 2 if "qkv" in block._modules else weight.dim() - 2
    return [random_images(count, weight.shape[1], dims, side).to(device)]


def _find_difference(block: nn.Module) -> str | None:
    """Say what the code of a block or of one of its parts does beyond the published code, or return None."""
    for part in block.modules():
        if reason := find_class_difference(
            original_class_of(part), PUBLISHED_BLOCK_NAMES | NORM_NAMES | ACTIVATION_NAMES
        ):
            return reason if part is block else f"its {original_class_of(part).__name__} {reason}"
    return None


PUBLISHED = CodeBase(
    name="published",
    submodules=("time_embed", "input_blocks", "middle_block", "out"),
    constructor_names=frozenset({"input_blocks", "middle_block"}),
    torso=("input_blocks", "middle_block", "output_blocks"),
    candidate_conversions=_candidate_conversions,
    find_difference=_find_difference,
    trial_inputs=_trial_inputs,
    list_blocks=_list_blocks,
    convert_other_layers=_convert_other_layers,
)
