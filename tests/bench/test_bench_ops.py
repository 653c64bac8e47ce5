"""Tests of the benches of ops: outputs are compared before timing, and rows have the right counts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from admfast.ops import TABLES, Implementation, conv_ref, group_norm_silu_ref, native
from bench import measure
from bench.measure import Case, Settings, WrongResult, check_error, measure_call, numerics, quantiles
from bench.ops import attention, matmul_and_conv, memory, norm, other_ops, providers, update
from bench.results import Row
from bench.runner import measure_case

CPU = Settings(torch.device("cpu"), seconds=0.001, quick=True)
CUDA = Settings(torch.device("cuda"))
needs_cpp = pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")

BUSY = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bench.measure import queue_seconds
def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        spin(1.0)
        os._exit(0)
before, begin = queue_seconds(), time.monotonic()
spin(0.8)
print(queue_seconds() - before, time.monotonic() - begin)
for child in children:
    os.waitpid(child, 0)
"""


def rows_of(cases: Callable[[Settings], Iterable[Case]], *names: str) -> list[Row]:
    chosen = [case for case in cases(CPU) if not names or case.provider in names]
    fields = [{"kind": c.kind, "dtype": c.dtype, "provider": c.provider, "shape": c.shape} for c in chosen]
    return [row | measure_case(case, CPU) for row, case in zip(fields, chosen, strict=True)]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel keeps no such statistics")
def test_time_without_a_cpu_is_seen() -> None:
    root = Path(measure.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", BUSY], cwd=root, capture_output=True, text=True, check=True)
    waited, elapsed = map(float, ran.stdout.split())
    assert 0.2 < waited < elapsed  # three processes share one CPU: it waits for two thirds of the time


def test_checked_refuses_a_wrong_output_and_nan() -> None:
    ref = torch.randn(64, dtype=torch.float64)
    assert check_error(ref.float(), ref, 1e-6) < 1e-6
    with pytest.raises(WrongResult):
        check_error(ref.float() * 1.01, ref, 1e-3)
    unwritten = ref.float()
    unwritten[5] = float("nan")
    with pytest.raises(WrongResult):
        check_error(unwritten, ref, 1e9)


def test_rates_are_counted_work_over_the_median() -> None:
    row = measure_call(lambda: sum(range(2000)), Settings(torch.device("cpu"), 0.01), flop=2e6, nbytes=4e6)
    assert row["tflops"] == pytest.approx(2e6 / (row["ms"] * 1e-3) / 1e12, rel=1e-4)
    assert row["gbps"] == pytest.approx(4e6 / (row["ms"] * 1e-3) / 1e9, rel=1e-4)
    assert row["ms_q20"] <= row["ms"] <= row["ms_q80"] and row["samples"] >= 3


def test_quantiles() -> None:
    found = quantiles([3.0, 1.0, 2.0])
    assert found["ms"] == 2.0 and found["ms_q20"] == pytest.approx(1.4)
    with pytest.raises(ValueError, match="empty"):
        quantiles([])


def test_numerics_are_restored() -> None:
    def now() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.enabled

    before = now()
    for dtype, precision in (("tf32", "high"), ("fp32", "highest")):
        with numerics(dtype):
            assert now() == (precision, dtype == "tf32", True, before[3])
    assert now() == before


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = [
        c for c in matmul_and_conv.matmul_ceilings(CPU) if c.provider == "torch.mm" and c.dtype == "fp32"
    ]
    true_mm = torch.mm
    assert measure_case(case, CPU)["status"] == "ok"
    monkeypatch.setattr(torch, "mm", lambda a, b: true_mm(a, b).mul_(1.001))
    row = measure_case(case, CPU)
    assert row["status"] == "wrong" and "ms" not in row


def test_conv_cases_begin_with_the_likeliest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_and_conv, "_fp8_ceilings", lambda settings: iter(()))
    monkeypatch.setattr(matmul_and_conv, "dtype_missing", lambda dtype, settings: "")
    cases = list(matmul_and_conv.conv_ceilings(CUDA))
    first = cases[0]
    assert first.dtype == "fp16" and first.shape["layout"] == "channels_last" and first.shape["batch"] == 8
    names = {(c.kind, c.dtype, c.provider, tuple(sorted(c.shape.items()))) for c in cases}
    assert len(names) == len(cases)
    assert {c.shape["batch"] for c in cases} == {1, 8, 32}
    assert {c.dtype for c in cases} == {"fp16", "bf16", "tf32", "fp32"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norm_cases_compile_last_and_not_everything(device: str) -> None:
    names = [case.provider for case in norm.ceilings(Settings(torch.device(device)))]
    assert names == sorted(names)  # eager before torch.compile
    assert 0 < names.count("torch.compile") <= names.count("eager") / 2


def test_ceilings_need_nothing_of_the_package() -> None:
    folder = Path(measure.__file__).parent
    shared = ("ceilings", "command", "measure", "report", "results", "runner", "shapes")
    for path in [*(folder / "ops").glob("*.py"), *(folder / f"{name}.py" for name in shared)]:
        # Benches of the package's own ops import the package inside functions only.
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {str(name).split(".")[0] for name in names}
            assert roots <= {"bench", "torch", "numpy"} | sys.stdlib_module_names, (path, roots)


def test_watching_a_bench_needs_no_torch() -> None:
    code = "import bench.ceilings, bench.kernels, bench.sampling.__main__, sys; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(measure.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "False"


def test_conv_reference_sees_a_shifted_output() -> None:
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3)
    out = torch.nn.functional.conv2d(x, weight, padding=1)
    assert matmul_and_conv.compare(out, x, weight, None, 1e-5) < 1e-5
    for wrong in (out.roll(1, dims=2), torch.cat([out[:1], out[:1]])):
        with pytest.raises(WrongResult):
            matmul_and_conv.compare(wrong, x, weight, None, 1e-5)


def test_graph_needs_cuda_on_a_cpu_and_says_so() -> None:
    rows = rows_of(memory.graphs)
    assert [(r["kind"], r["status"]) for r in rows] == [("graph_node", "none"), ("launch", "ok")]
    assert rows[0]["reason"] == "needs cuda"
    assert rows[1]["us_per_node"] == pytest.approx(rows[1]["ms"] * 2, rel=1e-3)  # 500 nodes


def test_a_copy_that_differs_is_wrong() -> None:
    assert memory.check_equal(torch.ones(3), torch.ones(3)) == 0
    with pytest.raises(WrongResult):
        memory.check_equal(torch.ones(3), torch.tensor([1.0, 1.0, float("nan")]))


def test_norm_ceilings_count_two_reads_and_a_write() -> None:
    eager = rows_of(norm.ceilings, "eager")
    assert {row["shape"]["layout"] for row in eager} == {"channels_last", "channels_first"}
    for row in eager:
        assert row["bytes"] == 6 * 768 * 8 * 8 and row["output_layout"]
        assert row["rel_err"] < 2**-7


@pytest.mark.parametrize("step", [0, 3, 249])
def test_published_update_is_its_formula(step: int) -> None:
    x, gradient, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    table = update.tables()
    torch.manual_seed(1)
    new = update.published_update(x, out, gradient, step, table)
    torch.manual_seed(1)
    wide = [t.double() for t in (x, out, gradient, torch.randn_like(x))]
    c = update.coefficients(step, table)
    assert check_error(new, update.formula(*wide, c), 1e-5) < 1e-5
    if step:  # at step 0, the last of a run, the tiny variance makes the guidance negligible
        wide[2] *= 2
        with pytest.raises(WrongResult):
            check_error(new, update.formula(*wide, c), 1e-5)


def test_schedule_tables_are_those_of_the_published_linear_schedule() -> None:
    table = update.tables(1000)
    assert torch.tensor(table["max_log"][0]).exp().item() == pytest.approx(1e-4)
    assert torch.tensor(table["max_log"][-1]).exp().item() == pytest.approx(0.02)
    assert table["min_log"][0] == table["min_log"][1]
    assert (update.tables(250)["timestep"][:3] == [0, 4, 8]).all()


def test_the_row_is_the_published_update_s() -> None:
    table, row = update.tables(), update.guided_row()
    assert row.l0 + row.l1 == pytest.approx(float(table["max_log"][update.MEASURED_STEP]))
    assert row.l0 - row.l1 == pytest.approx(float(table["min_log"][update.MEASURED_STEP]))


def test_traffic_counts_work_not_views() -> None:
    x = torch.zeros(4, 8)
    assert update.count_traffic(lambda: x.view(32)[:2]) == (0, 0)
    assert update.count_traffic(lambda: x + 1) == (1, 2 * 128)
    scalar = torch.zeros(1, 1).expand(4, 8)
    assert update.count_traffic(lambda: x * scalar) == (1, 2 * 128 + 4)
    image, out, table = torch.randn(1, 3, 64, 64), torch.randn(1, 6, 64, 64), update.tables()
    operations, moved = update.count_traffic(lambda: update.published_update(image, out, image, 3, table))
    assert 30 <= operations <= 55
    assert 45 <= moved / image.nbytes <= 60


@needs_cpp
@pytest.mark.parametrize("cases", [norm.kernels, norm.gradient_kernels, update.kernels])
def test_ours_and_the_others_agree_and_are_timed(cases: Callable[[Settings], Iterable[Case]]) -> None:
    rows = rows_of(cases, "copy", "cpp", "eager")
    assert {row["provider"] for row in rows} == {"copy", "cpp", "eager"}
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    moved: dict[str, set[int]] = {}
    for row in rows:
        moved.setdefault(f"{row['shape']} {row['dtype']}", set()).add(row["bytes"])
    # A copy moves as many bytes as the op it is compared with, to within one byte.
    assert all(max(sizes) - min(sizes) <= 1 for sizes in moved.values())


@pytest.mark.slow
@needs_cpp
def test_convolutions_are_measured_by_every_implementation_that_serves_them() -> None:
    rows = rows_of(
        matmul_and_conv.conv_kernels,
        "eager",
        "eager channels-first",
        "winograd",
        "packed",
        "library",
        "matmul",
    )
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    assert {row["kind"] for row in rows} == {"conv", "conv_grad"}
    for row in rows:
        own = "winograd" if row["shape"]["kernel"] == 3 else "matmul"
        assert row["provider"] in ("eager", "eager channels-first", "packed", "library", own)
        k, cin, cout = (row["shape"][name] for name in ("kernel", "cin", "cout"))
        assert row["flop"] == 2 * cin * cout * (k * 16) ** 2
    assert {row["provider"] for row in rows} >= {"winograd", "packed", "library", "matmul"}


def test_attention_is_measured_forward_and_backward() -> None:
    rows = rows_of(attention.kernels)
    assert {row["kind"] for row in rows} == {"attention", "attention_grad"}
    assert all(row["status"] in ("ok", "none") for row in rows), rows
    assert {row["status"] for row in rows if row["provider"] == "reference"} == {"ok"}


@pytest.mark.slow
def test_an_op_without_a_bench_of_its_own_is_measured_by_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_ops, "MEASURED_ELSEWHERE", other_ops.MEASURED_ELSEWHERE - {"attention"})
    rows = rows_of(other_ops.kernels, "copy", "eager", "sdpa")
    assert {row["kind"] for row in rows} >= {"attention", "attention_grad"}
    assert {row["provider"] for row in rows} == {"copy", "eager", "sdpa"}
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows), rows
    wrong_first(monkeypatch, "attention", lambda qkv, num_heads, **_: qkv[..., : qkv.shape[-1] // 3])
    assert {row["status"] for row in rows_of(other_ops.kernels, "wrong")} == {"wrong"}


def wrong_first(monkeypatch: pytest.MonkeyPatch, op: str, forward: Callable[..., object]) -> None:
    table = TABLES[op]
    monkeypatch.setattr(table, "implementations", [Implementation("wrong", forward), *table.implementations])


def test_a_convolution_without_its_bias_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bias(direction, x, bias, residual):
        return conv_ref(x, direction.weight(), padding=direction.padding)

    wrong_first(monkeypatch, "conv", without_bias)
    rows = rows_of(matmul_and_conv.conv_kernels, "wrong")
    assert {row["status"] for row in rows if row["kind"] == "conv"} == {"wrong"}


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scale(x, weight, bias, *args, scale=None, shift=None, **options):
        return group_norm_silu_ref(x, weight, bias, *args, **options)

    wrong_first(monkeypatch, "group_norm_silu", without_scale)
    rows = {row["shape"]["variant"]: row for row in rows_of(norm.kernels, "wrong")}
    assert rows["plain"]["status"] == "ok"
    assert rows["adaptive"]["status"] == "wrong" and "ms" not in rows["adaptive"]


def test_an_implementation_that_is_for_another_device_or_for_tests_is_left_out() -> None:
    # In tests the interpreter makes `triton` available on the CPU.
    assert providers.our_implementations("group_norm_silu", torch.device("cpu")) in (["cpp"], [])
    assert "cpp" not in providers.our_implementations("group_norm_silu", torch.device("cuda"))
