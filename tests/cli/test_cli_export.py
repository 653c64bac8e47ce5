"""Tests of `admfast export` through `main(argv)`: its output, its files and its errors."""

from __future__ import annotations

import json

import pytest

from admfast.cli.main import main


def test_each_form(weights, tmp_path, capsys):
    free = str(weights / "free.safetensors")
    for to, out in (("diffusers", "folder"), ("safetensors", "x.safetensors"), ("published", "y.pt")):
        assert main(["export", free, "--to", to, "--out", str(tmp_path / out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == str(tmp_path / out) and lines[0].split() == ["kind", "unet"]
    assert main(["inspect", str(tmp_path / "y.pt")]) == 0


def test_the_call_of_diffusers_is_printed(weights, tmp_path, capsys):
    out = str(tmp_path / "folder")
    arguments = ["export", str(weights / "free.safetensors"), "--to", "diffusers", "--out", out]
    assert main(arguments) == 0
    assert "use_clipped_model_output=True" in capsys.readouterr().out
    assert main([*arguments, "--scheduler", "ddpm", "--overwrite", "--dtype", "float16"]) == 0
    assert "DDPMPipeline" in capsys.readouterr().out
    assert json.loads((tmp_path / "folder/unet/config.json").read_text())["out_channels"] == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["faces.safetensors", "--to", "onnx"], "--to='onnx'"),
        (["guide.safetensors", "--to", "diffusers"], "kind='classifier'"),
        (["up.safetensors", "--to", "diffusers"], "kind='upsampler'"),
        (["faces.safetensors", "--to", "diffusers", "--dtype", "int8"], "--dtype='int8'"),
        (["faces.safetensors", "--to", "diffusers", "--scheduler", "heun"], "--scheduler='heun'"),
        (["faces.safetensors", "--to", "published"], "--out="),
        (["faces.safetensors", "--to", "diffusers", "--set", "steps=50", "--set", "rescale_timesteps=yes"],
         "rescale_timesteps=True"),
        (["faces.safetensors", "--to", "diffusers", "--set", "colour=1"], "--set='colour'"),
        (["nothing.pt", "--to", "diffusers"], "nothing.pt"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(weights, tmp_path, capsys, words, named):
    status = main(["export", str(weights / words[0]), *words[1:], "--out", str(tmp_path / "x")])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1) and named in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_refused(weights, tmp_path, capsys):
    words = [
        "export",
        str(weights / "faces.safetensors"),
        "--to",
        "published",
        "--out",
        str(tmp_path / "x.pt"),
    ]
    assert main(words) == 0 and main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
