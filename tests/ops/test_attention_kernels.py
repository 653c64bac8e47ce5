"""Tests of attention's kernels: higher derivatives, kernels that a CPU can't run, selection, and CUDA."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from admfast.errors import Unavailable
from admfast.ops import TABLES, attention, attention_ref
from admfast.ops.attention import kernels
from tests.ops.cover import all_pairs, case_id
from tests.ops.tolerance import assert_same_formula, assert_within, unmodified

module = sys.modules["admfast.ops.attention"]
TABLE = TABLES["attention"]
FUSED = ["sdpa", "sdpa-flash"]  # the fused kernels that a CPU can run
HEAD_DIMS = [32, 64, 96, 128, 192, 256]
ORDERS = pytest.mark.parametrize("legacy", [False, True], ids=["new-order", "legacy-order"])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def hessian_product(qkv: Tensor, heads: int, **options) -> Tensor:
    """Return d(g . dL/dqkv)/dqkv for L = sum(sin(attention)), in the dtype of qkv."""
    leaf = qkv.detach().requires_grad_(True)
    (first,) = torch.autograd.grad(attention(leaf, heads, **options).sin().sum(), leaf, create_graph=True)
    return torch.autograd.grad((first * numbers(*qkv.shape, seed=2, dtype=qkv.dtype)).sum(), leaf)[0]


# Second and higher derivatives


@ORDERS
@pytest.mark.parametrize("shape", [(1, 1, 2, 4), (2, 5, 1, 3), (1, 9, 3, 8)], ids=str)
def test_the_gradient_of_the_backward_is_that_of_the_backward_of_the_reference(shape, legacy):
    n, s, heads, d = shape

    def by_formula(dtype: torch.dtype) -> Tensor:
        g, dout, qkv = (numbers(n, s, w * heads * d, seed=w, dtype=dtype) for w in (3, 1, 3))
        found = module.attention_bwd_bwd_ref(g, dout, qkv + g, heads, legacy_order=legacy)
        return torch.cat(found, -1)

    def by_autograd(dtype: torch.dtype) -> Tensor:
        g, dout, qkv = (numbers(n, s, w * heads * d, seed=w, dtype=dtype) for w in (3, 1, 3))
        leaves = dout.requires_grad_(True), (qkv + g).requires_grad_(True)
        out = attention_ref(leaves[1], heads, legacy_order=legacy)
        (first,) = torch.autograd.grad(out, leaves[1], leaves[0], create_graph=True)
        return torch.cat(torch.autograd.grad(first, leaves, g), -1)

    assert_same_formula(by_formula, by_autograd, "d2")


@ORDERS
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_second_derivatives_are_within_tolerance(dtype, impl, legacy):
    qkv = numbers(2, 17, 3 * 2 * 32, dtype=dtype)
    with unmodified(qkv=qkv):
        found = hessian_product(qkv, 2, legacy_order=legacy, impl=impl)
    reference, truth = (
        hessian_product(t, 2, legacy_order=legacy, impl="reference") for t in (qkv, qkv.double())
    )
    assert found.dtype == dtype
    assert_within(found, reference, truth, "d2 qkv", "input gradient")


@pytest.mark.parametrize("impl", FUSED)
def test_the_third_derivative(impl):
    def third(function) -> Tensor:
        value = numbers(1, 3, 12).requires_grad_(True)
        total = function(value)
        for _ in range(2):
            (total,) = torch.autograd.grad(total.sin().sum(), value, create_graph=True)
        return torch.autograd.grad(total.sin().sum(), value)[0]

    torch.testing.assert_close(
        third(lambda value: attention(value, 2, impl=impl)), third(lambda value: attention_ref(value, 2))
    )


@pytest.mark.parametrize("impl", FUSED)
def test_second_derivatives_by_every_road(impl):
    x = numbers(1, 5, 24)

    def loss(value: Tensor, impl: str = impl) -> Tensor:
        return attention(value, 2, impl=impl).sin().sum()

    def checkpointed(value: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(loss, value, use_reentrant=False)

    truth = torch.autograd.functional.hessian(lambda value: loss(value, "reference"), x)
    for function in (loss, checkpointed):
        torch.testing.assert_close(torch.autograd.functional.hessian(function, x), truth)
    grad = torch.func.grad(loss)
    direction = numbers(*x.shape, seed=3)
    product = torch.func.grad(lambda value: (grad(value) * direction).sum())(x)
    torch.testing.assert_close(product, (truth.view(120, 120) @ direction.view(120)).view_as(x))
    if impl == "sdpa":
        many = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.func.vmap(grad)(many)[1], grad(2 * x))
    else:
        with pytest.raises(Unavailable, match=f"impl='{impl}': .*not under torch.func.vmap"):
            torch.func.vmap(loss)(x[None])


@pytest.mark.parametrize("impl", FUSED)
def test_forward_mode_is_refused_by_name(impl):
    x = numbers(1, 5, 24)

    def function(value: Tensor) -> Tensor:
        return attention(value, 2, impl=impl)

    message = "^attention: no forward-mode derivative"
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(Unavailable, match=message):
            torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Unavailable, match=message):
        function(torch.autograd.forward_ad.make_dual(x, x))
    _, tangent = torch.func.jvp(lambda value: attention(value, 2, impl="reference"), (x,), (x,))
    assert tangent.abs().max() > 0.01


@pytest.mark.parametrize("impl", FUSED)
def test_the_first_derivative_recomputes_nothing_and_copies_once(impl):
    """The forward is only the kernel. The backward is the kernel's, and one copy that joins dq, dk and dv."""
    qkv = numbers(2, 9, 48, dtype=torch.float32).requires_grad_(True)
    with Operations() as forward:
        out = attention(qkv, 2, impl=impl)
    with Operations() as backward:
        out.backward(torch.ones_like(out))
    assert out.is_contiguous() and qkv.grad.is_contiguous()
    assert forward.seen == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert backward.seen == ["ones_like", "_scaled_dot_product_flash_attention_for_cpu_backward", "stack"]


VIEWS = {"view", "transpose", "unbind", "detach", "_unsafe_view", "unsqueeze", "squeeze", "_fused_sdp_choice"}


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that records all operations except views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_gradient_is_the_eager_one(backend, impl):
    x = numbers(1, 16, 48, dtype=torch.float32)

    def loss(value: Tensor) -> Tensor:
        return attention(value, 2, legacy_order=True, impl=impl).sin().sum()

    def gradient(value: Tensor) -> Tensor:
        value = value.detach().requires_grad_(True)
        return torch.autograd.grad(loss(value), value)[0]

    truth = gradient(x.double())
    assert truth.abs().max() > 0.1
    torch._dynamo.reset()
    for function in (gradient, torch.func.grad(loss)):
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            found = torch.compile(function, backend=backend, fullgraph=True)(x)
        assert_within(found, gradient(x), truth, "d qkv", "input gradient")


# Kernels that a CPU can't run


@ORDERS
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("kernel", ["FLASH", "EFFICIENT", "CUDNN"])
def test_the_calls_of_torch_s_cuda_kernels_fit_their_signatures(kernel, d, legacy):
    entry = getattr(kernels, kernel)
    with FakeTensorMode():
        qkv = torch.empty(2, 64, 3 * 4 * d, device="cuda", dtype=torch.bfloat16)
        out, *saved = module.AttentionFn.forward(qkv, 4, legacy, entry)
        assert entry.infer(qkv, 4, legacy).shape == (2, 64, 4 * d)
        gradient = module.AttentionBackwardFn.forward(
            torch.empty_like(out), qkv, 4, legacy, entry, out, *saved
        )
    assert out.shape == (2, 64, 4 * d) and gradient.shape == qkv.shape
    assert out.is_contiguous() and gradient.is_contiguous()
    assert out.dtype == gradient.dtype == torch.bfloat16


@pytest.fixture
def stand_in(monkeypatch):
    """Install a fake xformers that follows its documentation on the CPU: [N, S, h, d], explicit gradients."""

    def check(*tensors: Tensor) -> None:
        assert all(t.dim() == 4 and t.stride(-1) == 1 and not t.stride(2) % 8 for t in tensors)

    def weights(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("nshd,nthd->nhst", q, k) / math.sqrt(q.shape[-1])

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        check(query, key, value)
        return torch.einsum("nhst,nthd->nshd", weights(query, key).softmax(-1), value)

    def forward_requires_grad(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return forward(query, key, value), weights(query, key).logsumexp(-1)

    def backward(grad, output, lse, query, key, value):
        check(grad, output, query, key, value)
        p = (weights(query, key) - lse[..., None]).exp()
        delta = (grad * output).sum(-1).transpose(1, 2)[..., None]
        ds = p * (torch.einsum("nshd,nthd->nhst", grad, value) - delta) / math.sqrt(query.shape[-1])
        dq, dk = torch.einsum("nhst,nthd->nshd", ds, key), torch.einsum("nhst,nshd->nthd", ds, query)
        return dq, dk, torch.einsum("nhst,nshd->nthd", p, grad)

    fake = types.ModuleType("xformers.ops.fmha")
    fake.memory_efficient_attention_forward = forward
    fake.memory_efficient_attention_forward_requires_grad = forward_requires_grad
    fake.memory_efficient_attention_backward = backward
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fake)
    return fake


@ORDERS
@pytest.mark.parametrize("d", [8, 32])
def test_xformers_is_called_as_it_is_documented(d, legacy, stand_in):
    qkv = numbers(2, 7, 3 * 3 * d)
    infer = module._run_kernel(kernels.XFORMERS, qkv, 3, legacy_order=legacy)
    torch.testing.assert_close(infer, attention_ref(qkv, 3, legacy_order=legacy))

    def function(value: Tensor) -> Tensor:
        return module._run_kernel(kernels.XFORMERS, value, 3, legacy_order=legacy)

    small = numbers(1, 2, 3 * 3 * 8).requires_grad_(True)
    assert torch.autograd.gradcheck(function, small) and torch.autograd.gradgradcheck(function, small)
    total = torch.func.grad(lambda value: function(value).sin().sum())(qkv)
    truth = torch.func.grad(lambda value: attention_ref(value, 3, legacy_order=legacy).sin().sum())(qkv)
    torch.testing.assert_close(total, truth)


def reason(qkv: Tensor, heads: int, device: str = "cuda") -> str | None:
    """Return xformers' reason for refusing a call, on a fake CUDA device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=device)
        if qkv.storage_offset():
            there = torch.empty(qkv.storage_offset() + 10**6, dtype=qkv.dtype, device=device).as_strided(
                qkv.shape, qkv.stride(), qkv.storage_offset()
            )
        return kernels.xformers_unsupported(*module.split_qkv(there, heads, False))


def test_xformers_names_its_reasons(monkeypatch):
    monkeypatch.setattr(kernels, "_xformers_trial", lambda *_: None)
    half = torch.zeros(2, 8, 3 * 2 * 32, dtype=torch.float16)
    assert reason(half, 2) is None
    assert reason(half, 2, "cpu") == "not on cpu"
    assert reason(half.double(), 2) == "no float64"
    assert reason(torch.zeros(1, 8, 36).half(), 1) == "head dim 12 is not a multiple of 8 up to 256"
    assert reason(torch.zeros(1, 8, 3 * 264).half(), 1) == "head dim 264 is not a multiple of 8 up to 256"
    assert reason(half[:0], 2) == "nothing to attend to"
    wide = torch.zeros(2, 8, 3 * 2 * 32 + 4).half()
    assert reason(wide[..., :-4], 2) == "rows of qkv are not aligned to 8 elements"
    wide = torch.zeros(2, 8, 3 * 2 * 32 + 8).half()
    assert reason(wide[..., 4:-4], 2) == "rows of qkv are not aligned to 8 elements"
    assert reason(wide[..., 8:], 2) is None


def test_a_package_without_its_kernels_is_a_reason(monkeypatch):
    kernels._xformers_trial.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    assert kernels._xformers_trial(0, torch.float16, 32).startswith("its trial failed: ")
    kernels._xformers_trial.cache_clear()


def test_what_is_not_here_says_why(monkeypatch):
    kernels._xformers_not_installed.cache_clear()
    monkeypatch.setattr(kernels, "cuda_missing", lambda: None)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.xformers_missing() == "xformers is not installed"
    kernels._xformers_not_installed.cache_clear()
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    assert kernels.xformers_missing() is None
    kernels._xformers_not_installed.cache_clear()
    assert kernels.torch_unsupported("cudnn", *[torch.zeros(1, 1, 2, 8)] * 3) == "not on a CPU"
    assert kernels.torch_unsupported("flash", *[torch.zeros(1, 1, 2, 8, device="meta")] * 3) == "not on meta"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        qkv = numbers(1, 5, 24).requires_grad_(True)
        assert kernels.find_torch_kernel(*module.split_qkv(qkv, 2, False)) is None
        assert torch.autograd.gradgradcheck(lambda value: attention(value, 2, impl="sdpa"), qkv)
        with pytest.raises(Unavailable, match="torch has no fused attention for this call"):
            attention(qkv, 2, impl="sdpa-flash")


# CUDA

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU_CASES = all_pairs(
    shape=[
        (1, 64, 4, 64),
        (8, 256, 8, 64),
        (2, 1024, 6, 64),
        (2, 256, 4, 128),
        (3, 64, 4, 192),
        (2, 65, 2, 256),
    ],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    impl=[name for name in TABLE.names() if name != "reference"],
    legacy=[False, True],
)


class TestCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("case", GPU_CASES, ids=case_id)
    def test_values_gradients_and_second_derivatives(self, case):
        n, s, heads, d = case["shape"]
        options = {"legacy_order": case["legacy"]}
        qkv = numbers(n, s, 3 * heads * d, dtype=case["dtype"]).cuda()
        dout = numbers(n, s, heads * d, seed=1, dtype=case["dtype"]).cuda()
        entry = TABLE.find(case["impl"])
        why = entry.reason_missing() or entry.reason_unsupported(qkv.requires_grad_(True), heads, **options)
        if why:
            pytest.skip(f"{case['impl']}: {why}")

        def run(value: Tensor, impl: str) -> tuple[Tensor, ...]:
            leaf = value.detach().requires_grad_(True)
            out = attention(leaf, heads, impl=impl, **options)
            (first,) = torch.autograd.grad(out, leaf, dout.to(value.dtype), create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            return out.detach(), first.detach(), second

        results = zip(
            run(qkv, case["impl"]), run(qkv, "reference"), run(qkv.double(), "reference"), strict=True
        )
        for name, kind, triple in zip(
            ("out", "d qkv", "d2 qkv"), ("output", "input gradient", "input gradient"), results, strict=True
        ):
            assert_within(*triple, name, kind)

    @pytest.mark.parametrize("impl", [None, *TABLE.names()])
    def test_a_captured_gradient_is_the_eager_one(self, impl):
        qkv = numbers(2, 256, 3 * 4 * 64, dtype=torch.bfloat16).cuda().requires_grad_(True)
        if impl is not None:
            why = TABLE.find(impl).reason_missing() or TABLE.find(impl).reason_unsupported(qkv, 4)
            if why:
                pytest.skip(f"{impl}: {why}")

        def gradient() -> Tensor:
            return torch.autograd.grad(attention(qkv, 4, impl=impl).square().sum(), qkv)[0]

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                gradient()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradient()
        with torch.no_grad():
            qkv.copy_(numbers(*qkv.shape, seed=5).cuda())
        graph.replay()
        truth = torch.func.grad(lambda value: attention_ref(value, 4).square().sum())(qkv.detach().double())
        assert_within(captured, gradient(), truth, "captured", "input gradient")

    def test_xformers_is_chosen_or_says_why(self):
        qkv = numbers(2, 256, 3 * 4 * 64, dtype=torch.float16).cuda()
        entry = TABLE.find("xformers")
        why = entry.reason_missing() or entry.reason_unsupported(qkv, 4)
        if why:
            pytest.skip(f"xformers: {why}")
        assert_within(
            attention(qkv, 4, impl="xformers"), attention_ref(qkv, 4), attention_ref(qkv.double(), 4), "out"
        )
