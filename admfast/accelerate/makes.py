"""The record of a make: how to recognise and convert the networks of one code base.

There are three makes: the published code, EDM's and diffusers'.

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

from admfast.accelerate.classes import own_class
from admfast.accelerate.trials import Conversion, Inputs, agrees


@dataclass(frozen=True)
class Make:
    """Describe how to recognise and convert the networks of one code base.

    name: of the make. parts: names of submodules that every network of the make has. builds: names that the
    constructor of its class uses. torso: names of the submodules that hold its blocks. candidates: returns
    the conversions that may fit a block, none if it is not a block of the make. difference: says what the
    code of a block uses beyond the known code, or None. inputs: makes the inputs of a block's trial. layers:
    lists the blocks of a network. ends: converts the other layers after the blocks; its second argument tells
    whether the network's own forward runs. refusal: says why a whole network stays as it is, or None.
    """

    name: str
    parts: tuple[str, ...]
    builds: frozenset[str]
    torso: tuple[str, ...]
    candidates: Callable[[Any], list[Conversion]]
    difference: Callable[[Any], str | None]
    inputs: Inputs
    layers: Callable[[Any], list[nn.Module]]
    ends: Callable[[Any, bool], None]
    refusal: Callable[[Any], str | None] = lambda net: None

    def owns(self, module: nn.Module) -> bool:
        """Tell whether a module itself has the parts; attributes that a wrapper forwards don't count."""
        return all(module._modules.get(name) is not None for name in self.parts)

    def conversion_of(self, block: nn.Module) -> Conversion | str:
        """Return the conversion of a block and its parts, or the reason why it stays as it is."""
        name = own_class(block).__name__
        if _patched(block):
            return f"{name}: its forward was replaced"
        try:
            candidates = self.candidates(block)
            if not candidates:
                return f"{name} has other parts or settings than blocks of the {self.name} make"
            if reason := self.difference(block):
                return f"{name}: {reason}"
            found = next((c for c in candidates if agrees(block, c, self.inputs)), None)
        except Exception as error:  # a program's block may raise anything
            return f"{name}: the trial of a copy failed ({type(error).__name__})"
        return found or f"{name} gives other results than a block of the {self.name} make"

    def plan(self, net: Any) -> tuple[list[tuple[nn.Module, Conversion]], dict[str, str]]:
        """Return the layers to convert with their conversions, and the reasons of other layers by name.

        Layers without parameters are left out of both.
        """
        names = {id(module): name for name, module in net.named_modules()}
        layers = list(dict.fromkeys(layer for layer in self.layers(net) if [*layer.parameters()]))
        found: dict[Any, Conversion | str] = {}
        # Of layers that differ only in size, the smallest is tried for all.
        for layer in sorted(layers, key=lambda layer: sum(p.numel() for p in layer.parameters())):
            key = likeness(layer)
            if key not in found:
                found[key] = self.conversion_of(layer)
        plan, left = [], {}
        for layer in layers:
            conversion = found[likeness(layer)]
            if isinstance(conversion, str):
                left[names[id(layer)]] = conversion
            else:
                plan.append((layer, conversion))
        return plan, left


def likeness(block: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for blocks that differ only in size."""
    return tuple(_likeness(part) for part in block.modules()), _patched(block)


def _likeness(part: Any) -> tuple[Any, ...]:
    own = tuple((name, _setting(value)) for name, value in vars(part).items() if not name.startswith("_"))
    given = tuple((name, p is None) for name, p in part._parameters.items())
    buffers = tuple((n, None if b is None else _values(b)) for n, b in part._buffers.items())
    groups = getattr(part, "num_groups", None)
    weight = part._parameters.get("weight")
    # A norm with one channel per group removes what is added to a channel, so its trial would miss that.
    alone = None if groups is None or weight is None else len(weight) == groups
    # With a single head, different orders of q, k and v give the same result.
    heads = [getattr(part, name, None) for name in ("n_heads", "num_heads")]
    one = tuple(count == 1 if isinstance(count, int) else None for count in heads)
    return own_class(part), own, given, buffers, groups, alone, one


def _setting(value: Any) -> Any:
    """Return a setting itself, or its class if it is a size or can't be compared."""
    return value if isinstance(value, bool | str | float) else type(value)


def _values(buffer: torch.Tensor) -> Any:
    """Return the shape of a buffer, and its values if it has at most 64."""
    small = buffer.numel() <= 64 and not buffer.is_meta
    return (tuple(buffer.shape), tuple(buffer.flatten().tolist()) if small else None)


def _patched(block: nn.Module) -> bool:
    return any({"forward", "_forward"} & vars(part).keys() for part in block.modules())
