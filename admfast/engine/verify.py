"""How far the fast path is from the float32 reference: layer by layer, step by step, and in the images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checks import real
from admfast.engine.images import to_uint8
from admfast.engine.numerics import own_numerics
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.models.fold import TORSO
from admfast.ops.sampler_step import Clip
from admfast.solvers import SolverTable


@dataclass(frozen=True)
class Budget:
    """What a precision may cost.

    layer: largest relative error (norm of the difference over the norm) of one layer's output for the same
    input. step: the same of x after any step. psnr: of the images [-1, 1], in dB, at the least. output: the
    relative error of a whole network's output that step and psnr reckon with; see `amplified`.
    """

    layer: float
    step: float
    psnr: float
    output: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layer", "step"):
            real(name, getattr(self, name), above=0)
        for name in ("psnr", "output"):
            real(name, getattr(self, name))


# A layer rounds its weights, a partial sum of two sources and its output once: three independent relative
# errors, uniform within half an epsilon, whose root mean square is half an epsilon at most; half as much
# again is allowed. In float32 the sums' own rounding counts, and the few times as much of it that Winograd
# convolutions have. The errors of layers average out on the way: at t = 999 the digits' network is off by
# 2e-3 in bfloat16, 1.4e-4 in float16 and 1e-7 in float32.
BUDGETS = {
    "fp32": Budget(layer=2e-5, step=1e-3, psnr=70.0, output=1e-6),
    "tf32": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=45.0, output=2.0**-11),
    "fp16": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=40.0, output=2.0**-11),
    "bf16": Budget(layer=0.75 * 2.0**-7, step=1e-1, psnr=30.0, output=2.0**-8),
}
# That of "auto" on a GPU, of x and the images: the network, whose rounding they have, is in bfloat16. The
# layers of its float32 classifier are held to the budget of float32 (`compare_layers`).
BUDGETS["auto"] = BUDGETS["bf16"]


def budget_of(policy: Policy) -> Budget:
    """Return the budget of a precision; raises InvalidArgument for a policy that has none of its own."""
    if policy.name not in BUDGETS:
        raise invalid("budget", None, f"a Budget: none is known for the precision {policy.name!r}")
    return BUDGETS[policy.name]


def amplified(table: SolverTable, output: float) -> float:
    """How far one row of a table may move x where the network's output is off by `output`, both relative.

    max over rows of |b| min(|k_out| output, 1): x_0 = k_x x + k_out out has 1 / sqrt(alpha_bar) times the
    rounding of the output, 157 times at t = 999 of the linear schedule. Many steps take next to nothing of
    that x_0 into x, few take all of it. Limited, two x_0 differ by about 1 at most.
    """
    return max(
        abs(row.b) * min(abs(row.k_out) * output, 1.0 if row.clip == Clip.USED else math.inf)
        for row in table.rows
    )


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
        with own_numerics(next(reference.parameters()).device), torch.no_grad():
            call(reference)
    finally:
        for handle in hooks:
            handle.remove()
    return layers, inputs


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


def _as(value: Any, dtype: torch.dtype, tf32: bool = False) -> Any:
    """A tensor of floats as values that a precision has; of anything else, itself."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    value = value.to(dtype)
    return _of_tf32(value) if tf32 and dtype == torch.float32 else value


def _of_tf32(x: Tensor) -> Tensor:
    """float32 with the last 13 of its 23 bits rounded away, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
