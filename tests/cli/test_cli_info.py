"""Tests of `admfast info`, and of `main` with bad usage, Ctrl-C and a closed output pipe."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import admfast
from admfast import host
from admfast.cli import info
from admfast.cli.main import main
from admfast.errors import AdmfastError
from admfast.ops import TABLES, Implementation, native

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
sys.argv = ["/usr/local/bin/admfast", *sys.argv[1:]]
from admfast.cli.main import main
sys.exit(main())
"""


def rows(text: str) -> dict[str, str]:
    """Return the two columns of a printed table as a dict."""
    return dict(map(str.strip, line.split("  ", 1)) for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("module", ["ast", "typer", "torch.storage", "admfast.cli.op_examples"])
@pytest.mark.parametrize("command", [["-m", "admfast"], ["-c", SCRIPT]], ids=["module", "script"])
def test_ctrl_c_while_the_command_starts_is_one_line(command, module):
    """The signal comes once this module is imported: before or after typer, within torch or the package."""
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command, "info"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in started.stderr:
        if line.endswith(f" {module}\n"):
            started.send_signal(signal.SIGINT)
            break
    rest = [line for line in started.stderr if not line.startswith("import time:")]
    assert (started.wait(60), rest) == (130, ["admfast: interrupted by SIGINT\n"])


def test_a_program_that_imports_the_package_keeps_its_ctrl_c():
    code = "import signal, admfast; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_versions_devices_and_environment(capsys, monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", "reference")
    monkeypatch.delenv("ADMFAST_MIRROR", raising=False)
    assert main(["info"]) == 0
    captured = capsys.readouterr()
    shown = rows(captured.out)
    assert captured.err == ""
    assert (shown["admfast"], shown["torch"]) == (admfast.__version__, torch.__version__)
    assert shown["python"].startswith(platform.python_version())
    assert shown["CPU"].startswith(f"{torch.get_num_threads()} threads, ")
    assert (shown["ADMFAST_IMPL"], shown["ADMFAST_MIRROR"]) == ("reference", "not set")
    assert ("no" in shown["CUDA"]) != torch.cuda.is_available()


def test_every_implementation_of_every_op_in_the_order_of_trying(capsys):
    assert main(["info"]) == 0
    _, second, _ = capsys.readouterr().out.split("\n\n")
    listed = [line.split("  ")[0].strip() for line in second.splitlines()]
    assert listed == [f"{op}: {name}" for op, table in TABLES.items() for name in table.names()]
    assert {"attention: reference", "sampler_step: reference"} <= set(listed)


def test_reasons_are_shown(capsys, monkeypatch):
    table = TABLES["normal"]
    absent = Implementation("absent", table.implementations[0].forward, lambda: "no device of that kind")
    monkeypatch.setattr(table, "implementations", [absent, *table.implementations])
    monkeypatch.setattr(
        info, "build_info", lambda: {"wanted": "auto", "built": "none", "reason": "no compiler"}
    )
    assert main(["info"]) == 0
    shown = rows(capsys.readouterr().out)
    assert shown["normal: absent"] == "no: no device of that kind"
    assert shown["normal: reference"] == "available"
    assert shown["compiled ops"] == "none, wanted auto (no compiler)"
    monkeypatch.setattr(info, "build_info", dict)
    assert main(["info"]) == 0
    assert rows(capsys.readouterr().out)["compiled ops"].startswith("no record of a build")


def choices(capsys) -> dict[str, str]:
    """Return the third table: the implementation chosen for every example call."""
    assert main(["info"]) == 0
    return rows(capsys.readouterr().out.split("\n\n")[2])


def test_every_op_has_calls_and_each_says_what_ran(capsys, monkeypatch):
    monkeypatch.delenv("ADMFAST_IMPL", raising=False)
    shown = choices(capsys)
    assert {call.split(",")[0] for call in shown} == set(TABLES)
    for call, answer in shown.items():
        assert answer.split(" ")[0] in TABLES[call.split(",")[0]].names(), call
    for call in ("cpu float32", "cpu bfloat16", "cpu float32 with gradient"):
        own = "bfloat16" in call and native.uses_amx()
        found = shown[f"attention, {call}"]
        assert found.startswith(f"{'cpp' if own else 'sdpa'} (xformers: ")
        assert torch.cuda.is_available() or found.startswith(found.split()[0] + " (xformers: no CUDA device")
    assert any("cuda" in call for call in shown) == torch.cuda.is_available()


def test_choices_follow_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", "reference,conv=packed")
    shown = choices(capsys)
    assert shown["attention, cpu float32"] == "reference (requested by ADMFAST_IMPL)"
    assert shown["conv, cpu float32"] == "packed (requested by ADMFAST_IMPL)"
    refused = shown["conv, cpu bfloat16"]
    assert refused.startswith("refused: ADMFAST_IMPL='reference,conv=packed': ") and "bfloat16" in refused
    monkeypatch.setenv("ADMFAST_IMPL", "referense")
    assert all(answer.startswith("refused: ADMFAST_IMPL='referense'") for answer in choices(capsys).values())


@pytest.mark.parametrize(
    "package, version", [("no_such_package", "not installed"), ("torch", torch.__version__)]
)
def test_versions_without_importing(package, version):
    assert info._version(package) == version


def test_a_package_without_metadata(tmp_path, monkeypatch):
    (tmp_path / "bare_package.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert info._version("bare_package") == "installed, version unknown"


# The command line itself


def test_help_and_no_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("sample", "inspect", "models", "fetch", "info"))
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: admfast") and captured.err == ""


TRAIN = [f"train {name}" for name in ("diffusion", "classifier", "upsampler", "export")]


@pytest.mark.parametrize("command", ["sample", "inspect", "models", "fetch", "info", "verify", *TRAIN])
def test_every_option_says_its_default(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    options = re.split(r"\n  (?=--)", capsys.readouterr().out.split("Options:")[1])[1:]
    assert options[-1].startswith("--help")
    for option in options[:-1]:
        assert "default" in option or "[required]" in option, option


@pytest.mark.parametrize(
    "argv, message",
    [
        (["samble"], "admfast: No such command 'samble'."),
        (["info", "extra"], "admfast info: "),
        (["info", "--verbose"], "admfast info: No such option: --verbose"),
        (["sample"], "admfast sample: Missing argument"),
        (["sample", "digits32", "--steps"], "admfast sample: Option '--steps'"),
        (["train", "diffusions"], "admfast train: No such command 'diffusions'."),
        (["train", "--verbose"], "admfast train: No such option: --verbose"),
        (["train", "diffusion"], "admfast train diffusion: Missing option '--out'"),
        (["train", "classifier", "--steps"], "admfast train classifier: Option '--steps'"),
        (["train", "upsampler", "--step", "1"], "admfast train upsampler: No such option: --step"),
        (["train", "export"], "admfast train export: Missing argument 'run'"),
        (["train", "export", "a", "b"], "admfast train export: "),
    ],
)
def test_bad_usage_is_one_line_and_status_2(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    "error, status, line",
    [
        (AdmfastError("weights=1: not that"), 2, "admfast: weights=1: not that"),
        (KeyboardInterrupt(), 130, "admfast: interrupted by SIGINT"),
    ],
)
def test_errors_of_a_command(monkeypatch, capsys, error, status, line):
    def failing():
        raise error

    monkeypatch.setattr(info, "_cuda", failing)
    assert main(["info"]) == status
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_what_is_a_defect_is_not_hidden(monkeypatch):
    def failing():
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(info, "_cuda", failing)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_is_no_error(buffered):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *([] if buffered else ["-u"]), "-m", "admfast", "info"],
            cwd=ROOT,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=300,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=["nothing", "active"])
def test_the_command_line_waits_passively_where_the_user_says_nothing(given):
    """libgomp prints its settings when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name not in host.PASSIVE_WAIT}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **given}
    command = [sys.executable, "-m", "admfast", "info"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    said = re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(.*)'", ran.stderr)
    if not said:
        pytest.skip("another OpenMP than GNU's")
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    assert dict(said).items() >= (passive if not given else given).items()
    assert given == {} or dict(said)["GOMP_SPINCOUNT"] != "0"
