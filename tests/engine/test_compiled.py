"""torch.compile around a step, and what is kept of it for another process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from admfast.engine import compiled
from admfast.engine.options import EngineOptions
from admfast.errors import InvalidArgument
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
settings = dict(classes=[0], seeds=[5], output="float", steps=2)
difference = (pipe.sample(**settings) - plain.sample(**settings)).abs().max()
assert difference < 1e-4, difference
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path):
    cache = tmp_path / "compiled.bin"

    def run(number: int) -> tuple[int, int]:
        # A folder of its own: the first process leaves the second nothing but the file.
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number)), "PATH": "/usr/bin:/bin"}
        script = textwrap.dedent(SCRIPT).format(root=str(ROOT), cache=str(cache))
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tuple(map(int, done.stdout.split()))

    assert run(1)[1] >= 1 and cache.stat().st_size > 1000
    assert run(2) == (1, 0)


def test_artefacts_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InvalidArgument, match="no such file"):
        compiled.load_artefacts(tmp_path / "absent.bin")
    with pytest.raises(InvalidArgument, match="compile_cache='x': only together with compile=True"):
        EngineOptions(compile_cache="x")
