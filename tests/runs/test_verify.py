"""`verify`: within the budget in every precision, past it when any layer is off by 1 %."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from admfast.cli.main import main
from admfast.cli.verify import PAST_BUDGET, report
from admfast.engine.options import PLAIN
from admfast.engine.precision import POLICIES
from admfast.engine.verify import BUDGETS, Budget, Deviation, Verification, compare_images, relative_error
from admfast.errors import InvalidArgument
from admfast.models import ClassifierConfig, UNetConfig
from admfast.runs.verify import verify
from admfast.systems import load
from tests.small import cascade, pipeline, randn, with_weights

PRECISIONS = ["fp32", "bf16", "fp16"]  # what a CPU has; more on a GPU
SHORT = {"steps": 3, "seeds": [5]}


@pytest.fixture(scope="module")
def digits():
    return load("digits32", device="cpu", precision="fp32", engine=PLAIN)


@pytest.fixture(scope="module")
def middling():
    """Pipelines of networks of the released ones' make: legacy attention, resampling blocks, 3 channels."""
    net = with_weights(
        UNetConfig(
            image_size=32,
            in_channels=3,
            model_channels=96,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_head_channels=32,
            use_scale_shift_norm=True,
            resblock_updown=True,
            num_classes=10,
        )
    )
    guide = with_weights(
        ClassifierConfig(
            image_size=32,
            in_channels=3,
            model_channels=64,
            out_channels=10,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_head_channels=32,
            use_scale_shift_norm=True,
            resblock_updown=True,
            pool="attention",
        ),
        1,
    )
    return lambda **settings: pipeline(net=copy.deepcopy(net), classifier=copy.deepcopy(guide), **settings)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_digits_are_within_the_budget(digits, precision):
    found = verify(load("digits32", device="cpu", precision=precision), digits, steps=5, seeds=[7])
    assert not found.failures, report(found)
    assert len(found.steps) == 5 and len(found.layers) > 140
    assert found.psnr > BUDGETS[precision].psnr and found.budget == BUDGETS[precision]
    if precision != "fp32":
        # A precision that isn't used would pass every budget.
        assert max(d.error for d in found.layers) > 10 * BUDGETS["fp32"].layer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_middling_network_is_within_the_budget(middling, precision):
    reference = middling(options=PLAIN)
    found = verify(middling(policy=POLICIES[precision]), reference, steps=2, seeds=[3], guidance=1.0)
    layers = [d for d in found.layers if not d.holds]
    assert not layers, report(found)


LAYERS = [
    "net.input_blocks.0.0",
    "net.input_blocks.4.0.in_layers.2",
    "net.input_blocks.4.0.in_layers.0",
    "net.middle_block.1.qkv",
    "net.middle_block.1.proj_out",
    "net.middle_block.0.emb_layers.1",
    "net.output_blocks.2.0.out_layers.3",
    "net.output_blocks.2.0.skip_connection",
    "net.time_embed.2",
    "net.label_emb",
    "net.out.2",
    "classifier.input_blocks.2.0.in_layers.2",
    "classifier.time_embed.0",
]


PERTURBED = [(layer, "bf16") for layer in LAYERS] + [(LAYERS[i], p) for i in (1, 3) for p in ("fp32", "fp16")]


@pytest.mark.parametrize("layer, precision", PERTURBED)
def test_one_percent_of_one_layer_is_past_the_budget(digits, layer, precision):
    pipe = load("digits32", device="cpu", precision=precision)
    root, _, name = layer.partition(".")
    with torch.no_grad():
        getattr(pipe, root).get_submodule(name).weight.mul_(1.01)
    failures = verify(pipe, digits, **SHORT).failures
    assert failures and failures[0].startswith(f"{layer}: relative error"), failures


def test_a_form_that_no_longer_is_its_parameter_s_is_found(digits):
    pipe = load("digits32", device="cpu", precision="fp32")
    assert not verify(pipe, digits, **SHORT).failures, "and every form has been derived"
    pipe.net.middle_block[0].out_layers[3].weight.data.mul_(1.01)  # behind the fold's back
    with torch.no_grad():
        pipe.net._projections[0].mul_(1.01)
    wrong = verify(pipe, digits, **SHORT)
    assert not any(not d.holds for d in wrong.layers if "middle_block.0.out_layers.3" in d.name)
    assert any(not d.holds for d in wrong.steps)


def test_a_cascade_is_verified_whole():
    found = verify(cascade(), cascade(options=PLAIN), **SHORT)
    assert not found.failures
    assert len([d for d in found.steps if d.name.startswith("upsampler: ")]) == 3
    assert any(d.name.startswith("upsampler net.") for d in found.layers)


def test_pipelines_of_other_networks_are_refused(digits):
    with pytest.raises(InvalidArgument, match="reference='small': of the same config as digits32"):
        verify(load("digits32", device="cpu"), pipeline())


# The measures


def test_images_are_compared_as_levels_and_decibels():
    exact = torch.zeros(1, 1, 2, 2)
    found = Verification(BUDGETS["fp32"])
    compare_images(found, exact, exact)
    assert (found.psnr, found.differing, found.largest) == (math.inf, 0.0, 0)
    compare_images(found, exact + torch.tensor([[[[0.2, 0.0], [0.0, 0.0]]]]), exact)
    assert found.psnr == pytest.approx(10 * math.log10(4 / 0.01)) and found.differing == 0.25
    assert found.largest == int(1.2 * 127.5) - 127


def test_relative_errors_of_nothing_and_of_what_is_not_finite():
    x = randn(3)
    assert relative_error(1.5 * x, x) == pytest.approx(0.5)
    assert relative_error(0 * x, 0 * x) == 0 and relative_error(x, 0 * x) == math.inf
    assert relative_error(x / 0, x) == math.inf and relative_error(x, x * math.nan) == math.inf


def test_failures_name_the_worst_of_each_kind():
    budget = Budget(layer=1e-3, step=1e-2, psnr=40)
    found = Verification(budget, psnr=math.nan)
    found.layers = [Deviation("a", 2e-3, 1e-3), Deviation("b", 5e-3, 1e-3), Deviation("c", 1e-2, 1e-1)]
    found.steps = [Deviation("x after step 1", 9e-3, 1e-2)]
    assert found.failures == [
        "b: relative error 5.00e-03, allowed 1.00e-03",
        "images: PSNR nan dB, at least 40 dB",
    ]
    assert report(found).endswith("past the budget: " + "; ".join(found.failures))


# The command


def test_the_command_prints_tables_and_exits_by_the_budget(capsys, monkeypatch):
    arguments = ["verify", "digits32", "--steps", "2", "--seeds", "0", "--device", "cpu"]
    assert main([*arguments, "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "within the budget" in out and "x after step 2" in out and "worst of 147 layers" in out
    monkeypatch.setitem(BUDGETS, "bf16", Budget(layer=1e-6, step=1, psnr=0))
    assert main([*arguments, "--precision", "bf16"]) == PAST_BUDGET
    assert "past the budget: net." in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps=0"),
        (["--solver", "euler"], "--solver='euler'"),
        (["--precision", "fp8"], "--precision='fp8'"),
        (["--seeds", "5-1"], "--seeds='5-1'"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert main(["verify", "digits32", "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"admfast: {message}") and err.count("\n") == 1
