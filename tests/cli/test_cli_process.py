"""Tests of the command line as a process: signals, full disks and outputs, and streams' encodings."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from admfast.cli.main import main
from admfast.files.images import read_image
from admfast.files.npz import read_samples

ROOT = Path(__file__).resolve().parents[2]


def pngs(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "images").glob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_leaves_what_is_finished(weights, tmp_path, number):
    out = tmp_path / "out"
    options = ["--steps", "2", "--seeds", "0-99999", "--batch", "1", "--device", "cpu", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "admfast", "sample", str(weights / "faces.safetensors"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(pngs(out)) < 3 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    made = len(pngs(out))
    assert f"{made} of 100000 images are finished and kept in {out}" in stdout.splitlines()
    assert len(read_samples(out / f"samples_{made}x8x8x1.npz").images) == made
    assert read_image(out / "grid.png").shape[2] == 3 and not list(out.glob("**/*.tmp"))


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9], ids=str)
def test_a_signal_while_the_libraries_are_loaded_ends_the_process(weights, tmp_path, delay):
    """Before our code runs, the signal itself kills the process; a shell reports 143 in both cases."""
    command = [sys.executable, "-m", "admfast", "sample", str(weights / "faces.safetensors"), "--seeds"]
    with subprocess.Popen(
        [*command, "0-99999", "--device", "cpu", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    said = {-signal.SIGTERM: "", 128 + signal.SIGTERM: "admfast: interrupted by SIGTERM\n"}
    assert stderr == said[process.returncode]


LIMITED = """
import resource, sys
from admfast.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit, file, images", [(20, "manifest.json", 0), (2000, "samples_", 40)])
def test_a_full_disk_is_one_line(weights, tmp_path, limit, file, images):
    """A limit on the file size stands in for a full disk: writes fail in the same way."""
    out = tmp_path / "out"
    command = [
        "sample",
        str(weights / "faces.safetensors"),
        "--steps",
        "1",
        "--seeds",
        "0-39",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"admfast: {out}/{file}")
    assert last.endswith("not written: the file would exceed the largest size allowed here")
    kept = [line for line in done.stdout.splitlines() if "kept in" in line]
    assert kept == ([f"{images} of 40 images are finished and kept in {out}"] if images else [])
    assert len(pngs(out)) == images and not list(out.glob("**/*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "admfast", "models"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2 and done.stderr == "admfast: standard output: not written: the disk is full\n"


@pytest.fixture
def streams(monkeypatch):
    """Return a function that replaces stdout and stderr by streams with the given encoding."""

    def given(encoding: str) -> list[io.TextIOWrapper]:
        made = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    return given


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding, name", [("cp1252", "вывод"), ("ascii", "é"), ("utf-8", "bad\udcff")])
def test_paths_that_a_stream_can_not_hold_are_escaped(weights, tmp_path, streams, encoding, name):
    folder = tmp_path / name
    folder.mkdir()
    known = name.isprintable()  # safetensors reads only files with UTF-8 names
    model = shutil.copy(weights / "faces.safetensors", folder if known else tmp_path)
    out, escaped = folder / "out", name.encode("ascii", "backslashreplace").decode()
    sampling = ["sample", model, "--steps", "1", "--device", "cpu", "--out", str(out)]
    for command, status in (
        (sampling, 0),
        ([*sampling, "--seeds", "7"], 2),  # refused: other samples exist now
        (["inspect", model if known else str(folder / "gone.pt"), "--no-values"], 0 if known else 2),
        (["verify", model, "--steps", "1", "--low-res", str(folder / "gone.png")], 2),
        (["fetch", "64x64_diffusion", "--out", str(out / "grid.png")], 2),
        (["models", name], 2),
    ):
        stdout, stderr = streams(encoding)
        assert main(command) == status
        said = written(stdout) + written(stderr)
        assert escaped in said or (encoding == "utf-8" and "udcff" in said), (command, said)
    assert len(pngs(out)) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_stop_nothing(weights, tmp_path, closed):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "admfast", "sample", str(weights / "faces.safetensors")]
    line = shlex.join([*command, "--steps", "1", "--device", "cpu", "--out", str(out)])
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert len(pngs(out)) == 1 and read_image(out / "grid.png").shape[2] == 3


@pytest.mark.parametrize("joined", [True, False])
def test_a_reader_that_goes_stops_nothing(weights, tmp_path, joined):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "admfast", "sample", str(weights / "faces.safetensors")]
    with subprocess.Popen(
        [*command, "--steps", "1", "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if joined else subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert joined or "Traceback" not in process.stderr.read()
        assert process.wait(120) == 0
    assert len(pngs(out)) == 1


def test_compile_without_a_compiler_is_one_line(weights, tmp_path, monkeypatch, capsys):
    def missing() -> str:
        raise RuntimeError("none found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    command = ["sample", str(weights / "faces.safetensors"), "--device", "cpu", "--compile"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("admfast: --compile=True: ") and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_links_to_nothing_are_named(weights, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    model = str(weights / "faces.safetensors")
    for command in (
        ["sample", model, "--steps", "1", "--device", "cpu", "--out", str(link)],
        ["sample", model, "--compile", "--compile-cache", str(link)],
        ["sample", model, "--device", "cpu", "--low-res", str(link)],
        ["fetch", "64x64_diffusion", "--out", str(link)],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert str(link) in said and said.count("\n") == 1
        assert "--low-res" in command or str(tmp_path / "gone") in said


@pytest.mark.parametrize("setting", ["NO_COLOR=1", "COLUMNS=20", "COLUMNS=1", "TERM=dumb", "FORCE_COLOR=1"])
def test_tables_and_help_are_plain_text_in_any_terminal(setting, monkeypatch, capsys):
    monkeypatch.setenv(*setting.split("="))
    for command, status in ((["models"], 0), (["sample", "--help"], 0), (["sample", "--stepz"], 2)):
        assert main(command) == status
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err


TWICE = """
import sys, torch, admfast
found = []
for _ in range(2):
    from admfast.ops.norm import triton
    assert triton.reason_missing() is None
    pipe = admfast.load("digits32", precision="fp32")
    found.append((pipe, pipe.sample(seeds=0, steps=1)))
    for name in [name for name in sys.modules if name.partition(".")[0] == "admfast"]:
        del sys.modules[name]
    import admfast
assert found[0][0].__class__ is not found[1][0].__class__
assert torch.equal(found[0][1], found[1][1])
assert torch.equal(found[0][0].sample(seeds=0, steps=1), found[1][1])
"""


def test_a_process_may_import_the_package_anew():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]
