"""Tests of the normalisation's autograd: gradient formula, second derivatives, transforms, raw ops."""

from __future__ import annotations

import pytest
import torch

from admfast.errors import Unavailable
from admfast.ops import TABLES, group_norm_silu, group_norm_silu_ref, native
from admfast.ops.norm.grad import (
    RAW_NORMS,
    GroupNormSiluFn,
    NormOptions,
    RawNorm,
    apply_resample,
    group_norm_silu_grad_ref,
    resample_backward,
)
from tests.ops.cover import all_pairs, case_id
from tests.ops.isas import FLAGS, run_tests_on
from tests.ops.tolerance import assert_same_formula, assert_within

CASES = all_pairs(
    shape=[(2, 4, 3), (2, 4, 2, 2), (1, 4, 3, 2), (1, 4, 2, 2, 3)],
    second=[0, 2],
    modulated=[False, True],
    silu=[False, True],
    resample=[None, "up", "down"],
    skip=[False, True],
    biased=[False, True],
)
# Without resampling the skip is the input itself, which no raw implementation computes.
CASES = [case for case in CASES if case["resample"] or not (case["skip"] and case["second"])]
CASES = [case | dict(biased=case["biased"] and not case["skip"]) for case in CASES]
IDS = [case_id(case) for case in CASES]
WITHOUT_C = native.reason_missing()
needs_cpp = pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}")


def arguments(case: dict, dtype: torch.dtype = torch.float64) -> tuple[list, NormOptions]:
    """Return x, x2, weight, bias, scale and shift of a case (None if it has none), and its options."""
    generator = torch.Generator().manual_seed(0)
    n, c = case["shape"][:2]
    spatial = case["shape"][2:]
    channels = c + case["second"]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, x2 = randn(*case["shape"]), randn(n, case["second"], *spatial) if case["second"] else None
    scale, shift = (randn(n, channels), randn(n, channels)) if case["modulated"] else (None, None)
    tensors = [x, x2, randn(channels), randn(channels), scale, shift]
    return tensors, NormOptions(2, 1e-5, case["silu"], case["resample"], case["skip"])


def bias_of(case: dict) -> torch.Tensor | None:
    """Return what a case adds to its input, [N, C] float64; None if nothing."""
    n, channels = case["shape"][0], case["shape"][1] + case["second"]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, generator=generator, dtype=torch.float64) if case.get("biased") else None


def reference(tensors: list, options: NormOptions, x_bias: torch.Tensor | None = None):
    """Call `group_norm_silu_ref` with a list of tensors."""
    x, x2, weight, bias, scale, shift = tensors
    return group_norm_silu_ref(
        x,
        weight,
        bias,
        options.groups,
        options.eps,
        scale=scale,
        shift=shift,
        silu=options.silu,
        resample=options.resample,
        x2=x2,
        x_bias=x_bias,
        with_skip=options.skip,
    )


def formula_forward(x, x2, x_bias, weight, bias, scale, shift, options):
    """Compute a raw forward in plain torch, in any dtype."""
    source = x if x2 is None else torch.cat([x, x2], 1)
    values = source.flatten(2).reshape(len(x), options.groups, -1)
    y = reference([x, x2, weight, bias, scale, shift], options, x_bias)
    skip = y[1].view_as(y[1]) if options.skip else x.new_empty(0)  # not resampled it is x itself
    rstd = (values.var(-1, unbiased=False) + options.eps).rsqrt()
    return y[0] if options.skip else y, skip, values.mean(-1), rstd


def formula_backward(dy, dskip, x, x2, x_bias, weight, bias, scale, shift, mean, rstd, options, sums):
    """Compute a raw backward in plain torch. The sums are the gradients in shift and scale."""
    unit = [torch.ones_like(weight), torch.zeros_like(bias)]
    dx, dx2, *_ = group_norm_silu_grad_ref(dy, dskip, x, x2, weight, bias, scale, shift, options, x_bias)
    one_plus = 1 if scale is None else 1 + scale
    new_scale = (weight * one_plus - 1).expand(len(x), -1)
    new_shift = (bias * one_plus + (0 if shift is None else shift)).expand(len(x), -1)
    *_, s2, s1 = group_norm_silu_grad_ref(dy, dskip, x, x2, *unit, new_scale, new_shift, options, x_bias)
    return dx, dx2, s1, s2


@pytest.fixture
def in_formulas(monkeypatch):
    """Register the raw implementation "formulas", which runs in float64, and return its name."""
    monkeypatch.setitem(RAW_NORMS, "formulas", RawNorm("formulas", formula_forward, formula_backward))
    return "formulas"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_gradient_s_formula_is_the_reference_s_gradient(case):
    torch.manual_seed(0)
    larger = (
        2,
        8,
        *(7 * size + 2 for size in case["shape"][2:]),
    )  # enough elements for a mean square near 1
    tensors, options = arguments(case | dict(shape=larger), torch.float32)
    there = [i for i, t in enumerate(tensors) if t is not None]
    x_bias = bias_of(case | dict(shape=larger))
    like = reference(tensors, options, x_bias)
    given = [torch.randn_like(t) for t in (like if options.skip else (like,))]

    def by_autograd(dtype: torch.dtype) -> list:
        leaves = [None if t is None else t.to(dtype).requires_grad_(True) for t in tensors]
        out = reference(leaves, options, x_bias)
        out = out if options.skip else (out,)
        return torch.autograd.grad(out, [leaves[i] for i in there], [dy.to(dtype) for dy in given])

    def by_formula(dtype: torch.dtype) -> list:
        moved = [None if t is None else t.to(dtype) for t in tensors]
        dskip = given[1].to(dtype) if options.skip else None
        found = group_norm_silu_grad_ref(given[0].to(dtype), dskip, *moved, options, x_bias)
        return [found[i] for i in there]

    positions = given[0].numel() // given[0].shape[1]
    for k, i in enumerate(there):
        kind = ("input gradient", 1) if i < 2 else ("parameter gradient", positions)
        assert_same_formula(lambda d, k=k: by_formula(d)[k], lambda d, k=k: by_autograd(d)[k], str(i), *kind)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_first_and_second_derivatives_of_the_function(case, in_formulas):
    tensors, options = arguments(case)
    there = [i for i, t in enumerate(tensors) if t is not None]

    def function(*values):
        full = [None] * len(tensors)
        for i, value in zip(there, values, strict=True):
            full[i] = value
        y, skip, *_ = GroupNormSiluFn.apply(*full, bias_of(case), in_formulas, options)
        return (y, skip) if options.skip else y

    leaves = [tensors[i].requires_grad_(True) for i in there]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [[0], [2], [3, 5], [0, 4]], ids=str)
def test_only_what_needs_a_gradient_gets_one(wanted, in_formulas):
    case = dict(shape=(2, 6, 4, 6), second=2, modulated=True, silu=True, resample=None, skip=False)
    tensors, options = arguments(case)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    asked: list[bool] = []
    pair = RawNorm("spy", formula_forward, lambda *a: asked.append(a[-1]) or formula_backward(*a))
    RAW_NORMS["spy"] = pair
    try:
        GroupNormSiluFn.apply(*tensors, None, "spy", options)[0].square().sum().backward()
    finally:
        del RAW_NORMS["spy"]
    assert asked == [any(i > 1 for i in wanted)]
    for i, t in enumerate(tensors):
        assert (t.grad is not None) == (i in wanted)
    truth, _ = arguments(case)
    leaves = [t.requires_grad_(True) for t in truth]
    expected = torch.autograd.grad(reference(truth, options).square().sum(), leaves)
    for i in wanted:
        torch.testing.assert_close(tensors[i].grad, expected[i])


def test_resampling_and_its_gradient_agree():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for resample in (None, "up", "down"):
        y = apply_resample(x, resample)
        dy = torch.randn_like(y)
        # <apply_resample(x), dy> = <x, resample_backward(dy)>
        torch.testing.assert_close((y * dy).sum(), (x * resample_backward(dy, x, resample)).sum())


@needs_cpp
def test_second_derivatives_over_a_raw_implementation():
    x, weight, bias = torch.randn(2, 8, 6, 5), torch.randn(8), torch.randn(8)

    def penalty(x, weight, bias, impl):
        leaf = x.clone().requires_grad_(True)
        y = group_norm_silu(leaf, weight, bias, 4, impl=impl)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaf)[0]

    truth = penalty(x.double(), weight.double(), bias.double(), "reference")
    plain = penalty(x, weight, bias, "reference")
    assert_within(penalty(x, weight, bias, "cpp"), plain, truth, "d2x", "input gradient")
    nested = torch.func.grad(
        lambda x: (
            torch.func.grad(lambda x: group_norm_silu(x, weight, bias, 4, impl="cpp").square().sum())(x)
            .square()
            .sum()
        )
    )
    assert_within(nested(x), plain, truth, "d2x by torch.func", "input gradient")


@needs_cpp
def test_transforms_it_can_t_serve_go_to_the_reference_or_are_refused_by_name():
    x, weight, bias = torch.randn(3, 8, 6, 5), torch.ones(8), torch.zeros(8)

    def op(x, impl=None):
        return group_norm_silu(x, weight, bias, 4, impl=impl)

    with pytest.raises(Unavailable, match="impl='cpp'.*forward-mode"):
        torch.func.jvp(lambda x: op(x, "cpp"), (x,), (x,))
    with pytest.raises(Unavailable, match="impl='cpp'.*vmap"):
        torch.func.vmap(lambda x: op(x[None], "cpp"))(x)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(op, (x,), (direction,))
    y = op(x.requires_grad_(True))
    dy = torch.randn_like(y)
    torch.testing.assert_close((tangent * dy).sum(), (torch.autograd.grad(y, x, dy)[0] * direction).sum())
    batched = torch.func.vmap(lambda x: op(x[None])[0])(x.detach())
    torch.testing.assert_close(batched, op(x.detach(), "reference"))


@needs_cpp
def test_the_cpu_runs_the_compiled_op_where_it_can():
    weight, bias = torch.ones(8), torch.zeros(8)
    for dtype, name in ((torch.float32, "cpp"), (torch.bfloat16, "cpp"), (torch.float16, "reference")):
        chosen = TABLES["group_norm_silu"].choose(None, torch.ones(2, 8, 4, 4, dtype=dtype), weight, bias)
        assert chosen.name == name


@needs_cpp
@pytest.mark.parametrize("isa", FLAGS)
def test_every_instruction_set_gives_the_same_within_tolerance(isa):
    run_tests_on(isa, "cpp and (tolerance or rounding)", "test_group_norm")
