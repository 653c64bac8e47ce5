"""Tests that each block equals its written-out formula and follows its options."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.errors import InvalidArgument
from admfast.models import layers
from admfast.models.convolution import Conv2d
from admfast.models.layers import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    Norm,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    timestep_embedding,
)
from tests.small import randn

# Both sides are float64 and do the same operations in another order: some thousand roundings.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return the module in float64 and evaluation mode, with random parameters: fresh ones may be zero."""
    for i, parameter in enumerate(module.double().parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + i, dtype=torch.float64) / 4 + (
            parameter.dim() == 1
        )
    return module.eval()


@pytest.mark.parametrize("dim", [8, 7, 1])
def test_timestep_embedding_is_cosines_then_sines(dim):
    t = torch.tensor([0.0, 1.0, 250.5, 999.0])
    half = dim // 2
    frequencies = torch.tensor([math.exp(-math.log(10000) * i / max(half, 1)) for i in range(half)])
    angles = t[:, None].double() * frequencies
    expected = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))
    # float32 angles up to 999 have errors of half a unit in the last place of 999; so do their cosines.
    torch.testing.assert_close(timestep_embedding(t, dim).double(), expected, rtol=0, atol=999 * 2**-23)


def test_timestep_embedding_takes_integers_and_another_period():
    t = torch.tensor([0, 3, 999])
    assert torch.equal(timestep_embedding(t, 16), timestep_embedding(t.float(), 16))
    assert timestep_embedding(t, 16).dtype == torch.float32
    assert not torch.equal(timestep_embedding(t, 16), timestep_embedding(t, 16, max_period=100))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norm_is_group_norm_with_silu_and_a_second_source(dims):
    norm = randomised(Norm(96))
    x, x2 = randn(2, 32, *[4] * dims, dtype=torch.float64), randn(2, 64, *[4] * dims, seed=1).double()
    whole = torch.cat([x, x2], dim=1)
    expected = F.group_norm(whole, 32, norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(whole), expected, **FLOAT64)
    torch.testing.assert_close(norm(x, x2=x2, silu=True), F.silu(expected), **FLOAT64)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("use_conv", [True, False], ids=["conv", "pool"])
def test_resampling_halves_and_doubles_but_for_the_first_side_of_a_volume(dims, use_conv):
    x = randn(2, 32, *[4] * dims)
    down, up = Downsample(32, use_conv, dims)(x), Upsample(32, use_conv, dims)(x)
    first = (4,) if dims == 3 else ()
    rest = dims - len(first)
    assert down.shape == (2, 32, *first, *[2] * rest)
    assert up.shape == (2, 32, *first, *[8] * rest)
    if not use_conv:
        assert torch.equal(up[..., ::2], x if dims == 1 else x.repeat_interleave(2, dim=-2))
        blocks = x.unflatten(-1, (-1, 2)).mean(-1)
        expected = blocks if dims == 1 else blocks.unflatten(-2, (-1, 2)).mean(-2)
        torch.testing.assert_close(down, expected)


def test_resampling_convolutions_may_change_the_width_and_averages_may_not():
    x = randn(1, 32, 4, 4)
    assert Downsample(32, True, out_channels=64)(x).shape == (1, 64, 2, 2)
    assert Upsample(32, True, out_channels=64)(x).shape == (1, 64, 8, 8)
    with pytest.raises(InvalidArgument, match="out_channels=64: averaging keeps the 32 channels"):
        Downsample(32, False, out_channels=64)


def resampled(x: torch.Tensor, how: str | None) -> torch.Tensor:
    if how == "up":
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.avg_pool2d(x, 2) if how == "down" else x


@pytest.mark.parametrize("how", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale-shift", "additive"])
@pytest.mark.parametrize("out_channels", [64, 96])
def test_residual_block_is_its_formula(how, scale_shift, out_channels):
    block = randomised(
        ResBlock(
            64,
            16,
            0.5,
            out_channels=out_channels,
            use_scale_shift_norm=scale_shift,
            up=how == "up",
            down=how == "down",
        )
    )
    x, emb = randn(2, 64, 4, 4, dtype=torch.float64), randn(2, 16, seed=1, dtype=torch.float64)
    into, out = block.in_layers, block.out_layers
    h = F.silu(F.group_norm(x, 32, into[0].weight, into[0].bias, 1e-5))
    h = into[2](resampled(h, how))
    e = F.linear(F.silu(emb), block.emb_layers[1].weight, block.emb_layers[1].bias)[:, :, None, None]
    if scale_shift:
        scale, shift = e.chunk(2, dim=1)
        h = F.group_norm(h, 32, out[0].weight, out[0].bias, 1e-5) * (1 + scale) + shift
    else:
        h = F.group_norm(h + e, 32, out[0].weight, out[0].bias, 1e-5)
    h = out[3](F.silu(h))
    skip = resampled(x, how)
    if out_channels != 64:
        skip = F.conv2d(skip, block.skip_connection.weight, block.skip_connection.bias)
    result = block(x, emb)
    torch.testing.assert_close(result, skip + h, **FLOAT64)
    two = block(x[:, :32], emb, x[:, 32:])
    torch.testing.assert_close(two, result, **FLOAT64)


def test_a_fresh_block_is_its_skip():
    x, emb = randn(1, 32, 4, 4), randn(1, 8)
    assert torch.equal(ResBlock(32, 8, 0.0)(x, emb), x)
    assert torch.equal(AttentionBlock(32, 4)(x), x)
    wide = ResBlock(32, 8, 0.0, out_channels=64, use_conv=True)
    assert wide.skip_connection.kernel_size == (3, 3)
    assert torch.equal(wide(x, emb), wide.skip_connection(x))


def test_an_additive_embedding_cancels_where_every_group_is_one_channel():
    x, emb = randn(1, 32, 4, 4, dtype=torch.float64), randn(2, 8, dtype=torch.float64)
    block = randomised(ResBlock(32, 8, 0.0))
    torch.testing.assert_close(block(x, emb[:1]), block(x, emb[1:]), **FLOAT64)
    block = randomised(ResBlock(32, 8, 0.0, use_scale_shift_norm=True))
    assert (block(x, emb[:1]) - block(x, emb[1:])).abs().max() > 0.1


@pytest.mark.parametrize("new_order", [True, False], ids=["new", "legacy"])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_block_is_softmax_over_positions(new_order, heads):
    block = randomised(AttentionBlock(64, heads, use_new_attention_order=new_order))
    x = randn(2, 64, 3, 2, dtype=torch.float64)
    norm = F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-5).flatten(2)
    qkv = block.qkv(norm)  # [N, 192, S]
    if new_order:
        q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)
    weights = torch.softmax(torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(64 / heads), dim=-1)
    h = torch.einsum("nhts,nhcs->nhct", weights, v).flatten(1, 2)
    expected = x + block.proj_out(h).unflatten(2, (3, 2))
    torch.testing.assert_close(block(x), expected, **FLOAT64)


def test_legacy_rows_permuted_are_the_new_order():
    legacy = randomised(AttentionBlock(64, 4))
    new = AttentionBlock(64, 4, use_new_attention_order=True).double()
    state = legacy.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        state[name] = state[name].unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x = randn(2, 64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(new(x), legacy(x), **FLOAT64)


class Operations(TorchDispatchMode):
    """A mode that records all operations except views."""

    views = {"view", "_unsafe_view", "expand", "squeeze", "t", "transpose", "unbind", "unsqueeze", "detach"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in {*self.views, "_fused_sdp_choice"}:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("new_order", [True, False], ids=["new-order", "legacy-order"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_attention_copies_nothing_between_the_norm_and_the_sum(layout, new_order, dims, monkeypatch):
    block = AttentionBlock(64, 2, use_new_attention_order=new_order).requires_grad_(False)

    # The norm's implementations may copy, so replace the norm by the identity, whose skip is x too.
    def identity(x, *_args, with_skip=False, **_options):
        return (x, x) if with_skip else x

    monkeypatch.setattr(layers, "group_norm_silu", identity)
    x = randn(2, 64, *[4] * dims)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_(True)
    with Operations() as forward:
        out = block(x)
    dout = torch.ones_like(out)
    with Operations() as backward:
        (dx,) = torch.autograd.grad(out, x, dout)
    assert out.stride() == dx.stride() == x.stride()
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    if layout == "channels_last":
        assert forward.seen == ["addmm", kernel, "addmm", "add"]
        # stack joins dq, dk and dv.
        assert backward.seen == ["mm", f"{kernel}_backward", "stack", "mm", "add"]
    else:
        # The transposed tokens are multiplied without a copy; the output's gradient is copied once.
        assert forward.seen == ["bmm", "add", kernel, "addmm", "add"]
        assert backward.seen == ["clone", "mm", f"{kernel}_backward", "stack", "bmm", "add"]


def test_attention_pool_is_the_attention_of_the_mean_token():
    pool = randomised(AttentionPool2d(3, 64, 16, 5))
    x = randn(2, 64, 3, 3, dtype=torch.float64)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + pool.positional_embedding
    q, k, v = (part.unflatten(1, (4, 16)) for part in pool.qkv_proj(tokens).chunk(3, dim=1))
    weights = torch.softmax(torch.einsum("nhc,nhcs->nhs", q[..., 0], k) / 4, dim=-1)
    h = torch.einsum("nhs,nhcs->nhc", weights, v).flatten(1)
    expected = F.linear(h, pool.c_proj.weight[..., 0], pool.c_proj.bias)
    torch.testing.assert_close(pool(x), expected, **FLOAT64)


def test_wrong_sizes_and_heads_are_refused_by_name():
    with pytest.raises(InvalidArgument, match=r"x.shape=\(1, 64, 4, 4\): .* built for 9 positions"):
        AttentionPool2d(3, 64, 16, 5)(randn(1, 64, 4, 4))
    with pytest.raises(InvalidArgument, match="num_heads_channels=24: must divide the 64 channels"):
        AttentionPool2d(3, 64, 24, 5)
    with pytest.raises(InvalidArgument, match="num_heads=5: must divide the 64 channels"):
        AttentionBlock(64, 5)


def test_an_attention_pool_puts_out_the_embedding_s_width_unless_told():
    pool = randomised(AttentionPool2d(3, 64, 16))
    x = randn(2, 64, 3, 3, dtype=torch.float64)
    told = randomised(AttentionPool2d(3, 64, 16, 64))
    assert torch.equal(pool(x), told(x)) and pool(x).shape == (2, 64)
    assert torch.equal(randomised(AttentionPool2d(3, 64, 16, output_dim=None))(x), told(x))


def test_a_sequence_gives_the_second_source_to_its_first_block_alone():
    first, second = ResBlock(64, 8, 0.0, out_channels=32), ResBlock(32, 8, 0.0)
    sequence = randomised(TimestepEmbedSequential(first, AttentionBlock(32, 2), second))
    x, emb = randn(1, 64, 4, 4, dtype=torch.float64), randn(1, 8, dtype=torch.float64)
    h = sequence[2](sequence[1](sequence[0](x, emb)), emb)
    torch.testing.assert_close(sequence(x[:, :32], emb, x[:, 32:]), h, **FLOAT64)


def counted(block: torch.nn.Module) -> list[None]:
    """Return a list that grows with every call of the block's `_forward`."""
    calls: list[None] = []
    inner = block._forward
    block._forward = lambda *args: (calls.append(None), inner(*args))[1]
    return calls


def test_checkpointing_recomputes_where_a_gradient_is_recorded_and_nowhere_else():
    block = randomised(AttentionBlock(32, 2, use_checkpoint=True))
    calls = counted(block)
    x = randn(1, 32, 2, 2, dtype=torch.float64).requires_grad_(True)
    with torch.no_grad():
        block(x)
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x)
    assert len(calls) == 3
    by_func = torch.func.grad(lambda x: block(x).square().sum())(x)
    assert len(calls) == 4
    torch.testing.assert_close(by_func, gradient, **FLOAT64)


def test_fresh_convolutions_that_end_a_branch_are_zero():
    assert not layers.zero_parameters(torch.nn.Conv2d(2, 2, 1)).weight.any()
    block = ResBlock(32, 8, 0.0)
    assert not block.out_layers[3].weight.any() and block.in_layers[2].weight.any()


@pytest.mark.parametrize(("padding", "side"), [("same", 8), ("valid", 6)])
def test_a_trainable_convolution_takes_torch_s_words_for_padding(padding, side):
    conv, x = Conv2d(16, 16, 3, padding=padding), randn(2, 16, 8, 8)
    assert conv(x).shape == (2, 16, side, side)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=padding))


def test_a_hook_sees_a_convolution_with_its_bias():
    class Leaving(torch.nn.Conv2d):
        def without_bias(self, x):
            return torch.nn.functional.conv2d(x, self.weight), self.bias

    conv, x, seen = Leaving(2, 3, 1), randn(1, 2, 4, 4), []
    y, bias = layers.convolve_without_bias(conv, x)
    assert bias is conv.bias
    handle = conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    whole, none = layers.convolve_without_bias(conv, x)
    handle.remove()
    assert none is None and len(seen) == 1
    torch.testing.assert_close(whole, y + bias.view(-1, 1, 1))
