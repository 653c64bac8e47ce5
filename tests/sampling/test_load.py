"""Tests of `admfast.load`: systems by name, models by file, and the errors if something is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import admfast
from admfast.checkpoints import describe, write_weights
from admfast.diffusion import DiffusionConfig
from admfast.engine.numerics import fixed_numerics
from admfast.engine.precision import POLICIES, policy
from admfast.errors import AdmfastError, CheckpointError, InvalidArgument, Unavailable
from admfast.models import NetConfig, UNetConfig, presets
from admfast.models.description import Description
from admfast.models.preset_types import ModelPreset, SystemPreset
from admfast.sampling.load import load
from tests.small import SIDE, classifier, cpu_precisions, randn, unet, upsampler

ANSWERS = {"kind": "upsampler", "num_heads": 2, "use_new_attention_order": False, "image_size": 2 * SIDE}
ANSWERS |= {"noise_schedule": "linear"}
both_defaults = pytest.mark.usefixtures("default_precision")
SETTINGS = DiffusionConfig(noise_schedule="linear", steps=100, learn_sigma=True)


def write(path: Path, net: torch.nn.Module, described: bool = True) -> Path:
    """Write a weights file, with its description unless `described` is False."""
    process = None if net.config.kind == "classifier" else SETTINGS
    description = Description(net.config, process) if described else None
    write_weights(path, net.state_dict(), description)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "faces.safetensors", unet())


@pytest.fixture
def guide(tmp_path) -> Path:
    return write(tmp_path / "guide.safetensors", classifier(1))


# By file


@both_defaults
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_described_file_is_a_pipeline(tmp_path, ending):
    net = unet()
    pipe = load(write(tmp_path / f"faces{ending}", net), device="cpu")
    assert isinstance(pipe, admfast.Pipeline) and isinstance(pipe.net, admfast.UNet)
    assert (pipe.name, pipe.steps, pipe.guidance) == ("faces", 100, 0.0)
    assert (pipe.classifier, pipe.upsampler) == (None, None)
    assert pipe.config == net.config and pipe.diffusion == SETTINGS
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in pipe.net.state_dict().items())
    assert pipe.sample(seeds=[0, 1], steps=2).shape == (2, SIDE, SIDE, 1)


@both_defaults
def test_a_classifier_is_given_beside_it(model, guide):
    pipe = load(model, classifier=guide, device="cpu")
    assert isinstance(pipe.classifier, admfast.Classifier) and pipe.guidance == 1.0
    assert not any(p.requires_grad for net in (pipe.net, pipe.classifier) for p in net.parameters())
    assert pipe.sample(seeds=[0], steps=1).shape == (1, SIDE, SIDE, 1)


def test_options_say_what_a_bare_file_does_not(tmp_path):
    net = unet(num_heads=4)
    path = write(tmp_path / "bare.pt", net, described=False)
    with pytest.raises(CheckpointError, match="bare.pt: .*num_head"):
        load(path, device="cpu")
    options = {"num_heads": 4, "image_size": SIDE, "use_new_attention_order": False, "dropout": 0.0}
    with pytest.raises(CheckpointError, match=r"all settings; give noise_schedule \(linear or cosine\); or"):
        load(path, device="cpu", steps=50, **options)
    pipe = load(path, device="cpu", noise_schedule="cosine", steps=50, **options)
    assert pipe.config == net.config
    assert (pipe.diffusion.noise_schedule, pipe.diffusion.steps, pipe.steps) == ("cosine", 50, 50)
    assert pipe.diffusion.learn_sigma
    with pytest.raises(InvalidArgument, match="num_head.*nearest: .*num_heads"):
        load(path, device="cpu", num_head=4)
    for name in (path, "digits32"):
        with pytest.raises(InvalidArgument, match="precison='fp16': no such argument.*nearest: precision"):
            load(name, device="cpu", precison="fp16")


@both_defaults
def test_everything_open_is_asked_for_at_once(tmp_path):
    model = write(tmp_path / "bare.pt", unet(), described=False)
    guide = write(tmp_path / "guide.pt", classifier(), described=False)
    up = write(tmp_path / "up.pt", upsampler(), described=False)
    with pytest.raises(CheckpointError) as caught:
        load(model, classifier=guide, upsampler=up, device="cpu")
    text = one_line(caught)
    for part in (
        "bare.pt: ",
        "guide.pt: ",
        "up.pt: ",
        "noise_schedule (linear or cosine)",
        "num_head_channels",
    ):
        assert part in text
    for flag in ("--set ", "--set-classifier ", "--set-upsampler "):
        assert flag in text
    heads = {"num_heads": 2, "use_new_attention_order": False, "noise_schedule": "linear", "steps": 100}
    pipe = load(
        model,
        classifier=guide,
        upsampler=up,
        device="cpu",
        classifier_options={"num_head_channels": 32, "image_size": SIDE},
        upsampler_options={**heads, "kind": "upsampler", "image_size": 2 * SIDE, "low_res_size": 4},
        image_size=SIDE,
        **heads,
    )
    assert (pipe.upsampler.low_res_size, pipe.upsampler.steps, pipe.guidance) == (4, 100, 1.0)
    assert pipe.sample([1], [2], steps=1, upsampler_steps=1).shape == (1, 2 * SIDE, 2 * SIDE, 1)


def test_a_model_that_ships_is_a_file_by_name(tmp_path, monkeypatch):
    parts = {"classifier": "digits32_classifier", "upsampler": "digits32_upsampler"}
    pipe, system = load("digits32_diffusion", device="cpu", **parts), load("digits32-up", device="cpu")
    assert (pipe.upsampler.low_res_size, pipe.guidance) == (8, 1.0)
    for own, same in ((pipe.net, system.net), (pipe.classifier, system.classifier)):
        for key, value in own.state_dict().items():
            assert torch.equal(value, same.state_dict()[key])
    admfast.export("digits32_classifier", tmp_path / "guide.safetensors", to="safetensors")
    with pytest.raises(InvalidArgument, match="^name='.*classifier.*': "):
        load("digits32_classifier")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "digits32_classifier.pt", classifier(), described=False)
    (tmp_path / "digits32_classifier.pt").rename("digits32_classifier")
    with pytest.raises(AdmfastError, match="^digits32_classifier: "):  # a file goes first
        load("digits32_diffusion", classifier="digits32_classifier")


@pytest.mark.parametrize("name", ["imagenet64", "x.pt"])
@pytest.mark.parametrize("part", ["classifier_options", "upsampler_options"])
def test_options_are_given_by_name(part, name):
    with pytest.raises(InvalidArgument, match=f"^{part}=3: "):
        load(name, device="cpu", **{part: 3})


@pytest.mark.parametrize("part", ["classifier_options", "upsampler_options"])
def test_answers_without_their_file_are_refused(model, part):
    with pytest.raises(InvalidArgument, match=f"{part}=.*: there is no {part.removesuffix('_options')}"):
        load(model, device="cpu", **{part: {"num_heads": 2}})
    with pytest.raises(InvalidArgument, match=f"{part}='device': no such option of a file"):
        load(model, device="cpu", **{part.removesuffix("_options"): model, part: {"device": "cpu"}})


def test_what_is_no_name_is_refused():
    for name in (None, 3, ""):
        with pytest.raises(InvalidArgument, match="name=.*: a system .such as 'digits32'. or the path"):
            load(name, device="cpu")
    with pytest.raises(InvalidArgument, match="weights='models': not for digits32, which ships with the"):
        load("digits32", "models", device="cpu")


def test_a_whole_block_that_is_missing_is_named_before_any_question(tmp_path):
    state = {key: value for key, value in unet().state_dict().items() if "middle_block.1" not in key}
    write_weights(tmp_path / "torn.pt", state)
    message = r"torn.pt: the weights of a unet with .* they lack parts of middle_block.1: 6 keys missing"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "torn.pt", device="cpu")
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path / "torn.pt")


@pytest.mark.parametrize("wanted, form", [("auto", ("bfloat16",) * 2), ("fp16", ("float16",) * 2)])
def test_precisions_on_a_gpu(wanted, form):
    chosen = policy(wanted, torch.device("cuda"))
    assert (chosen.torso, chosen.classifier) == tuple(getattr(torch, name) for name in form)


def test_loading_leaves_the_process_s_settings(model):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    for precision in ("fp32", "tf32"):
        with fixed_numerics(torch.device("cuda"), tf32=precision == "tf32"):
            assert settings() == (precision == "tf32",) * 2
        assert settings() == before


@both_defaults
def test_what_is_loaded_in_inference_mode_works_outside(model, guide):
    wanted = load(model, classifier=guide, device="cpu").sample([1], [2], steps=2)
    with torch.inference_mode():
        pipe = load(model, classifier=guide, device="cpu")
        inside = pipe.sample([1], [2], steps=2)
        assert torch.isfinite(pipe.predict(randn(1, 1, SIDE, SIDE), 5, [1]).x0).all()
    assert torch.equal(pipe.sample([1], [2], steps=2), wanted) and torch.equal(inside, wanted)
    x = randn(1, 1, SIDE, SIDE).requires_grad_(True)
    pipe.predict(x, 5, [1]).x0.sum().backward()
    assert x.grad.abs().sum() > 0


@both_defaults
def test_inputs_made_in_inference_mode_can_be_guided(model, guide):
    pipe = load(model, classifier=guide, device="cpu")
    with torch.inference_mode():
        image, classes = randn(1, 1, SIDE, SIDE), torch.tensor([1])
        for given in ({"noise": image}, {"x_start": image, "t_start": 50}):
            assert pipe.sample(classes, [2], steps=2, **given).shape == (1, SIDE, SIDE, 1)
        inverse = {"solver": "ddim-inverse", "x_start": image, "guidance": 1.0, "output": "float"}
        assert torch.isfinite(pipe.sample(classes, [2], steps=2, **inverse)).all()
    assert pipe.predict(image, 5, classes).x0.shape == image.shape


def test_a_file_can_be_said_to_be_a_released_model(tmp_path, small_system):
    path = write(tmp_path / "mine.pt", unet(), described=False)
    pipe = load(path, preset="small_diffusion", device="cpu")
    assert pipe.config == unet().config and pipe.diffusion == SETTINGS
    up = write(tmp_path / "up.pt", upsampler(), described=False)
    pipe = load(path, preset="small_diffusion", upsampler=up, upsampler_options=ANSWERS, device="cpu")
    assert pipe.upsampler.low_res_size is None
    with pytest.raises(InvalidArgument, match="preset='small': no such model; nearest: small_"):
        load(path, preset="small", device="cpu")


@both_defaults
def test_autocast_around_the_call_changes_nothing(model, guide):
    pipe = load(model, classifier=guide, device="cpu")
    wanted = pipe.sample([1], [2], steps=2, output="float")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pipe.sample([1], [2], steps=2, output="float"), wanted)


@both_defaults
def test_an_upsampler_s_file_is_a_pipeline(tmp_path):
    pipe = load(write(tmp_path / "up.safetensors", upsampler()), device="cpu")
    assert isinstance(pipe.net, admfast.Upsampler)
    assert pipe.sample(low_res=randn(1, 1, 8, 8), steps=1).shape == (1, 2 * SIDE, 2 * SIDE, 1)


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert isinstance(caught.value, AdmfastError)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_files_of_another_kind_are_refused(model, guide):
    with pytest.raises(InvalidArgument) as caught:
        load(guide, device="cpu")
    assert one_line(caught) == f"name={str(guide)!r}: a diffusion model; this file holds a classifier"
    with pytest.raises(InvalidArgument) as caught:
        load(model, classifier=model, device="cpu")
    assert one_line(caught) == f"classifier={str(model)!r}: a classifier; this file holds a unet"


def test_a_classifier_of_other_images_is_refused(model, tmp_path):
    other = write(tmp_path / "other.safetensors", classifier(in_channels=3))
    with pytest.raises(InvalidArgument, match="classifier='3 channels, 2-D': as the network"):
        load(model, classifier=other, device="cpu")


def test_files_that_are_not_there_are_named(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"face.safetensors: no such file.*faces.safetensors"):
        load(tmp_path / "face.safetensors", device="cpu")
    with pytest.raises(CheckpointError, match="gone.pt: no such file"):
        load(model, classifier=tmp_path / "gone.pt", device="cpu")
    with pytest.raises(CheckpointError, match="a folder, not a weights file .holds faces.safetensors"):
        load(tmp_path, device="cpu")
    with pytest.raises(InvalidArgument, match="weights='models': for a system, as the folder of its files"):
        load(model, "models", device="cpu")


@pytest.mark.parametrize(
    "name, found",
    [("runs/none", "no folder runs"), ("out/digit", "similar names: digits"), ("out", "holds digits")],
)
def test_what_is_no_run_is_said_with_what_a_run_is(tmp_path, monkeypatch, name, found):
    (tmp_path / "out/digits").mkdir(parents=True)
    (tmp_path / "out/digits/run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InvalidArgument, CheckpointError)) as caught:
        load(name, device="cpu")
    assert found in one_line(caught) and "run.json" in one_line(caught)


# By name


@pytest.mark.parametrize(
    "name, near",
    [
        ("imagenet265", "nearest: imagenet256"),
        ("digits", "nearest: digits32"),
        ("something else", "one of: imagenet64"),
        ("x" * 300, "one of: imagenet64"),
    ],
)
def test_unknown_systems_are_named_with_the_nearest(name, near):
    with pytest.raises(InvalidArgument) as caught:
        load(name, device="cpu")
    assert one_line(caught).startswith(f"name={name!r}: neither a system nor a file; {near}")


def fetch_options() -> set[str]:
    """Return the options that `admfast fetch` accepts."""
    from admfast.cli.commands import app

    command = app.get_command(None, "fetch")
    return {option for parameter in command.params for option in parameter.opts}


def test_what_is_missing_comes_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(InvalidArgument) as caught:
        load("imagenet64", device="cpu")
    assert one_line(caught) == (
        "weights=None: the folder that holds 64x64_diffusion.pt, 64x64_classifier.pt "
        "(admfast fetch imagenet64 --out models)"
    )
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InvalidArgument) as caught:
        load("imagenet64", nowhere, device="cpu")
    assert one_line(caught) == (
        f"weights={str(nowhere)!r}: not a folder (admfast fetch imagenet64 --out {nowhere})"
    )
    (tmp_path / "64x64_diffusion.pt").write_bytes(b"not read: the other file is looked for first")
    with pytest.raises(CheckpointError) as caught:
        load("imagenet64", tmp_path, device="cpu")
    text = one_line(caught)
    assert text == (
        f"{tmp_path / '64x64_classifier.pt'}: no such file; imagenet64 needs it "
        f"(admfast fetch 64x64_classifier --out {tmp_path})"
    )
    assert set(re.findall(r"--\w+", text)) <= fetch_options()


@pytest.mark.parametrize(
    "given",
    [{"classifier": "x.pt"}, {"num_heads": 2}, {"learn_sigma": False}, {"classifier_depth": 2}],
    ids=str,
)
def test_a_system_says_everything_itself(given, tmp_path):
    (name,) = given
    with pytest.raises(InvalidArgument, match=f"^{name}=.*: not for a system: imagenet64 fixes it"):
        load("imagenet64", tmp_path, device="cpu", **given)


@pytest.fixture
def small_system(monkeypatch) -> str:
    """Register a small system of released files, and return its name."""

    def released(name: str, network: NetConfig, **more) -> ModelPreset:
        settings = None if network.kind == "classifier" else SETTINGS
        return ModelPreset(
            name=name,
            file=f"{name}.pt",
            network=network,
            process=settings,
            url="https://example.org/",
            **more,
        )

    system = SystemPreset(
        name="small-up",
        summary="for tests",
        diffusion=released("small_diffusion", unet().config),
        classifier=released("small_classifier", classifier().config),
        upsampler=released("small_upsampler", upsampler().config, low_res_size=4),
        guidance=2.5,
        steps=7,
        upsampler_steps=3,
    )
    monkeypatch.setitem(presets.SYSTEMS, system.name, system)
    for model in system.models:
        monkeypatch.setitem(presets.MODELS, model.name, model)
    return system.name


@both_defaults
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_system_is_loaded_whole(small_system, tmp_path, ending):
    for name, net in (("diffusion", unet()), ("classifier", classifier(1)), ("upsampler", upsampler(2))):
        write(tmp_path / f"small_{name}{ending}", net, described=False)
    pipe = load(small_system, tmp_path, device="cpu")
    up = pipe.upsampler
    assert (pipe.name, pipe.guidance, pipe.steps) == ("small-up", 2.5, 7)
    assert (up.name, up.steps, up.low_res_size) == ("small_upsampler", 3, 4)
    assert torch.equal(up.net.state_dict()["out.2.bias"], upsampler(2).state_dict()["out.2.bias"])
    assert pipe.sample([0, 1], steps=1).shape == (2, 2 * SIDE, 2 * SIDE, 1)


def test_a_system_s_file_must_be_its_model(small_system, tmp_path):
    write(tmp_path / "small_diffusion.pt", unet(in_channels=3, out_channels=6), described=False)
    for name, net in (("classifier", classifier(1)), ("upsampler", upsampler(2))):
        write(tmp_path / f"small_{name}.pt", net, described=False)
    with pytest.raises(CheckpointError, match="small_diffusion.pt: does not fit"):
        load(small_system, tmp_path, device="cpu")


# Devices and precisions


@pytest.mark.parametrize("precision", [*POLICIES, "auto"])
def test_precisions_on_the_cpu(model, guide, precision):
    if precision == "tf32":
        with pytest.raises(Unavailable, match="precision='tf32': only on a CUDA device"):
            load(model, device="cpu", precision=precision)
        return
    if precision == "int8" and precision not in cpu_precisions():
        with pytest.raises(Unavailable, match="precision='int8': needs "):
            load(model, device="cpu", precision=precision)
        return
    pipe = load(model, classifier=guide, device="cpu", precision=precision)
    wanted = policy(precision, torch.device("cpu")).torso
    assert (pipe.net.torso_dtype, pipe.classifier.torso_dtype) == (wanted, wanted)
    assert pipe.net.out[2].weight.dtype == torch.float32
    # Parameters have the published layout, on which tools that flatten, save or prune them rely.
    assert all(p.is_contiguous() for net in (pipe.net, pipe.classifier) for p in net.parameters())
    assert pipe.sample([0, 1], steps=2).shape == (2, SIDE, SIDE, 1)


def test_half_precision_of_other_dimensions(tmp_path):
    path = write(tmp_path / "volume.safetensors", unet(dims=3))
    assert load(path, device="cpu", precision="bf16").net.torso_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"precision": "bf61"}, InvalidArgument, "precision='bf61': nearest: bf16"),
        ({"precision": "double"}, InvalidArgument, "precision='double': one of: auto, fp32, .*fp16, int8"),
        ({"precision": 16}, InvalidArgument, "precision=16: nearest: fp16, bf16"),
        ({"device": "gpu"}, InvalidArgument, "device='gpu': cpu, cuda, or cuda:N"),
        ({"device": "mps"}, InvalidArgument, "device='mps': cpu, cuda, or cuda:N"),
        ({"device": 1.5}, InvalidArgument, "device=1.5: cpu, cuda, or cuda:N"),
        ({"device": "cuda:99"}, Unavailable, r"device='cuda:99': this machine has \d+ usable CUDA devices"),
    ],
)
def test_devices_and_precisions_that_are_not_there(model, arguments, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        load(model, **arguments)
    one_line(caught)


def test_a_device_is_chosen_where_none_is_asked_for(model):
    assert load(model).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load(model, device=torch.device("cpu")).device.type == "cpu"
    assert isinstance(load(str(model), device="cpu").config, UNetConfig)
