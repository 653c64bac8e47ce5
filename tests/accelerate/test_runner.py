"""Tests of `python -m admfast.accelerate PROGRAM`: an unchanged program keeps its output and exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from admfast.accelerate.runner import NetworkRecord, Watcher

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import torch
from tests.accelerate.client import UNetModel, filled

class Mine(UNetModel):
    pass

net, other = filled(Mine()), filled(UNetModel(legacy=False))
torch.manual_seed(0)
x = torch.randn(1, 3, 16, 16)
with torch.no_grad():
    for _ in range(3):
        x = x - 0.1 * net(x, torch.tensor([500]))[:, :3] + 0.01 * torch.randn_like(x)
    x = other(x, torch.tensor([3]))
print(__name__, sys.argv[1:], " ".join(f"{v:.3f}" for v in x.flatten()[:4].tolist()))
sys.exit(int(sys.argv[1]) if sys.argv[1:] else None)
"""


def run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "sampling.py"
    path.write_text(PROGRAM)
    return path


def test_a_program_prints_what_it_prints_and_ends_as_it_ends(program):
    unaccelerated = run(str(program), "3", "--check")
    # --check comes after the program, so it is the program's option.
    found = run("-m", "admfast.accelerate", str(program), "3", "--check")
    assert (
        (found.returncode, found.stdout)
        == (unaccelerated.returncode, unaccelerated.stdout)
        == (3, unaccelerated.stdout)
    )
    lines = [line for line in found.stderr.splitlines() if line.startswith("admfast.accelerate: ")]
    assert len(lines) == 2 and all("whole" in line for line in lines)
    assert "3 calls" in lines[0] and "1 calls" in lines[1]


def test_all_arguments_behind_the_program_are_its_own(tmp_path):
    (tmp_path / "says.py").write_text("import sys; print(sys.argv, __file__)")
    for arguments in (["--", "-b"], ["-m", "x"], ["--check"]):
        unaccelerated = run("says.py", *arguments, folder=tmp_path)
        assert (
            run("-m", "admfast.accelerate", "says.py", *arguments, folder=tmp_path).stdout
            == unaccelerated.stdout
        )


@pytest.mark.parametrize("given", [["--precision=fp32"], ["--precision", "fp32"], ["--check"], []])
def test_the_runner_s_own_options_end_at_the_program(given, tmp_path):
    (tmp_path / "says.py").write_text("import sys; print(sys.argv)")
    found = run("-m", "admfast.accelerate", *given, "says.py", "--precision=3", folder=tmp_path)
    assert (found.returncode, found.stdout) == (0, "['says.py', '--precision=3']\n"), found.stderr


def test_a_module_may_be_the_program_and_first_calls_be_compared(program):
    found = run("-m", "admfast.accelerate", "--check", "-m", "sampling", folder=program.parent)
    assert found.returncode == 0 and found.stdout.startswith("__main__ []"), found.stderr
    assert found.stderr.count("e-0") == 2  # both are off by rounding


@pytest.mark.parametrize(
    ("difference", "has_difference"), [(1e-6, False), (1e-2, True), (float("nan"), True)]
)
def test_a_difference_beyond_rounding_is_told(difference, has_difference):
    watcher = Watcher(records=[NetworkRecord(difference=1e-7), NetworkRecord(difference=difference)])
    assert watcher.has_difference() == has_difference


OF_OTHER_CODE_BASES = """
import torch
from tests.accelerate import diffusers_client, edm_client
from tests.accelerate.client import filled

class Mine(edm_client.UNet):
    pass

x, t = torch.ones(1, 3, 16, 16), torch.tensor([0.5])
with torch.no_grad():
    images = [filled(Mine())(x, t), filled(diffusers_client.UNet2DModel())(x, t).sample]
    images.append(filled(edm_client.UNet(taps=(1, 3, 3, 1)))(x, t))
print(" ".join(f"{v:.3f}" for image in images for v in image.flatten()[:2].tolist()))
"""


def test_networks_of_other_code_bases_are_found(tmp_path):
    (tmp_path / "sampling.py").write_text(OF_OTHER_CODE_BASES)
    unaccelerated = run("sampling.py", folder=tmp_path)
    found = run("-m", "admfast.accelerate", "--check", "sampling.py", folder=tmp_path)
    assert (
        (found.returncode, found.stdout)
        == (unaccelerated.returncode, unaccelerated.stdout)
        == (0, unaccelerated.stdout)
    )
    first, second, third = found.stderr.splitlines()
    assert "EDM" in first and "diffusers" in second and "as it is" in third
    assert "e-0" in first and "e-0" in second


def test_what_cannot_run_is_named(tmp_path):
    (tmp_path / "plain.py").write_text("print('no network')")
    for command, named in (
        (["nowhere.py"], "program='nowhere.py': no such"),
        (["-m", "nowhere"], "program='nowhere'"),
        (["-m", "nowhere.a"], "program='nowhere.a'"),
        (["-m", "plain.nowhere"], "program='plain.nowhere'"),
        ([], "PROGRAM"),
        (["--precision", "half", "a.py"], "precision"),
        (["--prec", "fp32", "plain.py"], "--prec"),
        (["--check", "--package", "plain.py"], "--check"),
    ):
        found = run("-m", "admfast.accelerate", *command, folder=tmp_path)
        assert found.returncode == 2 and named in found.stderr and "Traceback" not in found.stderr, command
    assert "no network" in run("-m", "admfast.accelerate", "plain.py", folder=tmp_path).stderr
