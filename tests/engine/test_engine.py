"""Tests of engines: a step has one user at a time, and is dropped when weights or settings change."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor

from admfast.engine.options import PLAIN, EngineOptions
from admfast.engine.precision import POLICIES
from admfast.errors import InvalidArgument
from admfast.models.fold import FoldOptions
from admfast.ops import dispatch
from admfast.ops.dispatch import record_choices
from admfast.ops.update import sampler_step_ref
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import plan
from admfast.sampling.request import SampleRequest
from tests.small import PROCESS, cascade, classifier, pipeline, randn, unet

LABELS, SEEDS = [0, 3, 1], [3, 5, 7]


def images(pipe: Pipeline, **settings) -> Tensor:
    return pipe.sample(**{"classes": LABELS, "seeds": SEEDS, "output": "float", **settings})


def kept(pipe: Pipeline):
    """Return the only step that the engine keeps."""
    (step,) = pipe.engine._steps.values()
    return step


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("graph", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize("steps", [2, 6])
def test_a_dropped_step_is_freed_without_the_collector(steps, graph, hooked):
    # A step that referred to itself would keep its memory, which torch's allocator can't wait for.
    pipe = pipeline(options=EngineOptions(graph=graph))
    if hooked:
        pipe.net.register_forward_hook(lambda *_: None)
    images(pipe, steps=steps)
    dropped = weakref.ref(kept(pipe))
    gc.collect()
    gc.disable()
    try:
        pipe.engine.release()
        assert dropped() is None
    finally:
        gc.enable()


# Several users


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
def test_a_callback_may_sample_with_the_same_pipeline(options):
    pipe = pipeline(options=options)
    wanted, inner = images(pipe), images(pipe, seeds=[11, 12, 13])
    seen: list[Tensor] = []

    def callback(progress):
        if not seen:
            seen.append(images(pipe, seeds=[11, 12, 13]))

    assert torch.equal(images(pipe, callback=callback), wanted) and torch.equal(seen[0], inner)
    assert len(pipe.engine._steps) <= 1


def test_threads_get_the_images_of_one_after_another():
    pipe = pipeline()
    settings = [{"seeds": [i, i + 1, i + 2], "steps": 12} for i in (0, 50, 100)]
    wanted = [images(pipeline(), **given) for given in settings]
    found: dict[int, Tensor] = {}
    workers = [
        threading.Thread(target=lambda i=i, given=given: found.update({i: images(pipe, **given)}))
        for i, given in enumerate(settings)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == [0, 1, 2]
    assert all(torch.equal(found[i], wanted[i]) for i in found)


def test_a_step_in_use_is_nobody_else_s():
    pipe = pipeline()
    images(pipe)
    engine, step = pipe.engine, kept(pipe)
    batch = plan(SampleRequest(LABELS, SEEDS), pipe)
    with engine.borrow_step(batch) as first, engine.borrow_step(batch) as second:
        assert first is step and second is not step and not engine._steps
    assert kept(pipe) is step
    with pytest.raises(ZeroDivisionError), engine.borrow_step(batch):
        raise ZeroDivisionError
    assert kept(pipe) is step


def test_copies_and_pickles_sample_the_same():
    for pipe in (pipeline(), cascade()):
        wanted = images(pipe)
        for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
            assert torch.equal(images(other), wanted) and other.engine.net is other.net


# Other networks and settings


def test_a_step_is_of_the_implementations_that_the_environment_names():
    pipe = pipeline()
    with dispatch.override_impl("sampler_step=reference"):
        images(pipe)
        named = kept(pipe)
    assert named.update is sampler_step_ref
    assert torch.equal(images(pipe), images(pipeline())) and len(pipe.engine._steps) == 2


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
@pytest.mark.parametrize("part", ["net", "classifier"])
def test_another_network_makes_another_pipeline(part, options):
    pipe, other = pipeline(options=options), {"net": unet, "classifier": classifier}[part](9)
    before = images(pipe)
    changed = dataclasses.replace(pipe, **{part: other})
    assert not any(parameter.requires_grad for parameter in other.parameters())
    wanted = pipeline(options=options, **{part: copy.deepcopy(other)})
    assert torch.equal(images(changed), images(wanted)) and torch.equal(images(pipe), before)


@pytest.mark.parametrize(
    ("precision", "fold", "message"),
    [
        ("int8", None, "fold=None: FoldOptions: precision='int8'"),
        ("int8", FoldOptions(conv="library"), "conv='library': None with precision='int8'"),
        ("bf16", FoldOptions(int8=True), "int8=True: False: only precision='int8'.*'bf16'"),
    ],
)
def test_options_that_do_not_fit_int8_are_named(precision, fold, message):
    options = EngineOptions(fold=fold)
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        pipeline(policy=POLICIES[precision], options=options)


def test_a_float64_network_computes_in_float64_in_any_policy():
    pipe = pipeline(net=unet().double(), classifier=None, guidance=0.0, policy=POLICIES["int8"])
    with record_choices() as seen:
        images(pipe)
    assert pipe.net.torso_dtype == torch.float64 and not pipe.net.fold_options.int8
    assert {choice.op for choice in seen if "conv" in choice.op} == {"conv"}


def test_an_int8_pipeline_survives_a_copy():
    pipe = pipeline(policy=POLICIES["int8"])
    again = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(images(again), images(pipe)) and again.net.fold_options.int8


def test_other_settings_make_another_pipeline():
    pipe = pipeline()
    images(pipe)
    half = dataclasses.replace(pipe, policy=POLICIES["bf16"])
    assert torch.equal(images(half), images(pipeline(policy=POLICIES["bf16"])))
    plain = dataclasses.replace(pipe, options=PLAIN)
    assert not plain.net.is_folded
    cosine = dataclasses.replace(plain, diffusion=dataclasses.replace(PROCESS, noise_schedule="cosine"))
    x = randn(1, 1, 8, 8)
    wanted = pipeline(options=PLAIN, diffusion=cosine.diffusion).predict(x, 500, [1])
    assert torch.equal(cosine.predict(x, 500, [1]).x0, wanted.x0)


def test_a_pipeline_is_frozen_and_checks_what_takes_a_part_s_place():
    pipe = pipeline()
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipe.net = unet()
    with pytest.raises(InvalidArgument, match="^classifier="):
        dataclasses.replace(pipe, net=unet(in_channels=3, out_channels=6))


def test_a_plain_pipeline_runs_a_network_that_another_folded():
    net, guide = unet(), classifier(1)
    half = pipeline(net=net, classifier=guide, policy=POLICIES["bf16"])
    plain = pipeline(net=net, classifier=guide, options=PLAIN)
    rounded, wanted = images(half), images(pipeline(options=PLAIN))
    assert torch.equal(images(plain), wanted)
    x = randn(3, 1, 8, 8)
    images(half)
    found = plain.predict(x, 500, LABELS).x0
    assert torch.equal(found, pipeline(options=PLAIN).predict(x, 500, LABELS).x0)
    assert torch.equal(images(half), rounded)


@pytest.mark.parametrize("outer", [0, 1], ids=["prepared", "plain"])
def test_pipelines_of_two_precisions_do_not_mix_in_one_image(outer):
    net, guide = unet(), classifier(1)
    pipes = [
        pipeline(net=net, classifier=guide, policy=POLICIES["bf16"]),
        pipeline(net=net, classifier=guide, options=PLAIN),
    ]
    with pytest.raises(InvalidArgument, match="net='folded anew while it samples'"):
        images(pipes[outer], callback=lambda _: images(pipes[1 - outer]))


def test_a_network_that_trains_is_sampled_from_as_it_is():
    pipe = pipeline(guidance=0.0)
    wanted = images(pipe)
    for change in (lambda net: net.train(), lambda net: net.requires_grad_(True)):
        change(pipe.net)
        assert (images(pipe) - wanted).abs().max() < 1e-4
    with torch.no_grad():
        pipe.net.out[2].bias.add_(0.3)
    assert (images(pipe) - wanted).abs().max() > 1e-2
    pipe.net.eval().requires_grad_(False)
    assert pipe.net.out[2].bias.requires_grad is False and images(pipe).shape == wanted.shape
    assert pipe.net.is_folded


def test_a_classifier_made_trainable_is_refused_by_name():
    pipe = pipeline()
    images(pipe)
    pipe.classifier.requires_grad_(True)
    with pytest.raises(InvalidArgument, match="classifier='trainable': freeze its parameters first"):
        images(pipe)
    assert torch.isfinite(images(pipe, guidance=0)).all()


def test_input_that_requires_a_gradient_leaves_none_behind():
    pipe, z = pipeline(), randn(3, 1, 8, 8)
    wanted = images(pipe, noise=z)
    steps = randn(4, 3, 1, 8, 8, seed=4)
    recorded = images(pipe, noise=z, step_noise=steps)
    assert not images(pipe, noise=z.clone().requires_grad_(True)).requires_grad
    given = {"noise": z, "step_noise": steps.clone().requires_grad_(True)}
    assert torch.equal(images(pipe, **given), recorded)
    assert torch.equal(images(pipe, noise=z), wanted) and not images(pipe, noise=z).requires_grad


@pytest.mark.parametrize("options", [EngineOptions(), PLAIN], ids=["prepared", "plain"])
def test_a_scale_that_float32_does_not_hold_is_refused_by_name(options):
    for given in (1e39, -1e300):
        with pytest.raises(InvalidArgument, match="^guidance="):
            images(pipeline(options=options), guidance=given)


def test_a_pipeline_may_be_made_in_inference_mode_but_not_its_networks():
    net, guide, fresh = unet(), classifier(1), pipeline()
    with torch.inference_mode():
        pipe = pipeline(net=net, classifier=guide)
        for parts, name in (({"net": unet()}, "net"), ({"classifier": classifier(1)}, "classifier")):
            given = {"net": net, "classifier": guide, **parts}
            with pytest.raises(InvalidArgument, match=f"{name}='made in inference mode': build it outside"):
                pipeline(**given)
    for one in (pipe, fresh):
        images(one)
        with torch.no_grad():
            one.net.middle_block[0].emb_layers[1].bias.add_(0.3)
    assert torch.equal(images(pipe), images(fresh))


# Folded weights that moved in memory


MOVES = {
    "assigned": lambda net: net.load_state_dict(
        {k: v.clone() for k, v in net.state_dict().items()}, assign=True
    ),
    "a part converted": lambda net: net.middle_block.to(torch.float32),
    "a layer replaced": lambda net: net.middle_block.__setitem__(1, copy.deepcopy(net.middle_block[1])),
    "data replaced": lambda net: setattr(net.out[0].weight, "data", net.out[0].weight.data.clone()),
    "folded anew by a user": lambda net: (net.unfold(), net.fold()),
    "folded otherwise by a user": lambda net: net.fold(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES)
def test_steps_of_forms_in_other_memory_are_dropped(move):
    pipe = pipeline()
    wanted, step = images(pipe), kept(pipe)
    MOVES[move](pipe.net)
    assert torch.equal(images(pipe), wanted)
    # A captured graph of the old step would read freed memory.
    assert kept(pipe) is not step


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_folded_anew_by_another_pipeline_is_dropped(precision):
    net, guide = unet(), classifier(1)
    pipe = pipeline(net=net, classifier=guide)
    other = pipeline(net=net, classifier=guide, policy=POLICIES[precision])
    wanted = images(pipeline())
    assert torch.equal(images(pipe), wanted)
    step = kept(pipe)
    net.unfold()
    images(other)  # folds the network again; with equal precision `pipe` then finds it folded
    assert torch.equal(images(pipe), wanted) and kept(pipe) is not step


# One network in several pipelines


def test_pipelines_that_share_a_network_keep_its_form():
    net, guide = unet(), classifier(1)
    guided = pipeline(net=net, classifier=guide)
    alone = pipeline(net=net, classifier=None, guidance=0.0)
    images(guided), images(alone)
    generation = net.fold_generation
    for pipe in (guided, alone, guided):
        images(pipe)
    assert net.fold_generation == generation
