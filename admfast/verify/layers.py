"""Compare the layers of two networks one by one, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.engine.numerics import fixed_numerics
from admfast.models.fold import TORSO
from admfast.models.hooks import keep_fused
from admfast.verify.budget import BUDGETS, Budget, Deviation, relative_error


def compare_layers(
    fast: nn.Module,
    reference: nn.Module,
    call: Callable[[nn.Module], Tensor],
    budget: Budget,
    prefix: str,
    tf32: bool = False,
) -> list[Deviation]:
    """Run every layer of `fast` on the input of the same layer in `reference`, and compare their outputs.

    call(network) runs a network; layers are the modules with parameters of their own. The skip that a
    convolution adds is left out: it would make the relative error smaller. The budget of a layer depends on
    the dtype in which it computes: in float32 (outside the torso, or in a float32 network) it is that of
    "fp32". In "int8", only 8-bit convolutions have its budget, other layers that of "bf16" or "fp32".
    tf32: on CUDA, all layers of `fast` run with TF32 products; the reference never does, for any setting of
    the process.
    """
    layers, inputs = _record_inputs(reference, call)
    device = next(reference.parameters()).device
    deviations = []
    options = getattr(fast, "fold_options", None)
    for name, (x, kwargs) in inputs.items():
        in_torso = name.partition(".")[0] in TORSO
        dtype: Any = fast.torso_dtype if in_torso and not name.endswith("emb_layers.1") else x.dtype
        allowed = budget.layer
        if not _is_int8_layer(fast.get_submodule(name)):
            if options is not None and options.int8:
                allowed = min(allowed, BUDGETS["bf16"].layer)
            if dtype == torch.float32 and not tf32:
                allowed = BUDGETS["fp32"].layer
        tensor_arguments = {key: value for key, value in kwargs.items() if key != "residual"}
        with torch.no_grad():
            # Both layers get the rounded input: the error of rounding it depends on its mean, not on the
            # layer.
            x, kwargs = (
                _round_to(x, dtype, tf32),
                {key: _round_to(value, dtype, tf32) for key, value in tensor_arguments.items()},
            )
            with fixed_numerics(device, tf32):
                output = _layer_output(fast.get_submodule(name), x, kwargs)
            with fixed_numerics(device):
                exact_output = _layer_output(
                    layers[name], _to_float32(x), {key: _to_float32(value) for key, value in kwargs.items()}
                )
        deviations.append(Deviation(f"{prefix}.{name}", relative_error(output, exact_output), allowed))
    return deviations


def _is_int8_layer(layer: nn.Module) -> bool:
    """Tell whether a layer is an 8-bit convolution."""
    folded = getattr(layer, "folded", None)
    return folded is not None and folded.options.int8


def _record_inputs(
    reference: nn.Module, call: Callable[[nn.Module], Tensor]
) -> tuple[dict[str, nn.Module], dict[str, tuple[Any, ...]]]:
    """Return the layers by name, and the inputs of each at its first call while the network runs."""
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = []
    layers = {
        name: m
        for name, m in reference.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }

    def record_as(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.setdefault(name, (args[0].detach(), kwargs))

        return hook

    for name, module in layers.items():
        hooks.append(module.register_forward_pre_hook(record_as(name), with_kwargs=True))
    try:
        with fixed_numerics(next(reference.parameters()).device), torch.no_grad(), keep_fused():
            call(reference)
    finally:
        for handle in hooks:
            handle.remove()
    return layers, inputs


def _layer_output(layer: nn.Module, x: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return a layer's output, with the original order of channels if its folded form reorders them."""
    y = layer(x, **kwargs)
    y, rows = y[0] if isinstance(y, tuple) else y, getattr(layer, "rows", None)
    if rows is None or not getattr(layer, "reordered", False):
        return y
    return y[:, torch.tensor(rows, device=y.device).argsort()]


def _to_float32(value: Any) -> Any:
    return _round_to(value, torch.float32)


def _round_to(value: Any, dtype: torch.dtype, tf32: bool = False) -> Any:
    """Return a floating tensor rounded to a precision; return anything else unchanged."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    value = value.to(dtype)
    return round_to_tf32(value) if tf32 and dtype == torch.float32 else value


def round_to_tf32(x: Tensor) -> Tensor:
    """Return float32 values with the last 13 of the 23 mantissa bits rounded to zero, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
