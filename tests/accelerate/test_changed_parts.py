"""Tests of networks with a modified part, where results on small inputs may not reveal the change."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import admfast
from tests.accelerate import client
from tests.accelerate.client import filled
from tests.accelerate.test_accelerate import T, gradients, pair, x
from tests.small import assert_close


def changed(base: type, name: str, function) -> type:
    return type(base.__name__, (base,), {name: function})


CHANGED_BLOCKS = {
    "state": lambda self, x, emb: client.ResBlock._forward(self, x, emb) * self.scale,
    "size": lambda self, x, emb: client.ResBlock._forward(self, x, emb) * (2 if x.shape[2] > 8 else 1),
    "level": lambda self, x, emb: client.ResBlock._forward(self, x, emb) * (2 if x.shape[1] > 64 else 1),
    "training": lambda self, x, emb: client.ResBlock._forward(self, x * (2 if self.training else 1), emb),
    "gradient": lambda self, x, emb: client.ResBlock._forward(self, x, emb.detach()),
    "range": lambda self, x, emb: client.ResBlock._forward(self, x, emb).clamp(-20, 20),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("change", CHANGED_BLOCKS)
def test_blocks_that_somebody_changed_keep_the_change(change, train):
    """Each change has no effect on small inputs, on equal inputs or in evaluation mode."""
    net = filled(client.UNetModel())
    for module in net.modules():
        if isinstance(module, client.ResBlock):
            module.__class__ = changed(client.ResBlock, "_forward", CHANGED_BLOCKS[change])
            module.scale = 1.0
    fast = admfast.accelerate(copy.deepcopy(net))
    for one in (net.train(train), fast.train(train)):
        for module in one.modules():
            if hasattr(module, "scale"):
                module.scale = 0.5
    expected, found = gradients(net, {}), gradients(fast, {})
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key])


def norm_with(function):
    return changed(client.GroupNorm32, "forward", function)


@pytest.mark.parametrize(
    ("kind", "replacement"),
    [
        (client.GroupNorm32, norm_with(lambda self, x: 2 * client.GroupNorm32.forward(self, x))),
        (client.GroupNorm32, norm_with(lambda self, x: F.group_norm(x, 32, self.weight, self.bias, 0.1))),
        (
            client.ResBlock,
            changed(
                client.ResBlock,
                "_forward",
                lambda self, x, emb: client.ResBlock._forward(self, x, emb.mul_(2)),
            ),
        ),
        (client.SiLU, changed(client.SiLU, "forward", lambda self, x: x * torch.sigmoid(x + 0.5))),
        (
            client.TimestepEmbedSequential,
            changed(
                client.TimestepEmbedSequential,
                "forward",
                lambda self, x, emb: client.TimestepEmbedSequential.forward(self, x, -emb),
            ),
        ),
        (
            client.UNetModel,
            changed(
                client.UNetModel,
                "forward",
                functools.wraps(client.UNetModel.forward)(
                    lambda self, x, t, y=None: client.UNetModel.forward(self, x, t / 2, y)
                ),
            ),
        ),
    ],
)
def test_parts_that_somebody_changed_keep_the_change(kind, replacement):
    net = filled(client.UNetModel())
    for module in net.modules():
        if type(module) is kind:
            module.__class__ = replacement
    fast = admfast.accelerate(copy.deepcopy(net))
    with torch.no_grad():
        assert_close(fast(x(), T), net(x(), T))


def test_one_head_leaves_the_order_of_the_others_open():
    """With one head both orders of qkv rows are the same, so such a block must not decide for the others."""
    net = filled(client.UNetModel(legacy=False))
    net.input_blocks[3][1] = filled(client.AttentionBlock(64, 1, legacy=False))
    with torch.no_grad():
        assert_close(admfast.accelerate(copy.deepcopy(net))(x(), T), net(x(), T))


def test_methods_that_are_exchanged_later_run(monkeypatch):
    net, fast, _ = pair()
    original = client.ResBlock._forward
    monkeypatch.setattr(client.ResBlock, "_forward", lambda self, x, emb: 2 * original(self, x, emb))
    with torch.no_grad():
        assert_close(fast(x(), T), net(x(), T))
    assert type(fast) is client.UNetModel and vars(fast).keys() == vars(net).keys()
