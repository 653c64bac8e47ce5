"""Tests that `admfast.compat.guided_diffusion` gives the results of the published package.

The recorded draws are replayed in the order in which the published code drew them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.compat.guided_diffusion import (
    dist_util,
    gaussian_diffusion,
    logger,
    resample,
    respace,
    script_util,
    train_util,
    unet,
)
from admfast.compat.guided_diffusion.change_guard import SCHEDULE_ARRAYS
from admfast.compat.guided_diffusion.prepared_loops import prepared_loop
from admfast.files.levels import from_uint8, to_uint8
from tests.parity import analytic, golden
from tests.parity.nets import conditions, golden_state
from tests.parity.test_training import Tiny

RANDN = torch.randn


def network(folder: Path) -> Any:
    """Build the network of a golden case by its published constructor, with trainable weights."""
    config = golden.load_json(folder / "config.json")
    home = script_util if config["ctor"].islower() else unet
    with patch.object(torch, "randn", RANDN):
        net = getattr(home, config["ctor"])(**config["kwargs"])
    net.load_state_dict(golden_state(folder))
    return net.eval()


def process(settings: dict[str, Any]) -> Any:
    """Build the process of a case's "diffusion" entry as the published code does."""
    gd = gaussian_diffusion
    kept = {
        "betas": gd.get_named_beta_schedule(settings["schedule"], settings["steps"]),
        "model_mean_type": gd.ModelMeanType[settings["mean"]],
        "model_var_type": gd.ModelVarType[settings["var"]],
        "loss_type": gd.LossType[settings["loss"]],
        "rescale_timesteps": settings["rescale"],
    }
    if settings["respacing"] is None:
        return gd.GaussianDiffusion(**kept)
    spacing = settings["respacing"] or [settings["steps"]]
    steps = respace.space_timesteps(settings["steps"], spacing)
    return respace.SpacedDiffusion(use_timesteps=steps, **kept)


@pytest.fixture
def replayed(monkeypatch):
    """Return a list: torch's random functions give its draws in order, and the test must use all of them."""
    left: list[Tensor] = []

    def give(*shape: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        if generator is not None:
            return RANDN(*shape, generator=generator, **kwargs)
        drawn = left.pop(0)
        assert drawn.shape == torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        return drawn.clone()

    monkeypatch.setattr(torch, "randn", give)
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: give(*like.shape))
    yield left
    assert not left


def networks() -> list[Any]:
    """Return the golden UNets; those with released sizes are marked slow."""
    found = golden.networks("unet")
    large = [case.id is not None and "auto" in case.id for case in found]
    return [
        pytest.param(*case.values, id=case.id, marks=[*case.marks, *([pytest.mark.slow] if slow else [])])
        for case, slow in zip(found, large, strict=True)
    ]


@pytest.mark.parametrize("path", networks())
def test_unet(path: Path):
    arrays, net = golden.load_tensors(path.with_name("io.npz")), network(path.parent)
    extra = conditions(net, arrays)
    with torch.no_grad():
        out = net(arrays["x"], arrays["t_int"], **extra)
    assert net.is_folded and out.is_contiguous()
    golden.compare(out, arrays["out_t_int"], golden.NETWORK_OUTPUT_LIMIT, "without gradients")
    x = arrays["x"].requires_grad_(True)
    out = net(x, arrays["t_float"], **extra)
    golden.compare(out, arrays["out_t_float"], golden.NETWORK_OUTPUT_LIMIT, "with gradients")
    loss = (out * arrays["w_out"]).sum()
    (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    golden.compare(found, arrays["grad_x"], golden.NETWORK_GRADIENT_LIMIT, "gradient in x")
    loss.backward()
    for name, parameter in net.named_parameters():
        key = f"grad_param:{name}"
        if key in arrays:
            golden.compare(parameter.grad, arrays[key], golden.NETWORK_GRADIENT_LIMIT, name)


@pytest.mark.parametrize("path", golden.networks("classifier"))
def test_classifier(path: Path):
    arrays, net = golden.load_tensors(path.with_name("io.npz")), network(path.parent)
    x = arrays["x"].requires_grad_(True)
    logits = net(x, arrays["t_int"])
    golden.compare(logits, arrays["logits_t_int"], golden.NETWORK_OUTPUT_LIMIT, "logits")
    selected = F.log_softmax(logits, dim=-1)[range(len(logits)), arrays["y"]]
    (found,) = torch.autograd.grad(selected.sum(), x)
    golden.compare(found, arrays["grad_x_t_int"], golden.NETWORK_GRADIENT_LIMIT, "gradient in x")


@pytest.mark.parametrize("path", golden.cases("schedules", pattern="*_*.npz"))
def test_arrays(path: Path):
    name, steps, spacing = path.stem.split("_")
    spacing = {"full": None, "10-10-10": "10,10,10", "100-50-25": "100,50,25"}.get(spacing, spacing)
    settings = {"schedule": name, "steps": int(steps), "respacing": spacing, "rescale": False}
    diffusion = process({**settings, "mean": "EPSILON", "var": "FIXED_LARGE", "loss": "MSE"})
    arrays = golden.load_npz(path)
    known = [array for array in arrays if array in SCHEDULE_ARRAYS]
    assert len(known) > 5
    for array in known:
        found = getattr(diffusion, array)
        golden.compare(found, arrays[array], golden.SCHEDULE_LIMIT, array)
        assert torch.from_numpy(found).dtype == torch.float64  # clients convert them to tensors


def trajectory(case: dict[str, Any], arrays: dict[str, Tensor], nets: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a trajectory, and the keyword arguments of its loop."""
    diffusion = analytic.build_diffusion(case["diffusion"])
    kwargs: dict[str, Any] = {"clip_denoised": case["clip_denoised"]}
    kwargs["denoised_fn"] = analytic.denoised_fn(case.get("denoised_fn"))
    extra = {name: arrays[name] for name in ("y",) if name in arrays}
    if case.get("net") is None:
        model = analytic.analytic_model(diffusion)
    else:
        model = network(nets / case["net"])
        extra |= conditions(model, arrays)
    if case.get("cond_scale") is not None:
        kwargs["cond_fn"] = partial(analytic.guidance, scale=case["cond_scale"])
    if case.get("classifier") is not None:
        kwargs["cond_fn"] = guide(network(nets / case["classifier"]), case["cond_scale"])
        if model.num_classes is None:
            net, model = model, lambda x, t, y=None: net(x, t)
    if "eta" in case and case["sampler"] == "ddim":
        kwargs["eta"] = case["eta"]
    return model, {**kwargs, "model_kwargs": extra, "device": "cpu"}


def guide(classifier: Any, scale: float) -> Any:
    """Return a guidance function like that of the published sampling script, written independently."""
    args = type("Arguments", (), {"classifier_scale": scale})

    def cond_fn(x, t, y=None):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(leaf, t), dim=-1)[range(len(x)), y.view(-1)]
            return torch.autograd.grad(chosen.sum(), leaf)[0] * args.classifier_scale

    return cond_fn


@pytest.mark.parametrize("path", golden.cases("sampling", "trajectories"))
def test_trajectory(path: Path, replayed):
    case, arrays = golden.load_json(path), golden.load_tensors(path)
    diffusion = process(case["diffusion"])
    model, kwargs = trajectory(case, arrays, path.parents[1] / "nets")
    start = arrays["x_T"] if "x_T" in arrays else arrays["x_0"]
    if case["sampler"] == "ddim_reverse":
        steps = backwards(diffusion, model, start, kwargs)
    else:
        replayed += [start, *arrays["noises"]]
        sampler = "p_sample" if case["sampler"] == "p" else "ddim_sample"
        steps = getattr(diffusion, f"{sampler}_loop_progressive")(model, tuple(start.shape), **kwargs)
    found = list(steps)
    of_network = case.get("net") is not None
    limit = golden.NETWORK_SAMPLES_LIMIT if of_network else golden.ANALYTIC_SAMPLES_LIMIT
    x0_limit = golden.NETWORK_XSTART_LIMIT if of_network else golden.ANALYTIC_XSTART_LIMIT
    golden.compare(torch.stack([step["sample"] for step in found]), arrays["samples"], limit, "samples")
    golden.compare(
        torch.stack([step["pred_xstart"] for step in found]), arrays["pred_xstart"], x0_limit, "x0"
    )
    if case["sampler"] != "ddim_reverse":
        replayed += [start, *arrays["noises"]]
        final = getattr(diffusion, f"{sampler}_loop")(model, tuple(start.shape), **kwargs)
        golden.compare(final, arrays["final"], limit, "the loop's result")


def backwards(diffusion: Any, model: Any, x: Tensor, kwargs: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Yield the steps of reverse DDIM, for which the published code has no loop."""
    kwargs = {name: kwargs[name] for name in ("clip_denoised", "denoised_fn", "model_kwargs")}
    for i in range(diffusion.num_timesteps):
        with torch.no_grad():
            out = diffusion.ddim_reverse_sample(model, x, torch.tensor([i] * len(x)), **kwargs)
        yield out
        x = out["sample"]


@pytest.mark.parametrize("path", golden.cases("sampling", "scripts"))
def test_script(path: Path, replayed):
    """The loops of the published scripts run on a prepared step."""
    case, arrays = golden.load_json(path), golden.load_tensors(path)
    nets, flags, diffusion = path.parents[1] / "nets", case["flags"], process(case["diffusion"])
    model, kwargs = network(nets / case["net"]), {"clip_denoised": flags.get("clip_denoised", True)}
    if case.get("clf"):
        kwargs["cond_fn"] = guide(network(nets / case["clf"]), flags["classifier_scale"])
    sampler = "ddim_sample" if flags.get("use_ddim") and "sup" not in case["script"] else "p_sample"
    images = []
    for batch, x_t in enumerate(arrays["draw_x_T"]):
        extra = {}
        chosen = [(batch * len(x_t) + i) % len(arrays.get("base_images_uint8", x_t)) for i in range(len(x_t))]
        if "base_images_uint8" in arrays:
            extra["low_res"] = from_uint8(arrays["base_images_uint8"][chosen])
        if "draw_labels" in arrays:
            extra["y"] = arrays["draw_labels"][batch]
        elif "base_labels" in arrays:
            extra["y"] = arrays["base_labels"][chosen]
        replayed += [x_t, *arrays["draw_noises"][batch]]
        found = prepared_loop(diffusion, sampler, model, tuple(x_t.shape), model_kwargs=extra, **kwargs)
        assert found is not None, "the loop was not prepared"
        images.append(to_uint8(found))
    levels = (torch.cat(images)[: len(arrays["arr_0"])].int() - arrays["arr_0"].int()).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() < 1e-3


@pytest.mark.parametrize("path", golden.cases("sampling", "bpd"))
def test_bits_per_dimension(path: Path, replayed):
    case, arrays = golden.load_json(path), golden.load_tensors(path)
    diffusion = process(case["diffusion"])
    if case.get("net") is None:
        model, limit = (
            analytic.analytic_model(analytic.build_diffusion(case["diffusion"])),
            golden.POINT_LIMIT,
        )
        extra = {name: arrays[name] for name in ("y",) if name in arrays}
    else:
        model, limit = network(path.parents[1] / "nets" / case["net"]), golden.NETWORK_SAMPLES_LIMIT
        extra = conditions(model, arrays)
    replayed += [*arrays["noises"]]
    found = diffusion.calc_bpd_loop(model, arrays["x_start"], case["clip_denoised"], extra)
    assert list(found) == ["total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"]
    for name, value in found.items():
        golden.compare(value, arrays[name], limit, name)


@pytest.mark.parametrize("path", golden.cases("sampling", "training_losses"))
def test_training_losses(path: Path, replayed):
    arrays, settings = golden.load_tensors(path), golden.load_json(path)["diffusion"]
    model = analytic.analytic_model(analytic.build_diffusion(settings))
    labels = {name: arrays[name] for name in ("y",) if name in arrays}
    replayed.append(arrays["noise"])
    terms = process(settings).training_losses(model, arrays["x_start"], arrays["t"], model_kwargs=labels)
    golden.compare(model.seen[0], arrays["t_seen_by_model"], golden.POINT_LIMIT, "t")
    for name, value in terms.items():
        golden.compare(value, arrays[name], golden.POINT_LIMIT, name)


class Drawn(resample.UniformSampler):
    """A sampler that returns given draws: rows of (t, weights)."""

    def __init__(self, diffusion: Any, rows: Iterator[tuple[Tensor, Tensor]]) -> None:
        super().__init__(diffusion)
        self.rows = rows

    def sample(self, batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
        t, weights = next(self.rows)
        return t[:batch_size], weights[:batch_size]


class Learned(resample.LossSecondMomentResampler):
    """The loss-aware sampler with given draws, which compares its probabilities with the published ones."""

    def __init__(
        self, diffusion: Any, rows: Iterator[tuple[Tensor, Tensor]], wanted: Iterator[Tensor]
    ) -> None:
        super().__init__(diffusion)
        self.rows, self.wanted = rows, wanted

    def sample(self, batch_size: int, device: Any) -> tuple[Tensor, Tensor]:
        p = self.weights()
        golden.compare(p / p.sum(), next(self.wanted), golden.TRAINED_PARAMETERS_LIMIT, "p")
        return Drawn.sample(self, batch_size, device)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", golden.cases("training", "train_loop"))
def test_train_loop(path: Path, replayed, tmp_path):
    case, arrays = golden.load_json(path), golden.load_tensors(path)
    diffusion, limit = process(case["diffusion"]), golden.TRAINED_PARAMETERS_LIMIT
    net = Tiny({key.removeprefix("init:"): value for key, value in arrays.items() if key[:5] == "init:"})
    sizes = arrays["microbatch_sizes"].tolist()
    rows = zip(arrays["t"], arrays["importance_weights"], strict=True)
    replayed += [noise[:size] for noise, size in zip(arrays["noise"], sizes, strict=True)]
    data = iter(
        (images, {"y": arrays["batches_y"][i]} if "batches_y" in arrays else {})
        for i, images in enumerate(arrays["batches"])
    )
    sampler: Any = Drawn(diffusion, rows)
    if case["sampler"] != "uniform":
        sampler = Learned(diffusion, rows, iter(arrays["sampler_p"]))
    with logger.scoped_configure(str(tmp_path), ["csv"]):
        loop = train_util.TrainLoop(
            model=net, diffusion=diffusion, data=data, batch_size=case["batch"],
            microbatch=case["microbatch"], lr=case["lr"], ema_rate=case["ema"], log_interval=1,
            save_interval=case["save_interval"], resume_checkpoint="", schedule_sampler=sampler,
            weight_decay=case["wd"], lr_anneal_steps=case["anneal"],
        )  # fmt: skip
        # Without annealing the loop is endless and stops when its data end.
        with contextlib.nullcontext() if case["anneal"] else pytest.raises(StopIteration):
            loop.run_loop()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == case["files"]
    for name, keys in case["keys"].items():
        assert list(dist_util.load_state_dict(tmp_path / name)) == keys
    last = case["steps"] - 1
    for i, (name, parameter) in enumerate(net.named_parameters()):
        golden.compare(parameter, arrays[f"step{last}:param:{name}"], limit, name)
        for rate, average in zip(loop.ema_rate, loop.ema_params, strict=True):
            golden.compare(average[i], arrays[f"step{last}:ema_{rate}:{name}"], limit, f"{name}, {rate}")
        state = loop.opt.state[parameter]
        golden.compare(state["exp_avg"], arrays[f"final:exp_avg:{name}"], limit, name)
        golden.compare(state["exp_avg_sq"], arrays[f"final:exp_avg_sq:{name}"], limit, name)
    golden.compare(loop.opt.param_groups[0]["lr"], arrays["lr_after"][last], golden.SCHEDULE_LIMIT, "rate")


@pytest.mark.parametrize("path", golden.cases("training", pattern="loss_aware_sampler.json"))
def test_loss_aware_sampler(path: Path):
    settings, arrays = golden.load_json(path), golden.load_npz(path)
    settings = settings.get("settings", settings)
    steps = type("Process", (), {"num_timesteps": settings["T"]})
    sampler = resample.LossSecondMomentResampler(steps, settings["hist"], settings["uni"])
    for five in range(len(arrays["ts"]) // 5):
        part = slice(5 * five, 5 * five + 5)
        sampler.update_with_local_losses(*(torch.tensor(arrays[name][part]) for name in ("ts", "losses")))
        found = sampler.weights()
        golden.compare(found, arrays["weights_after_every_5"][five], golden.SCHEDULE_LIMIT, f"after {five}")
