"""Tests that networks in the style of EDM and of diffusers keep their results when blocks are converted."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import admfast
from admfast.accelerate.code_bases import shape_free_key
from admfast.accelerate.networks import AcceleratedNet
from admfast.errors import InvalidArgument
from admfast.models.layers import ResidualBlock
from tests.accelerate import diffusers_client, edm_client
from tests.accelerate.client import filled
from tests.small import assert_close, randn

T = torch.tensor([0.3, 2.0])
EDM, DIFFUSERS = edm_client.UNet, diffusers_client.UNet2DModel
NETS = {
    "edm": lambda: EDM(),
    "ddpm++": lambda: EDM(adaptive=False, scale=0.5**0.5, project=True, eps=1e-6),
    "diffusers": lambda: DIFFUSERS(),
    "diffusers by blocks": lambda: DIFFUSERS(
        by_blocks=True, scale_shift=True, heads=2, factor=2**0.5, attention=plain_attention
    ),
}
plain_attention = functools.partial(diffusers_client.Attention, norm=False, factor=2**0.5)


def x() -> Tensor:
    return randn(2, 3, 16, 16)


def call(net: nn.Module, images: Tensor) -> Tensor:
    out = net(images, T)
    return out if isinstance(out, Tensor) else out.sample


def pair(name: str) -> tuple[Any, Any]:
    """Return a program's network and its converted copy."""
    net = filled(NETS[name]())
    return net, admfast.accelerate(copy.deepcopy(net))


def gradients(net: nn.Module, twice: bool = False) -> dict[str, Tensor]:
    images = x().requires_grad_(True)
    loss = (call(net, images) * randn(2, 3, 16, 16, seed=2)).sum()
    if twice:
        loss.backward(retain_graph=True)
    loss.backward()
    found = {"x": images.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}
    net.zero_grad()
    return found


def assert_same_gradients(net: nn.Module, fast: nn.Module, **options: Any) -> None:
    expected, found = gradients(net, **options), gradients(fast, **options)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key])


def blocks(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, edm_client.UNetBlock | diffusers_client.ResnetBlock2D)]


@pytest.mark.parametrize("name", NETS)
def test_outputs_and_all_gradients_are_the_programs_own(name):
    net, fast = pair(name)
    assert (
        all(isinstance(block, ResidualBlock) for block in blocks(fast)) and not fast.accelerated_unconverted
    )
    images = x()
    with torch.no_grad():
        expected, found = call(net, images), call(fast, images)
        copied = found.clone()
        again = call(fast, 0.5 * images)
    assert fast.is_folded
    assert_close(found, expected)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(found, copied) and again.data_ptr() != found.data_ptr() and torch.equal(images, x())
    assert_same_gradients(net, fast)
    assert_same_gradients(net, fast, twice=True)
    assert_same_gradients(net.train(), fast.train())
    assert_same_gradients(net.eval().requires_grad_(False), fast.eval().requires_grad_(False))


@pytest.mark.parametrize("name", NETS)
def test_modules_stay_what_they_are(name):
    net = filled(NETS[name]())
    before, state = dict(net.named_modules()), net.state_dict()
    classes, parameters = [type(m) for m in net.modules()], [*net.parameters()]
    drawn = torch.get_rng_state()
    assert admfast.accelerate(net) is net
    assert torch.equal(torch.get_rng_state(), drawn)
    after = dict(net.named_modules())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(net.modules(), classes, strict=True))
    assert list(net.state_dict()) == list(state)


@pytest.mark.parametrize("name", NETS)
def test_hooks_see_what_they_saw(name):
    net, fast = pair(name)
    seen: dict[int, list[tuple[str, Tensor]]] = {0: [], 1: []}
    for i, one in enumerate((net, fast)):
        for inner, module in [*one.named_modules()][1::3]:
            module.register_forward_hook(lambda m, args, out, i=i, inner=inner: seen[i].append((inner, out)))
        with torch.no_grad():
            call(one, x())
    assert [inner for inner, _ in seen[0]] == [inner for inner, _ in seen[1]] != []
    for (_, expected), (_, found) in zip(*seen.values(), strict=True):
        if isinstance(expected, Tensor):
            assert_close(found, expected)


@pytest.mark.parametrize("name", NETS)
def test_copies_pickles_and_replicas(name):
    net, fast = pair(name)
    with torch.no_grad():
        expected = call(net, x())
        assert_close(call(fast, x()), expected)
        twin = copy.deepcopy(fast)
        assert isinstance(twin, AcceleratedNet)
        assert_close(call(twin, x()), expected)
        pickled = pickle.dumps(fast)
        assert b"admfast" not in pickled
        loaded = pickle.loads(pickled)
        assert type(loaded) is type(net) and vars(loaded).keys() == vars(net).keys()
        assert torch.equal(call(loaded, x()), expected)
        replica = fast._replicate_for_data_parallel()
        for inner, module in fast.named_children():
            setattr(replica, inner, module)
        assert_close(call(replica, x()), expected)


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict({n: 1.1 * v for n, v in net.state_dict().items()}),
    "in place": lambda net: [p.mul_(1.1) for p in net.parameters()],
    "data": lambda net: [p.data.mul_(1.1) for p in net.parameters()],
    "moved": lambda net: net.double().float(),
    "a norm": lambda net: next(m for m in net.modules() if hasattr(m, "num_groups")).bias.add_(1.0),
    "half": lambda net: net.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_the_next_call(change, name):
    net, fast = pair(name)
    if change == "load_state_dict" and name in ("edm", "ddpm++"):  # their filters must keep their values
        state = {n: v if "filter" in n else 1.1 * v for n, v in net.state_dict().items()}
        for one in (net, fast):
            call(one, x())
            one.load_state_dict(state)
    else:
        for one in (net, fast):
            call(one, x())
            with torch.no_grad():
                CHANGES[change](one)
    with torch.no_grad():
        found, expected = (half(one) if change == "half" else call(one, x()) for one in (fast, net))
    assert found.dtype == expected.dtype
    if change == "half":  # both round: compare their errors against the float32 network
        exact = call(filled(NETS[name]()), x())
        assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()
    else:
        assert_close(found, expected)


def half(net: nn.Module) -> Tensor:
    return call(net, x().to(torch.bfloat16))


@pytest.mark.parametrize("name", ["edm", "ddpm++"])
def test_edms_networks_compute_in_the_dtype_of_their_images(name):
    net, fast = pair(name)
    for one in (net, fast):
        for layer in (m for m in one.modules() if isinstance(m, nn.Linear)):
            layer.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    with torch.no_grad():
        found, expected, exact = half(fast), half(net), call(net, x())
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.parametrize("name", NETS)
def test_a_transform_may_come_first_and_a_trace_holds_the_whole(name):
    net, fast = pair(name)
    with torch.no_grad():
        expected, found = (
            torch.func.vjp(lambda v, n=one: call(n, v), x())[1](randn(2, 3, 16, 16, seed=3))[0]
            for one in (net, fast)
        )
        assert_close(found, expected)
        assert_close(call(fast, x()), call(net, x()))
        compiled = torch.compile(lambda v: call(fast, v), backend="eager", fullgraph=True)
        assert_close(compiled(x()), call(net, x()))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NETS)
def test_autocast_gives_the_programs_dtype(name):
    net, fast = pair(name)
    with torch.no_grad():
        exact = call(net, x())
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = call(net, x()), call(fast, x())
    assert found.dtype == expected.dtype
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_methods_that_are_exchanged_later_run(monkeypatch):
    for name, kind in (("edm", edm_client.UNetBlock), ("diffusers", diffusers_client.ResnetBlock2D)):
        net, fast = pair(name)
        original = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda self, x, emb, original=original: 2 * original(self, x, emb)
        )
        with torch.no_grad():
            assert_close(call(fast, x()), call(net, x()))
        assert type(fast) is type(net)


@pytest.mark.parametrize("how", ["another processor", "another code"])
def test_processors_that_are_exchanged_later_run(how, monkeypatch):
    net, fast = pair("diffusers")
    sharp = diffusers_client.SharpProcessor
    for one in (net, fast):
        for module in one.modules():
            if how == "another processor" and isinstance(module, diffusers_client.Attention):
                module.processor = sharp()
    if how == "another code":
        original = diffusers_client.AttnProcessor2_0.__call__
        changed = lambda self, attn, x: 3 * original(self, attn, x)  # noqa: E731
        monkeypatch.setattr(diffusers_client.AttnProcessor2_0, "__call__", changed)
    with torch.no_grad():
        assert_close(call(fast, x()), call(net, x()))


# Blocks that a program changed


def sharp_attention(*sizes: Any, **options: Any) -> nn.Module:
    module = diffusers_client.Attention(*sizes, **options)
    module.processor = diffusers_client.SharpProcessor()
    return module


# Each value: a network, the class of the blocks that must not be converted, and a word of the reason.
ALTERED = {
    "edm, another activation": (lambda: EDM(edm_client.AnotherActivation), "AnotherActivation", "gelu"),
    "edm, another term": (lambda: EDM(edm_client.AnotherTerm), "AnotherTerm", "mean"),
    "edm, another sign": (lambda: EDM(edm_client.AnotherSign), "AnotherSign", "results"),
    "edm, another eps": (lambda: EDM(edm_client.AnotherEps), "AnotherEps", ""),
    "edm, another order": (lambda: EDM(edm_client.AnotherOrder), "AnotherOrder", "AnotherOrder"),
    "diffusers, another activation": (lambda: DIFFUSERS(activation=nn.GELU), "ResnetBlock2D", ""),
    "diffusers, another term": (lambda: DIFFUSERS(diffusers_client.AnotherTerm), "AnotherTerm", "mean"),
    "diffusers, another sign": (lambda: DIFFUSERS(diffusers_client.AnotherSign), "AnotherSign", "results"),
    "diffusers, adapters": (lambda: DIFFUSERS(diffusers_client.WithAdapters), "WithAdapters", ""),
    "diffusers, another processor": (
        lambda: DIFFUSERS(attention=sharp_attention),
        "Attention",
        "SharpProcessor",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_blocks_that_somebody_changed_stay_and_are_named(name):
    make, kind, reason = ALTERED[name]
    net = filled(make())
    fast = admfast.accelerate(copy.deepcopy(net))
    changed_blocks = {n for n, m in net.named_modules() if type(m).__name__ == kind}
    if name == "edm, another order":  # blocks without attention are unchanged and are converted
        changed_blocks = {n for n in changed_blocks if net.get_submodule(n).num_heads}
    if name == "diffusers, another sign":  # with one channel per group the result is the known one
        changed_blocks = {n for n in changed_blocks if net.get_submodule(n).norm2.num_channels > 32}
    assert changed_blocks and set(fast.accelerated_unconverted) >= changed_blocks
    assert all(reason in fast.accelerated_unconverted[n] for n in changed_blocks)
    assert all(type(fast.get_submodule(n)) is type(net.get_submodule(n)) for n in changed_blocks)
    assert kind in admfast.accelerate.report(fast)
    with torch.no_grad():
        assert_close(call(fast, x()), call(net, x()))
    assert_same_gradients(net, fast)


def test_settings_of_a_known_block_are_served():
    for make in (lambda: EDM(eps=1e-3, scale=2), lambda: DIFFUSERS(eps=1e-3, groups_out=16, factor=3.0)):
        net = filled(make())
        fast = admfast.accelerate(copy.deepcopy(net))
        assert not fast.accelerated_unconverted
        with torch.no_grad():
            assert_close(call(fast, x()), call(net, x()))


def test_a_network_with_a_longer_filter_stays_as_it_is_and_is_named():
    net = filled(EDM(taps=(1, 3, 3, 1)))
    classes = [type(m) for m in net.modules()]
    with pytest.raises(InvalidArgument, match="^model="):
        admfast.accelerate(net)
    assert [type(m) for m in net.modules()] == classes
    assert "4" in admfast.accelerate.report(net)
    both = nn.ModuleList([net, filled(EDM())])
    admfast.accelerate(both)
    assert type(both[0]) is EDM and isinstance(both[1], AcceleratedNet)
    assert "4" in admfast.accelerate.report(both)


def test_another_filter_of_two_taps_is_seen():
    net = filled(EDM())
    for part in net.modules():
        if part._buffers.get("resample_filter") is not None:
            part.resample_filter.mul_(2)
    fast = admfast.accelerate(copy.deepcopy(net))
    assert {"enc.8_down", "dec.16_up"} == set(fast.accelerated_unconverted)
    with torch.no_grad():
        assert_close(call(fast, x()), call(net, x()))


def test_blocks_that_differ_in_more_than_sizes_are_not_alike():
    first = edm_client.UNetBlock(32, 32, 64, down=True)
    assert shape_free_key(first) == shape_free_key(edm_client.UNetBlock(32, 32, 48, down=True))
    other = edm_client.UNetBlock(32, 32, 64, down=True)
    other.conv0.resample_filter.mul_(2)
    for block in (
        other,
        edm_client.UNetBlock(32, 32, 64, up=True),
        edm_client.UNetBlock(32, 32, 64, scale=2.0),
    ):
        assert shape_free_key(first) != shape_free_key(block)


@pytest.mark.parametrize("name", NETS)
def test_images_stay_channels_last_from_block_to_block(name):
    _, fast = pair(name)
    seen = []
    for block in blocks(fast):
        block.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    with torch.no_grad():
        call(fast, x())
    assert len(seen) == len(blocks(fast)) and all(seen)


def test_another_dtype_of_the_torso_is_refused():
    for make in NETS.values():
        with pytest.raises(InvalidArgument, match="^precision="):
            admfast.accelerate(make(), precision="bf16")


def test_dropout_draws_while_training():
    for make in (lambda: EDM(dropout=0.5), DIFFUSERS):
        net = filled(make())
        for part in net.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
        fast = admfast.accelerate(net).train()
        with torch.no_grad():
            assert not torch.equal(call(fast, x()), call(fast, x()))
            assert torch.equal(call(fast.eval(), x()), call(fast, x()))
