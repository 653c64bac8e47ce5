"""Tests that the package imports, samples and trains on machines that lack modules and system calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import admfast
from admfast.checkpoints.snapshots import RUN_FILE
from admfast.files.npz import read_samples
from tests.tools.elsewhere import LINUX_MODULES, UNIX_MODULES

ROOT = Path(__file__).resolve().parents[1]
SLIM = ",".join([*UNIX_MODULES, *LINUX_MODULES])
SHIPPED = str(ROOT / "admfast" / "data" / "digits32" / "diffusion.safetensors")


def on(machine: str, folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands as on `machine`, without a compiler or a home folder, and with an ASCII locale.

    OUT in a command stands for `folder`.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "CC", "CXX")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": str(folder)}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = " -- ".join(commands).replace("OUT", str(folder)).split()
    command = [sys.executable, "-m", "tests.tools.elsewhere", machine, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


SAMPLE = (
    "sample digits32 --classes 0-9 --per-class 1 --steps 2 --device cpu --precision fp32 --out OUT/samples"
)
TRAIN = "train diffusion --data OUT/samples/samples_10x32x32x1.npz --out OUT/run --steps 2 --batch-size 2"
TRAIN += " --device cpu --save-every 1 --keep 1 --grid-every 0"
EVERYWHERE = ["info", f"inspect {SHIPPED}", SAMPLE]
FILES = [
    TRAIN,
    TRAIN.replace("--steps 2", "--steps 3"),  # resumes the run
    "train export OUT/run --out OUT/trained.pt",
    "export digits32 --out OUT/net.safetensors --to safetensors",
]


@pytest.mark.parametrize(
    "machine, commands",
    [(SLIM, EVERYWHERE), ("windows", EVERYWHERE + FILES), ("macos", EVERYWHERE + [TRAIN + " --workers 1"])],
    ids=["slim container", "windows", "macos"],
)
def test_another_machine_makes_the_same_images(tmp_path, machine, commands):
    done = on(machine, tmp_path, *commands)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(r"^triton +not installed$", done.stdout, re.M)
    assert re.search(r"^CPU loops +none: not loaded: .*admfast._C", done.stdout, re.M)
    made = read_samples(tmp_path / "samples" / "samples_10x32x32x1.npz").images
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    own = pipe.sample(classes=range(10), seeds=range(10), steps=2, solver="auto").numpy()
    assert np.abs(made.astype(int) - own).max() <= 1, "images differ by more than one level"
    assert (tmp_path / "run" / RUN_FILE).exists() == (TRAIN in " ".join(commands))
    assert not [path for path in tmp_path.rglob("*.tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("module", [*UNIX_MODULES, *LINUX_MODULES])
def test_a_module_that_is_missing_alone(tmp_path, module):
    done = on(module, tmp_path, *EVERYWHERE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
