"""Find the first layer that produces NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from admfast.models.fold import project_layer_by_layer
from admfast.models.hooks import keep_fused


def first_nonfinite(
    networks: Mapping[str, nn.Module | None],
    calls: Mapping[str, Callable[[Tensor, Tensor], Tensor] | None],
    x: Tensor,
    t: Tensor,
) -> str:
    """Run the calls again at (x, t); return text that names the first non-finite output and weights.

    networks: by the names that the text uses for them. calls: functions of (x, t) that call the networks, by
    name. Only this function adds hooks to the layers, so normal sampling pays nothing for it.
    """
    descriptions: list[str] = []
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output  # a norm may return its skip too
            if not descriptions and isinstance(tensor, Tensor) and not _is_finite(tensor):
                descriptions.append(f"the first layer to put it out is {name} ({type(module).__name__})")

        return hook

    used_networks = {name: network for name, network in networks.items() if network is not None}
    for prefix, network in used_networks.items():
        for name, module in network.named_modules():
            hooks.append(module.register_forward_hook(watch(f"{prefix}.{name}" if name else prefix)))
    try:
        with torch.no_grad(), keep_fused(), project_layer_by_layer(list(used_networks.values())):
            for name, call in calls.items():
                if call is not None and _is_finite(x) and not _is_finite(call(x, t)) and not descriptions:
                    descriptions.append(f"no layer put it out, but {name} is not finite")
    finally:
        for hook in hooks:
            hook.remove()
    if not _is_finite(x):
        descriptions = ["x was not finite before the step"]
    nonfinite_weights = [
        f"{prefix}.{name}"
        for prefix, network in used_networks.items()
        for name, parameter in network.named_parameters()
        if not _is_finite(parameter)
    ]
    location = descriptions[0] if descriptions else "no layer put it out: the update did"
    if not nonfinite_weights:
        return f"{location}; all weights are finite"
    others = f" and {len(nonfinite_weights) - 1} more" if len(nonfinite_weights) > 1 else ""
    return f"{location}; weights that are not finite: {nonfinite_weights[0]}{others}"


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
