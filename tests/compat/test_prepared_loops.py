"""Tests that the published sampling loops give the same samples and draws when run as a prepared step."""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.nn.functional as F

from admfast.compat.guided_diffusion import gaussian_diffusion as gd
from admfast.compat.guided_diffusion import script_util, unet
from admfast.compat.guided_diffusion.prepared_loops import find_guidance, find_network, prepared_loop
from tests.parity.golden import NETWORK_SAMPLES_LIMIT, compare
from tests.tools.random_checkpoint import random_state

SHAPE = (2, 3, 16, 16)
Y = torch.tensor([1, 3])
CLASSES = 5


def filled(net):
    net.load_state_dict(random_state(net.config))
    return net.eval()


@pytest.fixture(scope="module")
def nets():
    """Return a UNet with classes, one without, and a classifier, all with weights that require gradients."""
    common = dict(image_size=16, in_channels=3, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    common |= dict(attention_resolutions=(2,), num_head_channels=16, use_scale_shift_norm=True)
    return types.SimpleNamespace(
        labelled=filled(unet.UNetModel(out_channels=6, num_classes=CLASSES, **common)),
        plain=filled(unet.UNetModel(out_channels=6, **common)),
        classifier=filled(unet.EncoderUNetModel(out_channels=CLASSES, pool="attention", **common)),
    )


def process(respacing="6", **kwargs):
    return script_util.create_gaussian_diffusion(learn_sigma=True, timestep_respacing=respacing, **kwargs)


def published_guide(classifier, args):
    def cond_fn(x, t, y=None):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            logits = classifier(x_in, t)
            chosen = F.log_softmax(logits, dim=-1)[range(len(logits)), y.view(-1)]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale

    return cond_fn


def published_model(model, args):
    def model_fn(x, t, y=None):
        return model(x, t, y if args.class_cond else None)

    return model_fn


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("guided", [False, True])
def test_both_ways_give_and_draw_the_same(nets, step, guided):
    diffusion, kwargs, model = process(), {"model_kwargs": {"y": Y}}, nets.labelled
    if guided:
        args = types.SimpleNamespace(classifier_scale=1.5, class_cond=True)
        kwargs |= {"cond_fn": published_guide(nets.classifier, args), "device": "cpu"}
        model = published_model(nets.labelled, args)
    torch.manual_seed(3)
    *_, expected = getattr(diffusion, f"{step}_loop_progressive")(model, SHAPE, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = prepared_loop(diffusion, step, model, SHAPE, **kwargs)
    compare(found, expected["sample"], NETWORK_SAMPLES_LIMIT, "samples")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in nets.classifier.parameters())
    torch.manual_seed(3)
    again = getattr(diffusion, f"{step}_loop")(model, SHAPE, **kwargs)
    assert torch.equal(again, found)  # the public loop uses the prepared step
    again.zero_()
    torch.manual_seed(3)
    assert torch.equal(getattr(diffusion, f"{step}_loop")(model, SHAPE, **kwargs), found)  # new memory


def test_weights_written_between_loops_are_seen(nets):
    diffusion, kwargs = process(), {"noise": torch.ones(SHAPE), "model_kwargs": {"y": Y}}
    before = diffusion.ddim_sample_loop(nets.labelled, SHAPE, **kwargs)
    bias = nets.labelled.out[2].bias
    with torch.no_grad():
        bias += 0.1
    changed = diffusion.ddim_sample_loop(nets.labelled, SHAPE, **kwargs)
    *_, expected = diffusion.ddim_sample_loop_progressive(nets.labelled, SHAPE, **kwargs)
    with torch.no_grad():
        bias -= 0.1
    compare(changed, expected["sample"], NETWORK_SAMPLES_LIMIT, "samples")
    assert (changed - before).abs().max() > 0.01


def calls(nets, args):
    """Yield loops that a prepared step can't run: (name, diffusion, model, keyword arguments)."""
    y = {"model_kwargs": {"y": Y}}
    guide = published_guide(nets.classifier, args)

    class Mine(type(process())):
        def p_sample(self, *args, **kwargs):
            return super().p_sample(*args, **kwargs)

    patched = process()
    patched.p_mean_variance = patched.p_mean_variance
    own = Mine(
        use_timesteps=[0, 500, 999], betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON, model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )  # fmt: skip
    yield "denoised_fn", process(), nets.labelled, {**y, "denoised_fn": lambda x: x}
    yield "class of its own", own, nets.labelled, y
    yield "method of its own", patched, nets.labelled, y
    yield "parallel", process(), torch.nn.DataParallel(nets.labelled), {**y, "device": "cpu"}
    yield "keyword", process(), nets.labelled, {"model_kwargs": {"y": Y, "ref_img": Y}}
    yield "no labels", process(), nets.labelled, {}
    yield "labels too many", process(), nets.plain, y
    yield "float64", process(), nets.labelled, {**y, "noise": torch.zeros(SHAPE, dtype=torch.float64)}
    yield "guide", process(), nets.labelled, {**y, "cond_fn": lambda x, t, y: 2 * guide(x, t, y)}


def test_what_is_the_callers_own_runs_by_the_loop(nets):
    args = types.SimpleNamespace(classifier_scale=1.5, class_cond=True)
    named = [name for name, *_ in calls(nets, args)]
    state = torch.get_rng_state()
    for name, diffusion, model, kwargs in calls(nets, args):
        assert prepared_loop(diffusion, "p_sample", model, SHAPE, **kwargs) is None, name
    assert len(named) == 9 and torch.equal(torch.get_rng_state(), state)
    nets.labelled.train()
    assert prepared_loop(process(), "p_sample", nets.labelled, SHAPE, model_kwargs={"y": Y}) is None
    nets.labelled.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert prepared_loop(process(), "p_sample", nets.labelled, SHAPE, model_kwargs={"y": Y}) is None


def models(net, args):
    yield lambda x, t, y=None: 2 * net(x, t, y)
    yield lambda x, t, y=None: -net(x, t, y)
    yield lambda x, t, y=None: net(-x, t, y)
    yield lambda x, t, y=None: net(x, t + 1, y)
    yield lambda x, t, y=None: net(x, t, y.flip(0))
    yield lambda x, t, y=None: net(x, t, y) if len(x) < 3 else net(x, t, y.flip(0))
    yield lambda x, t, y=None: net(x, t, None)
    yield lambda x, t, y=None, scale=2: net(x, t, y) * scale
    yield types.SimpleNamespace(net=net)
    yield net.forward
    yield lambda x, t, y=None, low_res=None: net(x, t, y)
    yield lambda x, t, y=None: net(x, t, y) if t else net(x, t, y)
    yield published_model(net, type("Counting", (), {"class_cond": property(lambda self: True)})())
    yield functools.partial(published_model(net, args))

    def doubled(x, t, y=None):
        out = net(x, t, y)
        out += out
        return out

    def moved(x, t, y=None):
        x -= x
        return net(x, t, y)

    def turned(x, t, y=None):
        out = net(x, t, y)
        out[:] = -out
        return out

    def counted(x, t, y=None):
        args.calls = t
        return net(x, t, y)

    yield from (doubled, moved, turned, counted)


def test_a_function_that_does_more_than_hand_on_is_no_network(nets):
    args, labelled = types.SimpleNamespace(class_cond=True), nets.labelled
    assert find_network(published_model(nets.labelled, args), {"y": Y}) is nets.labelled
    assert find_network(lambda x, t, y=None: labelled(x, t, y=y), {"y": Y}) is nets.labelled
    assert (
        find_network(published_model(nets.plain, types.SimpleNamespace(class_cond=False)), {"y": Y})
        is nets.plain
    )
    for i, model in enumerate(models(nets.labelled, args)):
        assert find_network(model, {"y": Y}) is None, i


def guides(classifier, args):
    """Yield guidance functions that differ from the published one, some while using only its names."""

    def with_more(change):
        def cond_fn(x, t, y=None):
            with torch.enable_grad():
                x_in = x.detach().requires_grad_(True)
                return change(x_in, t, y)

        return cond_fn

    def grad(value, x):
        return torch.autograd.grad(value.sum(), x)[0] * args.classifier_scale

    yield with_more(lambda x, t, y: grad(F.log_softmax(classifier(x, t), dim=-1)[range(len(x)), y], x))
    yield lambda x, t, y=None: x * args.classifier_scale

    def other_sign(x, t, y=None):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(x_in, t), dim=-1)[range(len(x)), y.view(-1)]
            return -torch.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale

    def logits_alone(x, t, y=None):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = classifier(x_in, t)[range(len(x)), y.view(-1)]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale

    def over_classes(x, t, y=None):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(x_in, t), dim=0)[range(len(x)), y.view(-1)]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale

    def at_some_times(x, t, y=None):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(x_in, t), dim=-1)[range(len(x)), y.view(-1)]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * args.classifier_scale * (t[0] < 500)

    def some_classes(x, t, y=None):
        g = published(x, t, y)
        return g * (y != 1)[:, None, None, None]

    def more_each_time(x, t, y=None):
        g = published(x, t, y)
        args.classifier_scale -= 1
        return g

    published = published_guide(classifier, args)
    yield from (other_sign, logits_alone, over_classes, at_some_times, some_classes, more_each_time)
    yield published_guide(classifier, type("Odd", (), {"classifier_scale": property(lambda self: 2.5)})())


def changes():
    """Yield (name, function): the function changes this attribute of a process, as a program may."""

    def own(name):
        def change(diffusion):
            setattr(diffusion, name, getattr(diffusion, name))

        return change

    def written(name):
        def change(diffusion):
            getattr(diffusion, name)[-1] = 1

        return change

    methods = ("p_sample", "condition_mean", "p_mean_variance", "_wrap_model", "_predict_xstart_from_eps")
    yield from ((name, own(name)) for name in methods)
    yield from ((name, written(name)) for name in ("betas", "posterior_mean_coef1", "timestep_map"))
    yield "num_timesteps", lambda diffusion: setattr(diffusion, "num_timesteps", 3)
    yield (
        "model_var_type",
        lambda diffusion: setattr(diffusion, "model_var_type", gd.ModelVarType.FIXED_SMALL),
    )


@pytest.mark.parametrize(("name", "change"), [*changes()], ids=[name for name, _ in changes()])
def test_a_process_that_was_changed_is_not_prepared(nets, name, change):
    diffusion, kwargs = process(), {"model_kwargs": {"y": Y}}
    assert diffusion.is_unchanged()
    change(diffusion)
    assert prepared_loop(diffusion, "p_sample", nets.labelled, SHAPE, **kwargs) is None
    if name in ("p_sample", "condition_mean", "p_mean_variance", "_wrap_model"):
        diffusion.p_sample_loop(nets.labelled, SHAPE, **kwargs)  # the loop calls the replaced method
    else:
        with pytest.raises(NotImplementedError, match=name):
            diffusion.p_sample_loop(nets.labelled, SHAPE, **kwargs)


def test_a_subclass_whose_formulas_would_not_be_called_is_told():
    base = type(process())

    class Other(base):
        def q_sample(self, x_start, t, noise=None):
            return x_start

    other = Other(
        use_timesteps=[0, 500, 999], betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON, model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )  # fmt: skip
    x, t = torch.ones(SHAPE), torch.tensor([0, 1])
    assert torch.equal(other.q_sample(x, t), x)
    for call in (other.training_losses, lambda net, x, t: other.calc_bpd_loop(net, x)):
        with pytest.raises(NotImplementedError, match="q_sample"):
            call(lambda x, t: torch.cat([x, x], dim=1), x, t)


def test_only_the_published_guidance_is_known(nets):
    args = types.SimpleNamespace(classifier_scale=2.5)
    classifier, scale = find_guidance(published_guide(nets.classifier, args), {"y": Y})
    assert classifier is nets.classifier and scale == 2.5
    for i, guide in enumerate(guides(nets.classifier, args)):
        assert find_guidance(guide, {"y": Y}) is None, i
    assert find_guidance(None, {"y": Y}) is None and find_guidance(print, {"y": Y}) is None
