"""Error budgets of the precisions, and records of the errors measured in layers, steps and images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from admfast.checks import finite_float
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.files.levels import to_uint8
from admfast.ops.update import Clip, SolverTable


@dataclass(frozen=True)
class Budget:
    """The largest errors that a precision may cause.

    layer: relative error (norm of the difference over the norm) of one layer's output for the same input.
    step: relative error of x after any step. psnr: smallest PSNR in dB of the images, which are in [-1, 1].
    output: relative error of a whole network's output, which step and psnr assume; see `amplified_error`.
    """

    layer: float
    step: float
    psnr: float
    output: float = 0.0

    def __post_init__(self) -> None:
        for name, above in (("layer", 0), ("step", 0), ("psnr", None), ("output", None)):
            object.__setattr__(self, name, finite_float(name, getattr(self, name), above=above))


# A layer rounds three times: its weights, a partial sum of two sources, and its output. These relative errors
# are independent and uniform within half an epsilon. Together their root mean square is at most half an
# epsilon; the budget is 1.5 times that. In float32 the rounding of sums dominates, which is a few times
# larger in Winograd convolutions. In a whole network the errors of layers average out: at t = 999 the output
# of the digits' network has an error of 2e-3 in bfloat16, 1.4e-4 in float16 and 1e-7 in float32.
BUDGETS = {
    "fp32": Budget(layer=2e-5, step=1e-3, psnr=70.0, output=1e-6),
    "tf32": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=45.0, output=2.0**-11),
    "fp16": Budget(layer=0.75 * 2.0**-10, step=2e-2, psnr=40.0, output=2.0**-11),
    "bf16": Budget(layer=0.75 * 2.0**-7, step=1e-1, psnr=30.0, output=2.0**-8),
}
# "auto" on a GPU runs the network and the classifier in bfloat16. A policy called "auto" is used only there.
BUDGETS["auto"] = BUDGETS["bf16"]
# An 8-bit convolution rounds its inputs to 1/255 of their range and its weights to 1/127 of their largest. If
# the range is 10 times the root mean square of the inputs, and the largest weight 4.5 times that of the
# weights, the two errors are 1.1 % and 1.0 % (a step divided by the root of 12), together 1.5 %. Numbers that
# are spread twice as far have twice that.
BUDGETS["int8"] = Budget(layer=3e-2, step=1e-1, psnr=35.0, output=2.0**-6)


def default_budget(policy: Policy) -> Budget:
    """Return the budget of a precision; raise InvalidArgument for a policy without one."""
    if policy.name not in BUDGETS:
        raise invalid("budget", None, f"a Budget: none is known for the precision {policy.name!r}")
    return BUDGETS[policy.name]


def amplified_error(table: SolverTable, output: float) -> float:
    """Return the largest error of x that one row can cause, if the network's output has the error `output`.

    Both errors are relative. The result is the max over rows of w min(|k_out| output, 1), where w is |b| plus
    the weights of what the row pushes in later rows; the min applies if the update's x_0 is clipped, because
    two clipped x_0 differ by about 1 at most. In
    x_0 = k_x x + k_out out, the error of the output is multiplied by about 1 / sqrt(alpha_bar), which is 157
    at t = 999 of the linear schedule. With many steps, the row adds almost nothing of that x_0 to x; with few
    steps, it adds all of it.
    """
    errors = []
    for i, row in enumerate(table.rows):
        weight = abs(row.b)
        if row.pushes:  # as all rows of a solver do, or every second one, whose successor uses it
            later = zip(table.rows[i + 1 :], ("c1", "c2", "c3"), strict=False)
            weight += abs(row.p_0) * sum(abs(getattr(follower, name)) for follower, name in later)
        error = abs(row.k_out) * output
        errors.append(weight * (min(error, 1.0) if row.clip == Clip.USED else error))
    return max(errors)


@dataclass(frozen=True)
class Deviation:
    """A measured relative error and its limit."""

    name: str
    error: float
    allowed: float

    @property
    def within_budget(self) -> bool:
        return self.error <= self.allowed


@dataclass
class Verification:
    """The result of a comparison: the relative errors of `layers` and `steps`, then those of the images.

    psnr: in dB, infinite if nothing differs. differing_fraction: fraction of 8-bit values that differ.
    largest_difference: the largest difference of two such values, in levels.
    """

    budget: Budget
    layers: list[Deviation] = field(default_factory=list)
    steps: list[Deviation] = field(default_factory=list)
    psnr: float = math.inf
    differing_fraction: float = 0.0
    largest_difference: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise invalid("budget", self.budget, "a Budget, or None")

    @property
    def failures(self) -> list[str]:
        """One text for each kind of result that exceeds the budget; empty if all are within it."""
        worst = [max(group, key=_excess) for group in (self.layers, self.steps) if group]
        failures = [
            f"{d.name}: relative error {d.error:.2e}, allowed {d.allowed:.2e}"
            for d in worst
            if not d.within_budget
        ]
        if not self.psnr >= self.budget.psnr:
            failures.append(f"images: PSNR {self.psnr:.1f} dB, at least {self.budget.psnr:.0f} dB")
        return failures


def compare_images(verification: Verification, got: Tensor, exact: Tensor) -> None:
    """Fill in the results for images: float [N, C, *spatial] in [-1, 1]."""
    verification.psnr = psnr(got, exact)
    levels = (to_uint8(got).int() - to_uint8(exact).int()).abs()
    verification.differing_fraction = float((levels > 0).double().mean())
    verification.largest_difference = int(levels.max())


def psnr(got: Tensor, exact: Tensor) -> float:
    """Return the PSNR in dB of images in [-1, 1]; infinite if nothing differs."""
    mse = float((got.double() - exact.double()).clamp(-2, 2).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return ||got - exact|| / ||exact||; 0 if both are 0, infinite if `exact` is 0 or one is not finite."""
    got, exact = got.double().to(exact.device), exact.double()
    difference, size = float((got - exact).norm()), float(exact.norm())
    if not math.isfinite(difference) or not math.isfinite(size):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def _excess(deviation: Deviation) -> float:
    return deviation.error / deviation.allowed
