"""Tests of the classifier: its four pools, its gradient with respect to the image, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from admfast.errors import InvalidArgument
from admfast.models import build
from admfast.models.classifier import HIDDEN_WIDTH
from tests.parity.golden import NETWORK_GRADIENT_LIMIT, NETWORK_OUTPUT_LIMIT, compare
from tests.small import CLASSES, classifier, randn

T = torch.tensor([3, 800])
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
OPTIONS: dict[str, dict] = {
    "attention": {},
    "adaptive": {"pool": "adaptive"},
    "spatial": {"pool": "spatial"},
    "spatial_v2": {"pool": "spatial_v2"},
    "spatial, one-dimensional": {"pool": "spatial", "dims": 1},
    "spatial_v2, volumes": {"pool": "spatial_v2", "dims": 3},
    "adaptive, heads by number": {"pool": "adaptive", "num_head_channels": -1, "num_heads": 4},
    "new attention order": {"use_new_attention_order": True},
    "additive embedding": {"use_scale_shift_norm": False},
    "resblock_updown": {"resblock_updown": True},
    "no conv_resample": {"conv_resample": False},
    "three channels, seven classes": {"in_channels": 3, "out_channels": 7},
    "five channels, one class": {"in_channels": 5, "out_channels": 1},
    "half width first": {"model_channels": 64, "channel_mult": (0.5, 1)},
    "checkpointed": {"use_checkpoint": True},
    "dropout": {"dropout": 0.4},
}


def image(net: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(2, net.config.in_channels, *[8] * net.config.dims, dtype=dtype)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_logits_and_float64_agrees(changes):
    net = classifier(**changes)
    x = image(net)
    logits = net(x, T)
    assert logits.shape == (2, net.config.out_channels) and logits.dtype == torch.float32
    assert (net(x, T + 100) - logits).abs().max() > 1e-3
    double = net.double()(x.double(), T)
    assert double.dtype == torch.float64
    compare(logits, double, NETWORK_OUTPUT_LIMIT, "float32 against float64")


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_pools_take_the_mean_of_every_block(pool):
    net = classifier(pool=pool)
    blocks = [*net.input_blocks, net.middle_block]
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.mean(dim=(2, 3))))
    logits = net(image(net), T)
    h = net.out[0](torch.cat(seen, dim=1))
    if pool == "spatial_v2":
        h = F.silu(F.group_norm(h, 32, net.out[1].weight, net.out[1].bias, 1e-5))
        expected = net.out[3](h)
    else:
        expected = net.out[2](F.relu(h))
    assert len(seen) == len(blocks) and net.out[0].out_features == HIDDEN_WIDTH == 2048
    compare(logits, expected, NETWORK_OUTPUT_LIMIT, pool)


def test_adaptive_pool_is_norm_silu_mean_and_a_product():
    net = classifier(pool="adaptive")
    seen: list[torch.Tensor] = []
    net.middle_block.register_forward_hook(lambda _m, _i, out: seen.append(out))
    logits = net(image(net), T)
    h = F.silu(F.group_norm(seen[0], 32, net.out[0].weight, net.out[0].bias, 1e-5)).mean(dim=(2, 3))
    compare(
        logits, F.linear(h, net.out[3].weight[..., 0, 0], net.out[3].bias), NETWORK_OUTPUT_LIMIT, "adaptive"
    )


def test_the_legacy_order_is_in_the_body_and_the_new_one_in_the_pool():
    net = classifier()
    legacy = {name: m.legacy_order for name, m in net.named_modules() if hasattr(m, "legacy_order")}
    assert legacy.pop("out.2.attention") is False and set(legacy.values()) == {True}
    changed = classifier(use_new_attention_order=True)
    assert (net(image(net), T) - changed(image(net), T)).abs().max() > 1e-3


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "recomputed"])
def test_gradient_with_respect_to_the_image(pool, use_checkpoint):
    net = classifier(pool=pool, use_checkpoint=use_checkpoint).requires_grad_(False)
    x = image(net).requires_grad_(True)

    def log_probability(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(net(x, T), dim=1)[:, 1].sum()

    (found,) = torch.autograd.grad(log_probability(x), x)
    assert all(p.grad is None for p in net.parameters())
    by_func = torch.func.grad(log_probability)(x.detach())
    net.double()
    exact = torch.func.grad(log_probability)(x.detach().double())
    compare(found, exact, NETWORK_GRADIENT_LIMIT, "autograd against float64")
    compare(by_func, exact, NETWORK_GRADIENT_LIMIT, "torch.func against float64")


@pytest.mark.parametrize("pool", POOLS)
def test_convert_torso_leaves_embedding_norms_and_head(pool):
    net = classifier(pool=pool)
    x = image(net)
    exact = net(x, T)
    assert net.convert_torso(torch.bfloat16) is net and net.torso_dtype == torch.bfloat16
    halves = {name for name, p in net.named_parameters() if p.dtype == torch.bfloat16}
    assert {name.split(".")[0] for name in halves} == {"input_blocks", "middle_block"}
    assert {p.dtype for p in net.out.parameters()} == {torch.float32}
    logits = net(x, T)
    # A few dozen layers each round once, as in the UNet.
    error = (logits - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert logits.dtype == torch.float32 and 0 < error < 10 * torch.finfo(torch.bfloat16).eps
    assert net(x.double(), T).dtype == torch.float64
    assert net(x.half(), T).dtype == torch.float16


def test_dropout_acts_in_training_alone():
    net = classifier(dropout=0.5)
    x = image(net)
    compare(net(x, T), net(x, T), NETWORK_OUTPUT_LIMIT, "evaluated twice")
    net.train()
    assert (net(x, T) - net(x, T)).abs().max() > 1e-3


def test_other_sizes_run_but_for_the_attention_pool():
    assert classifier(pool="spatial")(randn(2, 1, 16, 4), T).shape == (2, CLASSES)
    assert classifier(pool="adaptive")(randn(2, 1, 6, 7), T).shape == (2, CLASSES)
    with pytest.raises(InvalidArgument, match="the attention pool was built for 16 positions"):
        classifier()(randn(2, 1, 16, 16), T)


@pytest.mark.parametrize(
    "x, t, message",
    [
        (randn(2, 3, 8, 8), T, r"x.shape=\(2, 3, 8, 8\): \[N, 1, ...\] with 2 spatial dimensions"),
        (randn(2, 1, 8), T, r"x.shape=\(2, 1, 8\)"),
        (randn(2, 1, 8, 8), T[:1], r"timesteps.shape=\(1,\): one for each image, \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(x, t, message):
    with pytest.raises(InvalidArgument, match=message):
        classifier()(x, t)


def test_build_gives_each_kind_in_evaluation_mode():
    net = build(classifier().config)
    assert not net.training and net(image(net), T).isfinite().all()
    with pytest.raises(TypeError, match="config=dict: a UNetConfig, UpsamplerConfig or ClassifierConfig"):
        build({"image_size": 8})  # type: ignore[arg-type]
