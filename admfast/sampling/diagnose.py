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
    found: list[str] = []
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output  # a norm may return its skip too
            if not found and isinstance(first, Tensor) and not _finite(first):
                found.append(f"the first layer to put it out is {name} ({type(module).__name__})")

        return hook

    present = {name: network for name, network in networks.items() if network is not None}
    for prefix, network in present.items():
        for name, module in network.named_modules():
            hooks.append(module.register_forward_hook(watch(f"{prefix}.{name}" if name else prefix)))
    try:
        with torch.no_grad(), keep_fused(), project_layer_by_layer(list(present.values())):
            for name, call in calls.items():
                if call is not None and _finite(x) and not _finite(call(x, t)) and not found:
                    found.append(f"no layer put it out, but {name} is not finite")
    finally:
        for hook in hooks:
            hook.remove()
    if not _finite(x):
        found = ["x was not finite before the step"]
    bad = [
        f"{prefix}.{name}"
        for prefix, network in present.items()
        for name, parameter in network.named_parameters()
        if not _finite(parameter)
    ]
    where = found[0] if found else "no layer put it out: the update did"
    if not bad:
        return f"{where}; all weights are finite"
    rest = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{where}; weights that are not finite: {bad[0]}{rest}"


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
