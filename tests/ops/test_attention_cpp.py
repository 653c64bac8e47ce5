"""Tests of the compiled attention in bfloat16: bits, NaN, derivatives, traces, selection, and the raw ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from admfast.errors import Unavailable
from admfast.ops import TABLES, attention, native, record_choices
from tests.csrc.loops import PRODUCT_ISAS
from tests.ops.isas import run_tests_on
from tests.ops.test_attention import largest_gradient_term, rows
from tests.ops.test_attention_kernels import ORDERS, Operations, hessian_product, numbers
from tests.ops.tolerance import assert_within, unmodified

HALF = torch.bfloat16
WITHOUT_C = native.reason_missing()
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}"),
]
OPS = torch.ops.admfast
# name: (batch, positions, heads, channels per head). The loops take 32 queries, keys or channels at a time.
# The gradient takes 128 keys and 256 queries.
SHAPES = {
    "one": (1, 1, 1, 1),
    "odd": (3, 33, 3, 5),
    "whole": (2, 64, 4, 64),
    "spans": (2, 300, 2, 40),
    "one head": (1, 257, 1, 96),
    "wide": (3, 5, 2, 256),
}
EACH = pytest.mark.parametrize("shape", SHAPES)


def call_of(shape: str) -> tuple[Tensor, Tensor, int]:
    """Return qkv, a gradient of the output, and the number of heads."""
    n, s, heads, d = SHAPES[shape]
    return torch.randn(n, s, 3 * heads * d).to(HALF), torch.randn(n, s, heads * d).to(HALF), heads


def results(qkv: Tensor, dout: Tensor, heads: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient in qkv."""
    leaf = qkv.detach().requires_grad_(True)
    out = attention(leaf, heads, **options)
    return out.detach(), torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


def cpp(qkv: Tensor, dout: Tensor, heads: int, legacy: bool = False) -> tuple[Tensor, Tensor]:
    return results(qkv, dout, heads, legacy_order=legacy, impl="cpp")


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Values


@ORDERS
@EACH
def test_values_and_gradient_are_within_tolerance(shape, legacy, poisoned):
    qkv, dout, heads = call_of(shape)
    with unmodified(qkv=qkv, dout=dout):
        found = cpp(qkv, dout, heads, legacy)
    plain = dict(legacy_order=legacy, impl="reference")
    reference, truth = results(qkv, dout, heads, **plain), results(qkv.double(), dout, heads, **plain)
    assert_within(found[0], reference[0], truth[0], "out")
    term = largest_gradient_term(qkv, heads, legacy, dout, truth[1])
    assert_within(found[1], reference[1], truth[1], "d qkv", "input gradient", largest_term=term)


@ORDERS
@EACH
def test_threads_and_the_place_in_a_batch_change_no_bit(shape, legacy):
    qkv, dout, heads = call_of(shape)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(cpp(qkv, dout, heads, legacy))
    finally:
        torch.set_num_threads(before)
    assert same(found[1], found[0]) and same(found[2], found[0])
    for i in range(len(qkv)):
        alone = cpp(qkv[i : i + 1], dout[i : i + 1], heads, legacy)
        assert same(alone, tuple(t[i : i + 1] for t in found[0]))
    with torch.no_grad():
        assert torch.equal(attention(qkv, heads, legacy_order=legacy, impl="cpp"), found[0][0])


@ORDERS
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_stays_in_its_head_and_image(value, kind, legacy):
    n, s, heads, d = 3, 70, 3, 40
    qkv, dout = torch.randn(n, s, 3 * heads * d).to(HALF), torch.randn(n, s, heads * d).to(HALF)
    clean = cpp(qkv, dout, heads, legacy)
    spoilt = qkv.clone()
    spoilt[1, 65, rows(kind, 1, heads, d, legacy)] = value
    out, gradient = cpp(spoilt, dout, heads, legacy)
    reach = torch.zeros(n, s, heads, d, dtype=torch.bool)
    reach[1, 65 if kind == 0 else slice(None), 1] = True
    reach = reach.flatten(2)
    assert torch.equal(out[~reach], clean[0][~reach]) and not out[reach].isfinite().any()
    own = [row for of in range(3) for row in rows(of, 1, heads, d, legacy)]
    elsewhere = torch.ones(n, s, 3 * heads * d, dtype=torch.bool)
    elsewhere[1, :, own] = False
    assert torch.equal(gradient[elsewhere], clean[1][elsewhere])
    assert not gradient[1, 65, rows(0, 1, heads, d, legacy)].isfinite().any()
    assert same(cpp(qkv, dout, heads, legacy), clean), "numbers of an earlier call must not matter"


@EACH
def test_qkv_is_read_where_it_lies(shape):
    qkv, dout, heads = call_of(shape)
    expected = cpp(qkv, dout, heads)
    n, s, width = qkv.shape
    wide = torch.full((n, 2 * s, width + 3), float("nan"), dtype=HALF)
    assert same(cpp(wide[:, ::2, 3:].copy_(qkv), dout, heads), expected)
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert same(cpp(turned, dout, heads), expected)
    for one in (qkv[:1].expand_as(qkv), qkv[:, :1].expand_as(qkv)):
        assert same(cpp(one, dout, heads), cpp(one.contiguous(), dout, heads))


def test_a_last_dimension_that_is_not_contiguous_is_refused():
    turned = torch.randn(2, 36, 5).to(HALF).transpose(1, 2)
    with pytest.raises(Unavailable, match="impl='cpp': .*last dimension of qkv is not contiguous"):
        attention(turned, 3, impl="cpp")
    with pytest.raises(RuntimeError, match="^attention_fwd: the last dimension of qkv is not contiguous"):
        OPS.attention_fwd(turned, 3, False)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24), (0, 0, 24)], ids=str)
def test_nothing_to_attend_to_has_a_gradient_too(shape):
    out, gradient = cpp(torch.randn(shape).to(HALF), torch.randn(*shape[:2], 8).to(HALF), 2)
    assert out.shape == (*shape[:2], 8) and gradient.shape == shape


@EACH
def test_an_expanded_gradient_is_the_full_one(shape):
    qkv, dout, heads = call_of(shape)
    for expanded in (torch.ones((), dtype=HALF).expand_as(dout), dout[:, :1].expand_as(dout)):
        assert same(cpp(qkv, expanded, heads), cpp(qkv, expanded.contiguous(), heads))


# Derivatives and traces


@ORDERS
@pytest.mark.parametrize("road", ["autograd", "torch.func"])
def test_second_derivatives_are_within_tolerance(road, legacy):
    qkv = numbers(2, 33, 3 * 2 * 32, dtype=HALF)

    def nested(value: Tensor, heads: int, **options: Any) -> Tensor:
        first = torch.func.grad(lambda qkv: attention(qkv, heads, **options).sin().sum())
        direction = numbers(*qkv.shape, seed=2, dtype=value.dtype)
        return torch.func.grad(lambda qkv: (first(qkv) * direction).sum())(value)

    second: Callable[..., Tensor] = hessian_product if road == "autograd" else nested
    options = dict(legacy_order=legacy)
    with unmodified(qkv=qkv):
        found = second(qkv, 2, impl="cpp", **options)
    reference, truth = (second(t, 2, impl="reference", **options) for t in (qkv, qkv.double()))
    assert_within(found, reference, truth, "d2 qkv", "input gradient")


def test_the_first_derivative_recomputes_and_copies_nothing():
    qkv = numbers(2, 9, 48, dtype=HALF).requires_grad_(True)
    with Operations() as forward:
        out = attention(qkv, 2, impl="cpp")
    with Operations() as backward:
        out.backward(torch.ones_like(out))
    assert out.is_contiguous() and qkv.grad.is_contiguous()
    assert forward.seen == ["attention_fwd"]
    assert backward.seen == ["ones_like", "attention_bwd"]


def test_vmap_and_forward_mode_are_refused_by_name():
    qkv = numbers(1, 5, 24, dtype=HALF)

    def function(value: Tensor) -> Tensor:
        return attention(value, 2, impl="cpp")

    with pytest.raises(Unavailable, match="impl='cpp': .*not under torch.func.vmap"):
        torch.func.vmap(function)(qkv[None])
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(Unavailable, match="^attention: no forward-mode derivative"):
            torch.func.jvp(function, (qkv,), (qkv,))


def chosen(qkv: Tensor, heads: int) -> str:
    with record_choices() as seen:
        attention(qkv, heads)
    return seen[-1].name


def test_it_is_chosen_with_amx_unless_something_counts_torch_s_operations(monkeypatch):
    qkv = numbers(2, 64, 3 * 2 * 32, dtype=HALF)
    monkeypatch.setattr(native, "uses_amx", lambda: True)
    assert chosen(qkv, 2) == chosen(qkv.requires_grad_(True), 2) == "cpp"
    assert chosen(qkv.float(), 2) == chosen(qkv.half(), 2) == "sdpa"
    with FlopCounterMode(display=False):
        assert chosen(qkv, 2) == "sdpa"
    monkeypatch.setattr(native, "uses_amx", lambda: False)
    assert chosen(qkv, 2) == "sdpa"
    why = TABLES["attention"].find("cpp").reason_named_only()
    assert why == "measured to be faster only with AMX"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_call_runs_torch_s_own_kernel(backend, monkeypatch):
    monkeypatch.setattr(native, "uses_amx", lambda: True)
    qkv, dout = numbers(2, 64, 3 * 2 * 32, dtype=HALF), numbers(2, 64, 64, seed=1, dtype=HALF)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    leaf = qkv.clone().requires_grad_(True)
    out = compiled(leaf, 2)
    found = out.detach(), torch.autograd.grad(out, leaf, dout)[0]
    torchs, plain = (results(qkv, dout, 2, impl=impl) for impl in ("sdpa", "reference"))
    truth = results(qkv.double(), dout, 2, impl="reference")
    assert torch.equal(found[0], torchs[0]) and not torch.equal(found[0], attention(qkv, 2, impl="cpp"))
    assert_within(found[1], plain[1], truth[1], "d qkv", "input gradient")
    named = torch.compile(lambda value: attention(value, 2, impl="cpp"), backend=backend)
    with pytest.raises(Exception, match="torch.compile traces scaled_dot_product_attention instead"):
        named(qkv)


def test_a_traced_program_contains_torch_s_own_kernel(monkeypatch):
    monkeypatch.setattr(native, "uses_amx", lambda: True)
    qkv, other = (numbers(2, 33, 3 * 2 * 32, seed=seed, dtype=HALF) for seed in (0, 1))
    traced = torch.jit.trace(lambda value: attention(value, 2), qkv, check_trace=False)
    assert "scaled_dot_product_attention" in str(traced.graph) and "admfast::" not in str(traced.graph)
    assert torch.equal(traced(other), attention(other, 2, impl="sdpa"))
    with pytest.raises(Unavailable, match="impl='cpp': .*a traced program may contain only torch's own"):
        torch.jit.trace(lambda value: attention(value, 2, impl="cpp"), qkv, check_trace=False)


@pytest.mark.parametrize("isa", PRODUCT_ISAS)
def test_every_instruction_set_is_right(isa):
    run_tests_on(isa, "cpp and (tolerance or bit or nan)", "test_attention", "test_attention_cpp")


# Raw ops


@ORDERS
@EACH
def test_the_raw_ops_pass_opcheck(shape, legacy):
    qkv, dout, heads = call_of(shape)
    torch.library.opcheck(OPS.attention_fwd.default, (qkv, heads, legacy))
    out, lse = OPS.attention_fwd(qkv, heads, legacy)
    torch.library.opcheck(OPS.attention_bwd.default, (dout, qkv, out, lse, heads, legacy))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=HALF)


WRONG = [
    (dict(qkv=ones(2, 5, 24).float()), "qkv is Float"),
    (dict(qkv=ones(5, 24)), "qkv must be"),
    (dict(qkv=ones(1, 2, 5, 24)), "qkv must be"),
    (dict(qkv=ones(2, 5, 0)), "qkv must be"),
    (dict(qkv=ones(2, 5, 25)), "qkv must be"),
    (dict(heads=3), "qkv must be"),
    (dict(heads=0), "qkv must be"),
    (dict(heads=-2), "qkv must be"),
    (dict(qkv=ones(2, 24, 5).mT), "the last dimension of qkv is not contiguous"),
]
WRONG_GRADIENT = [
    *WRONG,
    (dict(qkv=ones(2, 6, 24)), "dout must be"),
    (dict(dout=ones(2, 5, 8).half()), "dout is Half"),
    (dict(dout=ones(2, 5, 4)), "dout must be"),
    (dict(dout=ones(2, 5, 1).expand(2, 5, 8)), "dout must be"),
    (dict(out=ones(2, 5, 8).float()), "out is Float"),
    (dict(out=ones(10, 8)), "out must be"),
    (dict(out=ones(2, 8, 5).mT), "out must be"),
    (dict(lse=ones(2, 2, 5)), "lse is BFloat16"),
    (dict(lse=torch.ones(2, 5, 2)), "lse must be"),
    (dict(lse=torch.ones(2, 5, 2).mT), "lse must be"),
    (dict(heads=4), "lse must be"),
]


def case_name(value: Any) -> str:
    return value if isinstance(value, str) else "+".join(value)


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=case_name)
def test_the_raw_forward_refuses_what_does_not_fit(changes, message):
    call: dict[str, Any] = dict(qkv=ones(2, 5, 24), heads=2, legacy_order=False)
    OPS.attention_fwd(**call)
    with pytest.raises(RuntimeError, match=f"^attention_fwd: {message}"):
        OPS.attention_fwd(**(call | changes))


@pytest.mark.parametrize(("changes", "message"), WRONG_GRADIENT, ids=case_name)
def test_the_raw_gradient_refuses_what_does_not_fit(changes, message):
    call: dict[str, Any] = dict(dout=ones(2, 5, 8), qkv=ones(2, 5, 24), heads=2, legacy_order=False)
    call["out"], call["lse"] = OPS.attention_fwd(call["qkv"], 2, False)
    OPS.attention_bwd(**call)
    with pytest.raises(RuntimeError, match=f"^attention_bwd: {message}"):
        OPS.attention_bwd(**(call | changes))
