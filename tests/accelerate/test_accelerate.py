"""Tests that `admfast.accelerate` keeps the results of other programs' networks, however they are used."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import admfast
import admfast.accelerate
from admfast.accelerate.forward_methods import ForwardMethod, recognise_forward
from admfast.accelerate.networks import AcceleratedNet
from admfast.errors import InvalidArgument
from tests.accelerate import client
from tests.accelerate.client import filled
from tests.small import assert_close, randn

T = torch.tensor([3, 700])
Y = torch.tensor([1, 4])
WHOLE = {
    "unet": (lambda: client.UNetModel(), {}),
    "new order, additive, resampled by convolutions": (
        lambda: client.UNetModel(legacy=False, resample_blocks=False, scale_shift=False),
        {},
    ),
    "classes": (lambda: client.UNetModel(num_classes=5), {"y": Y}),
    "upsampler": (lambda: client.SuperResModel(), {"low_res": randn(2, 3, 4, 4, seed=7)}),
    "upsampler with classes": (
        lambda: client.SuperResModel(num_classes=5),
        {"low_res": randn(2, 3, 4, 4, seed=7), "y": Y},
    ),
    "classifier": (lambda: client.EncoderUNetModel(), {}),
    "a block used twice": (lambda: client.WithBlockUsedTwice(), {}),
    "unused arguments": (lambda: client.WithUnusedArguments(), {"ref_img": 1, "more": 2}),
}
BY_BLOCKS = {
    "pool of all blocks": (lambda: client.EncoderUNetModel(pool="spatial"), {}),
    "another forward": (lambda: client.WithAnotherForward(), {}),
    "used argument": (lambda: client.WithUsedArgument(), {"gt": randn(2, 3, 16, 16, seed=8)}),
    "other blocks": (lambda: client.WithOtherBlocks(), {}),
}
CLIENTS = WHOLE | BY_BLOCKS


def x() -> Tensor:
    return randn(2, 3, 16, 16)


def pair(name: str = "unet") -> tuple[nn.Module, nn.Module, dict]:
    """Return a program's network, its converted copy, and the keyword arguments to call both with."""
    make, model_kwargs = CLIENTS[name]
    net = filled(make())
    return net, admfast.accelerate(copy.deepcopy(net)), model_kwargs


def gradients(net: nn.Module, model_kwargs: dict) -> dict[str, Tensor]:
    images = x().requires_grad_(True)
    out = net(images, T, **model_kwargs)
    (out * randn(*out.shape, seed=2)).sum().backward()
    return {"x": images.grad, **{name: p.grad for name, p in net.named_parameters() if p.grad is not None}}


# Outputs and gradients


@pytest.mark.parametrize("name", CLIENTS)
def test_outputs_and_all_gradients_are_the_programs_own(name):
    net, fast, model_kwargs = pair(name)
    assert isinstance(fast.accelerated_forward, ForwardMethod) == (name in WHOLE)
    with torch.no_grad():
        expected, found = net(x(), T, **model_kwargs), fast(x(), T, **model_kwargs)
    assert fast.is_folded
    assert_close(found, expected)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    expected, found = gradients(net, model_kwargs), gradients(fast, model_kwargs)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key])


def test_what_is_no_published_block_stays_and_is_named():
    _, fast, _ = pair("other blocks")
    assert list(fast.accelerated_unconverted) == ["middle_block.0"]
    assert (
        type(fast.middle_block[0]) is client.OtherBlock
        and type(fast.middle_block) is client.TimestepEmbedSequential
    )
    assert isinstance(fast.middle_block[2], admfast.models.layers.ResBlock)
    assert "middle_block.0" in admfast.accelerate.report(fast)


@pytest.mark.parametrize(
    "timesteps", [torch.tensor([3.5]), torch.tensor([700], dtype=torch.int32), T.double()]
)
def test_timesteps_of_all_sorts(timesteps):
    net, fast, _ = pair()
    with torch.no_grad():
        assert_close(fast(x(), timesteps), net(x(), timesteps))


def test_wrong_calls_fail_as_the_programs_own():
    for name, error, args, kwargs in (
        ("unet", AssertionError, (x(), T, Y), {}),
        ("classes", AssertionError, (x(), T), {}),
        ("unet", TypeError, (x(), T), {"gt": 1}),
        ("unet", TypeError, (x(),), {}),
        ("unet", TypeError, (x(), T), {"x": x()}),
    ):
        for net in pair(name)[:2]:
            with pytest.raises(error):
                net(*args, **kwargs)


def test_labels_may_be_left_out_where_the_program_lets_them():
    net = filled(client.WithOptionalLabels(num_classes=5))
    fast = admfast.accelerate(copy.deepcopy(net))
    assert isinstance(fast.accelerated_forward, ForwardMethod)
    with torch.no_grad():
        for model_kwargs in ({}, {"y": Y}):
            assert_close(fast(x(), T, **model_kwargs), net(x(), T, **model_kwargs))


def test_compiled_networks_see_changes():
    net, fast, _ = pair()
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        fast(x(), T)
        compiled(x(), T)
        for one in (net, fast):
            for parameter in one.parameters():
                parameter.mul_(1.5)
        assert_close(compiled(x(), T), net(x(), T))


# Identity and behaviour as modules


def test_modules_keep_identity_names_parameters_classes_and_mode():
    net = filled(client.UNetModel()).train()
    before = dict(net.named_modules())
    parameters, classes, state = (
        dict(net.named_parameters()),
        [type(m) for m in net.modules()],
        net.state_dict(),
    )
    generator = torch.get_rng_state()
    assert admfast.accelerate(net) is net
    assert torch.equal(torch.get_rng_state(), generator)
    after = dict(net.named_modules())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(a is b for a, b in zip(net.parameters(), parameters.values(), strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(net.modules(), classes, strict=True))
    assert all(m.training for m in net.modules()) and not net.eval().middle_block[0].training
    assert list(net.state_dict()) == list(state)
    assert isinstance(net, client.UNetModel) and isinstance(net, AcceleratedNet)


def test_hooks_see_what_they_saw():
    seen: dict[str, list] = {"net": [], "fast": []}
    net, fast, _ = pair()
    for name, one in (("net", net), ("fast", fast)):
        for block in (one.output_blocks[1], one.middle_block[1].qkv, one.input_blocks[3][0].in_layers[0]):
            block.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args[0], out)))
        with torch.no_grad():
            one(x(), T)
    assert len(seen["fast"]) == len(seen["net"]) == 3
    for found, expected in zip(seen["fast"], seen["net"], strict=True):
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


def test_outputs_are_fresh_and_inputs_are_left_alone():
    _, fast, _ = pair()
    images = x()
    with torch.no_grad():
        first = fast(images, T)
        copied = first.clone()
        second = fast(0.5 * images, T)
    assert torch.equal(first, copied) and first.data_ptr() != second.data_ptr()
    assert torch.equal(images, x())
    assert first.view(2, -1).shape[1] == 6 * 16 * 16
    noise = [torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    assert torch.equal(torch.randn_like(first), noise[0])


def test_copies_and_pickles():
    net, fast, _ = pair()
    with torch.no_grad():
        expected = fast(x(), T)
        twin, shallow = copy.deepcopy(fast), copy.copy(fast)
        assert isinstance(twin, AcceleratedNet) and isinstance(shallow, AcceleratedNet)
        twin.out[2].bias.add_(1.0)
        assert torch.equal(fast(x(), T), expected) and not torch.equal(twin(x(), T), expected)
        file = io.BytesIO()
        torch.save(fast, file)
        assert b"admfast" not in file.getvalue()
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert type(loaded) is client.UNetModel and vars(loaded).keys() == vars(net).keys()
        assert torch.equal(loaded(x(), T), net(x(), T))
        assert type(pickle.loads(pickle.dumps(fast.middle_block[0]))) is client.ResBlock


def test_replicas_of_data_parallel_run():
    net, fast, _ = pair()
    with torch.no_grad():
        fast(x(), T)
        replica = fast._replicate_for_data_parallel()
        for name, module in fast.named_modules():
            if name and "." not in name:
                setattr(replica, name, module)
        assert_close(replica(x(), T), net(x(), T))


# Changes after the conversion


def half(net):
    net.input_blocks.apply(
        lambda m: setattr(m.weight, "data", m.weight.data.half()) if isinstance(m, nn.Conv2d) else None
    )


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict(filled(client.UNetModel(), seed=1).state_dict()),
    "in place": lambda net: [p.mul_(1.5) for p in net.parameters()],
    "data": lambda net: [p.data.copy_(1.5 * p) for p in net.parameters()],
    "another parameter": lambda net: setattr(net.out[2], "weight", nn.Parameter(2 * net.out[2].weight)),
    "another layer": lambda net: setattr(net.middle_block, "2", filled(client.OtherBlock(64, 128, 64))),
    "freeze": lambda net: net.requires_grad_(False),
    "double and back": lambda net: net.double().float(),
}  # fmt: skip


@pytest.mark.parametrize("name", ["unet", "another forward"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_the_next_call(change, name):
    net, fast, _ = pair(name)
    with torch.no_grad():
        before = fast(x(), T)
        for one in (net, fast):
            CHANGES[change](one)
        found = fast(x(), T)
        assert_close(found, net(x(), T))
        assert torch.equal(found, before) == (change in ("freeze", "double and back"))


def test_the_gradient_in_x_alone_makes_none_of_the_weights():
    """Posterior sampling takes this gradient, and does not freeze the weights first."""
    net, fast, _ = pair()
    for one in (net, fast):
        images = x().requires_grad_(True)
        loss = fast(images, T).square().sum() if one is fast else net(images, T).square().sum()
        one.found = torch.autograd.grad(loss, images)[0]
        assert all(p.grad is None for p in one.parameters())
    assert_close(fast.found, net.found)


def test_training_steps_are_the_programs_own():
    net, fast, _ = pair()
    for one in (net.train(), fast.train()):
        optimiser = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            gradients(one, {})
            optimiser.step()
    with torch.no_grad():
        assert_close(fast.eval()(x(), T), net.eval()(x(), T))


def test_a_transform_may_come_first():
    net, fast, _ = pair()
    with torch.no_grad():
        expected, found = (
            torch.func.vjp(lambda v, n=one: n(v, T), x())[1](randn(2, 6, 16, 16))[0] for one in (net, fast)
        )
        assert_close(found, expected)
        assert_close(fast(x(), T), net(x(), T))


def test_blocks_that_are_called_by_hand_see_changes():
    net, fast, _ = pair()
    emb, h = randn(2, 128), randn(2, 64, 8, 8)
    with torch.no_grad():
        fast(x(), T)
        for one in (net, fast):
            for parameter in one.middle_block.parameters():
                parameter.mul_(1.5)
        assert_close(fast.middle_block(h, emb), net.middle_block(h, emb))


def test_networks_made_in_inference_mode_run():
    with torch.inference_mode():
        net, fast, _ = pair()
        assert_close(fast(x(), T), net(x(), T))


def test_parametrized_and_low_rank_layers():
    net = filled(client.UNetModel())
    after = admfast.accelerate(copy.deepcopy(net))
    for one in (net, after):
        with torch.no_grad():
            one(x(), T)
        torch.nn.utils.parametrizations.weight_norm(one.middle_block[0].in_layers[2])
    before = admfast.accelerate(copy.deepcopy(net))
    assert "middle_block.0" in before.accelerated_unconverted
    with torch.no_grad():
        for one in (net, after, before):
            one.middle_block[0].in_layers[2].parametrizations.weight.original0.mul_(1.5)
        for fast in (after, before):
            assert_close(fast(x(), T), net(x(), T))


def test_autocast_and_half_precision_give_the_programs_dtypes():
    net, fast, _ = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = net(x(), T), fast(x(), T)
    assert found.dtype == expected.dtype == torch.bfloat16
    with torch.no_grad():
        exact = net(x(), T)
        assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()
        rounded = admfast.accelerate(fast, precision="bf16")(x(), T)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() <= 2 * (expected - exact).abs().max()


# Networks inside other objects


def test_networks_are_found_where_they_lie():
    net = filled(client.UNetModel())
    for holder in (client.Wrapper(net), SimpleNamespace(unet=net), nn.DataParallel(net)):
        assert admfast.accelerate(holder) is holder
        assert isinstance(net, AcceleratedNet)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), SimpleNamespace(a=1), None, 3])
def test_what_holds_no_network_is_refused(model):
    with pytest.raises(InvalidArgument, match="^model="):
        admfast.accelerate(model)


def test_an_unknown_precision_is_refused():
    net = client.UNetModel()
    with pytest.raises(InvalidArgument, match="^precision='half'"):
        admfast.accelerate(net, precision="half")
    assert type(net) is client.UNetModel


@pytest.mark.parametrize("converted", [False, True])
def test_a_precision_that_one_network_cannot_use_changes_none(converted):
    whole, by_blocks = filled(client.UNetModel()), filled(client.WithAnotherForward())
    model = SimpleNamespace(whole=whole, by_blocks=by_blocks)
    if converted:
        admfast.accelerate(model)
    before = [[type(module) for module in net.modules()] for net in (whole, by_blocks)]
    with pytest.raises(InvalidArgument, match="^precision='bf16'"):
        admfast.accelerate(model, precision="bf16")
    assert [[type(module) for module in net.modules()] for net in (whole, by_blocks)] == before
    assert getattr(whole, "accelerated_policy", None) is None


def test_the_report_says_in_what_a_network_will_compute_before_its_first_call():
    net = admfast.accelerate(filled(client.UNetModel()), precision="bf16")
    assert "bfloat16" in admfast.accelerate.report(net)
    with torch.no_grad():
        net(x(), T)
    assert "bfloat16" in admfast.accelerate.report(net) and "float32" not in admfast.accelerate.report(net)


def test_the_reason_is_that_of_the_method_that_is_nearest_to_the_published_walk():
    def forward_b(self):
        pass

    changed = type("Changed", (client.WithAnotherForward,), {"forward_b": forward_b})
    for net in (filled(changed()), filled(client.WithAnotherForward())):
        assert str(recognise_forward(net)).startswith("forward uses 0.5")
    enlarging = type("Enlarging", (ClampedUpsampler,), {"forward_b": forward_b})
    assert str(recognise_forward(filled(enlarging()))).startswith("forward uses clamp,")


class ClampedUpsampler(client.SuperResModel):
    def forward(self, x, timesteps, low_res=None, **kwargs):
        low_res = F.interpolate(low_res, x.shape[2:], mode="bilinear").clamp(-1, 1)
        return super().forward(torch.cat([x, low_res], dim=1), timesteps, **kwargs)


@pytest.mark.parametrize(
    "statement",
    [
        "import admfast.accelerate",
        "import admfast",
        "from admfast import accelerate",
        "from admfast.accelerate import report",
    ],
)
def test_the_module_is_the_function_however_it_is_imported(statement):
    code = f"{statement}\nimport admfast\nassert callable(admfast.accelerate), admfast.accelerate.report"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
