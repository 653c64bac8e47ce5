"""Tests of folded convolutions: kept and renewed forms, autograd, tracing, transforms, raw ops, selection."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, FoldedConv, conv_ref, native, record_choices
from admfast.ops.conv.folded import find_fastest
from admfast.ops.conv.forms import packed_missing
from admfast.ops.conv.grad import find_direction
from admfast.ops.conv.winograd import amplification
from admfast.ops.dispatch import override_impl
from tests.ops.cover import dtype_of
from tests.ops.isas import FLAGS, ROOT, run_tests_on
from tests.ops.tolerance import assert_within

TABLE = TABLES["conv"]
IMPLEMENTATIONS = [name for name in TABLE.names() if name != "matmul"]
WITHOUT_C = native.reason_missing()
needs_cpp = pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}")


def derived_bytes(conv):
    return sum(form.nbytes for form in conv.forms())


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("ADMFAST_IMPL", raising=False)


def weights(impl: str | None = None, c_out: int = 40, c_in: int = 20) -> tuple[Tensor, Tensor]:
    """Return weights and bias in a dtype that `impl` supports."""
    weight, bias = torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5, torch.randn(c_out)
    return weight.to(dtype_of("conv", impl)), bias.to(dtype_of("conv", impl))


def images(*shape: int, impl: str | None = None) -> Tensor:
    return torch.randn(shape).to(dtype_of("conv", impl), memory_format=torch.channels_last)


def growth_of(impl: str | None) -> tuple[float, float]:
    return (1.0, 1.0) if impl == "direct" else amplification()


def folded(impl: str | None, *given: Tensor, **options: Any) -> FoldedConv:
    """Return a 3x3 convolution by `impl`, or skip the test if this machine lacks it."""
    if impl is not None and TABLE.find(impl).reason_missing():
        pytest.skip(f"{impl}: {TABLE.find(impl).reason_missing()}")
    return FoldedConv(*given, padding=1, impl=impl, **options)


# Derivatives


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
def test_a_gradient_in_x_by_every_road(impl):
    conv, (weight, bias) = folded(impl, *weights(impl)), weights(impl)
    conv.refold(weight, bias)
    x, residual = images(2, 20, 9, 9, impl=impl), images(2, 40, 9, 9, impl=impl)

    def total(x: Tensor) -> Tensor:
        return conv(x, residual).square().sum()

    leaf = x.clone().requires_grad_(True)
    loss = total(leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    checkpointed = torch.utils.checkpoint.checkpoint(total, leaf, use_reentrant=False)
    (third,) = torch.autograd.grad(checkpointed, leaf)
    _, vjp = torch.func.vjp(total, x)
    assert torch.equal(second, first)
    wide = x.double().requires_grad_(True)
    (truth,) = torch.autograd.grad(
        conv_ref(wide, weight.double(), bias.double(), residual.double()).square().sum(), wide
    )
    plain = x.clone().requires_grad_(True)
    (reference,) = torch.autograd.grad(conv_ref(plain, weight, bias, residual).square().sum(), plain)
    for got in (first, third, torch.func.grad(total)(x), vjp(torch.ones((), dtype=x.dtype))[0]):
        assert_within(got, reference, truth, "dx", "input gradient", growth=growth_of(impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_and_third_derivatives(impl):
    weight, bias = weights(impl, 6, 5)
    conv = folded(impl, weight, bias)

    def third(function: Any, x: Tensor) -> Tensor:
        """Return a third derivative of mean(y^4), which passes through the convolution six times."""
        leaf = x.clone().requires_grad_(True)
        (dx,) = torch.autograd.grad(function(leaf).pow(4).mean(), leaf, create_graph=True)
        (d2x,) = torch.autograd.grad(dx.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(d2x.sum(), leaf)[0]

    x = images(1, 5, 7, 6, impl=impl)
    truth = third(lambda x: conv_ref(x, weight.double(), bias.double()), x.double())
    reference = third(lambda x: conv_ref(x, weight, bias), x)
    growth = tuple(6 * factor for factor in growth_of(impl))
    assert_within(third(conv, x), reference, truth, "d3x", "input gradient", growth=growth)
    nested = torch.func.grad(lambda x: torch.func.grad(lambda x: conv(x).pow(4).mean())(x).square().sum())
    assert bool(nested(x).isfinite().all()) and bool(nested(x).any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_weights_are_frozen(impl):
    weight, bias = (t.requires_grad_(True) for t in weights(impl))
    conv = folded(impl, weight, bias)
    assert not conv(images(1, 20, 8, 8, impl=impl)).requires_grad
    x = images(1, 20, 8, 8, impl=impl).requires_grad_(True)
    conv(x).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is not None


def test_a_gradient_that_nobody_wants_is_not_made(monkeypatch):
    conv = folded("winograd", *weights())
    residual = images(1, 40, 8, 8).requires_grad_(True)
    y = conv(images(1, 20, 8, 8), residual)
    monkeypatch.setattr(type(conv.directions[0]), "transposed", None)  # a gradient in x would call it
    assert torch.equal(torch.autograd.grad(y, residual, torch.ones_like(y))[0], torch.ones_like(y))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_outlives_its_convolution(impl):
    weight, bias = weights(impl)
    x = images(1, 20, 8, 8, impl=impl).requires_grad_(True)
    y = folded(impl, weight, bias)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (reference,) = torch.autograd.grad(conv_ref(x, weight, bias).sum(), x)
    (truth,) = torch.autograd.grad(conv_ref(x.double(), weight.double(), bias.double()).sum(), x)
    assert_within(dx, reference, truth.double(), "dx", "input gradient", growth=growth_of(impl))


def test_transforms_it_can_t_serve_go_to_torch_s_own_or_are_refused_by_name():
    weight, bias = weights()
    x, direction = images(2, 20, 8, 8), images(2, 20, 8, 8)
    chosen, plain = FoldedConv(weight, bias, padding=1), folded("library", weight, bias)
    chosen(x)  # transforms must not reuse the choice for this shape
    _, tangent = torch.func.jvp(chosen, (x,), (direction,))
    torch.testing.assert_close(tangent, conv_ref(direction, weight))
    torch.testing.assert_close(torch.func.vmap(lambda x: chosen(x[None])[0])(x), plain(x))
    small = images(1, 20, 3, 3)
    jacobian = torch.func.jacrev(lambda x: chosen(x)[:, 0, 1, 1].sum())(small)
    torch.testing.assert_close(jacobian[0], weight[0], atol=1e-5, rtol=1e-5)
    for impl in ("winograd", "packed", "direct"):
        conv = folded(impl, *weights(impl))
        x, direction = (t.to(conv.dtype) for t in (x, direction))
        with pytest.raises(Unavailable, match=f"impl='{impl}'.*forward-mode"):
            torch.func.jvp(conv, (x,), (direction,))
        with pytest.raises(Unavailable, match=f"impl='{impl}'.*vmap"):
            torch.func.vmap(lambda x, conv=conv: conv(x[None]))(x)


# Tracing


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("warm", [False, True], ids=["first traced", "first run"])
def test_a_compiled_call_and_its_gradient_are_the_eager_ones(impl, warm):
    torch._dynamo.reset()  # every case compiles the same line, and Dynamo allows eight compilations of it
    conv = folded(impl, *weights(impl))
    x, residual = images(2, 20, 9, 8, impl=impl), images(2, 40, 9, 8, impl=impl)
    if warm:
        conv(x)

    def function(x: Tensor, residual: Tensor) -> Tensor:
        return conv(x, residual) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y = compiled(x, residual)
        assert torch.equal(y, function(x, residual)) and y.stride() == conv(x).stride()
    leaves = x.clone().requires_grad_(True), residual.clone().requires_grad_(True)
    dy = torch.randn_like(y)
    eager, through = (torch.autograd.grad(f(*leaves), leaves, dy) for f in (function, compiled))
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(eager, through, strict=True))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
def test_a_compiled_call_sees_what_is_folded_anew(impl):
    conv, x = folded(impl, *weights(impl)), images(1, 20, 8, 8, impl=impl)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        conv.refold(*weights(impl))
        assert torch.equal(compiled(x), conv(x)) and not torch.equal(compiled(x), before)


def test_a_1x1_convolution_can_be_traced():
    conv = FoldedConv(torch.randn(6, 4, 1, 1), torch.randn(6), impl="matmul")
    x = images(2, 4, 3, 5)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), conv(x))


def test_a_trace_knows_its_convolution_by_a_name():
    conv = folded("winograd", *weights())
    key = conv.directions[0].key
    assert find_direction(key) is conv.directions[0]
    assert find_direction(key + "t") is conv.directions[0].transposed()
    assert find_direction(conv.directions[0].transposed().key + "t") is conv.directions[0]
    with pytest.raises(RuntimeError, match="the convolution -1 that was traced is gone"):
        find_direction("-1")


@needs_cpp
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.ones(1, 4, 4)), "x must be"),
        (dict(x=torch.ones(1, 4, 4, 4).double()), "x is Double"),
        (dict(x=torch.ones(1, 5, 4, 4)), "u must be contiguous"),
        (dict(u=torch.ones(1, 36, 4, 16)), "u must be contiguous"),
        (dict(u=torch.ones(1, 36, 32, 4).mT), "u must be contiguous"),
        (dict(u=torch.ones(1, 36, 4, 32).half()), "u is Half"),
        (dict(channels=33), "u must be contiguous"),
        (dict(channels=0), "4 channels in, 0 out"),
        (dict(bias=torch.ones(5)), "bias must be"),
        (dict(bias=torch.ones(6).bfloat16()), "bias is BFloat16"),
        (dict(residual=torch.ones(1, 6, 4, 5)), "residual must be"),
        (dict(residual=torch.ones(1, 6, 4, 4).double()), "residual is Double"),
    ],
    ids=str,
)
def test_the_raw_op_refuses_what_does_not_fit(changes, message):
    call = dict(x=torch.ones(1, 4, 4, 4), u=torch.ones(1, 36, 4, 32), bias=None, residual=None, channels=6)
    with pytest.raises(RuntimeError, match=f"^conv3x3_winograd: {message}"):
        torch.ops.admfast.conv3x3_winograd(**(call | changes))


# Kept forms


@pytest.mark.parametrize(
    ("impl", "size"), [*((impl, 3) for impl in IMPLEMENTATIONS), ("matmul", 1), ("direct", 1)]
)
def test_folding_anew_writes_the_same_buffers(impl, size):
    options = dict(padding=size // 2, impl=impl, dtype=dtype_of("conv", impl))
    conv = FoldedConv(torch.randn(40, 20, size, size), torch.randn(40), **options)
    x = images(2, 20, 8, 8, impl=impl).requires_grad_(True)
    torch.autograd.grad(conv(x).sum(), x)
    directions = [d for forward in conv.directions for d in forward.with_opposite()]
    held = {id(d): dict(d.forms) for d in directions}
    # A packed form has no data pointer.
    addresses = [f.data_ptr() for forms in held.values() for f in forms.values() if not f.is_mkldnn]
    weight, bias = torch.randn(40, 20, size, size), torch.randn(40)
    bias_address, nbytes = conv._bias.data_ptr(), derived_bytes(conv)
    conv.refold(weight, bias)
    assert [id(d) for forward in conv.directions for d in forward.with_opposite()] == list(held)
    for d in directions:
        assert all(form is held[id(d)][key] for key, form in d.forms.items())
    after = [f.data_ptr() for forms in held.values() for f in forms.values() if not f.is_mkldnn]
    assert after == addresses and conv._bias.data_ptr() == bias_address and derived_bytes(conv) == nbytes
    fresh = FoldedConv(weight, bias, **options)
    assert torch.equal(conv(x), fresh(x))
    assert torch.equal(torch.autograd.grad(conv(x).sum(), x)[0], torch.autograd.grad(fresh(x).sum(), x)[0])


def test_what_is_held_is_what_was_needed():
    sizes = {"library": 1, "winograd": 4, "packed": 1, "direct": 1, "reference": 0}
    for impl, times in sizes.items():
        (weight, bias), x = weights(impl, 64, 32), images(1, 32, 16, 16, impl=impl)
        conv, nbytes = folded(impl, weight, bias), times * weight.nbytes
        assert derived_bytes(conv) == 0
        conv(x), conv(x)
        assert derived_bytes(conv) == nbytes
        leaf = x.clone().requires_grad_(True)
        conv(leaf).sum().backward()
        assert derived_bytes(conv) == nbytes * (2 if impl in ("winograd", "packed", "direct") else 1)
    weight, bias = weights("packed", 64, 32)
    packed = folded("packed", weight, bias)
    packed(images(1, 32, 16, 16)), packed(images(2, 32, 16, 16))
    assert derived_bytes(packed) == 2 * weight.nbytes, "each shape of the input has its own packed form"


def test_other_shapes_can_t_be_folded():
    conv = FoldedConv(*weights(), padding=1)
    weight, bias = weights()
    for name, given in (
        ("weight=", (weight[:, :3], bias)),
        ("weight=", (weight.to("meta"), bias)),
        ("bias=", (weight, None)),
        ("bias.shape", (weight, bias[:3])),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}"):
            conv.refold(*given)
    with pytest.raises(InvalidArgument, match="^bias="):
        FoldedConv(weight, padding=1).refold(weight, bias)


def test_forms_made_in_inference_mode_serve_gradients():
    for impl in (*IMPLEMENTATIONS, None):
        conv = folded(impl, *weights(impl))
        with torch.inference_mode():
            conv(images(1, 20, 8, 8, impl=impl))
        x = images(1, 20, 8, 8, impl=impl).requires_grad_(True)
        conv(x).sum().backward()
        given = weights(impl)
        with torch.inference_mode():
            conv.refold(*given)
        conv(x).sum().backward()


def test_copies_and_pickles_hold_the_weights_alone():
    weight, bias = weights()
    conv, x = FoldedConv(weight, bias, padding=1, dtype=torch.bfloat16), images(1, 20, 8, 8).bfloat16()
    y = conv(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert derived_bytes(other) == 0 and torch.equal(other(x), y)
        weight_before = weight.clone()
        other.refold(*weights())
        assert torch.equal(conv(x), y) and torch.equal(weight, weight_before)
        assert other.directions[0].key != conv.directions[0].key


def test_half_precision_of_float32_weights():
    weight, bias = weights()
    conv, x = FoldedConv(weight, bias, padding=1, dtype=torch.bfloat16), images(1, 20, 8, 8).bfloat16()
    rounded = FoldedConv(weight.bfloat16(), bias.bfloat16(), padding=1)
    y = conv(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rounded(x))


# Which implementation runs


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    ("c_in", "c_out", "side", "batch", "kernel", "name"),
    [
        (192, 192, 64, 1, 3, "winograd"),
        (768, 768, 8, 2, 3, "winograd"),
        (768, 768, 8, 1, 3, "packed"),
        (192, 192, 5, 8, 3, "packed"),
        (3, 192, 64, 4, 3, "packed"),
        (192, 6, 64, 4, 3, "winograd"),
        (1, 32, 32, 1, 3, "winograd"),
        (512, 512, 8, 1, 3, "winograd"),
        (256, 256, 4, 1, 3, "packed"),
        (64, 64, 16, 1, 5, "packed"),
        (64, 64, 16, 1, 1, "matmul"),
    ],
)
def test_the_cpu_runs_what_was_measured_to_be_fastest(
    c_in, c_out, side, batch, kernel, name, amx, monkeypatch
):
    monkeypatch.setattr(native, "uses_amx", lambda: amx)
    conv = FoldedConv(torch.ones(c_out, c_in, kernel, kernel), padding=kernel // 2)
    if name == "winograd" and (WITHOUT_C or native.ops().cpu_instruction_set() == "generic"):
        name = "packed"
    assert find_fastest(conv.directions[0], torch.empty(batch, c_in, side, side)) == name
    half = "matmul" if kernel == 1 else "library"
    assert find_fastest(conv.directions[0], torch.empty(batch, c_in, side, side, device="meta")) == half
    half = "direct" if amx and c_in >= 16 and kernel < 5 else half
    assert (
        find_fastest(conv.directions[0], torch.empty(batch, c_in, side, side, dtype=torch.bfloat16)) == half
    )


def test_it_is_chosen_once_a_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(TABLE, "prefer", lambda direction, x: asked.append(tuple(x.shape)) or "library")
    conv = FoldedConv(*weights(), padding=1)
    for side in (8, 8, 9, 8, 9):
        conv(images(1, 20, side, side))
    assert asked == [(1, 20, 8, 8), (1, 20, 9, 9)]
    with record_choices() as seen:
        conv(images(1, 20, 8, 8))
    assert [choice.name for choice in seen] == ["library"], "a watcher must see every choice"
    monkeypatch.setenv("ADMFAST_IMPL", "conv=reference")
    with record_choices() as seen:
        conv(images(1, 20, 8, 8))
    assert [choice.name for choice in seen] == ["reference"]
    monkeypatch.setenv("ADMFAST_IMPL", "conv=matmul")
    with pytest.raises(Unavailable, match="^ADMFAST_IMPL='conv=matmul': conv can't run"):
        conv(images(1, 20, 8, 8))


def test_a_setting_holds_for_its_block_alone():
    given, x, other = weights(), images(1, 20, 8, 8), images(1, 20, 9, 9)
    conv = FoldedConv(*given, padding=1)
    y, reference = conv(x), conv_ref(x, *given)
    assert not torch.equal(y, reference)
    with override_impl("conv=reference"):
        assert torch.equal(conv(x), reference), "after a first call outside the block"
    assert torch.equal(conv(x), y)
    with override_impl("conv=reference"):
        assert torch.equal(conv(other), conv_ref(other, *given))
    assert not torch.equal(conv(other), conv_ref(other, *given)), "after a first call inside the block"


def test_forms_for_two_sizes_are_kept():
    if packed_missing():
        pytest.skip(packed_missing())
    given = weights()
    conv = FoldedConv(*given, padding=1, impl="packed")
    for batch in (1, 2, 3, 4, 3, 1):
        x = images(batch, 20, 8, 8)
        assert_within(conv(x), conv_ref(x, *given), conv_ref(x.double(), *(t.double() for t in given)), "y")
    assert len(conv.forms()) == 2


@pytest.mark.parametrize("impl", ["library", "matmul", "winograd", "direct", "reference"])
def test_autocast_changes_nothing(impl):
    if TABLE.find(impl).reason_missing():
        pytest.skip(str(TABLE.find(impl).reason_missing()))
    kernel = 1 if impl == "matmul" else 3
    weight, x = torch.randn(24, 20, kernel, kernel), images(2, 20, 8, 8, impl=impl)
    conv = FoldedConv(weight, padding=kernel // 2, impl=impl, dtype=x.dtype)
    residual = images(2, 24, 8, 8, impl=impl)
    y = conv(x, residual)
    with torch.autocast("cpu", torch.bfloat16 if x.dtype == torch.float32 else torch.float16):
        again = conv(x, residual)
    assert again.dtype == x.dtype and torch.equal(again, y)


def test_a_compiled_gradient_kept_on_disk_is_not_that_of_another_shape():
    program = """
import sys
import torch
from admfast.ops import FoldedConv
weight, x = torch.ones(6, int(sys.argv[1]), 3, 3), torch.ones(1, int(sys.argv[1]), 4, 4, requires_grad=True)
y = torch.compile(FoldedConv(weight, padding=1, impl="packed"), fullgraph=True)(x)
(dx,) = torch.autograd.grad(y, x, torch.ones(1, 6, 4, 4))
print(dx.shape[1])
"""
    for channels in ("8", "16"):
        command = [sys.executable, "-c", program, channels]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout.strip()) == (0, channels), done.stderr[-3000:]


@needs_cpp
@pytest.mark.parametrize("isa", FLAGS)
def test_every_instruction_set_is_within_tolerance(isa):
    keyword = "((winograd or direct) and (tolerance or neighbours or bit)) or definition or finite"
    run_tests_on(isa, keyword, "test_conv", "test_conv_direct", "test_conv_int8")
