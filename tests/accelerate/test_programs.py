"""Programs of others, from a folder of checkouts that the user names, give what they gave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.programs import ALLOWED, PROGRAMS, PROGRAMS_PATH, main, measured, ways_of

FOLDER = os.environ.get(PROGRAMS_PATH, "")
PARTS = [(name, part) for name, program in PROGRAMS.items() for part in program.parts]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "part"), PARTS)
def test_a_programs_core_gives_what_it_gave(program, part):
    roots = [Path(FOLDER) / root for root in PROGRAMS[program].roots]
    if not FOLDER or not all(root.is_dir() for root in roots):
        pytest.skip(f"{PROGRAMS_PATH} names no folder with {', '.join(PROGRAMS[program].roots)}")
    found = measured(FOLDER, program, part, 1, 1)
    assert list(found["error"]) == list(ways_of(program, part)[1:])
    for way, error in found["error"].items():
        assert error <= ALLOWED * found["nudge"], way
    # DDNM's network looks into a configuration at every call.
    assert ("block by block" if program == "DDNM" else "whole") in found["walk"]


def test_a_folder_without_programs_is_refused(tmp_path, capfd):
    status = main(["--programs", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert status == 2 and "programs=" in capfd.readouterr().err
