"""How far the fast path is from the float32 reference: layer by layer, step by step, and in the images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from admfast.engine.images import to_uint8
from admfast.models.fold import TORSO


@dataclass(frozen=True)
class Budget:
    """What a precision may cost.

    layer: largest relative error (norm of the difference over the norm) of one layer's output for the same
    input. step: the same of x after any step. psnr: of the images [-1, 1], in dB, at the least.
    """

    layer: float
    step: float
    psnr: float


# A layer rounds its weights, a partial sum of two sources and its output once: three independent relative
# errors, uniform within half an epsilon, whose root mean square is half an epsilon at most; half as much
# again is allowed. In float32 the sums' own rounding counts, and the few times as much of it that Winograd
# convolutions have.
BUDGETS = {
    "fp32": Budget(layer=2e-5, step=1e-3, psnr=70.0),
    "tf32": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=45.0),
    "fp16": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=40.0),
    "bf16": Budget(layer=0.75 * 2.0**-7, step=1e-1, psnr=30.0),
}
BUDGETS["auto"] = BUDGETS["bf16"]


@dataclass(frozen=True)
class Deviation:
    """Where the relative error of something was `error`, and what it may be."""

    name: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


@dataclass
class Verification:
    """What was compared: `layers` and `steps` as relative errors, then the images.

    psnr: in dB, infinite where nothing differs. differing: share of 8-bit values that differ. largest: by how
    many levels at most.
    """

    budget: Budget
    layers: list[Deviation] = field(default_factory=list)
    steps: list[Deviation] = field(default_factory=list)
    psnr: float = math.inf
    differing: float = 0.0
    largest: int = 0

    @property
    def failures(self) -> list[str]:
        """What is past the budget, in words; empty where all holds."""
        worst = [max(group, key=_excess) for group in (self.layers, self.steps) if group]
        found = [
            f"{d.name}: relative error {d.error:.2e}, allowed {d.allowed:.2e}" for d in worst if not d.holds
        ]
        if not self.psnr >= self.budget.psnr:
            found.append(f"images: PSNR {self.psnr:.1f} dB, at least {self.budget.psnr:.0f} dB")
        return found


def compare_layers(
    fast: nn.Module, reference: nn.Module, call: Callable[[nn.Module], Tensor], budget: Budget, prefix: str
) -> list[Deviation]:
    """Give every layer of `fast` what the layer of that name in `reference` saw, and compare what comes out.

    call(network) runs a network; layers are the modules with parameters of their own. What a convolution adds
    of a skip is left out, as its error would hide behind the skip.
    """
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
        with torch.no_grad():
            call(reference)
    finally:
        for handle in hooks:
            handle.remove()
    found = []
    for name, (x, options) in inputs.items():
        inside = name.partition(".")[0] in TORSO
        dtype: Any = fast.torso_dtype if inside and not name.endswith("emb_layers.1") else x.dtype
        allowed = budget.layer if dtype != torch.float32 else BUDGETS["fp32"].layer
        kept = {key: value for key, value in options.items() if key != "residual"}
        with torch.no_grad():
            # Of values that the precision has: what rounding the input costs depends on its mean, not on
            # the layer.
            x, given = _as(x, dtype), {key: _as(value, dtype) for key, value in kept.items()}
            got = _outcome(fast.get_submodule(name), x, given)
            exact = _outcome(layers[name], _wide(x), {key: _wide(value) for key, value in given.items()})
        found.append(Deviation(f"{prefix}.{name}", relative_error(got, exact), allowed))
    return found


def _outcome(layer: nn.Module, x: Any, options: dict[str, Any]) -> Tensor:
    """What a layer puts out, in its own order where its folded form has another."""
    y = layer(x, **options)
    y, rows = y[0] if isinstance(y, tuple) else y, getattr(layer, "rows", None)
    if rows is None or not getattr(layer, "reordered", False):
        return y
    back = torch.empty(len(rows), dtype=torch.int64)
    back[torch.tensor(rows)] = torch.arange(len(rows))
    return y[:, back.to(y.device)]


def compare_images(verification: Verification, got: Tensor, exact: Tensor) -> None:
    """Fill in what concerns the images: float [N, C, *spatial] in [-1, 1]."""
    mse = float((got.double() - exact.double()).clamp(-2, 2).square().mean())
    verification.psnr = math.inf if mse == 0 else 10 * math.log10(4 / mse)
    levels = (to_uint8(got).int() - to_uint8(exact).int()).abs()
    verification.differing = float((levels > 0).double().mean())
    verification.largest = int(levels.max())


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; 0 where both are 0, infinite where either is not finite."""
    got, exact = got.double().to(exact.device), exact.double()
    difference, size = float((got - exact).norm()), float(exact.norm())
    if not math.isfinite(difference) or not math.isfinite(size):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _excess(deviation: Deviation) -> float:
    return deviation.error / deviation.allowed


def _wide(value: Any) -> Any:
    return _as(value, torch.float32)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
