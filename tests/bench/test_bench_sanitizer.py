"""Tests of the compute-sanitizer step with a fake program: passes, failures, and runs that are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.gpu import sanitizer

AGREE = "48 launches of 24 kernels agree with the reference"
CLEAN = "========= COMPUTE-SANITIZER\n" + AGREE + "\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
REFUSED = (
    "========= COMPUTE-SANITIZER\n"
    '========= Error: Device not supported. Please refer to the "Supported Devices" section\n'
    "========= \n" + AGREE + "\n========= ERROR SUMMARY: 1 error\n"
)
OUT_OF_BOUNDS = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at _group_norm_silu_fwd_kernel\n" + AGREE + "\n========= ERROR SUMMARY: 1 error\n"
)
RACE = "========= Error: Race reported between Write access and Read access\n" + AGREE + "\n" + RACES


@pytest.mark.parametrize(
    ("code", "output", "passes", "says"),
    [
        (0, CLEAN, True, f"nothing found: {AGREE}"),
        (0, AGREE + "\n" + RACES.format(0, 0), True, "nothing found"),
        (86, REFUSED, True, "not run: Error: Device not supported"),
        (1, "========= Error: Target application terminated before first instrumented API call", True, "not"),
        (86, OUT_OF_BOUNDS, False, "Invalid __"),
        (86, REFUSED + OUT_OF_BOUNDS, False, "Invalid __"),
        (86, RACE.format(1, 1), False, "Race reported"),
        (0, RACE.format(1, 1), False, "Race reported"),
        (1, CLEAN, False, "exit status 1"),
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", False, "no sign"),
        (0, AGREE + "\n", False, "no sign"),
        (0, "", False, "no sign"),
        (-11, "", False, "exit status -11"),
    ],
)
def test_what_passes(code, output, passes, says):
    passed, why = sanitizer.verdict(code, output)
    assert passed is passes and says in why


def stand_in(folder: Path, output: str, code: int) -> None:
    """Write a fake compute-sanitizer, which prints its arguments and `output` and exits with `code`."""
    path = folder / "compute-sanitizer"
    called = "print(sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"
    says = f"print({output!r}, end='')"
    path.write_text(f"#!{sys.executable}\nimport os, sys\n{called}\n{says}\nsys.exit({code})\n")
    path.chmod(0o755)


def test_the_program_is_run_under_the_tool(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    stand_in(tmp_path, CLEAN, 0)
    assert sanitizer.main(["racecheck", "some.module", "--device", "cuda"]) == 0
    first, *_, last = capfd.readouterr().out.splitlines()
    assert first.startswith("['--tool', 'racecheck', '--error-exitcode', '86',") and first.endswith("] 1")
    assert "'-m', 'some.module', '--device', 'cuda'" in first and last == f"racecheck: nothing found: {AGREE}"
    stand_in(tmp_path, OUT_OF_BOUNDS, 86)
    assert sanitizer.main(["memcheck", "some.module"]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("memcheck: Invalid __")


def test_without_the_program_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert sanitizer.main(["memcheck", "some.module"]) == 0
    assert capsys.readouterr().out == "memcheck: not run: compute-sanitizer is not installed\n"


def test_it_is_found_in_a_toolkit(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin", CLEAN, 0)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.program() == str(tmp_path / "bin" / "compute-sanitizer")
