"""Tests of result files: rows survive an interrupt, aren't measured twice, and give the ceilings."""

import json
from pathlib import Path

import pytest
import torch

from bench.results import (
    ResultFile,
    Row,
    ceiling,
    conditions,
    environment,
    markdown_table,
    read_rows,
    read_smi,
    row_key,
    was_disturbed,
)


def row(key: str, **fields: object) -> Row:
    return {"key": key, "kind": "matmul", "dtype": "bf16", "status": "ok", "device": "d"} | fields


def test_rows_are_on_the_disk_one_by_one(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "deep" / "r.jsonl")
    file.append(row("a", tflops=1.0))
    assert [r["key"] for r in read_rows(file.path)] == ["a"]
    file.append(row("b"))
    assert file.path.read_text().count("\n") == 2


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "r.jsonl")
    file.append(row("a", status="error"))
    file.append(row("b", waited=0.2))
    file.append(row("a", status="ok"))
    again = ResultFile(file.path)
    assert [(r["key"], r["status"]) for r in again.rows] == [("a", "ok"), ("b", "ok")]
    assert [was_disturbed(r) for r in again.rows] == [False, True]


def test_a_half_written_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResultFile(path).append(row("a"))
    with path.open("a") as out:
        out.write('{"key": "b", "kind": "mat')
    file = ResultFile(path)
    assert set(file.by_key) == {"a"}
    file.append(row("c"))
    assert [r["key"] for r in read_rows(path)] == ["a", "c"]
    assert json.loads(path.read_text().splitlines()[-1])["key"] == "c"


def test_key_tells_apart_what_must_be_measured_apart() -> None:
    base = ("conv3x3", "bf16", "F.conv2d", {"batch": 1, "cin": 2}, "gpu", "2")
    key = row_key(*base)
    assert key == row_key("conv3x3", "bf16", "F.conv2d", {"cin": 2, "batch": 1}, "gpu", "2")
    for place, other in enumerate(("conv1x1", "fp16", "torch.mm", {"batch": 8, "cin": 2}, "cpu", "3")):
        changed = [*base[:place], other, *base[place + 1 :]]
        assert row_key(*changed) != key  # type: ignore[arg-type]


def test_ceiling_takes_the_best_product_and_the_largest_copy(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "ceilings.jsonl")
    file.append(row("a", tflops=5.0))
    file.append(row("b", tflops=7.0))
    file.append(row("c", tflops=70.0, status="wrong"))
    file.append(row("d", tflops=9.0, dtype="fp8"))
    file.append(row("e", kind="copy", dtype="fp32", gbps=900.0, bytes=10))
    file.append(row("f", kind="copy", dtype="fp32", gbps=300.0, bytes=10**9))
    file.append(row("g", kind="graph_node", dtype="fp32", us_per_node=2.0))
    file.append(row("h", kind="graph_node", dtype="fp32", us_per_node=1.5))
    rows = read_rows(file.path)
    assert ceiling(rows, "matmul", "bf16") == 7.0
    assert ceiling(rows, "matmul") == 9.0
    assert ceiling(rows, "copy") == 300.0  # the small copy stayed in a cache
    assert ceiling(rows, "graph_node") == 1.5
    assert ceiling(rows, "matmul", "tf32") is None
    assert ceiling(read_rows(tmp_path / "absent.jsonl"), "matmul") is None
    with pytest.raises(ValueError, match="kind='speed'"):
        ceiling(rows, "speed")
    with pytest.raises(ValueError, match="rows:"):
        ceiling([*rows, row("i", tflops=7.0, device="two")], "matmul", "bf16")


def test_table() -> None:
    text = markdown_table(("a", "b"), [(None, 1234.5), ("x|y\nz", 0.012345)])
    assert text.splitlines() == ["| a | b |", "|---|---|", "| - | 1234 |", "| x\\|y z | 0.0123 |"]
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        markdown_table(("a", "b"), [("x",)])


def test_environment_names_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"device", "triton", "cuda", "revision", "dirty", "isa"} <= set(found)
    assert found["device"] == environment(torch.device("cpu"))["device"]


def test_power_is_read_from_nvidia_smi_and_what_it_lacks_is_left_out() -> None:
    assert read_smi("312.4, 1980, 2619, 41\n") == {
        "power_w": 312.4,
        "sm_mhz": 1980.0,
        "mem_mhz": 2619.0,
        "celsius": 41.0,
    }
    assert read_smi("[N/A], 1980, 2619, 41") == {"sm_mhz": 1980.0, "mem_mhz": 2619.0, "celsius": 41.0}
    assert {"date", "load"} == set(conditions(torch.device("cpu")))
