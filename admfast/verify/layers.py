"""The layers of two networks, one by one, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.engine.numerics import own_numerics
from admfast.models.fold import TORSO
from admfast.models.hooks import staying_fused
from admfast.verify.budget import BUDGETS, Budget, Deviation, relative_error


def compare_layers(
    fast: nn.Module,
    reference: nn.Module,
    call: Callable[[nn.Module], Tensor],
    budget: Budget,
    prefix: str,
    tf32: bool = False,
) -> list[Deviation]:
    """Give every layer of `fast` what the layer of that name in `reference` saw, and compare what comes out.

    call(network) runs a network; layers are the modules with parameters of their own. What a convolution adds
    of a skip is left out, as its error would hide behind the skip. Every layer is held to the budget of what
    it computes in: those in float32 (a float32 classifier's, and outside the torso) to that of "fp32".
    tf32: on CUDA `fast` runs with TF32 products, all of it; the reference never does, whatever the process
    is set to.
    """
    layers, inputs = _inputs(reference, call)
    device = next(reference.parameters()).device
    found = []
    for name, (x, options) in inputs.items():
        inside = name.partition(".")[0] in TORSO
        dtype: Any = fast.torso_dtype if inside and not name.endswith("emb_layers.1") else x.dtype
        allowed = budget.layer if tf32 or dtype != torch.float32 else BUDGETS["fp32"].layer
        kept = {key: value for key, value in options.items() if key != "residual"}
        with torch.no_grad():
            # Of values that the precision has: what rounding the input costs depends on its mean, not on
            # the layer.
            x, given = _as(x, dtype, tf32), {key: _as(value, dtype, tf32) for key, value in kept.items()}
            with own_numerics(device, tf32):
                got = _outcome(fast.get_submodule(name), x, given)
            with own_numerics(device):
                exact = _outcome(layers[name], _wide(x), {key: _wide(value) for key, value in given.items()})
        found.append(Deviation(f"{prefix}.{name}", relative_error(got, exact), allowed))
    return found


def _inputs(
    reference: nn.Module, call: Callable[[nn.Module], Tensor]
) -> tuple[dict[str, nn.Module], dict[str, tuple[Any, ...]]]:
    """The layers by name, and what each is given at its first call while the network runs."""
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = []
    layers = {
        name: m
        for name, m in reference.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            inputs.setdefault(name, (given[0].detach(), options))

        return hook

    for name, module in layers.items():
        hooks.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    try:
        with own_numerics(next(reference.parameters()).device), torch.no_grad(), staying_fused():
            call(reference)
    finally:
        for handle in hooks:
            handle.remove()
    return layers, inputs


def _outcome(layer: nn.Module, x: Any, options: dict[str, Any]) -> Tensor:
    """Return what a layer puts out, in its own order where its folded form has another."""
    y = layer(x, **options)
    y, rows = y[0] if isinstance(y, tuple) else y, getattr(layer, "rows", None)
    if rows is None or not getattr(layer, "reordered", False):
        return y
    return y[:, torch.tensor(rows, device=y.device).argsort()]


def _wide(value: Any) -> Any:
    return _as(value, torch.float32)


def _as(value: Any, dtype: torch.dtype, tf32: bool = False) -> Any:
    """A tensor of floats as values that a precision has; of anything else, itself."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    value = value.to(dtype)
    return values_of_tf32(value) if tf32 and dtype == torch.float32 else value


def values_of_tf32(x: Tensor) -> Tensor:
    """float32 with the last 13 of its 23 bits rounded away, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
