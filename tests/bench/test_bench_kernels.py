"""The kernel bench: every op is compared before it is timed, and the table's ratios are those of its rows."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from admfast.errors import Unavailable
from admfast.ops import TABLES, Implementation, conv_ref, group_norm_silu_ref, native
from bench.case import Case, Settings
from bench.command import UNFINISHED
from bench.kernels import conv, norm, providers, sampler
from bench.kernels.__main__ import GROUPS, main
from bench.kernels.report import lines_of, ours_of, plot, ratio, render
from bench.registry import NormShape
from bench.results import read_rows
from bench.runner import measure_case

CPU = Settings(torch.device("cpu"), seconds=0.001, quick=True)
needs_cpp = pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")


def rows_of(cases, *providers):
    return [measure_case(case, CPU) for case in cases(CPU) if case.provider in providers]


@needs_cpp
@pytest.mark.parametrize(
    ("cases", "own", "others"),
    [
        (norm.forward_cases, {"cpp"}, {"eager"}),
        (norm.gradient_cases, {"cpp"}, {"eager"}),
        (sampler.cases, {"cpp"}, {"eager"}),
    ],
)
def test_ours_and_the_others_agree_and_are_timed(cases, own, others):
    rows = rows_of(cases, "copy", *own, *others)
    assert {row["provider"] for row in rows} == {"copy", *own, *others}
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    for line in lines_of(rows[0]["kind"], rows):
        ours = ours_of(line)
        assert ours["provider"] in own
        assert all(ratio(line, name) == line[name]["ms"] / ours["ms"] for name in others)
        # A copy and what it is compared with move the same bytes, to one byte.
        assert abs(line["copy"]["bytes"] - ours["bytes"]) <= 1


@needs_cpp
def test_convolutions_are_measured_by_every_implementation_that_serves_them():
    rows = rows_of(conv.cases, "eager", "eager channels-first", "winograd", "packed", "library", "matmul")
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    assert {row["kind"] for row in rows} == {"conv", "conv_grad"}
    for row in rows:
        own = "winograd" if row["shape"]["kernel"] == 3 else "matmul"
        assert row["provider"] in ("eager", "eager channels-first", "packed", "library", own)
        assert (
            row["flop"] == 2 * row["shape"]["cin"] * row["shape"]["cout"] * (row["shape"]["kernel"] * 16) ** 2
        )
    assert {row["provider"] for row in rows} >= {"winograd", "packed", "library", "matmul"}
    text = render([row | {"device": "a CPU", "torch": "2", "date": "2026-01-01"} for row in rows])
    assert "gradient in the input" in text and "TFLOP/s" in text


@needs_cpp
def test_a_convolution_without_its_bias_is_not_timed(monkeypatch):
    def without_bias(direction, x, bias, residual):
        return conv_ref(x, direction.weight(), padding=direction.padding)

    table = TABLES["conv"]
    monkeypatch.setattr(
        table, "implementations", [Implementation("wrong", without_bias), *table.implementations]
    )
    rows = rows_of(conv.cases, "wrong")
    assert {row["status"] for row in rows if row["kind"] == "conv"} == {"wrong"}


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


def test_an_implementation_that_is_for_another_device_or_for_tests_is_left_out():
    # Here the interpreter makes `triton` available.
    assert providers.ours("group_norm_silu", torch.device("cpu")) in (["cpp"], [])
    assert "cpp" not in providers.ours("group_norm_silu", torch.device("cuda"))


def test_a_refusal_is_a_row_s_reason():
    def refused(settings):
        raise Unavailable("impl='x': can't")

    (case,) = providers.with_reasons(lambda _: [Case("kind", "fp32", "x", {}, refused)])(CPU)
    row = measure_case(case, CPU)
    assert (row["status"], row["reason"]) == ("none", "impl='x': can't")


def library_row(name: str, channels: int = 64) -> dict:
    measure = norm._forward(NormShape("a model", channels, 4), 2, "fp32", "plain", name)
    return measure_case(Case("group_norm_silu", "fp32", name, {}, measure), CPU)


@pytest.mark.parametrize("name", ["apex", "liger"])
def test_a_library_that_is_not_there_is_a_row_with_the_reason(name, monkeypatch):
    monkeypatch.setitem(sys.modules, {"apex": "apex", "liger": "liger_kernel"}[name], None)
    row = library_row(name)
    assert row["status"] == "none" and row["reason"].startswith(f"{name}: ")


def test_apex_is_called_as_it_is_documented(monkeypatch):
    made = []

    class GroupNorm(torch.nn.GroupNorm):
        SUPPORTED_CHANNELS = frozenset([64])

        def __init__(self, *sizes, act, **options):
            made.append(act)
            super().__init__(*sizes, **options)

        def forward(self, x):
            assert x.is_contiguous(memory_format=torch.channels_last)
            return torch.nn.functional.silu(super().forward(x))

    for module in ("apex", "apex.contrib"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    library = types.ModuleType("apex.contrib.group_norm")
    library.GroupNorm = GroupNorm
    monkeypatch.setitem(sys.modules, library.__name__, library)
    row = library_row("apex")
    assert row["status"] == "ok" and made == ["silu"], "one layer, made before the clock starts"
    row = library_row("apex", 192)
    assert row["reason"] == "apex: no kernel for 192 channels, it calls torch's"


def test_liger_is_called_as_it_is_documented(monkeypatch):
    class LigerGroupNormFunction:
        @staticmethod
        def apply(x, weight, bias, channels, groups, eps):
            assert x.is_contiguous() and channels == x.shape[1]
            return torch.nn.functional.group_norm(x, groups, weight, bias, eps)

    for module in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    library = types.ModuleType("liger_kernel.ops.group_norm")
    library.LigerGroupNormFunction = LigerGroupNormFunction
    monkeypatch.setitem(sys.modules, library.__name__, library)
    assert library_row("liger")["status"] == "ok"


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
    assert all(word in text for word in ("GroupNorm + SiLU", "share of copy"))
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
