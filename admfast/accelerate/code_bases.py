"""Record of a code base: how to recognise and convert its networks.

There are three code bases: the published code, EDM's and diffusers'.

A block is recognised by its parts, by the names and numbers in its code, and by its results: a copy with
random parameters must give the same results before and after the conversion. A block that fails any of these
checks stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from admfast.accelerate.class_conversion import original_class_of
from admfast.accelerate.equivalence import Conversion, Inputs, gives_same_results


@dataclass(frozen=True)
class CodeBase:
    """Describe how to recognise and convert the networks of one code base.

    name: of the code base. submodules: names of submodules that every one of its networks has.
    constructor_names: names that the constructor of its class uses. torso: names of the submodules that hold
    its blocks. candidate_conversions: returns the conversions that may fit a block, none if the block is not
    of this code base. find_difference: says what the code of a block uses beyond the known code, or None.
    trial_inputs: makes the inputs of a block's trial. list_blocks: lists the blocks of a network.
    convert_other_layers: converts the other layers after the blocks; its second argument tells whether the
    network's own forward runs. find_refusal: says why a whole network can't be converted, or None.
    """

    name: str
    submodules: tuple[str, ...]
    constructor_names: frozenset[str]
    torso: tuple[str, ...]
    candidate_conversions: Callable[[Any], list[Conversion]]
    find_difference: Callable[[Any], str | None]
    trial_inputs: Inputs
    list_blocks: Callable[[Any], list[nn.Module]]
    convert_other_layers: Callable[[Any, bool], None]
    find_refusal: Callable[[Any], str | None] = lambda net: None

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module itself has the parts; attributes that a wrapper forwards don't count."""
        return all(module._modules.get(name) is not None for name in self.submodules)

    def find_conversion(self, block: nn.Module) -> Conversion | str:
        """Return the conversion of a block and its parts, or the reason why it stays as it is."""
        name = original_class_of(block).__name__
        if _has_patched_forward(block):
            return f"{name}: its forward was replaced"
        try:
            candidate_conversions = self.candidate_conversions(block)
            if not candidate_conversions:
                return f"{name} has other parts or settings than blocks of the {self.name} code base"
            if reason := self.find_difference(block):
                return f"{name}: {reason}"
            conversion = next(
                (c for c in candidate_conversions if gives_same_results(block, c, self.trial_inputs)), None
            )
        except Exception as error:  # a program's block may raise anything
            return f"{name}: the trial of a copy failed ({type(error).__name__})"
        return conversion or f"{name} gives other results than a block of the {self.name} code base"

    def plan_conversions(self, net: Any) -> tuple[list[tuple[nn.Module, Conversion]], dict[str, str]]:
        """Return the layers to convert with their conversions, and the reasons of other layers by name.

        Layers without parameters are left out of both.
        """
        names = {id(module): name for name, module in net.named_modules()}
        blocks = list(dict.fromkeys(block for block in self.list_blocks(net) if [*block.parameters()]))
        conversions: dict[Any, Conversion | str] = {}
        # One trial, of the smallest, decides for all layers that differ only in size.
        for block in sorted(blocks, key=lambda block: sum(p.numel() for p in block.parameters())):
            key = shape_free_key(block)
            if key not in conversions:
                conversions[key] = self.find_conversion(block)
        plan, unconverted = [], {}
        for block in blocks:
            conversion = conversions[shape_free_key(block)]
            if isinstance(conversion, str):
                unconverted[names[id(block)]] = conversion
            else:
                plan.append((block, conversion))
        return plan, unconverted


def shape_free_key(block: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for blocks that differ only in size."""
    return tuple(_shape_free_key(part) for part in block.modules()), _has_patched_forward(block)


def _shape_free_key(part: Any) -> tuple[Any, ...]:
    settings = tuple(
        (name, _setting_key(value)) for name, value in vars(part).items() if not name.startswith("_")
    )
    parameters = tuple((name, p is None) for name, p in part._parameters.items())
    buffers = tuple((n, None if b is None else _buffer_key(b)) for n, b in part._buffers.items())
    groups = getattr(part, "num_groups", None)
    weight = part._parameters.get("weight")
    # A norm with one channel per group removes a constant added to a channel: a trial would not show it.
    one_channel_groups = None if groups is None or weight is None else len(weight) == groups
    # With a single head, different orders of q, k and v give the same result.
    heads = [getattr(part, name, None) for name in ("n_heads", "num_heads")]
    single_head = tuple(count == 1 if isinstance(count, int) else None for count in heads)
    return original_class_of(part), settings, parameters, buffers, groups, one_channel_groups, single_head


def _setting_key(value: Any) -> Any:
    """Return a setting itself, or its class if it is a size or can't be compared."""
    return value if isinstance(value, bool | str | float) else type(value)


def _buffer_key(buffer: torch.Tensor) -> Any:
    """Return the shape of a buffer, and its values if it has at most 64."""
    small = buffer.numel() <= 64 and not buffer.is_meta
    return (tuple(buffer.shape), tuple(buffer.flatten().tolist()) if small else None)


def _has_patched_forward(block: nn.Module) -> bool:
    return any({"forward", "_forward"} & vars(part).keys() for part in block.modules())
