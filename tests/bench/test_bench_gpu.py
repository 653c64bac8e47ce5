"""The stages of `bench.gpu`: shares, stops, resuming and the exit status, tried with small fake stages."""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.command import interrupt_by_signals
from bench.gpu import __main__ as program
from bench.gpu import process, runner, stages
from bench.gpu.process import run_step
from bench.gpu.runner import exit_status, run_stages
from bench.gpu.stages import Plan, Stage, Step, choose


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", text)


def fake(name: str, *texts: str, weight: float = 1.0, tests: bool = False) -> Stage:
    """A stage whose steps are these scripts."""
    steps = [Step(f"{name} {i}", script(text), tests=tests) for i, text in enumerate(texts)]
    return Stage(name, weight, lambda plan, seconds: steps)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a step would find this checkout's benches
    root = tmp_path / "root"
    (root / "bench").mkdir(parents=True)
    return Plan(tmp_path / "out", "cpu", root)


def quiet(line: str) -> None:
    pass


def test_status_by_exit_code_and_the_last_line_is_the_note(plan: Plan) -> None:
    stages = [
        fake("good", "print('one'); print('two')"),
        fake("bad", "import sys; print('why'); sys.exit(1)"),
        fake("half", "import sys; sys.exit(3)"),
    ]
    said: list[str] = []
    entries = run_stages(plan, stages, 30, say=said.append)
    assert {name: e["status"] for name, e in entries.items()} == {
        "good": "passed",
        "bad": "failed",
        "half": "unfinished",
    }
    assert entries["good"]["note"] == "two"
    assert exit_status(entries) == 1
    assert any("| why" in line for line in said)  # the end of a failed stage's output is shown
    on_disk = json.loads((plan.out / "gpu.json").read_text())
    assert on_disk["stages"] == entries and on_disk["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [
        (0, "3 passed, 1 skipped in 2.00s", "passed"),
        (0, "4 skipped, 9 deselected in 1.00s", "no tests"),
        (5, "9 deselected in 0.10s", "no tests"),
        (1, "1 failed, 3 passed in 2.00s", "failed"),
        (2, "1 error in 2.00s", "failed"),
        (None, "", "stopped"),
    ],
)
def test_the_tests_stage_passes_only_if_tests_ran_and_passed(
    plan: Plan, code: int | None, last: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(step: Step, plan: Plan, seconds: float, log: Path) -> dict[str, object]:
        log.write_text(last)
        return {"exit": code, "seconds": 1.0, "last": last, "log_end": len(last)}

    monkeypatch.setattr(runner, "run_step", ran)
    assert run_stages(plan, [fake("tests", "", tests=True)], 30, say=quiet)["tests"]["status"] == status


def test_a_stage_is_stopped_at_its_share_and_the_next_still_runs(plan: Plan) -> None:
    begin = time.monotonic()
    stages = [
        fake("slow", "import time; print('begun', flush=True); time.sleep(60)"),
        fake("after", "print('ran')"),
    ]
    entries = run_stages(plan, stages, 3.0, say=quiet)
    assert time.monotonic() - begin < 20
    assert entries["slow"]["status"] == "stopped" and 1.0 <= entries["slow"]["seconds"] < 10
    assert entries["after"]["status"] == "passed"
    assert exit_status(entries) == 3


def test_a_stop_is_an_interrupt_first_so_that_results_can_be_written(plan: Plan, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    text = f"""
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(kept)!r}, "w")
"""
    plan.out.mkdir()
    result = run_step(Step("s", script(text)), plan, 2.0, plan.out / "log")
    assert result["exit"] is None and kept.exists()


def test_what_a_stage_started_ends_with_it(plan: Plan, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(child.pid))
"""
    plan.out.mkdir()
    assert run_step(Step("s", script(text)), plan, 20.0, plan.out / "log")["exit"] == 0
    status = Path(f"/proc/{pid.read_text()}/stat")
    deadline = time.monotonic() + 5
    while (
        status.exists()
        and status.read_text().rpartition(")")[2].split()[0] != "Z"
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def counted(tmp_path: Path) -> tuple[str, Callable[[], int]]:
    marks = tmp_path / "marks"
    return f"open({str(marks)!r}, 'a').write('x')", lambda: len(marks.read_text()) if marks.exists() else 0


def test_a_finished_stage_is_skipped_and_the_others_go_on(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    flag = tmp_path / "flag"
    second = f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    stages = [fake("one", mark), fake("two", second)]
    assert exit_status(run_stages(plan, stages, 20, say=quiet)) == 3
    flag.touch()
    assert exit_status(run_stages(plan, stages, 20, say=quiet)) == 0
    assert count() == 1


def test_a_changed_source_is_run_again(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    for text in ("a = 1", "a = 1", "a = 2"):
        (plan.root / "bench" / "x.py").write_text(text)
        run_stages(plan, [fake("one", mark)], 20, say=quiet)
    assert count() == 2


def test_a_build_carried_to_another_machine_is_made_again(plan: Plan) -> None:
    info = plan.root / "admfast" / "_build_info.json"
    info.parent.mkdir()
    info.write_text('{"built": "cuda"}')
    entry = {"status": "passed"} | stages.build_info(plan)
    assert entry["build_info"] == {"built": "cuda"} and entry["note"] == "built cuda"
    assert stages.build_stands(plan, entry)
    info.unlink()
    assert not stages.build_stands(plan, entry)
    assert not stages.build_stands(plan, {"status": "passed"})


def test_a_bench_is_told_device_folder_and_a_budget_inside_its_share(plan: Plan) -> None:
    (plan.root / "bench" / "sampling.py").write_text("import sys; print(*sys.argv[1:])")
    note = run_stages(plan, choose("peers"), 40, say=quiet)["peers"]["note"].split()
    assert note[:4] == ["--device", "cpu", "--out", str(plan.out)]
    assert note[4] == "--budget" and 20 <= float(note[5]) <= 30
    assert note[6] == "--peers"


def test_time_left_over_goes_to_the_stages_after_it(plan: Plan) -> None:
    given: list[float] = []

    def steps(plan: Plan, seconds: float) -> list[Step]:
        given.append(seconds)
        return [Step("s", script(""))]

    run_stages(plan, [Stage("a", 1.0, steps), Stage("b", 3.0, steps)], 100.0, say=quiet)
    assert given[0] == pytest.approx(25, abs=2)
    assert given[1] > 90


def test_without_time_a_stage_is_not_begun(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    entries = run_stages(plan, [fake("one", mark)], -1.0, say=quiet)
    assert entries["one"]["status"] == "stopped" and count() == 0


def test_a_stage_that_prints_without_end_does_not_fill_the_log(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_LIMIT", 4096)
    entries = run_stages(plan, [fake("loud", "for i in range(20000): print('line', i)")], 20, say=quiet)
    assert entries["loud"]["note"] == "line 19999"
    log = (plan.out / "gpu.log").read_text()
    assert len(log) < 8192 and "line 0\n" in log and "... shortened ..." in log and "line 19999" in log


def test_the_folder_stays_small(plan: Plan) -> None:
    run_stages(plan, [fake(f"s{i}", "") for i in range(5)], 20, say=quiet)
    assert sorted(p.name for p in plan.out.iterdir()) == ["gpu.json", "gpu.log"]


def test_a_step_that_passed_is_not_run_again_and_one_that_did_not_comes_last(
    plan: Plan, tmp_path: Path
) -> None:
    order, flag = tmp_path / "order", tmp_path / "flag"
    mark = f"open({str(order)!r}, 'a')"
    bad = f"import os, sys; {mark}.write('b'); sys.exit(0 if os.path.exists({str(flag)!r}) else 1)"
    texts = {"bad": bad, "good": f"{mark}.write('g')", "new": f"{mark}.write('n')"}

    def stage(*names: str) -> Stage:
        return Stage("s", 1.0, lambda plan, seconds: [Step(name, script(texts[name])) for name in names])

    assert run_stages(plan, [stage("bad", "good")], 30, say=quiet)["s"]["status"] == "failed"
    flag.touch()
    entry = run_stages(plan, [stage("bad", "good", "new")], 30, say=quiet)["s"]
    assert entry["status"] == "passed" and order.read_text() == "bgnb"
    assert [step["step"] for step in entry["steps"]] == ["bad", "good", "new"]


def test_a_step_that_hangs_leaves_time_for_those_after_it(plan: Plan) -> None:
    steps = [Step("hangs", script("import time; time.sleep(60)")), Step("after", script("print('ran')"))]
    stages = [Stage("s", 1.0, lambda plan, seconds: steps)]
    entry = run_stages(plan, stages, 4.0, say=quiet)["s"]
    assert [step["status"] for step in entry["steps"]] == ["stopped", "passed"]
    assert entry["status"] == "stopped"


def test_every_step_is_written_before_the_next_begins(plan: Plan) -> None:
    path = plan.out / "gpu.json"
    text = (
        f"import json; print([s['status'] for s in json.load(open({str(path)!r}))['stages']['s']['steps']])"
    )
    entry = run_stages(plan, [fake("s", "", text)], 30, say=quiet)["s"]
    assert entry["steps"][1]["last"] == "['passed', 'stopped']"


def test_a_stage_that_is_not_begun_keeps_what_its_steps_came_to(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    stage = fake("one", mark, "import sys; sys.exit(3)")
    for budget in (20.0, -1.0, 20.0):
        run_stages(plan, [stage], budget, say=quiet)
    assert count() == 1


def test_the_build_has_all_the_time_and_a_stage_at_least_what_it_needs(plan: Plan) -> None:
    given: dict[str, float] = {}

    def stage(name: str, **more: object) -> Stage:
        def steps(plan: Plan, seconds: float) -> list[Step]:
            given[name] = seconds
            return [Step("s", script(""))]

        return Stage(name, 1.0, steps, **more)  # type: ignore[arg-type]

    stages = [stage("whole", whole=True), stage("least", least=60.0), stage("a"), stage("b")]
    run_stages(plan, stages, 100.0, say=quiet)
    assert given["whole"] == pytest.approx(100, abs=2) and given["least"] == pytest.approx(60, abs=2)
    assert 40 < given["a"] < 52 and given["b"] > 90


def test_a_stage_depends_on_its_own_sources_only(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    stage = fake("one", mark)
    run_stages(plan, [stage], 20, say=quiet)
    (plan.root / "tests").mkdir()
    (plan.root / "tests" / "x.py").write_text("a = 1")
    run_stages(plan, [stage], 20, say=quiet)
    assert count() == 1
    run_stages(plan, [replace(stage, sources=("bench", "tests"))], 20, say=quiet)
    assert count() == 2


def test_each_file_with_tests_for_a_gpu_is_a_step_and_the_long_ones_come_last(plan: Plan) -> None:
    whole = Plan(plan.out, "cpu")
    names = [step.name for step in stages.test_steps(whole, 10)]
    assert {"engine/test_step_gpu.py", "ops/test_conv.py", "ops/test_sampler_step.py"} < set(names)
    assert "ops/test_tolerance.py" not in names and "bench/test_bench_gpu.py" not in names
    assert names[-1] == "kernels/test_group_norm_gpu.py"
    parity = [step.name for step in stages.parity_steps(whole, 10)]
    assert parity == ["parity/test_networks.py", "parity/test_trajectories.py"]
    assert not set(parity) & set(names)
    assert all((stages.ROOT / path).exists() for path in stages.PARALLEL)


@pytest.mark.parametrize("installed", [True, False])
def test_what_takes_long_runs_in_several_processes(
    plan: Plan, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: installed or None)
    steps = {step.name: step for step in stages.test_steps(Plan(plan.out, "cpu"), 10)}
    assert ("-n" in steps["ops/test_conv.py"].command) == installed
    assert "-n" not in steps["engine/test_step_gpu.py"].command
    assert all(step.tests for step in steps.values())


def test_golden_data_is_told_to_the_tests(plan: Plan) -> None:
    (plan.root / "tests" / "parity").mkdir(parents=True)
    (plan.root / "tests" / "parity" / "test_x.py").write_text("# mark.gpu")
    (step,) = stages.parity_steps(plan, 10)
    assert "ADMFAST_GOLDEN" not in step.environment
    (plan.root / ".golden").mkdir()
    (step,) = stages.parity_steps(plan, 10)
    assert step.environment["ADMFAST_GOLDEN"] == str(plan.root / ".golden")


def test_the_small_kernels_run_by_themselves_and_under_both_tools(plan: Plan) -> None:
    *_, alone = stages.smoke_steps(plan, 10)
    module = ("-m", "tests.tools.small_kernels", "--device", "cpu")
    assert alone.command[1:] == module
    under = stages.sanitizer_steps(plan, 10)
    assert [step.name for step in under] == ["memcheck", "racecheck"]
    for step in under:
        assert step.command[1:] == ("-m", "bench.gpu.sanitizer", step.name, *module[1:])


def test_a_stage_is_what_the_worst_of_its_steps_is(plan: Plan) -> None:
    good, bad, none = "print('2 passed')", "import sys; print('why'); sys.exit(1)", "print('9 skipped')"
    stage = [fake("good", good, good), fake("bad", good, bad, good), fake("none", none, good, tests=True)]
    said: list[str] = []
    entries = run_stages(plan, stage, 30, say=said.append)
    assert [entry["status"] for entry in entries.values()] == ["passed", "failed", "no tests"]
    assert entries["good"]["note"] == "2 passed; 2 passed" and entries["bad"]["note"] == "why"
    (shown,) = (line for line in said if "| " in line)
    assert shown.endswith("| why")  # the end of the step that failed, not of the one after it


def test_the_build_takes_nothing_from_a_network(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMFAST_BUILD", raising=False)
    (step,) = stages.build_steps(plan, 10)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(step.command)


def test_a_build_for_a_gpu_must_have_its_cuda_part(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMFAST_BUILD", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    modes = [stages.build_steps(Plan(plan.out, device), 10)[0] for device in ("cuda", "cpu")]
    assert [step.environment for step in modes] == [
        {"ADMFAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"},
        {"ADMFAST_BUILD": "auto"},
    ]
    monkeypatch.setenv("ADMFAST_BUILD", "cpu")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert stages.build_steps(Plan(plan.out, "cuda"), 10)[0].environment == {"ADMFAST_BUILD": "cpu"}


def test_without_cuda_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "no CUDA device" in said.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flags",
    [["--stages", "build,fly"], ["--budget", "0"], ["--budget", "soon"], ["--minutes", "-1"]],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_and_status_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--allow-cpu", "--out", str(tmp_path / "o"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_variables_stand_for_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    out, given = tmp_path / "o", []
    for name, value in {"STAGES": "peers", "MINUTES": "5", "BUDGET": "", "OUT": str(out)}.items():
        monkeypatch.setenv(name, value)

    def run(plan: Plan, chosen: list[Stage], budget: float, say: object) -> dict:
        given.append((plan.out, [stage.name for stage in chosen], budget))
        return {}

    monkeypatch.setattr(program, "run_stages", run)
    assert program.main(["--allow-cpu"]) == 0
    monkeypatch.setenv("BUDGET", "30")  # seconds go before minutes
    assert program.main(["--allow-cpu"]) == 0
    assert given == [(out, ["peers"], 300 - program.ENDING), (out, ["peers"], 30.0)]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_by_the_exit_status(sign: signal.Signals, monkeypatch, tmp_path: Path) -> None:
    def run(*given: object, **more: object) -> dict:
        signal.raise_signal(sign)
        return {}

    monkeypatch.setattr(program, "run_stages", run)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        interrupt_by_signals()
        assert program.main(["--allow-cpu", "--out", str(tmp_path)]) == 128 + sign
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
