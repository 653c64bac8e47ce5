"""Tests that other programs, in a folder of checkouts that the user names, keep their results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.programs import MAX_ERROR_RATIO, PROGRAMS, PROGRAMS_PATH, main, measure_part, variants_of
from tests.parity.golden import compare

ROOT = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get(PROGRAMS_PATH, "")
PARTS = [(name, part) for name, program in PROGRAMS.items() for part in program.parts]


def there(program: str) -> None:
    """Skip the test if the folder lacks the program's checkouts."""
    roots = [Path(FOLDER) / root for root in PROGRAMS[program].roots]
    if not FOLDER or not all(root.is_dir() for root in roots):
        pytest.skip(f"{PROGRAMS_PATH} names no folder with {', '.join(PROGRAMS[program].roots)}")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "part"), PARTS)
def test_a_programs_core_gives_what_it_gave(program, part):
    there(program)
    found = measure_part(FOLDER, program, part, 1, 1)
    assert list(found["error"]) == list(variants_of(program, part)[1:])
    for way, error in found["error"].items():
        assert error <= MAX_ERROR_RATIO * found["nudge"], way
    assert PROGRAMS[program].runs in found["runs"]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "part"), PARTS)
def test_a_programs_core_runs_through_the_runner(program, part, tmp_path):
    """Run the core as a separate program, whose classes the runner watches."""
    there(program)
    before = {"as it is": [], "through the runner": ["-m", "admfast.accelerate"]}
    found = {}
    for way, runner in before.items():
        command = [sys.executable, *runner, "-m", "bench.program_cores", FOLDER, program, part]
        done = subprocess.run(
            [*command, str(tmp_path / way)], cwd=ROOT, capture_output=True, text=True,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found[way] = torch.load(tmp_path / way)
    assert PROGRAMS[program].runs in done.stderr
    nudge = measure_part(FOLDER, program, part, 1, 1)["nudge"]
    compare(found["through the runner"], found["as it is"], MAX_ERROR_RATIO * nudge, part)


def test_a_folder_without_programs_is_refused(tmp_path, capfd):
    status = main(["--programs", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert status == 2 and "programs=" in capfd.readouterr().err
