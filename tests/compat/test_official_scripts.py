"""Tests that the official scripts, from a checkout that the user names, give the same results on ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from admfast.compat.guided_diffusion import script_util
from bench.programs import PROGRAMS_PATH
from tests.parity.golden import NETWORK_GRADIENT_LIMIT, NETWORK_SAMPLES_LIMIT, compare
from tests.tools.random_checkpoint import random_state

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "admfast" / "compat" / "stand_ins"
CHECKOUT = Path(os.environ.get(PROGRAMS_PATH, "nowhere")) / "guided-diffusion"
NETWORK = (
    "--image_size 64 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 --attention_resolutions 16 "
    "--resblock_updown True --learn_sigma True"
)
UPSAMPLER = (
    "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 "
    "--attention_resolutions 16 --learn_sigma True"
)
CLASSIFIER = (
    "--classifier_width 64 --classifier_depth 1 --classifier_path classifier.pt --classifier_scale 2.0"
)
SAMPLING = "--num_samples 4 --batch_size 2"
TRAINING = "--data_dir images --batch_size 4 --lr 1e-3 --save_interval 2 --log_interval 1"
MPI = """
class _World:
    rank, size = 0, 1
    def Get_rank(self): return 0
    def Get_size(self): return 1
    def bcast(self, value, root=0): return value
class MPI:
    COMM_WORLD = _World()
"""
# The scripts set no seeds. The published timestep sampler uses `numpy.int`, which NumPy has removed.
SEED = """
import random, numpy, torch
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
numpy.int = int
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with weights, images and a stub of mpi4py."""
    place = tmp_path_factory.mktemp("scripts")
    common = dict(num_channels=32, num_res_blocks=1, num_head_channels=16, attention_resolutions="16")
    net = script_util.create_model(
        64, **common, resblock_updown=True, learn_sigma=True, use_scale_shift_norm=True
    )
    flags = script_util.classifier_defaults() | dict(classifier_width=64, classifier_depth=1)
    flags_up = script_util.sr_model_and_diffusion_defaults() | common
    flags_up |= dict(large_size=64, small_size=16, learn_sigma=True, class_cond=True)
    upsampler, _ = script_util.sr_create_model_and_diffusion(**flags_up)
    nets = {"model": net, "classifier": script_util.create_classifier(**flags), "upsampler": upsampler}
    for name, built in nets.items():
        torch.save(random_state(built.config), place / f"{name}.pt")
    draw = np.random.default_rng(0)
    np.savez(place / "base.npz", draw.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), np.array([3, 5]))
    (place / "images").mkdir()
    for i in range(8):
        pixels = draw.integers(0, 256, (80 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{'ab'[i % 2]}_{i}.png")
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(SEED)
    (place / "site" / "mpi4py.py").write_text(MPI)
    return place


def run(folder: Path, out: str, before: list[str], script: str, flags: str, path: list[Path]) -> Path:
    """Run a script in the folder and return its log folder."""
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, [folder / "site", ROOT, *path])), "OMP_NUM_THREADS": "1",
        "PATH": "", "OPENAI_LOGDIR": str(folder / out), "DIFFUSION_TRAINING_TEST": "1",
    }  # fmt: skip
    command = [sys.executable, *before, str(CHECKOUT / "scripts" / f"{script}.py"), *flags.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / out


RUNNER = ["-m", "admfast.accelerate"]
SAMPLE = f"{NETWORK} {SAMPLING} --model_path model.pt"
CASES = {
    "ddpm": ("image_sample", f"{SAMPLE} --timestep_respacing 8"),
    "ddim": ("image_sample", f"{SAMPLE} --timestep_respacing ddim10 --use_ddim True"),
    "guided": ("classifier_sample", f"{SAMPLE} {CLASSIFIER} --timestep_respacing 6"),
    "guided ddim": ("classifier_sample", f"{SAMPLE} {CLASSIFIER} --timestep_respacing ddim8 --use_ddim True"),
    "upsampler": (
        "super_res_sample",
        f"{UPSAMPLER} {SAMPLING} --class_cond True --model_path upsampler.pt --base_samples base.npz "
        "--timestep_respacing 5",
    ),
    "likelihood": ("image_nll", f"{SAMPLE} --data_dir images --timestep_respacing 6"),
    "training": ("image_train", f"{NETWORK} {TRAINING} --microbatch 2 --ema_rate 0.9,0.99"),
    "training in fp16": (
        "image_train", f"{NETWORK} {TRAINING} --use_fp16 True --schedule_sampler loss-second-moment"
    ),
    "upsampler's training": ("super_res_train", f"{UPSAMPLER} {TRAINING}"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["package", "copy"])
@pytest.mark.parametrize("case", CASES)
def test_a_script_gives_what_it_gave(folder, case, way):
    if not CHECKOUT.is_dir():
        pytest.skip(f"{PROGRAMS_PATH} names no folder with a checkout of guided-diffusion")
    script, flags = CASES[case]
    name, own = case.replace(" ", "_").replace("'", ""), [CHECKOUT, STAND_INS]
    expected = folder / f"{name}_published"
    if not expected.is_dir():
        run(folder, expected.name, [], script, flags, own)
    if way == "package":
        found = run(folder, f"{name}_package", [*RUNNER, "--package"], script, flags, [])
    else:
        found = run(folder, f"{name}_copy", RUNNER, script, flags, own)
    files = [path.name for path in sorted(expected.iterdir()) if path.suffix in (".npz", ".pt")]
    assert files and files == [
        path.name for path in sorted(found.iterdir()) if path.suffix in (".npz", ".pt")
    ]
    for file in files:
        if file.endswith(".npz"):
            same_arrays(np.load(found / file), np.load(expected / file))
        elif "000000" in file:  # only the first step: later, Adam amplifies rounding of small gradients
            same_training(*(torch.load(place / file) for place in (found, expected)), file)


def same_arrays(found, expected) -> None:
    assert found.files == expected.files
    for name in expected.files:
        if expected[name].dtype == np.uint8:
            levels = np.abs(found[name].astype(int) - expected[name].astype(int))
            assert levels.max() <= 1 and (levels > 0).mean() < 1e-3
        else:
            compare(found[name], expected[name], NETWORK_SAMPLES_LIMIT, name)


def same_training(found, expected, file: str) -> None:
    """Compare weights and Adam's first moments (0.1 times the first gradients) with the published ones."""
    assert list(found) == list(expected)
    if not file.startswith("opt"):
        for name in expected:
            compare(found[name], expected[name], NETWORK_GRADIENT_LIMIT, name)
        return
    assert found["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"]
    for key, state in expected["state"].items():
        compare(found["state"][key]["exp_avg"], state["exp_avg"], NETWORK_GRADIENT_LIMIT, f"moment {key}")
