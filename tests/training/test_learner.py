"""Tests of one training step: microbatches, skipped steps, precisions, checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from admfast.errors import CheckpointError, NonFiniteError
from admfast.models import build
from admfast.ops.conv.winograd import amplification
from admfast.training.learner import Learner
from admfast.training.loss import loss_terms
from admfast.training.network import build_network, set_checkpointing
from admfast.training.recipe import KINDS
from tests.ops.tolerance import assert_same_formula, assert_within
from tests.training.small_runs import NETWORKS, batch, learner_of, same, small_recipe


def gradients(kind: str, dtype: torch.dtype = torch.float32, **changes) -> dict[str, Tensor]:
    """Return the gradients of a batch of six images, computed in a dtype."""
    recipe = small_recipe(kind, batch_size=6, **changes)
    learner = learner_of(recipe)
    training_batch = batch(recipe, range(6), learner.sampler)
    if dtype == torch.float64:
        learner.net.double()
        learner = Learner(recipe, learner.net)
        values = {f.name: getattr(training_batch, f.name) for f in dataclasses.fields(training_batch)}
        for name in ("images", "noise", "low_res"):
            values[name] = None if values[name] is None else values[name].double()
        training_batch = dataclasses.replace(
            training_batch, **{n: values[n] for n in ("images", "noise", "low_res")}
        )
    learner.update(training_batch)
    return {name: p.grad for name, p in learner.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "norms", "attention", "all", 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_reference_s_in_float64(kind, checkpointing, monkeypatch):
    found = gradients(kind, checkpointing=checkpointing, microbatch=4)
    monkeypatch.setenv("ADMFAST_IMPL", "reference")
    reference, truth = gradients(kind), gradients(kind, torch.float64)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        # A sum over six images of at most 16x16 pixels. Winograd's terms are larger, so it rounds more.
        limits = dict(reduction=6 * 256, growth=amplification())
        assert_within(value, reference[name], truth[name], name, "parameter gradient", **limits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_triton_kernels_equal_the_reference_s_in_float64(kind, monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", "group_norm_silu=triton")
    found = gradients(kind)
    monkeypatch.setenv("ADMFAST_IMPL", "reference")
    reference, truth = gradients(kind), gradients(kind, torch.float64)
    for name, value in found.items():
        limits = dict(reduction=6 * 256, growth=amplification())
        assert_within(value, reference[name], truth[name], name, "parameter gradient", **limits)


def test_checkpointing_changes_no_bit():
    for dropout in (0.0, 0.3):
        network = dataclasses.replace(NETWORKS["diffusion"], dropout=dropout)
        plain = gradients("diffusion", network=network)
        for which in ("norms", "attention", "all", 3):
            same(gradients("diffusion", network=network, checkpointing=which), plain)


def other_parameters(net):
    return {name: 1.3 * p.detach() for name, p in net.named_parameters()}


def through_others(net, parameters: dict[str, Tensor]) -> list[Tensor]:
    x, t = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8), torch.tensor([3, 500])
    leaves = {name: value.clone().requires_grad_(True) for name, value in parameters.items()}
    out = functional_call(net, leaves, (x, t), {"y": torch.tensor([0, 1])})
    return list(torch.autograd.grad(out.square().mean(), list(leaves.values())))


def test_norms_are_made_again_with_the_parameters_of_their_forward_pass():
    net = learner_of(small_recipe(network=dataclasses.replace(NETWORKS["diffusion"], dropout=0.0))).net
    parameters = other_parameters(net)
    plain = through_others(net, parameters)
    set_checkpointing(net, "norms")
    same(through_others(net, parameters), plain)


@pytest.mark.parametrize("which", ["attention", "all"])
def test_blocks_whose_parameters_were_replaced_are_not_computed_again(which):
    net = learner_of(small_recipe()).net
    set_checkpointing(net, which)
    with pytest.raises(RuntimeError, match="checkpointing"):
        through_others(net, other_parameters(net))


def test_a_block_of_an_older_pickle_runs():
    """An older pickle lacks newer attributes of blocks, so these must be attributes of the class."""
    net = build(NETWORKS["diffusion"])
    assert all("recomputes_norms" not in vars(block) for block in net.modules())


def test_checkpointing_chooses_blocks():
    net = build_network(small_recipe())
    counts = {}
    for which in ("none", "attention", "all", 1, 2):
        set_checkpointing(net, which)
        counts[which] = sum(getattr(module, "use_checkpoint", False) for module in net.modules())
    assert 0 == counts["none"] < counts["attention"] < counts["all"] == counts[1]
    assert counts[2] == counts[1] // 2


def test_published_sum_adds_the_means_of_microbatches():
    dtypes = torch.float32, torch.float64
    plain = {dtype: gradients("diffusion", dtype) for dtype in dtypes}
    summed = {dtype: gradients("diffusion", dtype, microbatch=3, published_sum=True) for dtype in dtypes}
    for name in plain[torch.float32]:
        # A weight's gradient sums over six images of at most 16x16 pixels.
        assert_same_formula(
            lambda dtype, name=name: summed[dtype][name],
            lambda dtype, name=name: 2 * plain[dtype][name],
            name,
            "sum",
            6 * 256,
        )


def test_clipping_bounds_the_gradient():
    norm = torch.nn.utils.get_total_norm(list(gradients("diffusion").values()))
    clipped = torch.nn.utils.get_total_norm(list(gradients("diffusion", clip=float(norm) / 2).values()))
    assert clipped == pytest.approx(float(norm) / 2, rel=1e-4)


# Skipped steps


class Poisoned:
    """The loss, multiplied by NaN at the given calls, which count from 1."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, net, recipe, process, training_batch):
        terms = loss_terms(net, recipe, process, training_batch)
        self.count += 1
        return {**terms, "loss": terms["loss"] * float("nan")} if self.count in self.calls else terms


def run(recipe, poisoned: Poisoned, steps: int) -> Learner:
    learner = Learner(recipe, build_network(recipe), loss=poisoned)
    for step in range(steps):
        training_batch = batch(recipe, range(4 * step, 4 * step + 4), learner.sampler)
        learner.update(training_batch)
        learner.check_finite(training_batch)
    return learner


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(precision):
    recipe = small_recipe(ema=(0.5,), precision=precision)
    learner = run(recipe, Poisoned(2), 1)
    before = {key: value.clone() for key, value in learner.net.state_dict().items()}
    average = {key: value.clone() for key, value in learner.averages.weights().items()}
    moments = {
        name: [value.clone() for value in learner.optimiser.state[p].values()]
        for name, p in learner.net.named_parameters()
    }
    scale = learner.log2_scale
    learner.update(batch(recipe, range(4, 8), learner.sampler))
    same(learner.net.state_dict(), before)
    same(learner.averages.weights(), average)
    for name, p in learner.net.named_parameters():
        same(list(learner.optimiser.state[p].values()), moments[name], name)
    assert (int(learner.skipped), int(learner.skipped_in_a_row), learner.step) == (1, 1, 2)
    if scale is not None:
        assert learner.log2_scale == scale - 1
    learner.update(batch(recipe, range(8, 12), learner.sampler))
    assert (int(learner.skipped), int(learner.skipped_in_a_row)) == (1, 0)
    assert any(not torch.equal(value, before[key]) for key, value in learner.net.state_dict().items())


def test_too_many_in_a_row_stop_the_run():
    recipe = small_recipe(max_skipped=2)
    assert run(recipe, Poisoned(1, 2, 4, 5), 6).step == 6
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        run(recipe, Poisoned(2, 3, 4), 6)


def test_the_first_bad_layer_is_named():
    recipe = small_recipe(max_skipped=0)
    learner = learner_of(recipe)
    with torch.no_grad():
        learner.net.middle_block[0].in_layers[2].weight[0, 0, 0, 0] = float("inf")
    training_batch = batch(recipe, range(4), learner.sampler)
    learner.update(training_batch)
    with pytest.raises(NonFiniteError, match=r"middle_block\.0\.in_layers\.2"):
        learner.check_finite(training_batch)


# Precision, sampler, state


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_parameters_and_gradients_in_float32(kind, precision):
    recipe = small_recipe(kind, precision=precision)
    learner = learner_of(recipe)
    if learner.log2_scale is not None:  # the initial scale is so high that the first steps are skipped
        learner.log2_scale.fill_(8)
    seen = set()
    for module in learner.net.input_blocks[1].modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    report = learner.update(batch(recipe, range(4), learner.sampler))
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in learner.net.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in learner.net.parameters()} == {torch.float32}
    exact = learner_of(small_recipe(kind))
    expected = exact.update(batch(recipe, range(4), exact.sampler))
    # Rounding to 8 bits (float16: 11) in a few dozen layers.
    assert report.terms["loss"].float().mean() == pytest.approx(
        float(expected.terms["loss"].mean()), rel=0.05
    )
    assert float(report.grad_norm) == pytest.approx(float(expected.grad_norm), rel=0.1)


def test_the_loss_aware_sampler_learns_once_a_step():
    recipe = small_recipe(sampler="loss-second-moment", microbatch=2)
    learner = learner_of(recipe)
    for step in range(3):
        training_batch = batch(recipe, range(4 * step, 4 * step + 4), learner.sampler)
        report = learner.update(training_batch)
        for t, value in zip(training_batch.t.tolist(), report.terms["loss"].tolist(), strict=True):
            assert value in learner.sampler.losses[t].float().tolist()
    assert int(learner.sampler.counts.sum()) == 12


@pytest.mark.parametrize("more", [{}, {"sampler": "loss-second-moment"}, {"precision": "fp16"}])
def test_a_state_is_all_that_the_next_step_depends_on(more):
    recipe = small_recipe(ema_power=(0.05,), **more)
    whole, half = run(recipe, Poisoned(1), 4), run(recipe, Poisoned(1), 2)
    resumed = Learner(recipe, build_network(dataclasses.replace(recipe, seed=9)))
    resumed.load_state_dict(half.state_dict())
    torch.manual_seed(5)
    for step in (2, 3):
        resumed.update(batch(recipe, range(4 * step, 4 * step + 4), resumed.sampler))
    same(resumed.state_dict(), whole.state_dict())


def test_a_state_of_another_run_is_refused():
    state = learner_of(small_recipe()).state_dict()
    for other in (small_recipe("classifier"), small_recipe(ema=(0.5,))):
        with pytest.raises(CheckpointError, match="not a state of this training"):
            learner_of(other).load_state_dict(state)
