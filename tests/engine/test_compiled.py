"""torch.compile around a step, and what is kept of it for another process."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from admfast.engine import compiled
from admfast.engine.options import EngineOptions
from admfast.errors import InvalidArgument, OutputError
from admfast.models.fold import FoldOptions
from tests.small import pipeline

ROOT = Path(__file__).resolve().parents[2]


def test_a_compiled_step_is_the_eager_one(monkeypatch):
    # The compiler's own backend is the next test's; here what is traced is run as it was traced.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, mode, **o: real(body, backend="aot_eager", **o))
    options = EngineOptions(compile=True, fold=FoldOptions())
    settings = dict(classes=[0, 3], seeds=[5, 6], output="float", guidance_interval=(300, 900), steps=3)
    got, wanted = pipeline(options=options).sample(**settings), pipeline().sample(**settings)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from admfast.engine.options import EngineOptions
from tests.small import pipeline
options = EngineOptions(compile=True, compile_cache={cache!r})
pipe = pipeline(options=options, classifier=None, guidance=0.0)
plain = pipeline(classifier=None, guidance=0.0)
for seeds in {batches!r}:
    settings = dict(classes=[0], seeds=seeds, output="float", steps=2)
    difference = (pipe.sample(**settings) - plain.sample(**settings)).abs().max()
    assert difference < 1e-4, difference
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path):
    cache = tmp_path / "compiled.bin"

    def run(number: int, *batches: list[int]) -> tuple[int, int]:
        # A folder of its own: the first process leaves the second nothing but the file.
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number)), "PATH": "/usr/bin:/bin"}
        script = textwrap.dedent(SCRIPT).format(root=str(ROOT), cache=str(cache), batches=batches)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tuple(map(int, done.stdout.split()))

    assert run(1, [5])[1] >= 1 and cache.stat().st_size > 1000
    assert run(2, [5]) == (1, 0)
    # Whether torch compiles a second batch size for any size depends on the first: in the same order.
    assert run(3, [5], [5, 6])[1] >= 1, "another batch is another step"
    assert run(4, [5], [5, 6]) == (2, 0), "and both are kept"


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that compiles nothing: what it has `compiled` by key, and what was `loaded`."""
    state = SimpleNamespace(compiled=[], loaded=[], saved=0)
    monkeypatch.setattr(compiled, "_SAVES", [])

    def save():
        # As torch does: all keys, of which those of an earlier save can't be loaded.
        info = SimpleNamespace(artifacts=defaultdict(list, inductor=list(state.compiled)))
        new, state.saved = state.compiled[state.saved :], len(state.compiled)
        return ("\n".join(new).encode(), info) if state.compiled else None

    def load(data):
        state.loaded.append(data.decode().split("\n"))
        return SimpleNamespace()

    monkeypatch.setattr(
        torch, "compile", lambda body, **_: state.compiled.append(f"k{len(state.compiled)}") or body
    )
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", save)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return state


def another_process(compiler, keys: list[str]) -> None:
    compiler.compiled[:], compiler.saved = keys, 0
    compiled._SAVES.clear()


def artefacts(path: Path) -> set[str]:
    return {key for keys in compiled._read(path).keys.values() for _, key in keys}


def sample(cache: Path, *batches: int):
    pipe = pipeline(options=EngineOptions(compile=True, compile_cache=cache), classifier=None, guidance=0.0)
    for count in batches:
        pipe.sample(classes=[0], seeds=range(count), steps=1)


def test_every_shape_that_is_compiled_is_kept(compiler, tmp_path):
    cache = tmp_path / "compiled.bin"
    sample(cache, 2)
    assert artefacts(cache) == {"k0"}
    sample(cache, 3, 1)
    assert artefacts(cache) == {"k0", "k1", "k2"}
    assert compiler.loaded[-2:] == [["k0"], ["k1"]], (
        "what earlier steps left is taken before the next compiles"
    )
    compiler.loaded.clear()
    sample(tmp_path / "another.bin", 4)
    assert compiled.load_artefacts(tmp_path / "another.bin")
    assert compiler.loaded == [["k0"], ["k1"], ["k2"], ["k3"]], "each file has all that this process compiled"


def test_what_other_processes_saved_is_kept(compiler, tmp_path):
    cache = tmp_path / "compiled.bin"
    for keys in (["a"], ["b"], ["a", "c"]):  # what one process each compiled
        another_process(compiler, keys)
        assert compiled.save_artefacts(cache) > 0
    assert artefacts(cache) == {"a", "b", "c"}
    before = cache.stat()
    another_process(compiler, ["c", "b"])
    assert compiled.save_artefacts(cache) == 0 and cache.stat() == before, "nothing new, nothing written"
    assert compiled.load_artefacts(cache)
    assert compiler.loaded == [["b"], ["a", "c"]], "what a later one covers is dropped"
    assert [path.name for path in tmp_path.iterdir()] == ["compiled.bin"]


def test_nothing_compiled_writes_nothing(compiler, tmp_path):
    assert compiled.save_artefacts(tmp_path / "compiled.bin") == 0 and not list(tmp_path.iterdir())


def spoilt(whole: bytes) -> dict[str, bytes]:
    return {"empty": b"", "cut": whole[: len(whole) // 2], "not an archive": b"garbage" * 100}


@pytest.mark.parametrize("kind", ["empty", "cut", "not an archive", "another torch"])
def test_a_spoilt_file_is_cold_in_one_line_and_repaired(compiler, tmp_path, caplog, monkeypatch, kind):
    cache = tmp_path / "compiled.bin"
    compiler.compiled[:] = ["kernel"]
    with monkeypatch.context() as patched:
        if kind == "another torch":
            patched.setattr(torch, "__version__", "9.9.9")
        compiled.save_artefacts(cache)
    if kind != "another torch":
        cache.write_bytes(spoilt(cache.read_bytes())[kind])
    another_process(compiler, [])
    with caplog.at_level(logging.WARNING):
        sample(cache, 1)
    [line] = [r.getMessage() for r in caplog.records if "compile_cache" in r.getMessage()]
    assert line.startswith(f"compile_cache: {cache} is not used: it is ") and line.count("\n") == 0
    assert not any(record.exc_info for record in caplog.records)
    assert not compiler.loaded and artefacts(cache) == {"k0"}
    assert compiled.load_artefacts(cache) and len(compiler.loaded) == 1, "the next process is warm"


def test_no_byte_that_is_wrong_gets_to_torch(compiler, tmp_path):
    cache = tmp_path / "compiled.bin"
    compiler.compiled[:] = ["kernel"]
    compiled.save_artefacts(cache)
    whole = cache.read_bytes()
    for i in range(len(whole)):
        cache.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        compiled.load_artefacts(cache)
    assert all(loaded == ["kernel"] for loaded in compiler.loaded)
    assert len(compiler.loaded) < len(whole) / 2, "dates and attributes of a zip may differ, nothing else"


def test_a_file_that_torch_cant_read_is_cold_without_its_traceback(tmp_path, caplog):
    cache = tmp_path / "compiled.bin"
    compiled._write(cache, compiled._Kept({"0": b"not torch's"}, {"0": {("inductor", "k")}}))
    with caplog.at_level(logging.WARNING):
        assert not compiled.load_artefacts(cache)
    [record] = caplog.records
    assert record.getMessage().endswith("is not used: torch can't read it; it will be written anew")


@pytest.mark.parametrize("place, reason", [("no/c.bin", "does not exist"), ("folder", "it is a folder")])
def test_a_cache_that_cant_be_written_is_said_before_compiling(compiler, tmp_path, place, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=f"{place}: not written: .*{reason}"):
        sample(tmp_path / place, 1)
    assert not compiler.compiled


def test_a_full_disk_leaves_the_images(compiler, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OutputError("c.bin: not written: the disk is full")

    monkeypatch.setattr(compiled, "_write", full)
    sample(tmp_path / "c.bin", 1)
    assert "compile_cache: c.bin: not written: the disk is full" in caplog.text


def test_artefacts_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InvalidArgument, match="no such file"):
        compiled.load_artefacts(tmp_path / "absent.bin")
    with pytest.raises(InvalidArgument, match="compile_cache='x': only together with compile=True"):
        EngineOptions(compile_cache="x")
