"""Tests that hooks and replaced layers of a pipeline's networks take effect at every row of the next call."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from admfast.engine import engine as engine_module
from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import POLICIES
from tests.small import assert_close, pipeline, randn, unet

LABELS, SEEDS = [0, 3, 1], [3, 5, 7]


def images(pipe, **settings) -> Tensor:
    return pipe.sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", **settings})


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
@pytest.mark.parametrize(
    "layer", ["time_embed.2", "middle_block.0.emb_layers.1", "input_blocks.0.0", "out.2", ""]
)
def test_a_hook_is_called_at_every_row_until_it_is_removed(layer, options):
    pipe, seen = pipeline(options=options), []
    wanted = images(pipe)
    for net, rows in ((pipe.net, 4), (pipe.classifier, 4)):
        if layer.startswith("out.") and net is pipe.classifier:
            continue
        handle = net.get_submodule(layer).register_forward_hook(lambda _m, _x, out: seen.append(len(out)))
        assert_close(images(pipe), wanted)
        assert seen == [len(SEEDS)] * rows
        handle.remove()
        seen.clear()
        assert torch.equal(images(pipe), wanted) and not seen


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
@pytest.mark.parametrize("layer", ["input_blocks.1.0.in_layers.0", "middle_block.1.qkv"])  # run in every row
def test_a_hook_that_a_callback_puts_in_sees_the_layer_from_the_next_row_on(layer, options):
    pipe, seen = pipeline(options=options), []
    module = pipe.net.get_submodule(layer)

    def watch(_module, _inputs, out):
        seen.append(out.clone())

    handle = module.register_forward_hook(watch)
    images(pipe)
    handle.remove()
    wanted = seen[2:]
    seen.clear()
    images(pipe, callback=lambda progress: progress.done == 2 and module.register_forward_hook(watch))
    assert len(seen) == len(wanted) == 2
    for found, published in zip(seen, wanted, strict=True):
        assert_close(found, published)


def test_a_hook_is_called_by_predict():
    pipe, seen = pipeline(), []
    given = randn(2, 1, 8, 8), 500, [1, 2]
    wanted = pipe.predict(*given)
    handle = pipe.net.middle_block[1].qkv.register_forward_hook(lambda _m, _x, out: seen.append(out.shape))
    assert_close(pipe.predict(*given).eps, wanted.eps)
    assert seen == [(2, 3 * 64, 16)]
    handle.remove()
    assert torch.equal(pipe.predict(*given).eps, wanted.eps) and len(seen) == 1


def test_a_compiled_step_serves_no_hooked_network(monkeypatch, caplog):
    made: list[object] = []
    monkeypatch.setattr(engine_module, "compile_step", lambda step, _cache: made.append(step))
    pipe = pipeline(options=EngineOptions(compile=True))
    images(pipe)
    assert len(made) == 1
    handle = pipe.classifier.middle_block[0].in_layers[1].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "admfast"):
        images(pipe)
    assert len(made) == 1 and "hook" in caplog.text
    handle.remove()
    images(pipe)
    assert len(made) == 2


@pytest.mark.parametrize(
    "layer", ["time_embed.1", "middle_block.0.in_layers.1", "middle_block.0.emb_layers.0"]
)
def test_a_layer_without_parameters_that_is_replaced_is_noticed(layer):
    pipe, fresh = pipeline(), pipeline()
    before = images(pipe)
    parent, _, name = layer.rpartition(".")
    for part in (pipe, fresh):
        setattr(part.net.get_submodule(parent), name, nn.Tanh())
    after = images(pipe)
    assert_close(after, images(pipeline(net=fresh.net)))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("layer", ["input_blocks.0.0", "middle_block.0.in_layers.2", "out.2"])
def test_half_precision_goes_on_around_a_pruned_layer(layer):
    mask = torch.ones_like(unet().get_submodule(layer).weight)
    exact, pipe = images(pipeline()), pipeline(policy=POLICIES["bf16"])
    rounded = images(pipe)
    prune.custom_from_mask(pipe.net.get_submodule(layer), "weight", mask)
    found = images(pipe)
    assert pipe.net.torso_dtype == torch.bfloat16
    assert 0 < (found - exact).norm() <= 2 * (rounded - exact).norm()
