"""The ceilings stop by budget, go on where they stopped, make failures rows, and check before they time."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import case
from bench.case import Case, Settings, Unavailable, WrongResult, checked, timed
from bench.ceilings import conv, graph, matmul, norm, sampler
from bench.ceilings.__main__ import UNFINISHED, main
from bench.ceilings.groups import GROUPS
from bench.ceilings.report import of_ceiling, render
from bench.results import ResultFile, Row, ceiling, read_rows
from bench.runner import measure_case, run, select
from bench.timing import measure, summarise

CPU = Settings(torch.device("cpu"), seconds=0.001, quick=True)


class Clock:
    """A clock that a measurement moves on by the time it pretends to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake_group(clock: Clock, kind: str, count: int, cost: float) -> Callable[[Settings], Iterator[Case]]:
    def measured(settings: Settings) -> Row:
        clock.now += cost
        return {"ms": 1.0, "ms_q20": 1.0, "ms_q80": 1.0, "tflops": 1.0}

    def cases(settings: Settings) -> Iterator[Case]:
        for n in range(count):
            yield Case(kind, "fp32", "fake", {"n": n}, measured)

    return cases


def test_each_group_keeps_to_its_share_and_the_next_run_goes_on(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "c.jsonl"
    groups = {"a": (1.0, fake_group(clock, "a", 10, 1.0)), "b": (1.0, fake_group(clock, "b", 10, 1.0))}
    first = list(run(CPU, ResultFile(path), 8.0, groups, say=lambda _: None, clock=clock))
    assert [(r.measured, r.left) for r in first] == [(4, 6), (4, 6)]
    second = list(run(CPU, ResultFile(path), 100.0, groups, say=lambda _: None, clock=clock))
    assert [(r.found, r.measured, r.left) for r in second] == [(4, 6, 0), (4, 6, 0)]
    assert [r["shape"]["n"] for r in read_rows(path) if r["kind"] == "a"] == list(range(10))
    assert all(r["device"] and r["date"] and r["group"] in "ab" for r in read_rows(path))


def test_what_a_group_leaves_over_goes_to_the_next(tmp_path: Path) -> None:
    clock = Clock()
    groups = {"a": (1.0, fake_group(clock, "a", 1, 1.0)), "b": (1.0, fake_group(clock, "b", 10, 1.0))}
    reports = list(run(CPU, ResultFile(tmp_path / "c.jsonl"), 8.0, groups, say=lambda _: None, clock=clock))
    assert [r.measured for r in reports] == [1, 7]


@pytest.mark.parametrize(("second", "kept"), [(0.01, 0.01), (0.9, 0.4)])
def test_a_disturbed_row_is_measured_again_when_asked_and_the_calmer_stays(
    tmp_path: Path, second: float, kept: float
) -> None:
    def next_wait(values: list[float], settings: Settings) -> Row:
        return {"waited": values.pop(0)}

    waits = {"calm": [0.01], "busy": [0.4, second]}

    def cases(settings: Settings) -> Iterator[Case]:
        for name, values in waits.items():
            yield Case("matmul", "fp32", "fake", {"n": name}, partial(next_wait, values))

    path, groups = tmp_path / "c.jsonl", {"a": (1.0, cases)}
    again = Settings(CPU.device, again=True)
    for settings, measured in ((CPU, 2), (CPU, 0), (again, 1)):
        reports = list(run(settings, ResultFile(path), 60.0, groups, say=lambda _: None))
        assert reports[0].measured == measured
    assert {r["shape"]["n"]: r["waited"] for r in read_rows(path)} == {"calm": 0.01, "busy": kept}


BUSY = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bench.timing import queue_seconds
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
before = queue_seconds()
spin(0.8)
print(queue_seconds() - before)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel keeps no such statistics")
def test_time_without_a_cpu_is_seen() -> None:
    root = Path(case.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", BUSY], cwd=root, capture_output=True, text=True, check=True)
    assert 0.2 < float(ran.stdout) < 0.8  # two of three thirds of 0.8 s, three processes on one CPU


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("no such unit"), "none"),
        (WrongResult("off"), "wrong"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (TypeError("a slip"), "error"),
    ],
)
def test_a_failure_is_a_row_with_its_reason(error: Exception, status: str) -> None:
    def fails(settings: Settings) -> Row:
        raise error

    row = measure_case(Case("matmul", "fp32", "torch", {"n": 1}, fails, {"models": "m"}), CPU)
    assert row["status"] == status
    assert str(error)[:20] in row["reason"]
    assert "ms" not in row and row["models"] == "m"


def test_a_lost_device_ends_the_run() -> None:
    def fails(settings: Settings) -> Row:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        measure_case(Case("matmul", "fp32", "torch", {"n": 1}, fails), CPU)


def test_checked_refuses_a_wrong_output_and_nan() -> None:
    ref = torch.randn(64, dtype=torch.float64)
    assert checked(ref.float(), ref, 1e-6) < 1e-6
    with pytest.raises(WrongResult, match="exceeds"):
        checked(ref.float() * 1.01, ref, 1e-3)
    unwritten = ref.float()
    unwritten[5] = float("nan")
    with pytest.raises(WrongResult):
        checked(unwritten, ref, 1e9)


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [c for c in matmul.cases(CPU) if c.provider == "torch.mm" and c.dtype == "fp32"]
    true_mm = torch.mm

    def off(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return true_mm(a, b, out=out).mul_(1.001)

    assert measure_case(cases[0], CPU)["status"] == "ok"
    monkeypatch.setattr(torch, "mm", off)
    row = measure_case(cases[0], CPU)
    assert row["status"] == "wrong" and "ms" not in row


def test_rates_are_counted_work_over_the_median() -> None:
    row = timed(lambda: sum(range(2000)), Settings(torch.device("cpu"), 0.01), flop=2e6, nbytes=4e6)
    assert row["tflops"] == pytest.approx(2e6 / (row["ms"] * 1e-3) / 1e12, rel=1e-4)
    assert row["gbps"] == pytest.approx(4e6 / (row["ms"] * 1e-3) / 1e9, rel=1e-4)
    assert row["ms_q20"] <= row["ms"] <= row["ms_q80"]


def test_timer() -> None:
    slow = measure(
        lambda: torch.ones(1).add_(1) and __import__("time").sleep(0.003), torch.device("cpu"), 0.0
    )
    assert 3.0 <= slow.ms < 100 and slow.samples >= 3
    found = summarise([3.0, 1.0, 2.0])
    assert (found.ms, found.samples) == (2.0, 3) and found.ms_q20 == pytest.approx(1.4)
    with pytest.raises(ValueError, match="empty"):
        summarise([])


def test_float32_mode_is_restored() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with case.float32_mode("tf32"):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    with case.float32_mode("fp32"):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_searching_leaves_cudnn_switched_on() -> None:
    before = torch.backends.cudnn.benchmark
    with conv.searching():
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.enabled
    assert torch.backends.cudnn.benchmark == before


def test_conv_cases_begin_with_the_likeliest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_fp8_cases", lambda settings: iter(()))
    monkeypatch.setattr(conv, "dtype_missing", lambda dtype, settings: "")
    cases = list(conv.cases(Settings(torch.device("cuda"))))
    first = cases[0]
    assert first.dtype == "fp16" and first.shape["layout"] == "channels_last" and first.shape["batch"] == 8
    names = {(c.kind, c.dtype, c.provider, tuple(sorted(c.shape.items()))) for c in cases}
    assert len(names) == len(cases)
    assert {c.shape["batch"] for c in cases} == {1, 8, 32}
    assert {c.dtype for c in cases} == {"fp16", "bf16", "tf32", "fp32"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norm_cases_compile_last_and_not_everything(device: str) -> None:
    cases = list(norm.cases(Settings(torch.device(device))))
    providers = [c.provider for c in cases]
    assert providers == sorted(providers)  # eager before torch.compile
    assert 0 < providers.count("torch.compile") <= providers.count("eager") / 2


def test_ceilings_need_nothing_of_the_package() -> None:
    folder = Path(case.__file__).parent
    shared = ("case", "command", "registry", "results", "runner", "timing")
    for path in [*(folder / "ceilings").glob("*.py"), *(folder / f"{name}.py" for name in shared)]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = str(name).split(".")[0]
                assert root in {"bench", "torch", "triton", "numpy", "xformers"} | sys.stdlib_module_names, (
                    path,
                    name,
                )


def test_conv_reference_sees_a_shifted_output() -> None:
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3)
    out = torch.nn.functional.conv2d(x, weight, padding=1)
    assert conv._check(out, x, weight, 1e-5) < 1e-5
    with pytest.raises(WrongResult):
        conv._check(out.roll(1, dims=2), x, weight, 1e-5)
    with pytest.raises(WrongResult):
        conv._check(torch.cat([out[:1], out[:1]]), x, weight, 1e-5)


def test_graph_needs_cuda_on_a_cpu_and_says_so() -> None:
    rows = [measure_case(c, CPU) for c in graph.cases(CPU)]
    assert [(r["kind"], r["status"]) for r in rows] == [("graph_node", "none"), ("launch", "ok")]
    assert rows[0]["reason"] == "needs cuda"
    assert rows[1]["us_per_node"] == pytest.approx(rows[1]["ms"] * 2, rel=1e-3)  # 500 nodes


def test_norm_counts_two_reads_and_a_write() -> None:
    made = norm._norm(norm.NORM_SHAPES[0], 1, "channels_last", "bf16", "eager")(CPU)
    assert made["bytes"] == 6 * 192 * 64 * 64
    assert made["rel_err"] < 2**-7


@pytest.mark.parametrize("step", [0, 3, 249])
def test_published_update_is_its_formula(step: int) -> None:
    x, gradient, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    table = sampler.tables()
    torch.manual_seed(1)
    new = sampler.published_update(x, out, gradient, step, table)
    torch.manual_seed(1)
    noise = torch.randn_like(x)
    assert checked(new, sampler.update_ref64(x, out, gradient, noise, step, table), 1e-5) < 1e-5
    other = sampler.update_ref64(x, out, 2 * gradient, noise, step, table)
    if step:  # at the last step the guidance is scaled by the tiny final variance
        with pytest.raises(WrongResult):
            checked(new, other, 1e-5)


def test_schedule_tables_are_those_of_the_published_linear_schedule() -> None:
    table = sampler.tables(1000)
    assert torch.tensor(table["max_log"][0]).exp().item() == pytest.approx(1e-4)
    assert torch.tensor(table["max_log"][-1]).exp().item() == pytest.approx(0.02)
    assert table["min_log"][0] == table["min_log"][1]
    assert (sampler.tables(250)["timestep"][:3] == [0, 4, 8]).all()


def test_traffic_counts_work_not_views() -> None:
    x = torch.zeros(4, 8)
    assert sampler.count_traffic(lambda: x.view(32)[:2]) == (0, 0)
    assert sampler.count_traffic(lambda: x + 1) == (1, 2 * 128)
    scalar = torch.zeros(1, 1).expand(4, 8)
    assert sampler.count_traffic(lambda: x * scalar) == (1, 2 * 128 + 4)
    operations, moved = sampler.count_traffic(
        lambda: sampler.published_update(x4, torch.randn(1, 6, 64, 64), x4, 3, tables)
    )
    assert 30 <= operations <= 55
    assert 45 <= moved / (x4.numel() * 4) <= 60


x4 = torch.randn(1, 3, 64, 64)
tables = sampler.tables()


def test_select() -> None:
    assert list(select(None, GROUPS)) == list(GROUPS)
    assert list(select("sampler, copy", GROUPS)) == ["copy", "sampler"]
    for bad in ("copy,fast", ""):
        with pytest.raises(ValueError, match="the groups are graph"):
            select(bad, GROUPS)
    assert sum(weight for weight, _ in GROUPS.values()) == pytest.approx(1.0)


def test_table_shows_rates_ratios_and_reasons() -> None:
    base = {
        "status": "ok",
        "device": "box",
        "torch": "2",
        "ms": 2.0,
        "ms_q20": 1.9,
        "ms_q80": 2.1,
        "load": [0.5],
    }
    rows = [
        base | {"kind": "matmul", "dtype": "fp32", "provider": "torch.mm", "shape": {"n": 64}, "tflops": 4.0},
        base
        | {
            "kind": "copy",
            "dtype": "fp32",
            "provider": "copy_",
            "shape": {"mib": 1},
            "gbps": 10.0,
            "bytes": 1,
        },
        base
        | {"kind": "conv3x3", "dtype": "fp32", "provider": "F.conv2d", "shape": {"cin": 3}, "tflops": 3.0},
        base | {"kind": "sampler", "dtype": "fp32", "provider": "eager", "shape": {"side": 8}, "gbps": 5.0},
        base
        | {
            "kind": "matmul",
            "dtype": "tf32",
            "provider": "torch",
            "shape": {},
            "status": "none",
            "reason": "not here",
        },
    ]
    text = render(rows)
    assert "# Ceilings: box" in text
    assert "| matmul | fp32 | 4 TFLOP/s | highest |" in text
    assert "| matmul | tf32 | none | not here |" in text
    assert of_ceiling(rows[2], rows) == "75 %" and of_ceiling(rows[3], rows) == "50 %"
    assert of_ceiling(rows[0], rows) is None
    for line in text.splitlines():
        if line.startswith("| 3 |"):
            assert "75 %" in line


def test_a_quick_run_of_two_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--quick", "--only", "copy,sampler", "--out", str(tmp_path)]
    assert main(flags) == 0
    rows = read_rows(tmp_path / "ceilings.jsonl")
    assert {r["kind"]: r["status"] for r in rows} == {"copy": "ok", "sampler": "ok"}
    assert ceiling(tmp_path, "copy") > 0  # type: ignore[operator]
    assert "## Published sampler update" in (tmp_path / "ceilings.md").read_text()
    size = (tmp_path / "ceilings.jsonl").stat().st_size
    assert main(flags) == 0
    assert (tmp_path / "ceilings.jsonl").stat().st_size == size
    assert "2 rows, 0 left" in capsys.readouterr().out


def test_an_exhausted_budget_is_told_by_the_exit_status(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--quick", "--only", "sampler", "--out", str(tmp_path)]
    assert main([*flags, "--budget", "1e-9"]) == UNFINISHED
    assert read_rows(tmp_path / "ceilings.jsonl") == []
    assert main(flags) == 0


@pytest.mark.parametrize("flags", [["--only", "speed"], ["--device", "tpu"], ["--budget", "0"]])
def test_a_wrong_flag_is_one_line_and_status_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
