"""Tests of `verify`: every precision is within its budget; a layer that is off by 1 % exceeds it."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from admfast.diffusion import DiffusionConfig
from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import POLICIES, Policy
from admfast.errors import InvalidArgument
from admfast.ops.dispatch import record_choices
from admfast.ops.update import Clip
from admfast.sampling import loop
from admfast.sampling.load import load
from admfast.sampling.loop import run
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.request import SampleRequest
from admfast.solvers import ddim, ddpm
from admfast.verify import compare
from admfast.verify.budget import (
    BUDGETS,
    Budget,
    Deviation,
    Verification,
    amplified_error,
    compare_images,
    relative_error,
)
from admfast.verify.compare import verify
from admfast.verify.layers import round_to_tf32
from admfast.verify.report import report
from tests.small import (
    PROCESS,
    SMALL_CLASSIFIER,
    SMALL_UNET,
    classifier,
    cpu_precisions,
    pipeline,
    randn,
    unet,
    upsampler,
    with_weights,
)

PRECISIONS = cpu_precisions()
SHORT = {"steps": 3, "seeds": [5]}


@pytest.fixture(scope="module")
def digits():
    return load("digits32", device="cpu", precision="fp32", engine=PLAIN)


@pytest.fixture(scope="module")
def middling():
    """Return a function that makes pipelines with the released models' options, but smaller networks."""
    net = with_weights(dataclasses.replace(SMALL_UNET, image_size=32, model_channels=96))
    levels = {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    guide = with_weights(dataclasses.replace(SMALL_CLASSIFIER, image_size=32, model_channels=64, **levels), 1)
    return lambda **settings: pipeline(net=copy.deepcopy(net), classifier=copy.deepcopy(guide), **settings)


def cascade(**settings) -> Pipeline:
    """Return a pipeline with an upsampler, both with these settings."""
    up = Pipeline("small-up", upsampler(2), PROCESS, low_res_size=8, **settings)
    return pipeline(upsampler=up, **settings)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_digits_are_within_the_budget(digits, precision):
    with record_choices() as seen:
        found = verify(load("digits32", device="cpu", precision=precision), digits, steps=5, seeds=[7])
    assert not found.failures, report(found)
    assert len(found.steps) == 5 and len(found.layers) > 140
    assert found.psnr > BUDGETS[precision].psnr and found.budget == BUDGETS[precision]
    if precision != "fp32":
        # Check that the precision is really used: otherwise every budget would be met.
        assert max(d.error for d in found.layers) > 10 * BUDGETS["fp32"].layer
    if precision == "int8":
        of_8_bits = [d for d in found.layers if d.name.endswith(("in_layers.2", "out_layers.3"))]
        assert all(d.allowed == BUDGETS["int8"].layer for d in of_8_bits), report(found)
        assert [choice.op for choice in seen].count("conv_int8") >= len(of_8_bits)
        assert all(d.allowed <= BUDGETS["bf16"].layer for d in found.layers if d not in of_8_bits)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_middling_network_is_within_the_budget(middling, precision):
    reference = middling(options=PLAIN)
    found = verify(middling(policy=POLICIES[precision]), reference, steps=2, seeds=[3], guidance=1.0)
    layers = [d for d in found.layers if not d.within_budget]
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
    # This also makes all derived forms.
    assert not verify(pipe, digits, **SHORT).failures, "the unchanged pipeline must pass"
    pipe.net.middle_block[0].out_layers[3].weight.data[..., 0, :].mul_(1.05)  # unnoticed by the fold
    with torch.no_grad():
        pipe.net._projections.weight.mul_(1.01)
    wrong = verify(pipe, digits, **SHORT)
    assert not any(not d.within_budget for d in wrong.layers if "middle_block.0.out_layers.3" in d.name)
    assert any(not d.within_budget for d in wrong.steps)


def test_a_cascade_is_verified_whole():
    found = verify(cascade(), cascade(options=PLAIN), **SHORT)
    assert not found.failures
    assert len([d for d in found.steps if d.name.startswith("upsampler: ")]) == 3
    assert any(d.name.startswith("upsampler net.") for d in found.layers)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_layers_are_compared_in_the_pipelines_own_numerics(around):
    # On CUDA the same code sets TF32. Settings of the process must not round the reference.
    pipe, reference = pipeline(), pipeline(options=PLAIN)
    wanted = verify(pipe, reference, **SHORT)
    with around():
        got = verify(pipe, reference, **SHORT)
    assert not got.failures and got.layers == wanted.layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("process", ["highest", "high"])
def test_tf32_is_what_is_compared_on_a_gpu(process):
    plain = load("digits32", device="cuda", precision="fp32", engine=PLAIN)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(process)
    torch.backends.cudnn.allow_tf32 = process == "high"
    try:
        found = {
            p: verify(load("digits32", device="cuda", precision=p), plain, **SHORT) for p in ("tf32", "fp32")
        }
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert not found["tf32"].failures and not found["fp32"].failures
    assert max(d.error for d in found["tf32"].layers) > 10 * BUDGETS["fp32"].layer


# The reference


def test_a_pipeline_is_no_reference_of_itself(digits):
    with pytest.raises(InvalidArgument, match="reference='digits32': another pipeline than `pipe`"):
        verify(digits, digits, **SHORT)


NO_REFERENCE = {
    "bf16": (dict(policy=POLICIES["bf16"], options=PLAIN), "in precision 'fp32'; this is in 'bf16'"),
    "auto": (dict(policy=Policy("auto", torch.bfloat16), options=PLAIN), "this is in 'auto'"),
    "folded": (dict(), "with engine=PLAIN; this differs in prepared, fold, graph, branches"),
    "unfolded": (dict(options=EngineOptions(fold=None)), "this differs in prepared, graph, branches"),
    "another process": (
        dict(diffusion=DiffusionConfig(noise_schedule="cosine", steps=1000, learn_sigma=True)),
        "of the same diffusion as small",
    ),
    "no classifier": (
        dict(classifier=None, options=PLAIN, guidance=0.0),
        "with the same classifier as small",
    ),
}


@pytest.mark.parametrize("kind", NO_REFERENCE)
def test_what_is_no_reference_is_refused(kind):
    settings, words = NO_REFERENCE[kind]
    with pytest.raises(InvalidArgument, match=f"^reference='small': .*{words}"):
        verify(pipeline(), pipeline(**settings), **SHORT)


def test_networks_are_the_reference_s_own():
    net, guide = unet(), classifier(1)
    pipe = pipeline(net=net, classifier=guide)
    for shared, part in (({"net": net}, "net"), ({"classifier": guide}, "classifier")):
        with pytest.raises(InvalidArgument, match=f"reference.{part}='that of pipe': a network of its own"):
            verify(pipe, pipeline(options=PLAIN, **shared), **SHORT)
    rounded = pipeline(options=PLAIN)
    rounded.net.convert_torso(torch.bfloat16)
    with pytest.raises(InvalidArgument, match="reference.net='bfloat16': parameters in float32"):
        verify(pipe, rounded, **SHORT)


def test_the_reference_of_a_cascade_is_one_in_both_halves():
    plain = dataclasses.replace(cascade(options=PLAIN), upsampler=cascade().upsampler)
    with pytest.raises(InvalidArgument, match="reference.upsampler='small-up': with engine=PLAIN"):
        verify(cascade(), plain, **SHORT)
    with pytest.raises(InvalidArgument, match="reference.upsampler=None: as of small"):
        verify(cascade(), pipeline(options=PLAIN), **SHORT)


def test_pipelines_of_other_networks_are_refused(digits):
    with pytest.raises(InvalidArgument, match="reference='small': of the same config as digits32"):
        verify(load("digits32", device="cpu"), pipeline(), **SHORT)


# Arguments


def test_seeds_and_classes_as_of_sample():
    pipe, plain = pipeline(), pipeline(options=PLAIN)
    one, several = (verify(pipe, plain, seeds=s, classes=3, steps=2) for s in (5, iter([5])))
    assert one == several and not one.failures


@pytest.mark.parametrize(
    "given, seeds, labels",
    [({}, [0, 1, 2, 3], [0, 1, 2, 3]), ({"classes": [1, 2]}, [0, 1], [1, 2]), ({"seeds": [9]}, [9], [1])],
)
def test_images_where_not_all_is_said(given, seeds, labels, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "run", lambda plan: seen.append(plan) or run(plan))
    verify(pipeline(), pipeline(options=PLAIN), steps=2, **given)
    assert [(plan.seeds.tolist(), plan.labels.tolist(), plan.batch_size) for plan in seen] == [
        (seeds, labels, len(seeds))
    ] * 2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(seeds="a"), "seeds='a'"),
        (dict(seeds=[]), r"seeds=\[\]: at least one"),
        (dict(seeds=-1), "seeds=-1: a whole number from 0"),
        (dict(classes=4), "classes=4: a whole number from 0 to 3"),
        (dict(budget=3), "budget=3"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(upsampler_steps=3), "upsampler_steps=3: small has no upsampler"),
        (dict(low_res=3), "low_res='int': a tensor of floats"),
        (dict(solver="ddim-inverse"), "solver='ddim-inverse'"),
    ],
)
def test_wrong_arguments_are_named(settings, words):
    with pytest.raises(InvalidArgument, match=words):
        verify(pipeline(), pipeline(options=PLAIN), **{**SHORT, **settings})


def test_what_is_no_pipeline_or_has_no_budget_is_named():
    plain = pipeline(options=PLAIN)
    with pytest.raises(InvalidArgument, match="pipe='digits32': a Pipeline"):
        verify("digits32", plain)
    with pytest.raises(InvalidArgument, match="reference=None: a Pipeline"):
        verify(plain, None)
    with pytest.raises(InvalidArgument, match="budget=None: a Budget: none is known for the precision 'own'"):
        verify(pipeline(policy=Policy("own", torch.bfloat16)), plain, **SHORT)
    for values in (dict(layer=0.0), dict(step=-1.0), dict(psnr="x"), dict(output=math.nan)):
        with pytest.raises(InvalidArgument, match=f"{next(iter(values))}="):
            Budget(**{"layer": 1.0, "step": 1.0, "psnr": 1.0, **values})


def test_batches_that_were_halved_are_compared_whole(monkeypatch):
    pipe, plain = pipeline(), pipeline(options=PLAIN)
    wanted = verify(pipe, plain, steps=2)
    own = loop.sample_batch

    def small(plan, notes):
        if plan.shape[0] > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return own(plan, notes)

    monkeypatch.setattr(loop, "sample_batch", small)
    found = verify(pipe, plain, steps=2)
    assert [d.name for d in found.steps] == [d.name for d in wanted.steps] and not found.failures


# How many steps


@pytest.mark.parametrize("precision, fewest", [("bf16", 4), ("fp16", 4), ("fp32", 2)])
def test_as_few_steps_as_are_taken_are_within_the_budget(digits, precision, fewest):
    pipe = load("digits32", device="cpu", precision=precision)
    found = verify(pipe, digits, steps=fewest, seeds=[0], solver="ddpm")
    assert not found.failures, report(found)
    for steps in range(2, fewest):
        with pytest.raises(
            InvalidArgument, match=rf"^steps={steps}: {fewest} or more for ddpm in this precision"
        ):
            verify(pipe, digits, steps=steps, seeds=[0], solver="ddpm")


def test_the_upsampler_s_steps_are_looked_at_too():
    half = dict(policy=POLICIES["bf16"])
    with pytest.raises(InvalidArgument, match="^upsampler_steps=2: 4 or more for ddpm"):
        verify(cascade(**half), cascade(options=PLAIN), steps=4, upsampler_steps=2, solver="ddpm")
    with pytest.raises(InvalidArgument, match="^steps=2: no number of steps of ddpm in this"):
        strict = Budget(layer=1.0, step=1e-9, psnr=0.0, output=1.0)
        verify(pipeline(), pipeline(options=PLAIN), steps=2, seeds=[0], solver="ddpm", budget=strict)


def test_what_a_row_makes_of_rounding():
    table = ddpm().table(PROCESS.build("2"))
    first = table.rows[0]
    assert first.clip == Clip.USED and amplified_error(table, 1e-3) == pytest.approx(
        -first.k_out * first.b * 1e-3
    )
    assert amplified_error(table, 1e4) == max(abs(row.b) for row in table.rows), (
        "clipped x_0 differ by at most 1"
    )
    # With few steps DDIM starts where x_0 amplifies less. With many steps each one uses little of x_0.
    few, many = (ddim().table(PROCESS.build(f"ddim{n}")) for n in (2, 100))
    assert amplified_error(many, 1e-3) < amplified_error(few, 1e-3) < 0.05 * amplified_error(table, 1e-3)


# Measures


def test_images_are_compared_as_levels_and_decibels():
    exact = torch.zeros(1, 1, 2, 2)
    found = Verification(BUDGETS["fp32"])
    compare_images(found, exact, exact)
    assert (found.psnr, found.differing_fraction, found.largest_difference) == (math.inf, 0.0, 0)
    compare_images(found, exact + torch.tensor([[[[0.2, 0.0], [0.0, 0.0]]]]), exact)
    assert found.psnr == pytest.approx(10 * math.log10(4 / 0.01)) and found.differing_fraction == 0.25
    assert found.largest_difference == int(1.2 * 127.5) - 127


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


def test_values_of_tf32_have_ten_bits():
    one = 1 + 2.0**-10
    x = torch.tensor([1.0, one, 1 + 2.0**-11, one + 2.0**-11, -(1 + 2.0**-11) - 2.0**-20, 0.0])
    wanted = [1.0, one, 1.0, 1 + 2.0**-9, -one, 0.0]
    assert round_to_tf32(x).tolist() == wanted
    y = randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert (round_to_tf32(y) / y - 1).abs().max() <= 2.0**-11


def test_a_request_of_one_s_own_is_judged_as_floats():
    plain = pipeline(options=PLAIN)
    assert not verify(pipeline(), plain, SampleRequest([1], [0], steps=3)).failures
    with pytest.raises(InvalidArgument, match="^request="):
        verify(pipeline(), plain, SampleRequest([1], [0], steps=3, callback=print))
