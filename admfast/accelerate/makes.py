"""Record of a make of networks, and the plan of converting the blocks of one.

A block is recognised by what it consists of, by the names and numbers in its code, and by its results: a copy
with random parameters must give the same before and after the conversion. What fails any of these stays as it
is.
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

    name: of the make. parts: of a network of it. builds: names that the constructor of its class uses. torso:
    where its blocks lie. candidates: what may convert a block, nothing where it isn't one of the make's.
    difference: what the code of a block uses beyond the known. inputs: what a block is tried on. layers: the
    blocks of a network. ends: converts what else there is, once the blocks are converted; told whether the
    network's own forward runs. refusal: why a network stays as it is as a whole.
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
        """Tell whether a module has the parts itself: wrappers hand on what others have."""
        return all(module._modules.get(name) is not None for name in self.parts)

    def conversion_of(self, block: nn.Module) -> Conversion | str:
        """Return what converts a block with all its parts, or why there is no such thing."""
        name = own_class(block).__name__
        if _patched(block):
            return f"{name}: somebody gave it another forward"
        try:
            candidates = self.candidates(block)
            if not candidates:
                return f"{name} has other parts or settings than blocks of the {self.name} make"
            if reason := self.difference(block):
                return f"{name}: {reason}"
            found = next((c for c in candidates if agrees(block, c, self.inputs)), None)
        except Exception as error:  # a block of others may be anything
            return f"{name}: a copy of it can't be tried ({type(error).__name__})"
        return found or f"{name} gives other results than a block of the {self.name} make"

    def plan(self, net: Any) -> tuple[list[tuple[nn.Module, Conversion]], dict[str, str]]:
        """Return the layers that can be converted and how, and of the others with parameters why not."""
        names = {id(module): name for name, module in net.named_modules()}
        layers = list(dict.fromkeys(layer for layer in self.layers(net) if [*layer.parameters()]))
        found: dict[Any, Conversion | str] = {}
        # The smallest of those that are alike stands for all.
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
    """Return what blocks have in common that differ in sizes alone."""
    return tuple(_likeness(part) for part in block.modules()), _patched(block)


def _likeness(part: Any) -> tuple[Any, ...]:
    own = tuple((name, _setting(value)) for name, value in vars(part).items() if not name.startswith("_"))
    given = tuple((name, p is None) for name, p in part._parameters.items())
    buffers = tuple((n, None if b is None else _values(b)) for n, b in part._buffers.items())
    groups = getattr(part, "num_groups", None)
    weight = part._parameters.get("weight")
    # A norm of one channel a group takes away whatever is added to a channel, and hides it.
    alone = None if groups is None or weight is None else len(weight) == groups
    # With one head several orders of q, k and v are the same.
    heads = [getattr(part, name, None) for name in ("n_heads", "num_heads")]
    one = tuple(count == 1 if isinstance(count, int) else None for count in heads)
    return own_class(part), own, given, buffers, groups, alone, one


def _setting(value: Any) -> Any:
    """Return a setting itself; of sizes and of what can't be compared, its class."""
    return value if isinstance(value, bool | str | float) else type(value)


def _values(buffer: torch.Tensor) -> Any:
    """Return the values of a small buffer, and the shape of a large one."""
    small = buffer.numel() <= 64 and not buffer.is_meta
    return (tuple(buffer.shape), tuple(buffer.flatten().tolist()) if small else None)


def _patched(block: nn.Module) -> bool:
    return any({"forward", "_forward"} & vars(part).keys() for part in block.modules())
