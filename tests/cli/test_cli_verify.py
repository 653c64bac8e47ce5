"""Tests of `admfast verify` through `main(argv)`: tables, exit statuses and one-line errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from admfast.checkpoints import write_weights
from admfast.cli import verify as command
from admfast.cli.commands import app
from admfast.cli.main import main
from admfast.cli.verify import EXCEEDS_BUDGET
from admfast.diffusion import DiffusionConfig
from admfast.models.description import Description
from admfast.verify.budget import BUDGETS, Budget
from tests.small import classifier, unet, upsampler

SETTINGS = DiffusionConfig(noise_schedule="linear", steps=1000, learn_sigma=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a folder with a model, a classifier and an upsampler."""
    folder = tmp_path_factory.mktemp("weights")
    for name, net in (("faces", unet()), ("guide", classifier(1)), ("up", upsampler())):
        process = None if name == "guide" else SETTINGS
        description = Description(net.config, process)
        write_weights(folder / f"{name}.safetensors", net.state_dict(), description)
    return folder


@pytest.fixture
def verify(weights, capsys, monkeypatch):
    """Return a function that calls `admfast verify faces.safetensors --steps 2 --precision fp32 ...`.

    It returns (status, stdout, stderr).
    """
    monkeypatch.chdir(weights)

    def call(*options: str, model: str = "faces.safetensors") -> tuple[int, str, str]:
        settings = {"--steps": "2", "--device": "cpu", "--precision": "fp32"}
        flat = [word for pair in settings.items() if pair[0] not in options for word in pair]
        status = main(["verify", model, *flat, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fail the test if a model is loaded: wrong arguments must be refused before that."""
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("the model must not be loaded"))


def test_tables_and_the_exit_status_of_the_budget(capsys, monkeypatch):
    arguments = ["verify", "digits32", "--steps", "2", "--seeds", "0", "--device", "cpu"]
    assert main([*arguments, "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "within the budget" in out and "x after step 2" in out and "worst of 147 layers" in out
    assert "ddim:eta=0.0, 2 steps" in out and "1.00e-01  ####" in out
    monkeypatch.setitem(BUDGETS, "bf16", Budget(layer=1e-6, step=1, psnr=0))
    assert main([*arguments, "--precision", "bf16"]) == EXCEEDS_BUDGET
    assert "past the budget: net." in capsys.readouterr().out


def layers_in(out: str) -> int:
    found = re.search(r"worst of (\d+) layers", out)
    assert found, out
    return int(found[1])


def test_a_model_with_all_that_goes_with_it(verify):
    parts = ("--classifier", "guide.safetensors", "--upsampler", "up.safetensors", "--set-upsampler")
    status, out, err = verify(*parts, "low_res_size=8", "--classes", "1,3", "--upsampler-steps", "3")
    assert status == 0, out + err
    assert "to 16x16, 3 steps" in out and "upsampler: x after step 3" in out
    _, alone, _ = verify("--classifier", "guide.safetensors", "--classes", "1,3")
    assert layers_in(out) > layers_in(alone)


def test_guidance_by_other_networks_is_compared(verify, weights):
    write_weights(weights / "weak.safetensors", unet(7).state_dict(), Description(unet().config, SETTINGS))
    guides = ("--weak", "weak.safetensors", "--autoguidance-scale", "1.5")
    status, out, err = verify(*guides, "--cfg-scale", "1.5", "--set", "null_class=True")
    assert status == 0, err
    assert re.search(r"^weak\.", out, re.M) and "null class" in out
    status, _, err = verify("--weak", "weak.safetensors")
    assert status == 2 and err.startswith("admfast: --weak=") and err.count("\n") == 1


def test_images_of_another_size_on_threads_that_are_asked_for(verify, monkeypatch):
    engines, load = [], command.load
    monkeypatch.setattr(command, "load", lambda *a, **k: engines.append(k["engine"]) or load(*a, **k))
    status, out, err = verify("--size", "8x12", "--threads", "1", "--guidance", "0", "--seeds", "0-1")
    assert status == 0, out + err
    assert "2 of 8x12" in out and [engine.threads for engine in engines] == [1, None]
    for option, value in (("--size", "8x13"), ("--threads", "0")):
        status, out, err = verify(option, value, "--guidance", "0")
        assert status == 2 and out == "" and err.startswith(f"admfast: {option}=") and err.count("\n") == 1


@pytest.mark.parametrize("count", [1, 3])
def test_an_upsampler_gets_its_images(verify, weights, count):
    small = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    np.savez(weights / "small.npz", arr_0=small, arr_1=np.arange(count))
    status, out, err = verify("--low-res", "small.npz", model="up.safetensors")
    assert status == 0, out + err
    status, _, err = verify(model="up.safetensors")
    assert (
        status == 2 and err == "admfast: --low-res=None: upsamplers need it and no other network takes it\n"
    )


def test_the_options_are_those_of_sample():
    given = {name: {o.name: o for o in app.get_command(None, name).params} for name in ("sample", "verify")}
    own = {"seeds", "steps", "upsampler_steps", "solver"}  # these have other defaults
    for name in set(given["verify"]) & set(given["sample"]) - own:
        assert given["verify"][name].help == given["sample"][name].help, name
    assert {"classes", "size", "threads", "low_res", "upsampler", "set_upsampler", "compile_cache"} <= set(
        given["verify"]
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps=0: "),
        (["--steps", "2", "--solver", "ddpm", "--precision", "bf16"], "--steps=2: 4 or more for ddpm"),
        (["--solver", "rk4"], "--solver='rk4': "),
        (["--solver", "ddim-inverse"], "--solver='ddim-inverse': "),
        (["--precision", "fp8"], "--precision='fp8'"),
        (["--seeds", "5-1"], "--seeds='5-1'"),
        (["--classes", "4"], "--classes=4: a whole number from 0 to 3"),
        (["--upsampler-steps", "3"], "--upsampler-steps=3: faces has no upsampler"),
        (["--low-res", "absent.npz"], "--low-res: "),
        (["--compile-cache", "c"], "--compile-cache='c': only together with compile=True"),
        (["--set-upsampler", "num_heads=2"], "upsampler_options={'num_heads': 2}: there is no upsampler"),
    ],
)
def test_wrong_flags_are_one_line(verify, flags, message):
    status, _, err = verify(*flags)
    assert status == 2 and err.startswith(f"admfast: {message}") and err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_said_first(verify, nothing_loads):
    reason = "no/c: not written: the folder no does not exist"
    assert verify("--compile", "--compile-cache", "no/c") == (2, "", f"admfast: {reason}\n")
    assert main(["sample", "digits32", "--compile", "--compile-cache", "no/c"]) == 2


def test_a_system_says_its_own_parts(capsys):
    assert main(["verify", "digits32", "--upsampler", "x.pt"]) == 2
    assert capsys.readouterr().err == "admfast: --upsampler='x.pt': not for a system: digits32 fixes it\n"


def test_a_classifier_that_is_not_used_is_not_compared(capsys):
    options = ["--size", "36x48", "--guidance", "0", "--classes", "1", "--steps", "4"]
    assert main(["verify", "digits32", *options]) == 0
    assert "classifier." not in capsys.readouterr().out
