"""The tolerance rule of all tests: an error may be a small multiple of the reference's rounding error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# kind: (factor of max r, factor of u) in the bound on max e. For a sum, such as a parameter's gradient, the
# second is sqrt(reduction length), the growth of the rounding of that many terms.
_LIMITS = {"output": (2.0, 2.0), "input gradient": (3.0, 4.0), "sum": (2.0, None)}
_LIMITS["parameter gradient"] = _LIMITS["sum"]

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF_AND_SINGLE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_within(
    out: Tensor,
    reference: Tensor,
    truth: Tensor,
    name: str,
    kind: str = "output",
    reduction: int = 1,
    precision: torch.dtype | None = None,
    largest_term: float = 0.0,
    growth: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Assert max e <= 2 max r + 2u and rms(e) <= 2 rms(r) + u/4 for the errors e of `out`, r of `reference`.

    Errors are differences from `truth`, in float64. `reference` is the reference in the dtype of the call.
    u is eps of `precision` (by default the dtype of `out`) times max|truth|, or times `largest_term` if
    larger terms cancel. The bounds on max e are 3 max r + 4u for an "input gradient", and 2 max r + s u for a
    "parameter gradient" or "sum", with s = max(2, sqrt(reduction)); for these the bound on rms(e) is
    2 rms(r) + s u/8. `growth` multiplies the two bounds, for an algorithm that is known to round larger terms
    than the reference. NaN and infinities must be at the same places as in `truth`.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert out.shape == truth.shape == reference.shape, (
        f"{name}: {out.shape}, {truth.shape}, {reference.shape}"
    )
    assert out.dtype == reference.dtype, f"{name}: {out.dtype}, the reference gives {reference.dtype}"
    precision = out.dtype if precision is None else precision
    finite = torch.isfinite(truth)
    odd = out.double()[~finite]
    assert torch.equal(odd.nan_to_num(7.0), truth[~finite].nan_to_num(7.0)), (
        f"{name}: NaN or infinities differ"
    )
    if not finite.any():
        return
    e = (out.double() - truth)[finite].abs()
    r = (reference.double() - truth)[finite].abs()
    largest = max(largest_term, float(truth[finite].abs().max()))
    assert_bounded(e, r, torch.finfo(precision).eps * largest, name, kind, reduction, growth)


def assert_bounded(
    e: Tensor,
    r: Tensor,
    u: float,
    name: str,
    kind: str = "output",
    reduction: int = 1,
    growth: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Apply the rule to errors `e` of an output and `r` of the reference."""
    times_r, times_u = _LIMITS[kind]
    times_u_rms = 0.25
    if times_u is None:
        times_u = max(2.0, math.sqrt(reduction))
        times_u_rms = times_u / 8
    largest, limit = float(e.max()), growth[0] * (times_r * float(r.max()) + times_u * u)
    assert largest <= limit, f"{name}: largest error {largest:.3g}, limit {limit:.3g} (u = {u:.3g})"
    rms, limit = _rms(e), growth[1] * (2 * _rms(r) + times_u_rms * u)
    assert rms <= limit, f"{name}: rms error {rms:.3g}, limit {limit:.3g} (u = {u:.3g})"


def assert_same_formula(
    value: Callable[[torch.dtype], Tensor],
    formula: Callable[[torch.dtype], Tensor],
    name: str,
    kind: str = "output",
    reduction: int = 1,
) -> None:
    """Assert that two computations of one quantity differ in float64 by rounding only.

    Rounding is measured in float32: r of the rule is the larger float32 error of the two, scaled by
    eps64 / eps32. Both are called with the dtype to compute in, and their inputs must be exact in float32.
    The error of a mistake, or of an intermediate float32 result, does not shrink with eps and is detected.
    """
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    out, truth = value(torch.float64), formula(torch.float64)
    singles = [value(torch.float32), formula(torch.float32)]
    assert out.dtype == truth.dtype == torch.float64 and all(t.dtype == torch.float32 for t in singles), name
    assert out.shape == truth.shape, f"{name}: {tuple(out.shape)}, {tuple(truth.shape)}"
    finite = torch.isfinite(truth)
    assert torch.equal(out[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)), name
    if not finite.any():
        return
    r = torch.stack([(single.double() - truth)[finite].abs() for single in singles]).amax(0) * scale
    u = torch.finfo(torch.float64).eps * float(truth[finite].abs().max())
    assert_bounded((out - truth)[finite].abs(), r, u, name, kind, reduction)


@contextlib.contextmanager
def unmodified(**tensors: Tensor | None) -> Iterator[None]:
    """Assert that the block leaves every bit of these tensors, and their strides, as they were."""
    before = {name: (t.clone(), t.stride()) for name, t in tensors.items() if t is not None}
    yield
    for name, (copy, strides) in before.items():
        now = tensors[name]
        assert now is not None and now.stride() == strides, f"{name}: its strides were changed"
        assert torch.equal(bits(now), bits(copy)), f"{name} was written to"


def bits(t: Tensor) -> Tensor:
    """Return the bit patterns, in which NaN equals itself and 0 differs from -0."""
    if not t.dtype.is_floating_point:
        return t
    return t.contiguous().view(_BITS[t.element_size()])


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
