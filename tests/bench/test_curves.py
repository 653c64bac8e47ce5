"""Tests of the curves of quality over steps: which rows become points of which line."""

from __future__ import annotations

import json
from pathlib import Path

from bench.curves import KINDS, MEASURES, read_points

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "digits32"


def test_rows_of_several_files_are_points_of_one_line(tmp_path):
    names = {"unipc 10 log-snr, unguided": 1.0, "unipc 5 log-snr, unguided": 3.0, "ddim 5, guidance 2": 5.0}
    for file, more in (("a", 0.0), ("b", 0.5)):
        rows = {name: dict.fromkeys(MEASURES, value + more) for name, value in names.items()}
        rows |= {
            "two halves of the real digits": dict.fromkeys(MEASURES, 0.0),
            "ddim 9, unguided": "too slow",
        }
        (tmp_path / file).write_text(json.dumps({"rows": rows}))
    lines = read_points([tmp_path / "a", tmp_path / "b"])
    assert set(lines) == {("unipc log-snr", "unguided"), ("ddim", "guidance 2")}
    for measure in MEASURES:
        assert lines["unipc log-snr", "unguided"][measure] == {10: [1.0, 1.5], 5: [3.0, 3.5]}
        assert lines["ddim", "guidance 2"][measure] == {5: [5.0, 5.5]}


def test_every_committed_row_of_the_solvers_is_a_point():
    path = RESULTS / "quality_solvers.json"
    rows = json.loads(path.read_text())["rows"]
    lines = read_points([path])
    assert sum(len(points["frechet"]) for points in lines.values()) == len(rows) - 1  # the real digits
    assert {kind for _, kind in lines} == set(KINDS)
