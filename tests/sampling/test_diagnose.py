"""Tests of the diagnosis of NaN and infinity: the first layer that outputs one, and the bad weights."""

from __future__ import annotations

import pytest
import torch

from admfast.engine.guidance import classifier_guidance
from admfast.engine.options import PLAIN, EngineOptions
from admfast.errors import NonFiniteError
from admfast.sampling.diagnose import first_nonfinite
from admfast.sampling.functions import bind_conditions
from tests.small import classifier, pipeline, randn, unet

X, T, LABELS = randn(2, 1, 8, 8), torch.tensor([500, 500]), torch.tensor([0, 1])


def diagnosis(net: torch.nn.Module, guide: torch.nn.Module | None = None, x: torch.Tensor = X) -> str:
    guidance = None
    if guide is not None:
        guidance = classifier_guidance(guide.requires_grad_(False), LABELS, 1.0)
    calls = {"its output": bind_conditions(net, LABELS, None), "the guidance": guidance}
    return first_nonfinite({"net": net, "classifier": guide}, calls, x, T)


def poison(net: torch.nn.Module, name: str, value: float = float("nan")) -> None:
    """Set the first value of a weight."""
    with torch.no_grad():
        net.get_parameter(name).view(-1)[0] = value


# Weight that is made NaN or infinite: layer that must be named.
LAYERS = {
    "time_embed.2.bias": "net.time_embed.2 (Linear)",
    "label_emb.weight": "net.label_emb (Embedding)",
    "input_blocks.0.0.weight": "net.input_blocks.0.0 (Conv2d)",
    "input_blocks.1.0.in_layers.0.weight": "net.input_blocks.1.0.in_layers.0 (Norm)",
    "input_blocks.3.1.qkv.weight": "net.input_blocks.3.1.qkv (PointwiseConv1d)",
    "middle_block.2.emb_layers.1.weight": "net.middle_block.2.emb_layers.1 (Linear)",
    "output_blocks.3.0.skip_connection.bias": "net.output_blocks.3.0.skip_connection (Conv2d)",
    "out.2.weight": "net.out.2 (Conv2d)",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("weight", LAYERS)
def test_the_first_layer_is_named(weight, value):
    net = unet()
    poison(net, weight, value)
    if weight != "out.2.weight":
        poison(net, "out.2.weight")  # a later layer, which must not be named
    text = diagnosis(net, classifier())
    assert text.startswith(f"the first layer to put it out is {LAYERS[weight]};")
    rest = "" if weight == "out.2.weight" else " and 1 more"
    assert text.endswith(f"weights that are not finite: net.{weight}{rest}")


def test_the_classifier_s_layers_are_named_too():
    guide = classifier()
    poison(guide, "middle_block.0.in_layers.2.weight")
    assert diagnosis(unet(), guide) == (
        "the first layer to put it out is classifier.middle_block.0.in_layers.2 (Conv2d); "
        "weights that are not finite: classifier.middle_block.0.in_layers.2.weight"
    )


def test_overflow_with_finite_weights():
    net = unet()
    with torch.no_grad():
        net.get_parameter("input_blocks.1.0.out_layers.3.weight").mul_(1e38)
        net.get_parameter("input_blocks.1.0.out_layers.3.weight").mul_(10).clamp_(-3e38, 3e38)
    text = diagnosis(net)
    assert text.startswith("the first layer to put it out is net.input_blocks.1.0.out_layers.3 (Conv2d);")
    assert text.endswith("all weights are finite")


def test_what_is_no_layer_s_fault():
    net = unet()
    assert diagnosis(net) == "no layer put it out: the update did; all weights are finite"
    bad = X.clone()
    bad[1, 0, 3, 3] = float("inf")
    assert diagnosis(net, x=bad) == "x was not finite before the step; all weights are finite"
    calls = {"its output": None, "the guidance": lambda x, t: x / 0}
    text = first_nonfinite({"net": net}, calls, X, T)
    assert text == "no layer put it out, but the guidance is not finite; all weights are finite"


def test_no_hook_is_left_behind():
    net = unet()

    def failing(x, t):
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        first_nonfinite({"net": net}, {"its output": failing}, X, T)
    diagnosis(net)
    assert not any(module._forward_hooks for module in net.modules())


# Through the pipeline


def test_sampling_stops_with_the_layer_s_name():
    pipe = pipeline()
    poison(pipe.net, "output_blocks.0.0.in_layers.2.weight")
    with pytest.raises(NonFiniteError) as caught:
        pipe.sample(seeds=[1])
    assert str(caught.value) == (
        "x is not finite after step 3 (t = 999); the first layer to put it out is "
        "net.output_blocks.0.0.in_layers.2 (Conv2d); "
        "weights that are not finite: net.output_blocks.0.0.in_layers.2.weight"
    )


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
def test_sampling_names_a_layer_that_folding_takes_the_place_of(options):
    pipe = pipeline(options=options)
    poison(pipe.net, "middle_block.0.emb_layers.1.weight")
    with pytest.raises(NonFiniteError, match=r"is net.middle_block.0.emb_layers.1 \(Linear\); weights"):
        pipe.sample(seeds=[1])
    assert pipe.net.joins_projections == (options.fold is not None)


def test_sampling_names_a_layer_of_the_classifier():
    pipe = pipeline()
    poison(pipe.classifier, "input_blocks.2.0.op.bias")
    with pytest.raises(NonFiniteError, match=r"is classifier.input_blocks.2.0.op \(Conv2d\); weights"):
        pipe.sample(seeds=[1])
    assert pipe.sample(seeds=[1], guidance=0).shape == (1, 8, 8, 1)


def test_an_update_that_diverges_by_itself():
    pipe = pipeline(classifier=None, guidance=0.0)
    where = "no layer put it out: the update did; all weights are finite"
    with pytest.raises(NonFiniteError, match=f"after step 2 .*; {where}"):
        pipe.sample(seeds=[1], denoised_fn=Late(1, float("nan"), calls_after=1))
    where = "no layer put it out, but what denoised_fn returned is not finite; all weights are finite"
    with pytest.raises(NonFiniteError, match=f"after step 2 .*; {where}"):
        pipe.sample(seeds=[1], denoised_fn=Late(1, float("nan")))
    with pytest.raises(NonFiniteError, match="after step 3 .*; no layer put it out, but the guidance is not"):
        pipe.sample(seeds=[1], guidance_fn=lambda x, t: x * float("inf"))
    with pytest.raises(NonFiniteError, match="after step 3 .*; x was not finite before the step"):
        pipe.sample(seeds=[1], noise=torch.full((1, 1, 8, 8), float("nan")))


class Late:
    """A denoised_fn that returns x0 unchanged for `calls` calls, and then `value` for `calls_after` calls."""

    def __init__(self, calls: int, value: float, calls_after: int = 1000):
        self.left, self.value, self.calls_after = calls, value, calls_after

    def __call__(self, x0: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return torch.full_like(x0, self.value) if -self.calls_after <= self.left < 0 else x0
