"""Tests of convolutions of 8 bits: their numbers, blocks and memory, gradients, selection, and the raw op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import FoldedConv, conv_int8_ref, dispatch, native, record_choices
from tests.ops import tiles
from tests.ops.cover import laid_out
from tests.ops.tolerance import assert_within, unmodified

HALF = torch.bfloat16
WITHOUT_C = native.reason_missing()
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}"),
]
DTYPES = [HALF, torch.float32]


def call_of(name: str, dtype: torch.dtype = HALF, impl: str | None = "cpp") -> tuple[Any, ...]:
    """Return a convolution of 8 bits, its weights and bias, x and residual. Every image has its own range."""
    n, c_in, c_out, spatial = tiles.SHAPES[name]
    weight, bias = torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5, torch.randn(c_out).to(dtype)
    x, residual = (laid_out(torch.randn(n, c, *spatial), "channels_last") for c in (c_in, c_out))
    x = F.silu(x) * torch.logspace(-2, 2, n)[:, None, None, None]
    conv = FoldedConv(weight, bias, padding=1, dtype=dtype, int8=True, impl=impl)
    return conv, weight, bias, x.to(dtype), residual.to(dtype)


def rounded(weight: Tensor) -> Tensor:
    """Return the weights, rounded to 127 steps of each output channel, in float64."""
    scale = (weight.flatten(1).abs().amax(1) / 127)[:, None, None, None]
    return (weight / scale).round().double() * scale.double()


def truth_of(weight: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return the definition's result, from numbers rounded here, in float64."""
    y = []
    for image in x.float():
        least, most = image.amin().clamp(max=0).double(), image.amax().clamp(min=0).double()
        step = ((most - least) / 255).float()
        zero = (-least / step.double()).round().float()
        level = ((image * (1 / step)).round() + zero).clamp(0, 255) - zero
        y.append(F.conv2d(level.double()[None] * step.double(), rounded(weight), padding=1))
    found = torch.cat(y)
    found = found if bias is None else found + bias.double()[:, None, None]
    return found if residual is None else found + residual.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tiles.SHAPES)
def test_values_are_the_definition_s_by_any_number_of_threads(name, dtype, threads, poisoned):
    conv, weight, bias, x, residual = call_of(name, dtype)
    y = tiles.by_any_number_of_threads(conv, x, residual, threads)
    truth, expected = truth_of(weight, bias, x, residual), conv_int8_ref(x, weight, bias, residual)
    largest = float(x.abs().max()) * float(weight.abs().flatten(1).sum(1).max())
    assert_within(expected, truth.to(dtype), truth, name)
    assert_within(y, expected, truth, name, largest_term=largest if dtype == torch.float32 else 0.0)
    by_reference = FoldedConv(weight, bias, padding=1, dtype=dtype, int8=True, impl="reference")
    assert torch.equal(by_reference(x, residual), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tiles.SHAPES)
def test_an_image_does_not_depend_on_its_batch(name, dtype):
    conv, _, _, x, residual = call_of(name, dtype)
    tiles.assert_images_are_independent(conv, x, residual)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_an_image_that_is_not_finite_becomes_nan_and_no_other(impl, dtype, value):
    conv, _, _, x, residual = call_of("groups over rows", dtype, impl)
    clean = conv(x, residual)
    x = x.clone(memory_format=torch.preserve_format)
    x[1, 20, 3, 3] = value
    y = conv(x, residual)
    assert torch.equal(y[0], clean[0]) and y[1].isnan().all()


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("filled", [0.0, 3.0, -2.0, 1e-37], ids=str)
def test_an_image_of_one_value_is_exact(filled, impl):
    weight, bias = torch.randn(6, 20, 3, 3), torch.randn(6)
    x = torch.full((1, 20, 8, 8), filled)
    y = FoldedConv(weight, bias, padding=1, int8=True, impl=impl)(x)
    weight, bias, x = rounded(weight), bias.double(), x.double()
    # Five roundings to float32: of the step, the sum, two products and the bias.
    terms = F.conv2d(x.abs(), weight.abs(), bias.abs(), padding=1)
    assert bool(((y - F.conv2d(x, weight, bias, padding=1)).abs() <= 5 * 2**-24 * terms).all())


@pytest.mark.parametrize("place", [(0, 0, 0), (19, -1, -1), (12, 4, 3)], ids=str)
@pytest.mark.parametrize("value", [9.0, -9.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_range_has_the_extreme_wherever_it_lies(dtype, value, place):
    weight, x = (
        torch.randn(6, 20, 3, 3),
        torch.rand(1, 20, 9, 7).to(dtype),
    )  # 1260 numbers, 12 after whole vectors
    x[(0, *place)] = value
    y = FoldedConv(weight, padding=1, dtype=dtype, int8=True, impl="cpp")(x)
    assert_within(y, conv_int8_ref(x, weight), truth_of(weight, None, x, None), "range")


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_the_smallest_number_has_level_0_even_if_its_level_is_rounded_below(impl):
    least, most = -0.6445451974868774, 1.3238264322280884
    step = (torch.tensor(most).double() - least).div(255).float()
    assert float((least * (1 / step)).round()) == -84 and round(-least / float(step)) == 83
    weight = torch.zeros(32, 32, 3, 3)
    weight[:, :, 1, 1] = torch.eye(32)
    x = torch.full((1, 32, 8, 8), least)
    x[..., 4:] = most
    y = FoldedConv(weight, padding=1, int8=True, impl=impl)(x)
    assert ((y - x).abs() <= step).all()  # half of it for the input's rounding, half for the zero's


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("size", [1e-36, 100 * 2.0**-100, 250 * 2.0**-100, 1e-20, 1e30], ids=str)
def test_images_of_any_size_are_off_by_a_step_at_most(size, impl):
    weight, x = torch.randn(6, 20, 3, 3), torch.rand(1, 20, 8, 8) * size
    y = FoldedConv(weight, padding=1, int8=True, impl=impl)(x).double()
    step = max(float(x.max()) / 255, 2.0**-100)  # half of it for the input's rounding, half for the zero's
    x, weight = x.double(), rounded(weight)
    limit = F.conv2d(step + 2**-22 * x, weight.abs(), padding=1)
    assert bool(((y - F.conv2d(x, weight, padding=1)).abs() <= limit).all()) and bool(y.any()) == (
        size > step
    )


def test_scales_whose_product_would_overflow():
    weight = torch.full((6, 20, 3, 3), 1e6)
    x = torch.zeros(1, 20, 8, 8)
    x[..., :3, :] = 3e36
    y = FoldedConv(weight, padding=1, int8=True, impl="cpp")(x)
    assert (y[..., 5:, :] == 0).all() and y[..., :3, :].isinf().all()


def test_a_channel_without_weights_gives_its_bias():
    weight, bias = torch.randn(6, 20, 3, 3), torch.randn(6)
    weight[2] = 0
    for impl in ("cpp", "reference"):
        y = FoldedConv(weight, bias, padding=1, int8=True, impl=impl)(torch.randn(2, 20, 8, 8))
        assert (y[:, 2] == bias[2]).all() and y.isfinite().all()


@pytest.mark.parametrize("shape", [(70, 72, 3, 3), (32, 33, 3, 3)], ids=str)
def test_the_form_has_the_weights_in_words_of_four_channels(shape):
    direction = FoldedConv(torch.randn(shape), padding=1, int8=True).directions[0]
    for one in (direction, direction.transposed()):
        weight, (scale, total) = one.weight(), one.form("int8_scales")
        c_out, c_in = weight.shape[:2]
        form = one.form("int8")
        assert form.shape == (-(-c_out // 32), -(-c_in // 64), 9, 2, 16, 16, 4) and form.is_contiguous()
        whole = tiles.weights_in_form(form, c_out, c_in).float()
        assert torch.equal(whole.flatten(1).sum(1), total) and int(whole.abs().max()) == 127
        assert torch.equal(whole, (weight / scale[:, None, None, None]).round().flatten(2))


def test_refolding_rewrites_weights_and_scales_in_place():
    conv, weight, bias, x, residual = call_of("groups over rows")
    conv(x, residual)
    forms = [form.data_ptr() for form in conv.forms()]
    other = torch.randn_like(weight)
    conv.refold(other, bias)
    assert torch.equal(
        conv(x, residual), FoldedConv(other, bias, padding=1, dtype=HALF, int8=True)(x, residual)
    )
    assert [form.data_ptr() for form in conv.forms()] == forms and len(forms) == 2


# Gradients


@pytest.mark.parametrize("name", ["rows of whole groups", "groups over rows"])
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_the_gradient_is_the_transposed_convolution_of_8_bits(name, impl):
    conv, weight, _, x, residual = call_of(name, torch.float32, impl)
    leaves = [t.clone().requires_grad_(True) for t in (x, residual)]
    dy = torch.randn_like(residual).requires_grad_(True)
    dx, dresidual = torch.autograd.grad(conv(*leaves), leaves, dy, create_graph=True)
    assert torch.equal(dresidual, dy)
    turned = weight.flip(2, 3).transpose(0, 1).contiguous()
    truth = truth_of(turned, None, dy.detach(), None)
    largest = float(dy.detach().abs().max()) * float(turned.abs().flatten(1).sum(1).max())
    assert_within(dx.detach(), conv_int8_ref(dy.detach(), turned), truth, name, largest_term=largest)
    (d_dy,) = torch.autograd.grad(dx, dy, x)
    assert torch.equal(d_dy, FoldedConv(weight, padding=1, int8=True, impl=impl)(x))


@pytest.mark.parametrize("name", ["rows of whole groups", "groups over rows"])
def test_a_compiled_gradient_is_the_eager_one(name):
    conv, _, _, x, residual = call_of(name, impl=None)
    tiles.assert_compiled_is_eager(conv, x, residual)


# Which calls are of 8 bits


def chosen(conv: FoldedConv, x: Tensor) -> tuple[str, str]:
    with record_choices() as seen:
        conv(x)
    return seen[-1].op, seen[-1].name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_3x3_convolutions_outside_of_transforms_are(dtype):
    def make(kernel: int = 3, **options: Any) -> FoldedConv:
        options = dict(padding=kernel // 2, int8=True) | options
        return FoldedConv(torch.randn(32, 32, kernel, kernel).to(dtype), **options)

    conv, x = make(), torch.randn(1, 32, 8, 8).to(dtype)
    assert chosen(conv, x) == ("conv_int8", "cpp")
    for other in (make(1), make(5), make(stride=2), make(padding=0), make(int8=False)):
        assert chosen(other, x)[0] == "conv"
    with FlopCounterMode(display=False) as counter:
        assert chosen(conv, x)[0] == "conv"
    assert counter.get_total_flops() == 2 * 8 * 8 * 32 * 32 * 9
    assert "admfast::" not in str(torch.jit.trace(lambda x: conv(x), x).graph)
    plain = make(int8=False)
    plain.refold(conv.weight, None)
    with dispatch.override_impl("conv=library"):
        assert torch.equal(torch.func.vmap(conv)(x[None]), torch.func.vmap(plain)(x[None]))
        primal, tangent = torch.func.jvp(conv, (x,), (x,))
        assert torch.equal(primal, tangent)  # a linear map


def test_sums_that_exceed_32_bits_are_not():
    channels = 2**31 // (255 * 127 * 9) + 1
    assert 255 * 127 * 9 * channels > 2**31 > 255 * 127 * 9 * (channels - 1)
    for count, op in ((channels, "conv"), (channels - 1, "conv_int8")):
        conv = FoldedConv(torch.ones(1, count, 3, 3), padding=1, int8=True)
        x = torch.ones(1, count, 3, 3)
        assert chosen(conv, x)[0] == op
        torch.testing.assert_close(conv(x)[0, 0, 1, 1], torch.tensor(9.0 * count), rtol=1e-5, atol=0)


def test_an_implementation_of_another_op_is_refused():
    with pytest.raises(InvalidArgument, match=r"^impl='library': no implementation of conv_int8 is called"):
        FoldedConv(torch.ones(8, 20, 3, 3), padding=1, int8=True, impl="library")
    conv = FoldedConv(torch.ones(8, 20, 3, 3).double(), padding=1, int8=True, impl="cpp")
    with pytest.raises(Unavailable, match="x is torch.float64; bfloat16 or float32"):
        conv(torch.ones(1, 20, 8, 8).double())


# The raw op


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
def test_the_raw_op_reads_any_layout(layout):
    conv, _, bias, x, residual = call_of("groups over rows")
    direction, channels = conv.directions[0], len(bias)
    forms = direction.form("int8"), direction.form("int8_scales")
    x, residual = (laid_out(t.contiguous(), layout) for t in (x, residual))
    spread = torch.full((2 * channels,), float("nan"), dtype=HALF)[::2].copy_(bias)
    with unmodified(x=x, residual=residual, bias=spread):
        y = torch.ops.admfast.conv_int8(x, *forms, spread, residual, channels)
    x, residual = (laid_out(t.contiguous(), "channels_last") for t in (x, residual))
    assert torch.equal(y, conv(x, residual)) and y.movedim(1, -1).is_contiguous()


def ones(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.ones(shape, dtype=dtype)


FORM = (1, 1, 9, 2, 16, 16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=ones(4, 4)), "x must be"),
        (dict(x=ones(1, 4, 4, 4).double()), "x is Double"),
        (dict(x=ones(1, 65, 4, 4)), "w must be"),
        (dict(x=ones(1, 4, 16)), "9 taps of 1 dimensions"),
        (dict(w=ones(*FORM)), "w is BFloat16"),
        (dict(w=ones(*FORM[1:], dtype=torch.int8)), "w must be contiguous"),
        (dict(w=ones(1, 1, 1, 2, 16, 16, 4, dtype=torch.int8)), "1 taps of 2 dimensions; 9 of 2"),
        (dict(w=ones(1, 1, 9, 2, 16, 32, 2, dtype=torch.int8)), "w must be"),
        (dict(scales=ones(2, 6)), "scales is BFloat16"),
        (dict(scales=ones(2, 5, dtype=torch.float32)), "scales must be"),
        (dict(scales=ones(6, 2, dtype=torch.float32).t()), "scales must be"),
        (
            dict(x=ones(1, 7369, 4, 4), w=ones(1, 116, *FORM[2:], dtype=torch.int8)),
            "sums of 66321 terms exceed",
        ),
        (dict(channels=33), "w must be"),
        (dict(channels=0), "w must be"),
        (dict(bias=ones(5)), "bias must be"),
        (dict(bias=ones(6).float()), "bias is Float"),
        (dict(residual=ones(1, 6, 4, 5)), "residual must be"),
        (dict(residual=ones(1, 6, 4, 4).float()), "residual is Float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_raw_op_refuses_what_does_not_fit(changes, message):
    call: dict[str, Any] = dict(x=ones(1, 4, 4, 4), w=ones(*FORM, dtype=torch.int8))
    call |= dict(scales=ones(2, 6, dtype=torch.float32), bias=None, residual=None, channels=6)
    torch.ops.admfast.conv_int8(**call)
    with pytest.raises(RuntimeError, match=f"^conv_int8: {message}"):
        torch.ops.admfast.conv_int8(**(call | changes))
