"""Tests of the steps of `bench.gpu` with small scripts: limits, stopping, resuming and the exit status."""

import argparse
import json
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.command import interrupt_by_signals
from bench.gpu import __main__ as program
from bench.gpu import runner, stages
from bench.gpu.runner import exit_status, run_step, run_steps
from bench.gpu.stages import STAGES, Plan, Step, choose
from bench.sampling import choice
from bench.sampling.flags import add_flags


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", text)


def fake(name: str, text: str, limit: float = 30.0, sources: tuple[str, ...] = ("bench",), **more) -> Step:
    """Return a step that runs this script."""
    return Step(name, script(text), limit, sources=sources, **more)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # else a step would import this checkout's benches
    root = tmp_path / "root"
    (root / "bench").mkdir(parents=True)
    return Plan(tmp_path / "out", "cpu", root)


def quiet(line: str) -> None:
    pass


def ran(plan: Plan, *steps: Step, budget: float = 30.0, say: Callable[[str], None] = quiet) -> dict[str, str]:
    """Run the steps and return the status of each."""
    return {name: entry["status"] for name, entry in run_steps(plan, steps, budget, say).items()}


def test_status_by_exit_code_and_the_last_line_is_the_note(plan: Plan) -> None:
    steps = [
        fake("good", "print('one'); print('two')"),
        fake("bad", "import sys; print('why'); sys.exit(1)"),
        fake("half", "import sys; sys.exit(3)"),
    ]
    said: list[str] = []
    entries = run_steps(plan, steps, 30, say=said.append)
    assert [e["status"] for e in entries.values()] == ["passed", "failed", "unfinished"]
    assert entries["good"]["note"] == "two"
    assert exit_status(entries) == 1
    (shown,) = (line for line in said if "| " in line)
    assert shown.endswith("| why")  # the output of the failed step is shown, not that of the next one
    on_disk = json.loads((plan.out / "gpu.json").read_text())
    assert on_disk["steps"] == entries and on_disk["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [
        (0, "3 passed, 1 skipped in 2.00s", "passed"),
        (0, "4 skipped, 9 deselected in 1.00s", "no tests"),
        (5, "9 deselected in 0.10s", "no tests"),
        (1, "1 failed, 3 passed in 2.00s", "failed"),
        (2, "1 error in 2.00s", "failed"),
        (3, "internal error", "failed"),
    ],
)
def test_tests_pass_only_if_tests_ran_and_passed(plan: Plan, code: int, last: str, status: str) -> None:
    step = fake("tests", f"import sys; print({last!r}); sys.exit({code})", tests=True)
    assert ran(plan, step) == {"tests": status}


def test_a_step_is_stopped_at_its_limit_and_the_next_still_runs(plan: Plan) -> None:
    begin = time.monotonic()
    slow = fake("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=1.0)
    entries = run_steps(plan, [slow, fake("after", "print('ran')")], 30, say=quiet)
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
    entry, _ = run_step(fake("s", text), plan, 5.0, plan.out / "log")
    assert entry["status"] == "stopped" and kept.exists()


def test_what_a_step_started_ends_with_it(plan: Plan, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(child.pid))
"""
    plan.out.mkdir()
    assert run_step(fake("s", text), plan, 20.0, plan.out / "log")[0]["status"] == "passed"
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


def test_a_changed_source_is_run_again(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    for text in ("a = 1", "a = 1", "a = 2"):
        (plan.root / "bench" / "x.py").write_text(text)
        ran(plan, fake("one", mark))
    assert count() == 2


def test_a_build_carried_to_another_machine_is_made_again(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    info = plan.root / "info.json"
    step = fake("build", f"{mark}; open({str(info)!r}, 'w').write('cuda')", writes=info)
    for expected in (1, 1):
        assert ran(plan, step) == {"build": "passed"} and count() == expected
    info.unlink()
    assert ran(plan, step) == {"build": "passed"} and count() == 2
    info.write_text("cpu")
    assert ran(plan, step) == {"build": "passed"} and count() == 3


def test_a_bench_is_told_device_folder_and_a_budget_inside_its_limit(plan: Plan) -> None:
    (plan.root / "bench" / "sampling.py").write_text("import sys; print(*sys.argv[1:])")
    note = run_steps(plan, choose("peers", plan), 40, say=quiet)["peers"]["note"].split()
    assert note[:4] == ["--device", "cpu", "--out", str(plan.out)]
    assert note[4] == "--peers"
    assert note[-2] == "--budget" and 20 <= float(note[-1]) <= 30


def test_without_time_a_step_is_not_begun(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    assert ran(plan, fake("one", mark), budget=-1.0) == {"one": "stopped"} and count() == 0


def test_a_step_that_prints_without_end_does_not_fill_the_log(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LOG_LIMIT", 4096)
    loud = fake("loud", "for i in range(20000): print('line', i)")
    assert run_steps(plan, [loud], 20, say=quiet)["loud"]["note"] == "line 19999"
    log = (plan.out / "gpu.log").read_text()
    assert len(log) < 8192 and "line 0\n" in log and "... shortened ..." in log and "line 19999" in log


def test_the_folder_stays_small(plan: Plan) -> None:
    ran(plan, *(fake(f"s{i}", "") for i in range(5)))
    assert sorted(p.name for p in plan.out.iterdir()) == ["gpu.json", "gpu.log"]


def test_a_step_that_passed_is_not_run_again_and_one_that_did_not_comes_last(
    plan: Plan, tmp_path: Path
) -> None:
    order, flag = tmp_path / "order", tmp_path / "flag"
    mark = f"open({str(order)!r}, 'a')"
    late = f"import os, sys; {mark}.write('b'); sys.exit(0 if os.path.exists({str(flag)!r}) else 1)"
    bad, good, new = fake("bad", late), fake("good", f"{mark}.write('g')"), fake("new", f"{mark}.write('n')")
    assert ran(plan, bad, good) == {"bad": "failed", "good": "passed"}
    flag.touch()
    assert list(ran(plan, bad, good, new).items()) == [(n, "passed") for n in ("bad", "good", "new")]
    assert order.read_text() == "bgnb"


def test_a_build_that_failed_comes_first_again(plan: Plan, tmp_path: Path) -> None:
    order = tmp_path / "order"
    steps = [
        fake(
            "build", f"import sys; open({str(order)!r}, 'a').write('b'); sys.exit(1)", before_new_steps=True
        ),
        fake("new", f"open({str(order)!r}, 'a').write('n')"),
    ]
    ran(plan, steps[0])
    ran(plan, *steps)
    assert order.read_text() == "bbn"


def test_every_step_is_written_before_the_next_begins(plan: Plan) -> None:
    path = plan.out / "gpu.json"
    text = f"import json; print([s['status'] for s in json.load(open({str(path)!r}))['steps'].values()])"
    entries = run_steps(plan, [fake("one", ""), fake("two", text)], 30, say=quiet)
    assert entries["two"]["note"] == "['passed', 'stopped']"


def test_a_step_that_is_not_begun_keeps_its_outcome(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    steps = fake("one", mark), fake("two", "import sys; sys.exit(3)")
    for budget in (20.0, -1.0, 20.0):
        assert ran(plan, *steps, budget=budget) == {"one": "passed", "two": "unfinished"}
    assert count() == 1


def test_a_step_depends_on_its_own_sources_only(plan: Plan, tmp_path: Path) -> None:
    mark, count = counted(tmp_path)
    step = fake("one", mark)
    ran(plan, step)
    (plan.root / "tests").mkdir()
    (plan.root / "tests" / "x.py").write_text("a = 1")
    ran(plan, step)
    assert count() == 1
    ran(plan, replace(step, sources=("bench", "tests")))
    assert count() == 2


def test_each_file_with_tests_for_a_gpu_is_a_step_and_the_long_ones_come_last(plan: Plan) -> None:
    whole = Plan(plan.out, "cpu")
    names = [step.name for step in stages.test_steps(whole)]
    assert {
        "tests/engine/test_step_gpu.py",
        "tests/ops/test_conv.py",
        "tests/ops/test_sampler_step.py",
    } < set(names)
    assert "tests/ops/test_tolerance.py" not in names and "tests/bench/test_bench_gpu.py" not in names
    assert names[-1] == "tests/kernels/test_group_norm_gpu.py"
    parity = [step.name for step in stages.parity_steps(whole)]
    assert parity == ["tests/parity/test_networks.py", "tests/parity/test_trajectories.py"]
    assert not set(parity) & set(names)
    assert all((stages.ROOT / path).exists() for path in stages.PARALLEL_TESTS)


@pytest.mark.parametrize("installed", [True, False])
def test_what_takes_long_runs_in_several_processes(
    plan: Plan, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: installed or None)
    steps = {step.name: step for step in stages.test_steps(Plan(plan.out, "cpu"))}
    assert ("-n" in steps["tests/ops/test_conv.py"].command) == installed
    assert "-n" not in steps["tests/engine/test_step_gpu.py"].command
    assert all(step.tests for step in steps.values())


def test_golden_data_is_told_to_the_tests(plan: Plan) -> None:
    (plan.root / "tests" / "parity").mkdir(parents=True)
    (plan.root / "tests" / "parity" / "test_x.py").write_text("# mark.gpu")
    (step,) = stages.parity_steps(plan)
    assert "ADMFAST_GOLDEN" not in step.environment
    (plan.root / ".golden").mkdir()
    (step,) = stages.parity_steps(plan)
    assert step.environment["ADMFAST_GOLDEN"] == str(plan.root / ".golden")


def test_the_first_stages_answer_the_most(plan: Plan) -> None:
    first = ["build", "smoke", "parity", "sampling", "kernels", "xformers"]
    assert list(STAGES)[: len(first)] == first
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = parser.parse_args(stages.FIRST_STEPS)
    chosen = choice.choose(flags, SimpleNamespace(device=torch.device("cuda"), quick=False))
    pairs = [(subject.name, batch) for subject, batch in chosen.pairs]
    assert pairs == [("imagenet64", 1), ("imagenet64", 8), ("imagenet256", 1), ("imagenet256", 8)]
    (step,) = choose("sampling", plan)
    start = step.command.index(stages.FIRST_STEPS[0])
    assert step.command[start : start + len(stages.FIRST_STEPS)] == stages.FIRST_STEPS


def test_without_a_wheel_of_xformers_one_line_says_so(plan: Plan) -> None:
    entries = run_steps(plan, stages.xformers_steps(plan), 30, say=quiet)
    assert entries["xformers"]["status"] == "no tests" and ".wheels" in entries["xformers"]["note"]
    assert exit_status(entries) == 0


def test_a_wheel_of_xformers_is_seen_by_its_own_steps_only(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan.root / ".wheels").mkdir()
    information = "xformers-0.0.1.dist-info"
    with zipfile.ZipFile(plan.root / ".wheels" / "xformers-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("xformers/__init__.py", "")
        wheel.writestr("xformers/version.py", "__version__ = '0.0.1'\n")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.1\n")
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "mine")
    install, tests, bench = stages.xformers_steps(plan)
    assert {"--no-index", "--no-deps"} <= set(install.command)
    assert ran(plan, install, budget=60) == {"xformers: install": "passed"}
    for step in (tests, bench):
        folder, *rest = step.environment["PYTHONPATH"].split(os.pathsep)
        assert (Path(folder) / "xformers" / "__init__.py").exists() and rest == ["mine"]
    assert tests.tests and tests.command[-4:-2] == ("-k", "xformers")
    assert all((stages.ROOT / path).exists() for path in tests.command[-2:])
    # In a folder of its own: the stage `kernels` has rows that say xformers is missing.
    assert bench.bench and bench.command[bench.command.index("--out") + 1] == str(plan.out / "xformers")
    assert "bench.kernels" in bench.command and bench.command[-2:] == ("--only", "attention")
    others = [step for step in choose(None, plan) if not step.name.startswith("xformers")]
    assert not any("PYTHONPATH" in step.environment for step in others)


def test_the_small_kernels_run_by_themselves_and_under_both_tools(plan: Plan) -> None:
    *_, alone = stages.smoke_steps(plan)
    module = ("-m", "tests.tools.small_kernels", "--device", "cpu")
    assert alone.command[1:] == module
    under = stages.sanitizer_steps(plan)
    assert [step.name for step in under] == ["sanitizers: memcheck", "sanitizers: racecheck"]
    for step, tool in zip(under, ("memcheck", "racecheck"), strict=True):
        assert step.command[1:] == ("-m", "bench.gpu.sanitizer", tool, *module[1:])


def test_the_build_takes_nothing_from_a_network(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMFAST_BUILD", raising=False)
    (step,) = stages.build_steps(plan)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(step.command)


def test_a_build_for_a_gpu_must_have_its_cuda_part(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMFAST_BUILD", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    modes = [stages.build_steps(Plan(plan.out, device))[0] for device in ("cuda", "cpu")]
    assert [step.environment for step in modes] == [
        {"ADMFAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"},
        {"ADMFAST_BUILD": "auto"},
    ]
    monkeypatch.setenv("ADMFAST_BUILD", "cpu")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert stages.build_steps(Plan(plan.out, "cuda"))[0].environment == {"ADMFAST_BUILD": "cpu"}


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
    [["--stages", "build,fly"], ["--minutes", "0"], ["--minutes", "soon"], ["--minutes", "-1"]],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_and_status_2(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--allow-cpu", "--out", str(tmp_path / "o"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_flags_choose_stages_time_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, given = tmp_path / "o", []

    def run(plan: Plan, steps: list[Step], budget: float) -> dict:
        given.append((plan.out, [step.name for step in steps], budget))
        return {}

    monkeypatch.setattr(program, "run_steps", run)
    for minutes in ("5", "0.5"):
        flags = ["--stages", "peers", "--minutes", minutes, "--out", str(out)]
        assert program.main(["--allow-cpu", *flags]) == 0
    assert given == [(out, ["peers"], 300 - program.SECONDS_TO_END), (out, ["peers"], 15.0)]


def test_every_stage_has_steps_of_different_names(plan: Plan) -> None:
    names = [step.name for step in choose(None, Plan(plan.out, "cpu"))]
    assert len(names) == len(set(names)) > len(STAGES)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_by_the_exit_status(sign: signal.Signals, monkeypatch, tmp_path: Path) -> None:
    def run(*given: object, **more: object) -> dict:
        signal.raise_signal(sign)
        return {}

    monkeypatch.setattr(program, "run_steps", run)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        interrupt_by_signals()
        assert program.main(["--allow-cpu", "--out", str(tmp_path)]) == 128 + sign
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
