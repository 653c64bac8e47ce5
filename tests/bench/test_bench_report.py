"""Tests that the report's tables show what the rows say, for the committed rows too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.gpu.stages import STAGES
from bench.report import faster_than, main, render, share_of_ceiling, with_ablation_times
from bench.results import Row, read_rows, row_key

RESULTS = sorted((Path(__file__).resolve().parents[2] / "bench/results").glob("*/*.jsonl"))
OK = {"status": "ok", "device": "box", "torch": "2", "ms": 2.0, "ms_q20": 1.9, "ms_q80": 2.1, "load": [0.5]}


def row(kind: str, provider: str = "p", dtype: str = "fp32", shape: Row | None = None, **more: object) -> Row:
    return OK | {"kind": kind, "dtype": dtype, "provider": provider, "shape": shape or {"n": 1}} | more


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_rows_are_read(path: Path) -> None:
    rows = read_rows(path)
    assert rows
    for one in rows:
        names = ("kind", "dtype", "provider", "shape", "device", "torch")
        assert one["key"] == row_key(*(one[name] for name in names))
        if one["status"] == "ok" and one["kind"] in ("copy", "matmul", "sampler_step", "guided_step"):
            assert one["ms"] > 0
    text = render(path.stem, rows)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| ms |" not in line]
    assert len(lines) >= len(rows)


def test_the_tables_of_a_folder_are_written_again(tmp_path: Path) -> None:
    (tmp_path / "copies.jsonl").write_text(json.dumps(row("copy", gbps=10.0, bytes=1, key="a")) + "\n")
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "copies.md").read_text()
    assert text.startswith("# Copies: box") and "| 10 |" in text


def test_table_shows_rates_ratios_and_reasons() -> None:
    rows = [
        row("matmul", "torch.mm", tflops=4.0),
        row("copy", "copy_", gbps=10.0, bytes=1),
        row("conv3x3", "F.conv2d", shape={"cin": 3}, tflops=3.0),
        row("sampler", "eager", gbps=5.0),
        row("matmul", "torch", "tf32", status="none", reason="not here"),
    ]
    text = render("ceilings", rows)
    assert "# Ceilings: box" in text
    assert "| matmul | fp32 | 4 TFLOP/s | highest |" in text
    assert "| matmul | tf32 | none | not here |" in text
    assert share_of_ceiling(rows[2], rows) == "75%" and share_of_ceiling(rows[3], rows) == "50%"
    assert share_of_ceiling(rows[0], rows) is None
    (line,) = (line for line in text.splitlines() if line.startswith("| 3 |"))
    assert "75%" in line


def test_what_is_missing_is_named_with_what_measures_it() -> None:
    rows = [row("guided_step", "admfast"), row("guided_step", "published"), row("step", "openvino")]
    lines = render("sampling", rows).splitlines()
    (guided, unguided) = (line for line in lines if line.startswith("Not measured: "))
    assert "published, compiled (`--guided-diffusion PATH --peers compiled`)" in guided
    assert "published (`" not in guided and "published (`" in unguided and "openvino" not in unguided
    assert "make gpu" in lines[-1]
    assert "make gpu" not in render("sampling", [one | {"cuda": "13.0"} for one in rows])
    assert "Not measured" not in render("kernels", [row("conv")])
    assert set(report.GPU_BENCHES) < set(STAGES)


def test_others_are_held_against_the_baselines_of_the_same_shape() -> None:
    eager = row("group_norm_silu", "eager", ms=6.0)
    elsewhere = row("group_norm_silu", "eager", shape={"n": 2}, ms=60.0)
    mine = row("group_norm_silu", "cpp")
    failed = row("group_norm_silu", "copy", status="oom", reason="no memory")
    del failed["ms"]
    rows = [elsewhere, eager, mine, failed]
    assert faster_than(mine, "eager", rows) == 3.0
    assert faster_than(eager, "eager", rows) is None and faster_than(mine, "copy", rows) is None
    assert faster_than(failed, "eager", rows) is None
    text = render("kernels", rows)
    assert "x eager" in text and "oom" in text and "no memory" in text
    step = row("guided_step", "admfast", rounds_ms=[1.0], faster_than={"published fp32": 2.5})
    assert faster_than(step, "published", [step, row("guided_step", "published")]) == 2.5


def test_a_ladder_s_gains_add_up() -> None:
    rows = [
        row("ablation_added", name, ratio=ratio, whole_ms=whole)
        for name, ratio, whole in (("plain", 2.0, 10.0), ("a", 1.5, 11.0), ("b", 1.0, 9.0))
    ]
    steps = with_ablation_times([*rows, row("ablation_added", status="oom")])
    assert [step["ms"] for step in steps] == [20.0, 15.0, 10.0, 2.0]
    assert [step.get("saves") for step in steps] == [None, 0.25, 0.25, None]
