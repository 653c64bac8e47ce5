"""Tests of compiled steps: results equal to the eager step or a refusal, and the cache between processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from admfast.engine.compiled import compiled_body
from admfast.engine.options import EngineOptions
from admfast.engine.precision import POLICIES
from admfast.errors import InvalidArgument, OutputError, Unavailable
from admfast.ops.dispatch import override_impl
from tests.small import pipeline

ROOT = Path(__file__).resolve().parents[2]
COMPILED = EngineOptions(compile=True)


@pytest.fixture
def traced(monkeypatch):
    """Compile with the backend "aot_eager", which runs the traced graph; only the slow test uses inductor."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, **_: real(body, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_is_the_eager_one(traced, precision):
    settings = dict(classes=[0, 3], seeds=[5, 6], output="float", guidance_interval=(300, 900), steps=3)
    policy = POLICIES[precision]
    with override_impl("attention=sdpa"):  # a trace takes no other fused attention
        compiled = pipeline(options=COMPILED, policy=policy)
        got = compiled.sample(**settings)
        wanted = pipeline(policy=policy).sample(**settings)
    # The graph runs the eager operations in the same order, so only the order inside float32 sums may change.
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    stage = compiled.last_run.stages[0]
    assert stage.not_compiled_reason is None and "compiled" in stage.not_replayed_reason


# Comparison of compiled and eager steps


def compiler_of(change):
    """Return a compiler whose bodies run and then apply `change` to the step's state."""

    def compiler(body, **_):
        def run(step, guided):
            body(step, guided)
            change(step.state)

        return run

    return compiler


SPOILT = {
    "output": lambda state: state.x0.mul_(1.5),
    "guidance gradient": lambda state: state.x.mul_(1.5),
    "network's output": lambda state: state.x0.fill_(float("nan")),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", SPOILT)
def test_a_wrong_compiled_step_is_refused(monkeypatch, precision, part):
    monkeypatch.setattr(torch, "compile", compiler_of(SPOILT[part]))
    pipe = pipeline(options=COMPILED, policy=POLICIES[precision])
    with pytest.raises(Unavailable, match=f"^compile=.*{part}"):
        pipe.sample(classes=[0], seeds=[0], steps=2)


def test_rounding_is_not_refused(monkeypatch):
    def round_(state):
        for x in (state.x0, state.x):
            x.copy_(x.bfloat16())

    monkeypatch.setattr(torch, "compile", compiler_of(round_))
    pipe = pipeline(options=COMPILED, policy=POLICIES["bf16"])
    pipe.sample(classes=[0], seeds=[0], steps=2)
    with pytest.raises(Unavailable, match="^compile="):
        pipeline(options=COMPILED, policy=POLICIES["fp32"]).sample(classes=[0], seeds=[0], steps=2)


class Step(SimpleNamespace):
    """The parts of a step that `compiled_body` uses."""

    def body(self, guided: bool) -> None:
        """Run nothing."""


@pytest.mark.parametrize("kind, backends", [("cuda", "ATEN"), ("cpu", None)])
def test_convolutions_on_a_gpu_stay_with_the_library(monkeypatch, kind, backends):
    given = []
    monkeypatch.setattr(torch, "compile", lambda body, **options: given.append(options) or body)
    state = SimpleNamespace(x=SimpleNamespace(device=torch.device(kind)))
    compiled_body(Step(state=state), True)
    [options] = given
    assert options["options"].get("max_autotune_conv_backends") == backends and options["fullgraph"]
    assert options["options"].get("max_autotune") == (True if kind == "cuda" else None)


# Memory


@pytest.mark.parametrize("guidance", [0.0, 1.0], ids=["unguided", "guided"])
def test_a_dropped_compiled_step_is_freed_without_the_collector(traced, guidance):
    pipe = pipeline(options=COMPILED)
    pipe.sample(classes=[0], seeds=[0], steps=2, guidance=guidance)
    dropped = [weakref.ref(step) for step in pipe.engine._steps.values()]
    gc.collect()  # torch's compiler leaves cycles behind
    gc.disable()
    try:
        pipe.engine.release()
        assert [step() for step in dropped] == [None]
    finally:
        gc.enable()


def test_a_step_whose_compilation_is_refused_is_freed_without_the_collector(monkeypatch):
    made = []

    def compiler(body, **_):
        def wrong(step, guided):
            made.append(weakref.ref(step))
            step.state.x0.fill_(float("nan"))

        return wrong

    monkeypatch.setattr(torch, "compile", compiler)
    pipe = pipeline(options=COMPILED)
    gc.disable()
    try:
        with pytest.raises(Unavailable, match="^compile=") as caught:
            pipe.sample(classes=[0], seeds=[0], steps=1)
        del caught
        assert [step() for step in made] == [None]
    finally:
        gc.enable()


# Cache and errors


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from admfast.engine.options import EngineOptions
from admfast.engine.precision import POLICIES
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
    cache = tmp_path / "compiled"

    def run(number: int, *batches: list[int]) -> tuple[int, int]:
        # Each process has its own inductor folder, so that they share only `compile_cache`.
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number)), "PATH": "/usr/bin:/bin"}
        script = textwrap.dedent(SCRIPT).format(root=str(ROOT), cache=str(cache), batches=batches)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tuple(map(int, done.stdout.split()))

    assert run(1, [5])[1] >= 1 and any(cache.iterdir())
    assert run(2, [5]) == (1, 0)
    # torch may compile the second batch size for all sizes, which depends on the first. So the processes
    # use the same order.
    assert run(3, [5], [5, 6])[1] >= 1, "a second batch size must be compiled too"
    assert run(4, [5], [5, 6]) == (2, 0), "both steps should come from the cache"


def test_torch_keeps_what_it_compiles_in_the_folder_and_nothing_else_there(monkeypatch, tmp_path):
    places = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)

    def compiler(body, **_):
        places.append([os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ.get("TRITON_CACHE_DIR")])
        return body

    monkeypatch.setattr(torch, "compile", compiler)
    for cache in (tmp_path / "here", None):
        options = EngineOptions(compile=True, compile_cache=cache)
        pipeline(options=options, classifier=None, guidance=0.0).sample(classes=[0], seeds=[0], steps=1)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and "TRITON_CACHE_DIR" not in os.environ
    assert places == [[str(tmp_path / "here"), str(tmp_path / "here" / "triton")], ["mine", None]]


@pytest.mark.parametrize("place, reason", [("no/c", "does not exist"), ("file", "it is a file")])
def test_a_cache_that_cant_be_written_is_said_before_compiling(monkeypatch, tmp_path, place, reason):
    (tmp_path / "file").write_text("")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda body, **_: compiled.append(body) or body)
    options = EngineOptions(compile=True, compile_cache=tmp_path / place)
    with pytest.raises(OutputError, match=f"{place}: not written: .*{reason}"):
        pipeline(options=options).sample(classes=[0], seeds=[0], steps=1)
    assert not compiled


def test_without_a_compiler_nothing_begins(monkeypatch):
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(Unavailable, match=r"^compile=True: .*C\+\+ compiler"):
        pipeline(options=COMPILED)
    assert pipeline().options.compile is False


def test_what_torch_fails_to_compile_is_one_line(monkeypatch):
    def compiler(body, **_):
        def failing(*_) -> None:
            raise InductorError(CppCompileError(["g++", "-O3"], "no such header"), None)

        return failing

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(Unavailable, match="^compile=True: .*CppCompileError") as caught:
        pipeline(options=COMPILED).sample(classes=[0], seeds=[0], steps=1)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_a_cache_without_compile_is_refused():
    with pytest.raises(InvalidArgument, match="^compile_cache='x'"):
        EngineOptions(compile_cache="x")


def test_a_guided_step_is_refused_where_torch_cannot_trace_its_gradient(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    monkeypatch.setattr(torch, "compile", lambda body, **_: body)
    with pytest.raises(Unavailable, match="compile=True"):
        pipeline(options=COMPILED).sample(classes=[0], seeds=[0], steps=1)
    plain = pipeline(options=COMPILED).sample(classes=[0], seeds=[0], steps=1, guidance=0.0)
    assert torch.equal(plain, pipeline().sample(classes=[0], seeds=[0], steps=1, guidance=0.0))


@pytest.mark.slow
def test_a_process_may_compile_any_number_of_steps(traced):
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for steps in (1, 2):
            for classes in ([0], [0, 1]):
                pipe = pipeline(options=COMPILED)
                assert len(pipe.sample(classes=classes, seeds=classes, steps=steps)) == len(classes)
