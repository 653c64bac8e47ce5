"""Tests of the direct convolution in bfloat16: its form, blocks and memory, selection, and the raw op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from admfast.errors import Unavailable
from admfast.ops import FoldedConv, conv_ref, native, record_choices
from tests.ops import tiles
from tests.ops.cover import laid_out
from tests.ops.tolerance import assert_within, unmodified

HALF = torch.bfloat16
WITHOUT_C = native.reason_missing()
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}"),
]
# name: (batch, C_in, C_out, spatial, kernel)
SHAPES: dict[str, tuple] = {
    **{name: (*shape, 3) for name, shape in tiles.SHAPES.items()},
    "1x1 in place": (2, 64, 40, (8, 10), 1),
    "1x1 packed": (2, 40, 64, (9, 11), 1),
    "1x1 of whole groups": (2, 40, 64, (8, 4), 1),
    "1x1 in blocks": (3, 64, 20, (40, 16), 1),
    "tokens in place": (2, 32, 96, (40,), 1),
    "tokens packed": (3, 70, 33, (21,), 1),
    "volume": (2, 32, 17, (3, 4, 5), 1),
}


def call_of(name: str) -> tuple[FoldedConv, Tensor, Tensor, Tensor, Tensor]:
    """Return a convolution by `direct`, its weights and bias, x and residual."""
    n, c_in, c_out, spatial, kernel = SHAPES[name]
    weight = torch.randn(c_out, c_in, *(kernel,) * len(spatial)) / (c_in * kernel ** len(spatial)) ** 0.5
    weight, bias = weight.to(HALF), torch.randn(c_out).to(HALF)
    x, residual = (laid_out(torch.randn(n, c, *spatial), "channels_last").to(HALF) for c in (c_in, c_out))
    return FoldedConv(weight, bias, padding=kernel // 2, impl="direct"), weight, bias, x, residual


@pytest.mark.parametrize("name", SHAPES)
def test_values_are_within_tolerance_by_any_number_of_threads(name, threads, poisoned):
    conv, weight, bias, x, residual = call_of(name)
    padding = weight.shape[-1] // 2
    expected = conv_ref(x, weight, bias, residual, padding=padding)
    wide = (t.double() for t in (x, weight, bias, residual))
    truth = conv_ref(*wide, padding=padding)
    y = tiles.by_any_number_of_threads(conv, x, residual, threads)
    assert_within(y, expected, truth, name)


@pytest.mark.parametrize("name", SHAPES)
def test_the_place_in_a_batch_changes_no_bit(name):
    conv, _, _, x, residual = call_of(name)
    tiles.assert_images_are_independent(conv, x, residual)


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_of_an_earlier_call_do_not_matter(name):
    conv, _, _, x, residual = call_of(name)
    clean = conv(x, residual)
    # The memory that a thread keeps is then full of NaN.
    large = torch.full((2, 640, 48, 80), float("nan"), dtype=HALF)
    torch.ops.admfast.conv_direct(large, torch.ones(1, 20, 9, 2, 16, 16, 2, dtype=HALF), None, None, 1)
    assert torch.equal(conv(x, residual), clean)
    one = x.clone(memory_format=torch.preserve_format)
    one[-1] = float("nan")
    y = conv(one, residual)
    assert torch.equal(y[:-1], clean[:-1]) and y[-1].isnan().all()


@pytest.mark.parametrize("shape", [(70, 40, 3, 3), (32, 33, 3, 3), (6, 3, 1, 1), (33, 64, 1)], ids=str)
def test_the_form_has_the_weights_in_pairs_of_channels(shape):
    direction = FoldedConv(torch.randn(shape).to(HALF), padding=shape[-1] // 2).directions[0]
    for one in (direction, direction.transposed()):
        weight = one.weight().flatten(2)
        c_out, c_in, taps = weight.shape
        form = one.form("direct")
        assert form.shape == (-(-c_out // 32), -(-c_in // 32), taps, 2, 16, 16, 2) and form.is_contiguous()
        assert torch.equal(tiles.weights_in_form(form, c_out, c_in), weight)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("name", ["groups over rows", "1x1 in place", "tokens packed"])
def test_the_raw_op_reads_any_layout(name, layout):
    conv, _, bias, x, residual = call_of(name)
    form, channels = conv.directions[0].form("direct"), len(bias)
    x, residual = (laid_out(t.contiguous(), layout) for t in (x, residual))
    spread = torch.full((2 * channels,), float("nan"), dtype=HALF)[::2].copy_(bias)
    with unmodified(x=x, residual=residual, bias=spread):
        y = torch.ops.admfast.conv_direct(x, form, spread, residual, channels)
    x, residual = (laid_out(t.contiguous(), "channels_last") for t in (x, residual))
    assert torch.equal(y, conv(x, residual)) and y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("name", SHAPES)
def test_the_raw_op_passes_opcheck(name):
    conv, _, bias, x, residual = call_of(name)
    form = conv.directions[0].form("direct")
    for given in ((bias, residual), (None, None)):
        torch.library.opcheck(torch.ops.admfast.conv_direct.default, (x, form, *given, len(bias)))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=HALF)


FORM = (1, 1, 9, 2, 16, 16, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=ones(4, 4)), "x must be"),
        (dict(x=ones(1, 0, 4, 4)), "x must be"),
        (dict(x=ones(1, 4, 4, 4).float()), "x is Float"),
        (dict(x=ones(1, 33, 4, 4)), "w must be"),
        (dict(x=ones(1, 4, 4)), "9 taps of 1 dimensions"),
        (dict(x=ones(1, 4, 4, 4, 4)), "9 taps of 3 dimensions"),
        (dict(w=ones(*FORM).float()), "w is Float"),
        (dict(w=ones(*FORM[1:])), "w must be contiguous"),
        (dict(w=ones(*FORM).transpose(3, 6)), "w must be contiguous"),
        (dict(w=ones(2, *FORM[1:])), "w must be"),
        (dict(w=ones(1, 1, 4, *FORM[3:])), "4 taps of 2 dimensions"),
        (dict(w=ones(1, 1, 9, 2, 16, 32, 1)), "w must be"),
        (dict(channels=33), "w must be"),
        (dict(channels=0), "w must be"),
        (dict(channels=-1), "w must be"),
        (dict(bias=ones(5)), "bias must be"),
        (dict(bias=ones(6, 1)), "bias must be"),
        (dict(bias=ones(6).float()), "bias is Float"),
        (dict(residual=ones(1, 6, 4, 5)), "residual must be"),
        (dict(residual=ones(1, 1, 4, 4)), "residual must be"),
        (dict(residual=ones(1, 6, 4, 4).double()), "residual is Double"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_raw_op_refuses_what_does_not_fit(changes, message):
    call: dict[str, Any] = dict(x=ones(1, 4, 4, 4), w=ones(*FORM), bias=None, residual=None, channels=6)
    torch.ops.admfast.conv_direct(**call)
    with pytest.raises(RuntimeError, match=f"^conv_direct: {message}"):
        torch.ops.admfast.conv_direct(**(call | changes))


@pytest.mark.parametrize(
    ("kernel", "options", "dtype", "reason"),
    [
        (3, dict(padding=1), torch.float32, "x is torch.float32; bfloat16"),
        (3, dict(padding=1, stride=2), HALF, "neither a 3x3 convolution of stride 1 and padding 1 nor a 1x1"),
        (3, dict(padding=0), HALF, "neither a 3x3"),
        (5, dict(padding=2), HALF, "neither a 3x3"),
        (1, dict(padding=1), HALF, "neither a 3x3"),
        (1, dict(stride=2), HALF, "neither a 3x3"),
    ],
)
def test_what_it_can_t_compute_is_refused_with_the_reason(kernel, options, dtype, reason):
    conv = FoldedConv(torch.ones(4, 20, kernel, kernel, dtype=dtype), impl="direct", **options)
    with pytest.raises(Unavailable, match=f"^impl='direct': conv can't run on it here: {reason}"):
        conv(torch.ones(1, 20, 8, 8, dtype=dtype))


def chosen(conv: FoldedConv, x: Tensor) -> str:
    with record_choices() as seen:
        conv(x)
    return seen[-1].name


@pytest.mark.parametrize(("kernel", "otherwise"), [(3, "library"), (1, "matmul")])
def test_it_is_chosen_with_amx_unless_something_counts_torch_s_operations(kernel, otherwise, monkeypatch):
    conv = FoldedConv(torch.randn(32, 32, kernel, kernel).to(HALF), padding=kernel // 2)
    x, other = torch.randn(1, 32, 8, 8).to(HALF), torch.randn(2, 32, 8, 8).to(HALF)
    monkeypatch.setattr(native, "uses_amx", lambda: True)
    assert chosen(conv, x) == "direct"
    assert chosen(conv, x.contiguous(memory_format=torch.channels_last)) == "direct"
    with FlopCounterMode(display=False) as counter:
        assert chosen(conv, x) == otherwise
    assert counter.get_total_flops() == 2 * 8 * 8 * 32 * 32 * kernel**2
    assert "admfast::" not in str(torch.jit.trace(lambda x: conv(x), x).graph)
    monkeypatch.setattr(native, "uses_amx", lambda: False)
    assert chosen(conv, other) == otherwise
    with pytest.raises(Unavailable, match="not under torch.func.vmap"):
        torch.func.vmap(FoldedConv(conv.weight, padding=kernel // 2, impl="direct"))(x[None])


@pytest.mark.parametrize("name", ["rows of whole groups", "1x1 packed", "tokens in place"])
def test_a_compiled_gradient_is_the_eager_one(name):
    conv, _, _, x, residual = call_of(name)
    tiles.assert_compiled_is_eager(conv, x, residual)


@pytest.mark.parametrize("name", ["groups over rows", "1x1 in place", "tokens packed"])
def test_an_expanded_gradient_is_the_full_one(name):
    conv, _, _, x, residual = call_of(name)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
    (expanded,) = torch.autograd.grad(conv(leaf, residual).sum(), leaf)
    (full,) = torch.autograd.grad(conv(leaf, residual), leaf, torch.ones_like(residual))
    assert torch.equal(expanded, full) and bool(full.any())


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_of_the_gradient_is_the_convolution(name):
    conv, _, _, x, residual = call_of(name)
    leaf, dy = x.clone().requires_grad_(True), torch.randn_like(residual).requires_grad_(True)
    (dx,) = torch.autograd.grad(conv(leaf), leaf, dy, create_graph=True)
    (d_dy,) = torch.autograd.grad(dx, dy, x)
    assert torch.equal(d_dy, FoldedConv(conv.weight, padding=conv.options.padding, impl="direct")(x))


@pytest.mark.parametrize("name", ["rows of whole groups", "1x1 in place", "tokens packed"])
def test_two_sources_and_rows_in_another_order(name):
    _, weight, bias, x, residual = call_of(name)
    order = torch.randperm(len(bias)).tolist()
    padding, part = weight.shape[-1] // 2, x.shape[1] // 2
    conv = FoldedConv(weight, bias, padding=padding, impl="direct", split=part, rows=order)
    y = conv(x[:, :part], residual, x[:, part:])
    reference = conv_ref(x[:, :part], weight[order, :part], bias[order], residual, padding=padding)
    reference = conv_ref(x[:, part:], weight[order, part:], None, reference, padding=padding)
    wide = (t.double() for t in (x, weight[order], bias[order], residual))
    assert_within(y, reference, conv_ref(*wide, padding=padding), name)
