"""Tests that sampler_step's CPU loops agree bit for bit on every instruction set, also with sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.csrc.loops import CSRC, FLAGS, GXX, HERE_ONLY, SANITIZERS, built, compiled, said_by

ROOT = CSRC.parent
pytestmark = HERE_ONLY
ISAS = ("generic", "avx2", "avx512")


@pytest.fixture(scope="module", params=["optimised", "sanitized"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile loops_driver.cpp with the loops, optimised and with sanitizers."""
    folder = tmp_path_factory.mktemp("sampler_step")
    return built("sampler_step", ISAS, "loops_driver", request.param, folder)


def test_every_instruction_set_and_the_kernel_s_body_give_the_same_bits(driver):
    said = said_by(driver)
    chosen = said.pop("chosen")
    assert {"generic", "body", chosen} <= said.keys()
    assert len(set(said.values())) == 1, said


def test_an_instruction_set_can_be_asked_for(driver):
    said = said_by(driver)
    assert said_by(driver, ADMFAST_CPU_ISA="")["chosen"] == said["chosen"], "empty must mean unset"
    known = said.keys() - {"chosen", "body"}
    for name in known:
        assert said_by(driver, ADMFAST_CPU_ISA=name)["chosen"] == name
    assert said_by(driver, ADMFAST_CPU_ISA="unknown")["chosen"] == "generic"


# Registers the sanitized extension as admfast._C before the package imports its own.
PLUGIN = """
import importlib.util, os, sys
import torch
spec = importlib.util.spec_from_file_location("admfast._C", os.environ["ADMFAST_SANITIZED"])
sys.modules["admfast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["admfast._C"])
"""


@pytest.mark.slow
def test_the_ops_run_clean_under_the_sanitizers(tmp_path):
    from torch.utils.cpp_extension import include_paths, library_paths

    target, objects = tmp_path / "_C.so", []
    includes = [f"-I{path}" for path in (CSRC, *include_paths(), sysconfig.get_path("include"))]
    flags = [*FLAGS, *SANITIZERS, "-O1", "-fPIC", "-fopenmp", "-DTORCH_EXTENSION_NAME=_C", *includes]
    # One file at a time: compiling torch's headers with a sanitizer takes a gigabyte of memory.
    for source in sorted(CSRC.glob("*.cpp")):
        if "_cuda_" not in source.name:
            objects.append(str(tmp_path / f"{source.stem}.o"))
            compiled([str(GXX), *flags, "-c", str(source), "-o", objects[-1]])
    libraries = [f"-L{library_paths()[0]}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    compiled([str(GXX), "-shared", *SANITIZERS, "-fopenmp", *objects, *libraries, "-o", str(target)])

    (tmp_path / "sanitized_plugin.py").write_text(PLUGIN)
    # Python doesn't load libstdc++, so preload it too: the sanitizer must find __cxa_throw to wrap it.
    preload = [
        subprocess.run([str(GXX), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ADMFAST_SANITIZED": str(target),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "2",
    }
    names = "sampler_step sampler_step_call noise conv conv_direct conv_int8 attention attention_cpp".split()
    tests = [f"tests/ops/test_{name}.py" for name in names]
    wanted = "(cpp or compiled or raw or threads or winograd or direct) and not instruction_set"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "sanitized_plugin", "-p", "no:cacheprovider"]
    command += ["-k", wanted, *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
