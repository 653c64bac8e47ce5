"""Tests that every CUDA source compiles for its GPUs without spills, and the noise without contractions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")
ARCHITECTURES = ["80", "90", "100"]
FLAGS = ["-std=c++20", "-O3"]  # the flags of setup.py
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def nvcc(*arguments: str) -> str:
    done = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_a_spill(source, architecture, tmp_path):
    if f"sm_{architecture}" not in nvcc("--list-gpu-code"):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    said = nvcc(*FLAGS, target, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o"))
    assert "warning" not in said.lower(), said
    kernels = re.findall(r"Compiling entry function '(\S+)'", said)
    memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    sizes = re.findall(memory + r"\n.*?Used (\d+) registers", said)
    assert kernels and len(sizes) == len(kernels), said
    for name, (stack, stores, loads, registers) in zip(kernels, sizes, strict=True):
        assert (stack, stores, loads) == ("0", "0", "0"), (
            f"{name}: stack {stack}, spills {stores} and {loads}"
        )
        assert int(registers) <= 200, f"{name}: {registers} registers, at most 200 allowed"


@needs_nvcc
def test_the_noise_is_rounded_operation_by_operation(tmp_path):
    # ptxas may contract instructions without an explicit rounding mode, which would change bits.
    out = tmp_path / "out.ptx"
    nvcc(*FLAGS, "-arch=compute_90", "-ptx", str(ROOT / "csrc" / "sampler_step_cuda.cu"), "-o", str(out))
    (body,) = re.findall(r"\.entry \S*normal_kernel\S*\(.*?\n}", out.read_text(), re.S)
    single = re.findall(r"\t((?:add|sub|mul|mad|fma|div|sqrt)\.\S*f32)\s", body)
    assert set(single) == {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}


@needs_nvcc
def test_the_host_side_compiles_as_far_as_this_torch_has_its_headers(tmp_path):
    from torch.utils.cpp_extension import include_paths

    top = re.search(r"^#\$ TOP=(.+)$", nvcc("--dryrun", "-c", str(SOURCES[0])), re.M)
    assert top is not None
    includes = [*include_paths(), str(Path(top[1].strip()) / "include"), sysconfig.get_path("include")]
    if not (Path(include_paths()[0]) / "c10/cuda/impl/cuda_cmake_macros.h").exists():
        # A CPU build of torch lacks this one header, which says that c10_cuda is a shared library.
        stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        stub.parent.mkdir(parents=True)
        stub.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
        includes.insert(0, str(tmp_path))
    for source in sorted((ROOT / "csrc").glob("*_cuda_ops.cpp")):
        command = [
            "g++",
            "-std=c++20",
            "-Wall",
            "-Werror",
            "-fsyntax-only",
            str(source),
            f"-I{ROOT / 'csrc'}",
        ]
        done = subprocess.run(
            [*command, *(f"-isystem{path}" for path in includes)], capture_output=True, text=True
        )
        assert done.returncode == 0, f"torch {torch.__version__}: {done.stderr[-4000:]}"
