"""Tests of every implementation of attention against its formula, in both published row orders."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, attention, attention_ref
from admfast.ops.attention import split_qkv
from tests.ops.cover import all_pairs, case_id, dtype_of
from tests.ops.tolerance import (
    DEVICES,
    HALF_AND_SINGLE,
    assert_same_formula,
    assert_within,
    unmodified,
)

TABLE = TABLES["attention"]
IMPLEMENTATIONS = TABLE.names()
# name: (batch, positions, heads, channels per head)
SHAPES = {
    "one": (1, 1, 1, 1),
    "odd": (2, 7, 3, 5),
    "adm-8": (2, 64, 6, 64),
    "adm-16": (1, 256, 4, 64),
    "pool": (2, 65, 2, 32),  # the attention pool adds one position
    "one-head": (1, 49, 1, 96),
    "adm-32": (1, 1024, 2, 32),
    "d128": (2, 64, 2, 128),
    "d192": (1, 100, 1, 192),
    "d256": (3, 1, 2, 256),
    "narrow": (2, 130, 3, 8),  # narrow heads are widened on the CPU
}
LAYOUTS = ["contiguous", "rows", "expanded", "turned"]
CASES = all_pairs(
    shape=list(SHAPES),
    dtype=list(HALF_AND_SINGLE),
    legacy=[False, True],
    layout=LAYOUTS,
    spread=[1, 4],  # factor of q and k: 4 makes one weight nearly 1
    mean=[0, 100],  # added to v; in q and k it would only saturate the softmax
)
# For the compiled kernel: every shape in both orders, in its only dtype.
CASES += [
    dict(shape=name, dtype="bf16", legacy=legacy, layout="rows", spread=spread, mean=0)
    for name in SHAPES
    for legacy, spread in ((False, 1), (True, 4))
]
CASE_IDS = [f"{i}-{case_id(case)}" for i, case in enumerate(CASES)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def channel(kind: int, head: int, j: int, heads: int, d: int, legacy: bool) -> int:
    """Return the index in qkv of row j of a head's q, k or v (kind 0, 1, 2)."""
    return (head * 3 + kind) * d + j if legacy else (kind * heads + head) * d + j


def rows(kind: int, head: int, heads: int, d: int, legacy: bool) -> list[int]:
    return [channel(kind, head, j, heads, d, legacy) for j in range(d)]


def formula(qkv: Tensor, heads: int, legacy: bool) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, computed head by head."""
    d = qkv.shape[-1] // (3 * heads)
    outs = []
    for head in range(heads):
        q, k, v = (qkv[..., rows(kind, head, heads, d, legacy)] for kind in range(3))
        logits = torch.einsum("nsd,ntd->nst", q, k) / d**0.5
        powers = (logits - logits.amax(-1, keepdim=True)).exp()
        outs.append(torch.einsum("nst,ntd->nsd", powers / powers.sum(-1, keepdim=True), v))
    return torch.cat(outs, dim=-1)


def qkv_of(case: dict[str, Any]) -> tuple[Tensor, int]:
    """Return the qkv of a case in its dtype and layout, and the number of heads."""
    n, s, heads, d = SHAPES[case["shape"]]
    qkv = torch.randn((n, s, 3 * heads * d), generator=torch.Generator().manual_seed(0))
    for head in range(heads):
        for kind in range(3):
            where = rows(kind, head, heads, d, case["legacy"])
            qkv[..., where] = (
                qkv[..., where] + case["mean"] if kind == 2 else qkv[..., where] * case["spread"]
            )
    qkv = qkv.to(HALF_AND_SINGLE[case["dtype"]])
    if case["layout"] == "rows":  # a part of a wider product: only the last dimension is contiguous
        wide = torch.full((n, 2 * s, 3 * heads * d + 8), float("nan"), dtype=qkv.dtype)
        return wide[:, ::2, 8:].copy_(qkv), heads
    if case["layout"] == "turned":  # the layout after a 1x1 convolution of [N, C, S]
        return qkv.transpose(1, 2).contiguous().transpose(1, 2), heads
    return qkv[:1].expand_as(qkv) if case["layout"] == "expanded" else qkv, heads


def largest_gradient_term(qkv: Tensor, heads: int, legacy: bool, dy: Tensor, gradient: Tensor) -> float:
    """Return the largest number that a gradient's computation rounds, which sets the tolerance's unit u.

    One candidate is the largest sum of |terms| P (dP - delta) in the gradient of q or k, in which the mean
    of v cancels. The other matters in float32 only: a fused backward computes P as exp(logit - l), where l
    is the log-sum-exp in float32, so half a unit of l becomes a relative error of a whole row of P.
    """
    wide = qkv.double()
    q, k, v = split_qkv(wide, heads, legacy)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = torch.softmax(logits, -1)
    terms = weights * (dy.double().unflatten(-1, (heads, -1)).transpose(1, 2) @ v.transpose(-1, -2)).abs()
    sums = (terms @ k.abs(), terms.transpose(-1, -2) @ q.abs())
    largest = max(float(part.max()) for part in sums) / q.shape[-1] ** 0.5
    if qkv.dtype == torch.float32:
        rounded = logits.logsumexp(-1).abs().max() / 2 * gradient.abs().max()
        largest = max(largest, float(rounded))
    return largest


def refused(impl: str, qkv: Tensor, heads: int, legacy: bool = False) -> bool:
    """Tell whether `impl` can't run the call. If so, check that naming it raises an error with the reason."""
    entry = TABLE.find(impl)
    reason = entry.reason_missing() or entry.reason_unsupported(qkv, heads, legacy_order=legacy)
    if reason:
        with pytest.raises(
            Unavailable, match=re.escape(f"impl='{impl}': attention can't run on it here: {reason}")
        ):
            attention(qkv, heads, legacy_order=legacy, impl=impl)
    return bool(reason)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_reference_is_the_formula(case):
    qkv, heads = qkv_of(case)
    legacy = case["legacy"]
    assert_same_formula(
        lambda dtype: attention(qkv.to(dtype), heads, legacy_order=legacy, impl="reference"),
        lambda dtype: formula(qkv.to(dtype), heads, legacy),
        case["shape"],
        "sum",  # a sum over all positions, in another order on each side
        qkv.shape[1],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_values_and_gradient_are_within_tolerance(case, impl, device):
    qkv, heads = qkv_of(case)
    legacy, there = case["legacy"], qkv.to(device)
    if refused(impl, there, heads, legacy):
        return
    dy = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3, generator=torch.Generator().manual_seed(1)).to(
        qkv.dtype
    )

    def run(function, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        leaf = value.detach().requires_grad_(True)
        out = function(leaf, heads, legacy_order=legacy, **options)
        return out.detach().cpu(), torch.autograd.grad(out, leaf, dy.to(out))[0].cpu()

    with unmodified(qkv=there, dy=dy):
        out, gradient = run(attention, there, impl=impl)
    # Each device sums in its own order, so the reference's error is measured on the same device.
    reference, reference_gradient = run(attention_ref, there)
    truth, true_gradient = run(attention_ref, qkv.double())
    assert out.dtype == gradient.dtype == qkv.dtype
    assert_within(out, reference, truth, "out")
    largest = largest_gradient_term(qkv, heads, legacy, dy, true_gradient)
    assert_within(
        gradient, reference_gradient, true_gradient, "d qkv", "input gradient", largest_term=largest
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_orders_are_one_permutation_of_the_rows(shape, impl):
    n, s, heads, d = SHAPES[shape]
    legacy = torch.randn(n, s, 3 * heads * d).to(dtype_of("attention", impl))
    order = [
        channel(kind, head, j, heads, d, True) for kind in range(3) for head in range(heads) for j in range(d)
    ]
    assert sorted(order) == list(range(3 * heads * d))
    # The same permutation without a loop: [h, 3, d] -> [3, h, d].
    assert torch.equal(legacy[..., order], legacy.unflatten(-1, (heads, 3, d)).transpose(2, 3).flatten(2))
    for old, new in zip(
        split_qkv(legacy, heads, True), split_qkv(legacy[..., order], heads, False), strict=True
    ):
        assert old.shape == (n, heads, s, d) and torch.equal(old, new)
        assert old.untyped_storage().data_ptr() == legacy.untyped_storage().data_ptr(), "split_qkv copied"
    if not refused(impl, legacy, heads):
        # torch's kernels may sum in another order if the strides differ.
        old = attention(legacy, heads, legacy_order=True, impl=impl)
        reference = attention_ref(legacy, heads, legacy_order=True)
        truth = attention_ref(legacy.double(), heads, legacy_order=True)
        for got in (old, attention(legacy[..., order], heads, impl=impl)):
            assert_within(got, reference, truth, shape)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_positions_samples_and_heads_do_not_mix(impl):
    qkv = torch.randn(2, 5, 3 * 3 * 4).to(dtype_of("attention", impl))
    if refused(impl, qkv, 3):
        return
    before = attention(qkv, 3, impl=impl)
    touched = qkv.clone()
    touched[1, 2, rows(0, 1, 3, 4, False)] += 1  # q of image 1, position 2, head 1
    changed = (attention(touched, 3, impl=impl) != before).unflatten(-1, (3, 4)).any(-1).nonzero()
    assert changed.tolist() == [[1, 2, 1]]
    order = torch.tensor([3, 1, 4, 0, 2])
    truth = attention_ref(qkv.double(), 3)
    assert_within(
        attention(qkv[:, order], 3, impl=impl), before[:, order], truth[:, order], "turned positions"
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_edges(impl):
    d, dtype = 4, dtype_of("attention", impl)
    for shape in ((0, 5, 3 * d), (2, 0, 3 * d)):
        if not refused(impl, torch.randn(shape).to(dtype), 1):
            assert attention(torch.randn(shape).to(dtype), 1, impl=impl).shape == (*shape[:2], d)
    one = torch.randn(3, 1, 3 * d).to(dtype)
    if not refused(impl, one, 1):
        assert torch.equal(attention(one, 1, impl=impl), one[..., 2 * d :]), "one position gives its v"
    # Logits of 5000 and 0: exponentials overflow unless the largest logit is subtracted first.
    sharp = torch.cat([100 * torch.eye(d).repeat(1, 2), torch.arange(4.0 * d).view(d, d)], 1)[None].to(dtype)
    if not refused(impl, sharp, 1):
        assert torch.equal(attention(sharp, 1, impl=impl), sharp[..., 2 * d :])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_derivatives_in_float64(impl, legacy):
    qkv = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    if refused(impl, qkv, 2, legacy):
        return

    def function(value: Tensor) -> Tensor:
        return attention(value, 2, legacy_order=legacy, impl=impl)

    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gradient_by_every_road(impl):
    qkv = torch.randn(2, 16, 3 * 2 * 8).to(dtype_of("attention", impl))
    if refused(impl, qkv, 2):
        return

    def total(value: Tensor, impl: str = impl) -> Tensor:
        return attention(value, 2, impl=impl).square().sum()

    leaf, wide = qkv.clone().requires_grad_(True), qkv.double().requires_grad_(True)
    loss = total(leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, again)
    (truth,) = torch.autograd.grad(total(wide, "reference"), wide)
    checkpointed = torch.utils.checkpoint.checkpoint(total, leaf, use_reentrant=False)
    (third,) = torch.autograd.grad(checkpointed, leaf)
    _, vjp = torch.func.vjp(total, qkv)
    found = [third, torch.func.grad(total)(qkv), *vjp(torch.ones((), dtype=qkv.dtype))]
    if impl != "cpp":  # torch.compile gets torch's own kernel
        compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
        found += torch.autograd.grad(compiled(leaf), leaf)
    for got in found:
        assert_within(got, first, truth, "d qkv", "input gradient")


def test_a_last_dimension_that_is_not_contiguous_is_not_for_sdpa():
    turned = torch.randn(2, 36, 5).transpose(1, 2)
    with pytest.raises(Unavailable, match="impl='sdpa': .*last dimension of qkv is not contiguous"):
        attention(turned, 3, impl="sdpa")
    assert torch.equal(attention(turned, 3), attention_ref(turned, 3))


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    ("name", "qkv", "heads"),
    [
        ("qkv.shape", torch.ones(6, 6), 1),
        ("qkv.shape", torch.ones(1, 2, 2, 6), 1),
        ("qkv.dtype", torch.ones(1, 2, 6, dtype=torch.int64), 1),
        ("num_heads=0", torch.ones(1, 2, 6), 0),
        ("num_heads=-1", torch.ones(1, 2, 6), -1),
        ("num_heads=4", torch.ones(1, 2, 6), 4),
        ("num_heads=1", torch.ones(1, 2, 7), 1),
    ],
)
def test_wrong_arguments_are_named(name, qkv, heads, impl):
    with pytest.raises(InvalidArgument, match=f"^{name}"):
        attention(qkv, heads, impl=impl)
