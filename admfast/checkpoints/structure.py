"""Derive the configuration of an ADM network from its keys and shapes, as far as they show it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from admfast.checkpoints.differences import Shapes
from admfast.errors import CheckpointError

_CHILD = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Structure:
    """Facts about a network that its shapes show, and the choices that they leave open.

    Attributes:
        kinds: possible kinds, each with the image channels that it implies; one, or unet and upsampler.
        fields: configuration fields that are certain.
        layouts: possible (levels, residual blocks per level); more than one only for some classifiers.
        attention_widths: widths of the levels with attention, including the middle block.
        pool_side: side of an attention pool in positions; None without one.
        blocks: the blocks of the down path.
    """

    kinds: dict[str, int]
    fields: dict[str, Any]
    layouts: tuple[tuple[int, int], ...]
    attention_widths: tuple[int, ...]
    pool_side: int | None = None
    blocks: tuple[_Block, ...] = field(default=(), repr=False)

    def fields_of_layout(self, layout: tuple[int, int]) -> dict[str, Any]:
        """Return the fields that follow from (levels, residual blocks per level)."""
        levels, count = layout
        firsts = [self.blocks[1 + level * (count + 1)] for level in range(levels)]
        base = self.fields["model_channels"]
        fields: dict[str, Any] = {
            "num_res_blocks": count,
            "channel_mult": tuple(_multiplier(block.width, base) for block in firsts),
            "attention_resolutions": tuple(2**i for i, block in enumerate(firsts) if block.attention),
        }
        if self.pool_side is not None:
            fields["image_size"] = self.pool_side * 2 ** (levels - 1)
        fields["resblock_updown"] = levels > 1 and self.blocks[count + 1].residual
        return fields


@dataclass(frozen=True)
class _Block:
    """Block of the down path: a residual block (with or without attention) or a downsampling layer."""

    residual: bool = False
    width: int = 0
    widened: bool = False
    attention: bool = False
    convolution: bool = False


def read_structure(shapes: Shapes) -> Structure:
    """Return the structure of an ADM network, as far as its keys and shapes show it.

    Raises:
        CheckpointError: if they are not those of an ADM network; one line that says why.
    """
    try:
        return _read(shapes)
    except (KeyError, IndexError) as error:
        # With damaged shapes, any look-up in `_read` can fail; all failures mean the same.
        raise CheckpointError(f"not an ADM network: a tensor is missing or of low rank ({error})") from None


def _read(shapes: Shapes) -> Structure:
    """Do the work of `read_structure`, without handling damaged shapes."""
    base = _base_width(shapes)
    stem = shapes.get("input_blocks.0.0.weight")
    if stem is None or not 3 <= len(stem) <= 5:
        raise CheckpointError("not an ADM network: input_blocks.0.0.weight, the stem, is missing")
    blocks = _down_blocks(shapes, stem[0])
    fields: dict[str, Any] = {"model_channels": base, "dims": len(stem) - 2}
    fields["use_scale_shift_norm"] = _uses_scale_shift(shapes)
    fields["conv_resample"] = all(block.residual or block.convolution for block in blocks[1:])
    if any(key.startswith("output_blocks.") for key in shapes):
        kinds, pool_side = _read_unet_head(shapes, stem[1], fields), None
        layouts: tuple[tuple[int, int], ...] = (_read_unet_layout(shapes, blocks),)
    else:
        kinds, layouts = {"classifier": stem[1]}, _possible_layouts(blocks)
        pool_side = _read_pool(shapes, fields)
    if not layouts or not all(_is_consistent(blocks, *layout) for layout in layouts):
        raise CheckpointError(f"not an ADM network: its {len(blocks)} input blocks form no regular levels")
    attention_widths = {block.width for block in blocks if block.attention} | {blocks[-1].width}
    return Structure(kinds, fields, layouts, tuple(sorted(attention_widths)), pool_side, tuple(blocks))


def _base_width(shapes: Shapes) -> int:
    """Return the base width, which the timestep embedding of every ADM network shows."""
    shape = shapes.get("time_embed.0.weight")
    if shape is not None and len(shape) == 2 and shape[0] == 4 * shape[1]:
        return shape[1]
    for key in shapes:
        prefix = key.removesuffix("time_embed.0.weight")
        if prefix not in (key, "") and all(other.startswith(prefix) for other in shapes):
            raise CheckpointError(
                f"not a plain state dict: every key begins with {prefix!r}; save it without this prefix"
            )
    if "time_embedding.linear_1.weight" in shapes:
        raise CheckpointError(
            "not in the published format: these are the keys of a diffusers UNet2DModel, "
            "which admfast export writes but admfast does not read"
        )
    first = ", ".join(list(shapes)[:3])
    raise CheckpointError(f"not an ADM network: no time_embed.0.weight [4M, M] among its keys ({first}, ...)")


def _group_children(shapes: Shapes, path: str) -> dict[int, dict[int, dict[str, tuple[int, ...]]]]:
    """Return {block: {child: {rest of the key: shape}}} of input_blocks or output_blocks."""
    children: dict[int, dict[int, dict[str, tuple[int, ...]]]] = {}
    for key, shape in shapes.items():
        match = _CHILD.fullmatch(key)
        if match and match[1] == path:
            children.setdefault(int(match[2]), {}).setdefault(int(match[3]), {})[match[4]] = shape
    return children


def _down_blocks(shapes: Shapes, stem_width: int) -> list[_Block]:
    """Return the input blocks. A block without parameters (average pooling) shows as a gap in the numbers."""
    children = _group_children(shapes, "input_blocks")
    blocks = [_Block(width=stem_width)]
    for index in range(1, max(children) + 1):
        first = children.get(index, {}).get(0, {})
        width = first.get("in_layers.2.weight", (0,))[0]
        blocks.append(
            _Block(
                residual=width > 0,
                width=width or blocks[-1].width,
                widened="skip_connection.weight" in first,
                attention="norm.weight" in children.get(index, {}).get(1, {}),
                convolution="op.weight" in first,
            )
        )
    return blocks


def _uses_scale_shift(shapes: Shapes) -> bool:
    """Tell whether the embedding is projected to twice the channels: scale and shift."""
    names = ("in_layers.2.weight", "emb_layers.1.weight")
    width, projected = (shapes.get(f"input_blocks.1.0.{name}") for name in names)
    if not width or not projected or projected[0] not in (width[0], 2 * width[0]):
        raise CheckpointError(
            "not an ADM network: input_blocks.1.0 is not a residual block with an embedding"
        )
    return projected[0] == 2 * width[0]


def _read_unet_head(shapes: Shapes, stem_channels: int, fields: dict[str, Any]) -> dict[str, int]:
    """Add the fields that a UNet's last layer and classes show; return kinds with their image channels."""
    head = shapes.get("out.2.weight")
    if head is None:
        raise CheckpointError("not an ADM UNet: out.2.weight, the last convolution, is missing")
    label = shapes.get("label_emb.weight")
    fields |= {"out_channels": head[0], "num_classes": label[0] if label else None}
    kinds = {"unet": stem_channels}
    # A UNet whose input is an image and a condition can have the same channels.
    if stem_channels % 2 == 0 and head[0] in (stem_channels // 2, stem_channels):
        kinds["upsampler"] = stem_channels // 2
    return kinds


def _read_unet_layout(shapes: Shapes, blocks: list[_Block]) -> tuple[int, int]:
    """Return (levels, residual blocks per level), from the upsampling layers or the gaps in the down path."""
    children = _group_children(shapes, "output_blocks")
    num_upsamplings = 0
    for layers in children.values():
        num_upsamplings += any(
            "in_layers.2.weight" in m or "conv.weight" in m for i, m in layers.items() if i > 0
        )
    levels = 1 + (num_upsamplings or sum(not block.residual for block in blocks[1:]))
    return levels, len(children) // levels - 1


def _possible_layouts(blocks: list[_Block]) -> tuple[tuple[int, int], ...]:
    """Return every (levels, residual blocks per level) that fits the down path."""
    total = len(blocks)
    num_downsamplings = sum(not block.residual for block in blocks[1:])
    levels = [1 + num_downsamplings] if num_downsamplings else range(1, total + 1)
    layouts = [(n, total // n - 1) for n in levels if total % n == 0 and total // n > 1]
    return tuple(layout for layout in layouts if _is_consistent(blocks, *layout))


def _is_consistent(blocks: list[_Block], levels: int, count: int) -> bool:
    """Tell whether the blocks form levels of equal blocks, with a downsampling block between levels."""
    if count < 1 or levels * (count + 1) != len(blocks):
        return False
    for level in range(levels):
        start = 1 + level * (count + 1)
        body = blocks[start : start + count]
        before = blocks[start - 1].width
        if any(not b.residual or b.width != body[0].width or b.attention != body[0].attention for b in body):
            return False
        if any(b.widened != (i == 0 and b.width != before) for i, b in enumerate(body)):
            return False
        if level + 1 < levels:
            down = blocks[start + count]
            if down.attention or down.widened or down.width != body[0].width:
                return False
    return True


def _read_pool(shapes: Shapes, fields: dict[str, Any]) -> int | None:
    """Add the fields of a classifier's pool and classes; return the side of an attention pool, or None."""
    positions = shapes.get("out.2.positional_embedding")
    if positions is not None:
        side = math.isqrt(max(positions[1] - 1, 0))
        fields |= {"pool": "attention", "out_channels": shapes["out.2.c_proj.weight"][0]}
        return side
    for pool, last, first in (
        ("adaptive", "out.3.weight", 1),
        ("spatial", "out.2.weight", 2),
        ("spatial_v2", "out.3.weight", 2),
    ):
        if last in shapes and len(shapes.get("out.0.weight", ())) == first:
            fields |= {"pool": pool, "out_channels": shapes[last][0]}
            return None
    raise CheckpointError("not an ADM classifier: its keys under 'out.' are none of the four published pools")


def _multiplier(width: int, base: int) -> float:
    """Return the multiplier m with int(m * base) == width; an int if possible."""
    if width % base == 0:
        return width // base
    multiplier = width / base
    return multiplier if int(multiplier * base) == width else math.nextafter(multiplier, math.inf)


def describe_structure(structure: Structure) -> str:
    """Return a short description of the network that was recognised, for error messages."""
    layout = structure.fields_of_layout(structure.layouts[0])
    fields: Mapping[str, Any] = structure.fields
    levels = ",".join(f"{mult:g}" for mult in layout["channel_mult"])
    kind = " or ".join(structure.kinds)
    return f"a {kind} with {fields['model_channels']} base channels x ({levels})"
