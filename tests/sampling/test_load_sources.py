"""Tests of `admfast.load` from sources other than plain paths: memory, open files, "~", URLs, modules."""

from __future__ import annotations

import io
import logging
import os

import pytest
import torch
from safetensors.torch import save

from admfast.checkpoints import read_weights, write_weights
from admfast.errors import AdmfastError, CheckpointError, InvalidArgument, show_value
from admfast.sampling.load import load
from tests.small import SIDE, classifier, randn, unet, upsampler

HEADS = {"num_heads": 2, "use_new_attention_order": False, "noise_schedule": "linear"}
ANSWERS = {**HEADS, "image_size": SIDE}
GUIDE = {"num_head_channels": 32, "image_size": SIDE}
UP = {**HEADS, "kind": "upsampler", "image_size": 2 * SIDE}


def as_bytes(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file  # positioned at its end


FORMS = {
    "state dict": lambda net: dict(net.state_dict()),
    "ordered": lambda net: net.state_dict(),
    "module": lambda net: net,
    "wrapped module": torch.nn.DataParallel,
    "training checkpoint": lambda net: {"ema": net.state_dict(), "model": unet(9).state_dict(), "step": 3},
    "file": lambda net: as_bytes(net.state_dict()),
    "safetensors": lambda net: io.BytesIO(save(dict(net.state_dict()))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_memory_load_as_their_file_does(tmp_path, form, precision):
    net = unet(1)
    write_weights(tmp_path / "x.pt", net.state_dict())
    wanted = load(tmp_path / "x.pt", device="cpu", precision=precision, **ANSWERS)
    found = load(form(net), device="cpu", precision=precision, **ANSWERS)
    x, t, y = randn(2, 1, SIDE, SIDE), torch.tensor([3, 700]), torch.tensor([0, 2])
    assert torch.equal(found.net(x, t, y), wanted.net(x, t, y))
    assert (found.config, found.diffusion) == (wanted.config, wanted.diffusion)
    assert len(found.name) < 40


def test_every_part_may_be_in_memory():
    pipe = load(
        unet(1), classifier=classifier(2).state_dict(), upsampler=as_bytes(upsampler(3).state_dict()),
        classifier_options=GUIDE, upsampler_options=UP, device="cpu", **ANSWERS,
    )  # fmt: skip
    assert pipe.sample([1], [2], steps=1, upsampler_steps=1).shape == (1, 2 * SIDE, 2 * SIDE, 1)


@pytest.mark.parametrize("form", ["state dict", "module"])
def test_the_pipeline_and_the_caller_share_no_tensor(form):
    net = unet(1).requires_grad_(True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    pipe = load(FORMS[form](net), device="cpu", precision="fp32", **ANSWERS)
    for value in pipe.net.parameters():
        value.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(value.requires_grad for value in net.parameters())
    pipe = load(FORMS[form](net), device="cpu", precision="fp32", **ANSWERS)
    for value in net.parameters():
        value.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in pipe.net.state_dict().items())


def test_a_module_of_ours_brings_its_configuration():
    net = unet(1, num_heads=4)
    pipe = load(net, device="cpu", noise_schedule="cosine")
    assert pipe.config == net.config and pipe.diffusion.noise_schedule == "cosine"
    with pytest.raises(CheckpointError, match="noise_schedule"):
        load(net, device="cpu")


@pytest.mark.parametrize("text", [True, False], ids=["text", "unreadable"])
def test_a_file_that_can_t_be_read_for_bytes_is_refused(text):
    with pytest.raises(AdmfastError) as caught:
        load(io.StringIO("{}") if text else [1, 2], device="cpu")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value",
    [
        unet().state_dict(), unet(), list(range(1000)), randn(100, 100), {"a": {"b": list(range(999))}},
        "x\n" * 40, "x" * 5000, b"y" * 5000, 10**300, object(),
    ],
    ids=["state dict", "module", "list", "tensor", "nested", "lines", "text", "bytes", "number", "object"],
)  # fmt: skip
def test_no_message_prints_a_large_object(value):
    text = show_value(value)
    assert "\n" not in text and len(text) <= (302 if isinstance(value, str) else 80)
    for argument in ("weights", "preset", "precision", "device", "num_heads", "compile_cache", "engine"):
        try:
            load("digits32" if argument == "weights" else unet(), **{argument: value, **ANSWERS})
        except AdmfastError as error:
            assert "\n" not in str(error) and len(str(error)) < 800, argument


@pytest.mark.parametrize("value", [3, 2.5, "word", None, [1, 2], {"a": 1}, (True,), range(3)], ids=repr)
def test_small_values_are_shown_whole(value):
    assert show_value(value) == repr(value)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_weights(tmp_path / "x.pt", unet(1).state_dict())
    write_weights(tmp_path / "c.pt", classifier(1).state_dict())
    assert load("~/x.pt", classifier="~/c.pt", classifier_options=GUIDE, device="cpu", **ANSWERS).name == "x"
    assert read_weights("~/x.pt").path == tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match=f"{tmp_path}/y.pt: no such file"):
        load("~/y.pt", device="cpu")
    with pytest.raises(InvalidArgument, match=f"weights='~/none': not a folder.*{tmp_path}/none"):
        load("imagenet64", "~/none", device="cpu")
    with pytest.raises(InvalidArgument, match="name='~nobody-of-that-name/x.pt'"):
        load("~nobody-of-that-name/x.pt", device="cpu")


@pytest.mark.parametrize(
    "url", ["https://example.org/x.pt", "https:/example.org/x.pt", "s3://bucket/x", "file:///x.pt"]
)
def test_a_url_is_called_one(url):
    with pytest.raises(InvalidArgument, match="name=.*URL.*admfast fetch"):
        load(url, device="cpu")
    with pytest.raises(InvalidArgument, match="classifier=.*URL"):
        load(unet(), classifier=url, device="cpu", noise_schedule="linear")
    with pytest.raises(InvalidArgument, match="weights=.*URL"):
        load("imagenet64", url, device="cpu")


def test_a_link_to_nowhere_is_called_one(tmp_path):
    os.symlink(tmp_path / "gone.pt", tmp_path / "link")
    with pytest.raises(CheckpointError, match="link: a link to .*gone.pt"):
        load(tmp_path / "link", device="cpu")


# Networks that can be called but not sampled


def test_a_network_without_a_meaning_in_diffusion_runs_but_isn_t_sampled():
    net = unet(1, in_channels=4, out_channels=2, num_classes=None)
    with pytest.raises(CheckpointError, match=r"kind \(unet or upsampler\)"):
        load(net.state_dict(), device="cpu", **ANSWERS)
    pipe = load(net.state_dict(), device="cpu", precision="fp32", kind="unet", **ANSWERS)
    x, t = randn(2, 4, SIDE, SIDE), torch.tensor([1, 2])
    # A folded network adds the same terms in another order.
    torch.testing.assert_close(pipe.net(x, t), net(x, t))
    for call in (
        lambda: pipe.sample(seeds=[0], steps=1),
        lambda: pipe.check(seeds=[0], steps=1),
        lambda: pipe.predict(x, 3),
    ):
        with pytest.raises(InvalidArgument, match="net='4 channels in, 2 out'.*pipe.net"):
            call()


# The published flags


def test_flags_of_the_published_scripts_are_taken(caplog):
    net, guide = unet(1, attention_resolutions=(2,)), classifier(2)
    pasted = {
        "num_channels": 32, "class_cond": True, "use_fp16": True, "diffusion_steps": 100, "learn_sigma": True,
        "attention_resolutions": "4", "channel_mult": "1,2", "num_head_channels": -1, "num_res_blocks": 1,
        "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "4",
        "classifier_use_fp16": False,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "admfast"):
        pipe = load(
            net.state_dict(), classifier=guide.state_dict(), classifier_options=GUIDE, device="cpu",
            **pasted, **ANSWERS,
        )  # fmt: skip
    assert pipe.config == net.config and pipe.classifier.config == guide.config
    assert pipe.diffusion.steps == 100
    assert any("use_fp16" in line and "precision" in line for line in caplog.messages)
    first = next(flag for flag in pasted if flag.startswith("classifier_"))
    with pytest.raises(InvalidArgument, match=f"^{first}={pasted[first]!r}: .*no classifier"):
        load(net.state_dict(), device="cpu", **pasted, **ANSWERS)
    with pytest.raises(InvalidArgument, match="timestep_respacing='250': .*respacing"):
        load(net.state_dict(), device="cpu", timestep_respacing="250", **ANSWERS)
