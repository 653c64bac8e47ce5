"""Tests of the published sampling scripts' flags, given to `admfast sample`."""

from __future__ import annotations

import pytest

from admfast.cli.main import main
from admfast.cli.published_flags import FLAGS, translate_flags
from admfast.errors import InvalidArgument
from admfast.files.npz import read_samples


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--model_path m.pt --num_samples 3", "m.pt --seeds 0-2"),
        ("--classifier_path=c.pt --classifier_scale 2.5", "--classifier c.pt --guidance 2.5"),
        ("--timestep_respacing ddim25 --use_ddim True", "--respacing ddim25 --solver ddim"),
        ("--use_ddim False --clip_denoised True --steps 4", "--solver ddpm --steps 4"),
        ("--batch_size 4 --base_samples small.npz", "--batch 4 --low-res small.npz"),
        ("--use_fp16 True", "--precision fp16"),
        ("--use_fp16 no", "--precision fp32"),
        ("--num_channels 192 --image_size=64", "--set num_channels=192 --set image_size=64"),
        ("--large_size 256 --small_size 64", "--set image_size=256 --set low_res_size=64"),
        ("--classifier_depth 4", "--set-classifier num_res_blocks=4"),
        ("--out out --set num_heads=4 name", "--out out --set num_heads=4 name"),
    ],
)
def test_flags_of_the_same_meaning(given, wanted):
    assert translate_flags(given.split()) == wanted.split()
    assert translate_flags(["--timestep_respacing", ""]) == ["--respacing", ""]


@pytest.mark.parametrize(
    "given, named",
    [
        ("--clip_denoised False", "clip=False"),
        ("--classifier_use_fp16 False", "--precision"),
        ("--num_samples 0", "--seeds"),
        ("--num_samples many", "--seeds"),
        ("--use_ddim maybe", "True or False"),
        ("--model_path", "a value"),
    ],
)
def test_what_has_no_option_is_named(given, named):
    with pytest.raises(InvalidArgument, match=f"^{given.split()[0]}=.*{named}"):
        translate_flags(given.split())


@pytest.mark.usefixtures("default_precision")
def test_a_published_command_samples(weights, tmp_path, capsys):
    command = "--timestep_respacing 2 --num_samples 3 --batch_size 2 --use_ddim True --num_heads 2"
    paths = ["--classifier_path", str(weights / "guide.safetensors"), "--classifier_scale", "0.5"]
    model = ["--model_path", str(weights / "faces.safetensors"), "--device", "cpu"]
    status = main(["sample", *command.split(), *paths, *model, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert read_samples(tmp_path / "out" / "samples_3x8x8x1.npz").labels.tolist() == [0, 1, 2]
    rows = dict(line.split(maxsplit=1) for line in said.out.splitlines()[:8])
    assert rows["solver"] == "ddim:eta=0.0, respacing 2" and rows["guidance"] == "classifier 0.5"


def test_every_flag_is_a_line_or_a_translation(capsys):
    for flag in sorted(FLAGS):
        assert main(["sample", flag, "x", "--set", "nothing"]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "No such option" not in said.err
