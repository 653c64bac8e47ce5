"""The kernel bench: every op is compared before it is timed, and the table's ratios are those of its rows."""

from __future__ import annotations

import pytest
import torch

from admfast.ops import TABLES, Implementation, group_norm_silu_ref, native
from bench.case import Settings
from bench.command import UNFINISHED
from bench.kernels import norm, sampler
from bench.kernels.__main__ import GROUPS, main
from bench.kernels.report import lines_of, ours_of, plot, ratio, render
from bench.results import read_rows
from bench.runner import measure_case

CPU = Settings(torch.device("cpu"), seconds=0.001, quick=True)
needs_cpp = pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")


def rows_of(cases, *providers):
    return [measure_case(case, CPU) for case in cases(CPU) if case.provider in providers]


@needs_cpp
@pytest.mark.parametrize("cases", [norm.forward_cases, norm.gradient_cases, sampler.cases])
def test_ours_and_eager_agree_and_are_timed(cases):
    rows = rows_of(cases, "eager", "cpp", "copy")
    assert {row["provider"] for row in rows} == {"eager", "cpp", "copy"}
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    for line in lines_of(rows[0]["kind"], rows):
        assert ours_of(line)["provider"] == "cpp"
        assert ratio(line, "eager") == line["eager"]["ms"] / line["cpp"]["ms"]
        # A copy and what it is compared with move the same bytes, to one byte.
        assert abs(line["copy"]["bytes"] - line["cpp"]["bytes"]) <= 1


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    def without_scale(x, weight, bias, *args, scale=None, shift=None, **options):
        return group_norm_silu_ref(x, weight, bias, *args, **options)

    table = TABLES["group_norm_silu"]
    monkeypatch.setattr(
        table, "implementations", [Implementation("wrong", without_scale), *table.implementations]
    )
    rows = {row["shape"]["variant"]: row for row in rows_of(norm.forward_cases, "wrong")}
    assert rows["plain"]["status"] == "ok"
    assert rows["adaptive"]["status"] == "wrong" and "ms" not in rows["adaptive"]


def test_the_row_is_the_published_update_s():
    table = sampler.tables()
    row = sampler.guided_row()
    assert row.l0 + row.l1 == pytest.approx(float(table["max_log"][sampler.STEP]))
    assert row.l0 - row.l1 == pytest.approx(float(table["min_log"][sampler.STEP]))


def test_the_program_writes_rows_and_table_and_goes_on(tmp_path, capsys):
    flags = ["--device", "cpu", "--quick", "--only", "norm", "--out", str(tmp_path)]
    assert main([*flags, "--budget", "1e-9"]) == UNFINISHED
    assert main(flags) == 0
    rows = read_rows(tmp_path / "kernels.jsonl")
    assert rows and all(row["revision"] and row["device"] for row in rows)
    text = (tmp_path / "kernels.md").read_text()
    assert "GroupNorm + SiLU" in text and "share of copy" in text
    assert main(["--only", "nothing"]) == 2 and "sampler" in capsys.readouterr().err
    assert sum(share for share, _ in GROUPS.values()) == pytest.approx(1)


def test_a_plot_is_made_where_it_can_be(tmp_path, capsys):
    rows = [{**row, "device": "a CPU"} for row in rows_of(norm.forward_cases, "eager", "copy")]
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    plot(rows, tmp_path)
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_what_could_not_be_measured_says_so_in_the_table():
    rows = rows_of(norm.forward_cases, "eager", "copy")
    rows[0] |= {"status": "oom", "reason": "no memory"}
    for row in rows:
        row |= {"device": "a CPU", "torch": "2", "date": "2026-01-01"}
    assert "oom" in render(rows)
