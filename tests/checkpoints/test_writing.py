"""Tests of writing weights files: both formats, the description, and failures that change nothing."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from admfast.checkpoints import read_weights, write_weights
from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, OutputError
from admfast.models.description import Description
from tests.small import SMALL_CLASSIFIER, SMALL_UNET
from tests.tools.random_checkpoint import random_state

STATE = random_state(SMALL_UNET)
DESCRIPTION = Description(SMALL_UNET, DiffusionConfig(learn_sigma=True), {"steps": 16000, "data": "digits"})
ENDINGS = ["pt", "pth", "safetensors"]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, ending, dtype):
    path = tmp_path / f"x.{ending}"
    write_weights(path, STATE, DESCRIPTION, dtype=dtype)
    weights = read_weights(path)
    assert weights.description == DESCRIPTION
    assert set(weights.tensors) == set(STATE)
    for key, value in STATE.items():
        assert torch.equal(weights.tensors[key], value.to(dtype or torch.float32)), key
        assert weights.tensors[key].dtype == (dtype or torch.float32)
    assert names(tmp_path) == ["x.json", f"x.{ending}"]


def test_pt_is_the_published_format(tmp_path):
    write_weights(tmp_path / "x.pt", STATE)
    plain = torch.load(tmp_path / "x.pt", weights_only=True)
    assert type(plain) is dict and list(plain) == list(STATE)
    assert names(tmp_path) == ["x.pt"]


def test_a_safetensors_file_passed_on_alone_keeps_its_description(tmp_path):
    write_weights(tmp_path / "x.safetensors", STATE, DESCRIPTION)
    (tmp_path / "x.json").unlink()
    assert read_weights(tmp_path / "x.safetensors").description == DESCRIPTION
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"admfast": DESCRIPTION.to_json()}
    assert set(load_file(tmp_path / "x.safetensors")) == set(STATE)


def test_files_are_readable_by_others(tmp_path):
    """By itself, safetensors creates files that only the owner can read."""
    before = os.umask(0o022)
    try:
        for ending in ENDINGS:
            write_weights(tmp_path / f"x.{ending}", STATE, DESCRIPTION)
            assert stat.S_IMODE((tmp_path / f"x.{ending}").stat().st_mode) == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("ending", ENDINGS)
def test_views_and_shared_tensors_are_written_as_they_are_seen(tmp_path, ending):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.t(), "row": base[1], "again": base[1], "grad": torch.nn.Parameter(base)}
    write_weights(tmp_path / f"x.{ending}", state)
    back = read_weights(tmp_path / f"x.{ending}").tensors
    for key, value in state.items():
        assert torch.equal(back[key], value.detach()) and back[key].is_contiguous(), key
    write_weights(tmp_path / f"row.{ending}", {"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / f"row.{ending}").stat().st_size < 10_000, "the base of a view was written"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("x.bin", {}, "a name that ends in .pt, .pth, .safetensors"),
        ("x.pt", {"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ("x.pt", {"dtype": torch.int8}, "float32, float16 or bfloat16"),
        ("x.pt", {"description": Description(SMALL_CLASSIFIER)}, "the weights differ: .* keys missing"),
    ],
)
def test_refusals(tmp_path, name, arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        write_weights(tmp_path / name, STATE, **arguments)
    assert names(tmp_path) == []


def test_training_facts_that_json_cant_hold(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_weights(tmp_path / "x.pt", STATE, Description(SMALL_UNET, None, {"rate": torch.zeros(1)}))
    assert names(tmp_path) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_cant_be_written(tmp_path, ending):
    (tmp_path / "file").write_text("x")
    for place, said in (("no", "does not exist"), ("file", "not a folder")):
        with pytest.raises(OutputError, match=said):
            write_weights(tmp_path / place / f"x.{ending}", STATE, DESCRIPTION)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_the_old_weights_and_description(tmp_path, ending):
    other = Description(SMALL_UNET, None, {"old": True})
    write_weights(tmp_path / f"x.{ending}", {k: v + 1 for k, v in STATE.items()}, other)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    program = f"""
        from admfast.errors import OutputError
        from admfast.checkpoints import write_weights
        from tests.checkpoints.test_writing import DESCRIPTION, STATE
        try:
            write_weights("x.{ending}", STATE, DESCRIPTION)
        except OutputError as error:
            print(error)
        else:
            raise SystemExit("no error")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"x.{ending}: not written: the file would exceed the largest size allowed here\n"
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
