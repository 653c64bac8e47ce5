"""Tests of `admfast.export`: every format from every kind of source, complete or nothing, and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import admfast
from admfast.checkpoints import read_weights, write_weights
from admfast.checkpoints.snapshots import write_snapshot
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument, OutputError
from admfast.models import UNetConfig
from admfast.models.description import Description
from admfast.models.presets import preset
from tests.checkpoints.exported import assert_same_output, inputs
from tests.checkpoints.plain_unet2d import PlainUNet2D
from tests.small import SMALL_UNET, classifier, upsampler, with_weights, write

FOLDER = [
    "admfast.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]  # fmt: skip
PUBLISHED: UNetConfig = dataclasses.replace(SMALL_UNET, num_classes=1000)
PROCESS = DiffusionConfig(noise_schedule="cosine", steps=500, learn_sigma=True)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "net.safetensors"
    write_weights(path, with_weights(PUBLISHED).state_dict(), Description(PUBLISHED, PROCESS, {"step": 7}))
    return path


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_an_upsampler_keeps_what_it_enlarges(ending, tmp_path):
    bare, path, to = tmp_path / "bare.safetensors", tmp_path / f"up.{ending}", "safetensors"
    write(bare, upsampler())
    assert admfast.load(bare).low_res_size is None
    admfast.export(bare, path, to="published" if ending == "pt" else to, low_res_size=4)
    assert admfast.load(path).low_res_size == 4
    again = tmp_path / "again.safetensors"
    admfast.export(path, again, to=to)
    assert admfast.load(again).low_res_size == 4
    for wrong in (bare, "digits32"):
        with pytest.raises(InvalidArgument, match="^low_res_size="):
            admfast.export(wrong, tmp_path / "c.safetensors", to=to, low_res_size=0)


def test_a_folder_for_diffusers(source, tmp_path):
    exported = admfast.export(source, tmp_path / "a/b", to="diffusers")
    assert exported.path == tmp_path / "a/b" and files(exported.path) == FOLDER
    index = json.loads((exported.path / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline"
    for part, file in (("unet", "unet/config.json"), ("scheduler", "scheduler/scheduler_config.json")):
        assert index[part] == ["diffusers", json.loads((exported.path / file).read_text())["_class_name"]]
    record = json.loads((exported.path / "admfast.json").read_text())
    assert (
        record["network"] == json.loads(json.dumps(PUBLISHED.to_dict())) and record["training"]["step"] == 7
    )
    assert record["training"]["exported"]["variance_dropped"] is True
    assert any("variance" in note for note in exported.notes) and any(
        "class_labels" in note for note in exported.notes
    )
    config = json.loads((exported.path / "unet/config.json").read_text())
    state = load_file(exported.path / "unet/diffusion_pytorch_model.safetensors")
    x, t, classes = inputs(PUBLISHED, torch.float32)
    wanted = with_weights(PUBLISHED)(x, t, classes)
    assert_same_output(PlainUNet2D(config, state)(x, t, classes), wanted[:, :3])


def test_ddpm_keeps_the_variance(source, tmp_path):
    exported = admfast.export(source, tmp_path / "x", to="diffusers", scheduler="ddpm")
    record = json.loads((tmp_path / "x/admfast.json").read_text())["training"]["exported"]
    assert record == {"to": "diffusers", "scheduler": "ddpm", "variance_dropped": False}
    assert not any("variance" in note for note in exported.notes)
    config = json.loads((tmp_path / "x/unet/config.json").read_text())
    assert config["out_channels"] == 6
    scheduler = json.loads((tmp_path / "x/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range"


def test_safetensors_are_loaded_again(source, tmp_path):
    exported = admfast.export(source, tmp_path / "x.safetensors", to="safetensors")
    weights = read_weights(exported.path)
    assert weights.description == Description(PUBLISHED, PROCESS, {"step": 7}) == exported.description
    for key, value in with_weights(PUBLISHED).state_dict().items():
        assert torch.equal(weights.tensors[key], value), key


def test_the_published_file_has_the_published_keys_and_its_flags(source, tmp_path):
    exported = admfast.export(source, tmp_path / "x.pt", to="published")
    plain = torch.load(exported.path, weights_only=True)
    state = with_weights(PUBLISHED).state_dict()
    assert type(plain) is dict and list(plain) == list(state)
    assert all(torch.equal(plain[key], value) for key, value in state.items())
    assert files(tmp_path) == ["x.flags", "x.json", "x.pt"]
    assert (tmp_path / "x.flags").read_text() == f"{exported.flags}\n"
    words = exported.flags.replace("--", "").split()
    said = dict(zip(words[::2], words[1::2], strict=True))
    wanted = {"image_size": "16", "channel_mult": "1,2", "class_cond": "True", "noise_schedule": "cosine"}
    assert wanted.items() <= said.items() and said["diffusion_steps"] == "500"


@pytest.mark.parametrize("make", [classifier, upsampler], ids=["classifier", "upsampler"])
def test_every_kind_of_network_is_published(tmp_path, make):
    """Networks of these sizes have no flags: a note says so, and an old file of flags is removed."""
    write(tmp_path / "in.safetensors", make())
    (tmp_path / "x.flags").write_text("--image_size 64")
    exported = admfast.export(tmp_path / "in.safetensors", tmp_path / "x.pt", to="published", overwrite=True)
    assert list(torch.load(exported.path, weights_only=True)) == list(make().state_dict())
    assert exported.flags is None and any("in_channels" in n or "image_size" in n for n in exported.notes)
    assert not (tmp_path / "x.flags").exists()


def test_a_system_a_run_a_state_dict_and_an_open_file(source, tmp_path):
    exported = admfast.export("digits32", tmp_path / "digits", to="diffusers")
    assert exported.description.network == preset("digits32_diffusion").config
    assert any("digits32_classifier" in note for note in exported.notes)

    net, average = with_weights(SMALL_UNET), with_weights(SMALL_UNET, 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(Description(SMALL_UNET, PROCESS).to_json())
    write_snapshot(run, 3, {"net": net.state_dict(), "averages": {"0.99": average.state_dict()}}, None)
    assert admfast.export(run, tmp_path / "r.safetensors", to="safetensors").description.training["step"] == 3
    found = read_weights(tmp_path / "r.safetensors").tensors
    assert torch.equal(found["out.2.weight"], average.state_dict()["out.2.weight"])

    said = {"num_head_channels": 32, "image_size": 16, "use_new_attention_order": False}
    admfast.export(net.state_dict(), tmp_path / "s.pt", to="published", **said)
    with open(source, "rb") as file:
        admfast.export(file, tmp_path / "o.pt", to="published")
    assert list(torch.load(tmp_path / "s.pt")) == list(torch.load(tmp_path / "o.pt"))


def test_the_dtype_on_disk(source, tmp_path):
    for to, out in (("diffusers", "d"), ("published", "x.pt"), ("safetensors", "y.safetensors")):
        admfast.export(source, tmp_path / out, to=to, dtype=torch.bfloat16)
    kept = [load_file(tmp_path / "d/unet/diffusion_pytorch_model.safetensors"), torch.load(tmp_path / "x.pt")]
    for state in (*kept, load_file(tmp_path / "y.safetensors")):
        assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_what_is_there_stays_unless_overwritten(source, tmp_path):
    admfast.export(source, tmp_path / "d", to="diffusers")
    (tmp_path / "d/notes.txt").write_text("mine")
    for name in ("x.pt", "y.json", "z.flags"):
        (tmp_path / name).write_text("mine")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for to, out in (("diffusers", "d"), ("published", "x.pt"), ("published", "y.pt"), ("published", "z.pt")):
        with pytest.raises(OutputError, match="overwrite"):
            admfast.export(source, tmp_path / out, to=to)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    admfast.export(source, tmp_path / "d", to="diffusers", scheduler="ddpm", overwrite=True)
    assert "DDPM" in (tmp_path / "d/model_index.json").read_text()
    assert (tmp_path / "d/notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(source, tmp_path, monkeypatch):
    for name in ("empty", "here"):
        (tmp_path / name).mkdir()
    admfast.export(source, tmp_path / "empty", to="diffusers")
    monkeypatch.chdir(tmp_path / "here")
    admfast.export(source, ".", to="diffusers")
    assert files(tmp_path / "empty") == files(tmp_path / "here") == FOLDER


@pytest.mark.parametrize(
    ("out", "arguments", "named"),
    [
        ("x", {"to": "onnx"}, "to"),
        ("x.safetensors", {"to": "diffusers"}, "out"),
        ("x.safetensors", {"to": "published"}, "out"),
        ("x", {"to": "diffusers", "scheduler": "unipc"}, "scheduler"),
        ("x.pt", {"to": "published", "scheduler": "ddpm"}, "scheduler"),
        ("x", {"to": "diffusers", "dtype": torch.float64}, "dtype"),
        ("x", {"to": "diffusers", "num_heads": 3, "num_head_channels": -1}, "num_heads"),
        ("x", {"to": "diffusers", "weights": "models/"}, "weights"),
        ("x", {"to": "diffusers", "overwrite": "yes"}, "overwrite"),
    ],
)
def test_refusals_write_nothing(source, tmp_path, out, arguments, named):
    with pytest.raises(InvalidArgument, match=f"^{named}="):
        admfast.export(source, tmp_path / out, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_networks_and_processes_that_diffusers_cant_hold_write_nothing(tmp_path):
    made = tmp_path / "in"
    made.mkdir()
    kinds = {"classifier": write(made / "c.safetensors", classifier()), "upsampler": made / "u.safetensors"}
    write(kinds["upsampler"], upsampler())
    for kind, path in kinds.items():
        with pytest.raises(InvalidArgument, match=f"^kind='{kind}'"):
            admfast.export(path, tmp_path / "x", to="diffusers")
    write_weights(made / "bare.pt", with_weights(SMALL_UNET).state_dict(), Description(SMALL_UNET))
    with pytest.raises(CheckpointError, match="noise_schedule"):
        admfast.export(made / "bare.pt", tmp_path / "x", to="diffusers")
    write_weights(made / "asked.pt", with_weights(SMALL_UNET).state_dict())
    with pytest.raises(CheckpointError, match="--set") as caught:
        admfast.export(made / "asked.pt", tmp_path / "x", to="diffusers")
    assert all(name in str(caught.value) for name in ("noise_schedule", "num_head_channels"))
    with pytest.raises(InvalidArgument, match="^source="):
        admfast.export("digits33", tmp_path / "x", to="diffusers")
    with pytest.raises(InvalidArgument, match="^num_heads=.*digits32"):
        admfast.export("digits32", tmp_path / "x", to="diffusers", num_heads=2)
    assert files(tmp_path) == files(made.parent) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["diffusers", "published"])
def test_a_full_disk_leaves_nothing(source, tmp_path, to):
    program = f"""
        import admfast
        try:
            admfast.export({str(source)!r}, "a/x" if {to!r} == "diffusers" else "x.pt", to={to!r})
        except admfast.AdmfastError as error:
            print(f"{{type(error).__name__}} {{error}}")
    """
    exported = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    named = "a/x/unet/diffusion_pytorch_model.safetensors" if to == "diffusers" else "x.pt"
    assert exported.stdout.startswith(f"OutputError {named}: ") and exported.stdout.count("\n") == 1, (
        exported.stderr
    )
    assert list(tmp_path.iterdir()) == []
