"""Tests of the guidance options of `admfast sample`: what they make of a request, and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from admfast import guides
from admfast.cli.guidance import guidance_settings
from admfast.cli.main import main
from admfast.errors import InvalidArgument
from admfast.files.npz import read_samples
from admfast.sampling.load import load
from tests.small import classifier, unet, write


@pytest.mark.parametrize(
    "options, settings",
    [
        ({}, {"guidance": None, "guidance_interval": None, "guides": []}),
        ({"guidance": "1,4"}, {"guidance": (1.0, 4.0), "guidance_interval": None, "guides": []}),
        ({"guidance_every": 2}, {"guides": [guides.by_classifier(2.5, every=2)]}),
        (
            {"guidance": "3", "guidance_count": 4, "guidance_reuse": True, "guidance_interval": "100,900"},
            {"guides": [guides.by_classifier(3.0, (100.0, 900.0), count=4, reuse=True)]},
        ),
        (
            {"cfg_scale": "2", "cfg_interval": "0,500", "autoguidance_scale": "1.5,2"},
            {
                "guidance": None,
                "guidance_interval": None,
                "guides": [guides.by_null_class(2.0, (0.0, 500.0)), guides.by_weak_network((1.5, 2.0))],
            },
        ),
    ],
)
def test_options_become_settings(options, settings):
    assert guidance_settings(2.5, **options) == settings


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"guidance": "high"}, "guidance='high'"),
        ({"guidance": "nan"}, "guidance=nan"),
        ({"cfg_scale": "1e99"}, "cfg-scale=1e[+]99"),
        ({"cfg_interval": "0,500"}, "cfg-interval='0,500'"),
        ({"cfg_scale": "2", "cfg_interval": "5"}, "cfg-interval="),
        ({"autoguidance_scale": "2", "autoguidance_interval": "9,3"}, "autoguidance-interval="),
        ({"guidance_every": 0}, "guidance-every=0"),
        ({"guidance_reuse": True}, "guidance-reuse=True"),
        ({"guidance": "0", "guidance_every": 2}, "guidance-every=2"),
        ({"guidance_every": 2, "guidance_count": 3}, "every=2"),
    ],
)
def test_wrong_options_are_named(options, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}"):
        guidance_settings(2.0, **options)


def test_a_command_guides_by_all_networks(tmp_path):
    files = [
        str(write(tmp_path / f"{name}.safetensors", net))
        for name, net in (("net", unet()), ("guide", classifier(1)), ("weak", unet(7)))
    ]
    command = ["sample", files[0], "--classifier", files[1], "--weak", files[2], "--set", "null_class=True"]
    command += [
        "--seeds",
        "3,5",
        "--classes",
        "2,1",
        "--steps",
        "6",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    command += ["--guidance", "1,3", "--guidance-every", "2", "--guidance-reuse", "--cfg-scale", "1.5"]
    command += ["--autoguidance-scale", "1.25", "--solver", "ddim", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    pipe = load(files[0], classifier=files[1], weak=files[2], null_class=True, device="cpu", precision="fp32")
    given = [
        guides.by_null_class(1.5),
        guides.by_weak_network(1.25),
        guides.by_classifier((1.0, 3.0), every=2, reuse=True),
    ]
    wanted = pipe.sample([2, 1], [3, 5], steps=6, solver="ddim", guides=given)
    (found,) = (tmp_path / "out").glob("*.npz")
    assert np.array_equal(read_samples(found).images, wanted.numpy())


def test_a_weak_network_that_guides_nothing_is_refused(tmp_path, capsys):
    net, weak = (str(write(tmp_path / f"{i}.safetensors", unet(i))) for i in (0, 7))
    assert main(["sample", net, "--weak", weak, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "weak=" in capsys.readouterr().err and not (tmp_path / "out").exists()
