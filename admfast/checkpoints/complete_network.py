"""Check that keys and shapes are those of a complete ADM network."""

from __future__ import annotations

import math
from collections.abc import Iterator

from admfast.checkpoints.differences import Differences, Shape, Shapes, compare, network_shapes
from admfast.checkpoints.structure import Structure, describe_structure, read_structure
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models import config_from_dict


def check_complete(shapes: Shapes, structure: Structure, file: str) -> None:
    """Reject weights whose keys and shapes fit no possible network: no option can change that."""
    nearest_differences: Differences | None = None
    for needed_shapes in _possible_shapes(structure):
        differences = compare(shapes, needed_shapes)
        if not differences:
            return
        if nearest_differences is None or differences.count < nearest_differences.count:
            nearest_differences = differences
    if nearest_differences is not None:
        blocks = ", ".join(sorted({_block_name(key) for key in nearest_differences.missing}))
        lacks = f", they lack parts of {blocks}" if blocks else ""
        raise CheckpointError(
            f"{file}: the weights of {describe_structure(structure)} are not complete{lacks}: "
            f"{nearest_differences.summary()}"
        )


def is_in_published_order(shapes: Shapes) -> bool:
    """Tell whether the keys are those of a complete ADM network, in the order of its parameters."""
    try:
        return any(
            list(shapes) == list(needed_shapes) for needed_shapes in _possible_shapes(read_structure(shapes))
        )
    except (CheckpointError, InvalidArgument):  # not an ADM network, or impossible widths
        return False


def _possible_shapes(structure: Structure) -> Iterator[dict[str, Shape]]:
    """Yield the keys and shapes, in the published order, of each network that fits a structure."""
    for kind, channels in structure.kinds.items():
        for layout in structure.layouts:
            fields = {**structure.fields, **structure.fields_of_layout(layout), "kind": kind}
            fields |= {"in_channels": channels, "num_head_channels": math.gcd(*structure.attention_widths)}
            fields.setdefault("image_size", 2 ** (layout[0] - 1))
            yield network_shapes(config_from_dict(fields))


def _block_name(key: str) -> str:
    """Return the block that a key belongs to: "output_blocks.3", "middle_block.1", "out"."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0].endswith("_blocks") or parts[0] == "middle_block" else parts[0]
