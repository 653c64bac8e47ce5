"""Budgets of the precisions, and the errors that were found in layers, steps and images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from admfast.checks import real
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.files.levels import to_uint8
from admfast.ops.update import Clip, SolverTable


@dataclass(frozen=True)
class Budget:
    """The errors that a precision may cost.

    layer: largest relative error (norm of the difference over the norm) of one layer's output for the same
    input. step: the same of x after any step. psnr: of the images [-1, 1], in dB, at the least. output: the
    relative error of a whole network's output that step and psnr reckon with; see `amplified`.
    """

    layer: float
    step: float
    psnr: float
    output: float = 0.0

    def __post_init__(self) -> None:
        for name, above in (("layer", 0), ("step", 0), ("psnr", None), ("output", None)):
            object.__setattr__(self, name, real(name, getattr(self, name), above=above))


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
    """Return how far a row may move x where the network's output is off by `output`, both relative.

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
    """A measured relative error and its limit."""

    name: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


@dataclass
class Verification:
    """The result of a comparison: relative errors of `layers` and `steps`, then the images.

    psnr: in dB, infinite where nothing differs. differing: share of 8-bit values that differ. largest: by how
    many levels at most.
    """

    budget: Budget
    layers: list[Deviation] = field(default_factory=list)
    steps: list[Deviation] = field(default_factory=list)
    psnr: float = math.inf
    differing: float = 0.0
    largest: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise invalid("budget", self.budget, "a Budget, or None")

    @property
    def failures(self) -> list[str]:
        """Return what is past the budget, in words; empty where all holds."""
        worst = [max(group, key=_excess) for group in (self.layers, self.steps) if group]
        found = [
            f"{d.name}: relative error {d.error:.2e}, allowed {d.allowed:.2e}" for d in worst if not d.holds
        ]
        if not self.psnr >= self.budget.psnr:
            found.append(f"images: PSNR {self.psnr:.1f} dB, at least {self.budget.psnr:.0f} dB")
        return found


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
