"""Build the compiled ops; all metadata is in pyproject.toml.

ADMFAST_BUILD=auto (default) builds what this machine can build, and records why not more. cuda, cpu and none
build exactly that, or fail. TORCH_CUDA_ARCH_LIST replaces the architectures. If nothing is compiled, the
wheel is the same for all platforms.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cuda", "cpu", "none")
# Machine code for these GPUs, and PTX of the newest for later ones.
ARCHITECTURES = ("8.0", "9.0", "10.0")
mode = os.environ.get("ADMFAST_BUILD", "auto")
if mode not in MODES:
    sys.exit(f"ADMFAST_BUILD={mode!r}: one of {', '.join(MODES)}")


def record(place: str | Path, built: str, reason: str | None, torch: str | None = None) -> None:
    """Write what was wanted, what was built, why not more and for which torch, to the package at `place`."""
    path = Path(place) / "admfast" / "_build_info.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"wanted": mode, "built": built, "reason": reason, "torch": torch}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the arguments of a command that failed."""
    lines = re.sub(r"\['(\S+)', .*\]", r"\1 ...", str(error).strip()).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def nvcc_says(*arguments: str) -> str:
    """Return what nvcc prints. Raises OSError or CalledProcessError if it can't be run."""
    command = [os.environ.get("ADMFAST_NVCC", "nvcc"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def prepare_cuda() -> str | None:
    """Set CUDA_HOME and TORCH_CUDA_ARCH_LIST if they aren't set; return why CUDA can't be built, or None.

    Call it before the import of torch.utils.cpp_extension, which reads CUDA_HOME once. nvcc on PATH may be a
    wrapper outside the toolkit's folder, so the folder is taken from nvcc's own output.
    """
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        os.environ.setdefault("ADMFAST_NVCC", str(Path(home) / "bin" / "nvcc"))
    try:
        if not home:
            plan = nvcc_says("--dryrun", "-c", str(CSRC / "sampler_step_cuda.cu"))
            top = re.search(r"^#\$ TOP=(.+)$", plan, re.M)
            if top is None:
                return "nvcc does not report the folder of its toolkit; set CUDA_HOME"
            os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())
        known = nvcc_says("--list-gpu-code")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {first_line(error)}"
    there = [arch for arch in ARCHITECTURES if f"sm_{arch.replace('.', '')}" in known]
    if there:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(there) + "+PTX")
    return None


def sources(cuda: bool) -> list[str]:
    """Return the source files of csrc/, relative to this file; with `cuda`, also those of the CUDA part."""
    files = [*CSRC.glob("*.cpp"), *(CSRC.glob("*.cu") if cuda else [])]
    return sorted(str(path.relative_to(ROOT)) for path in files if cuda or "_cuda_" not in path.name)


def extension(cuda: bool):
    """Return the extension module, with its CUDA part or without."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # No fused multiply-adds: the noise must round each product and each sum separately, on every machine.
    flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # at::parallel_for is a header template: without this flag it silently compiles to a serial loop.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    arguments = {"cxx": flags + openmp}
    if cuda:
        arguments["nvcc"] = ["-O3", "-std=c++20"]
    return (CUDAExtension if cuda else CppExtension)(
        "admfast._C",
        sources(cuda),
        include_dirs=[str(CSRC)],
        depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("*.h")),
        extra_compile_args=arguments,
        extra_link_args=openmp,
    )


def nothing(reason: str) -> tuple[list, dict]:
    """Return no extension module, and a build command that records why."""

    class Build(build_py):
        def run(self) -> None:
            super().run()
            record(ROOT if self.editable_mode else self.build_lib, "none", reason)

    return [], {"build_py": Build}


def extensions() -> tuple[list, dict]:
    """Return the extension modules and the build command."""
    if mode == "none":
        return nothing("ADMFAST_BUILD=none")
    if mode == "auto" and sys.platform == "win32":
        return nothing("the C++ code needs gcc or clang, which can't build torch's extensions on Windows")
    try:
        reason = prepare_cuda() if mode in ("auto", "cuda") else "ADMFAST_BUILD=cpu"
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        if mode != "auto":
            raise
        return nothing(f"torch is not installed at build time: {error}")
    if mode == "cuda" and reason is not None:
        sys.exit(f"ADMFAST_BUILD='cuda': {reason}")
    if mode == "auto" and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")):
        return nothing("no C++ compiler was found")

    class Build(BuildExtension):
        """Build; in mode auto, fall back to the CPU part or to no compiled ops, and record the reason."""

        def run(self) -> None:
            self.place = ROOT if self.inplace else self.build_lib  # setuptools builds elsewhere, then copies
            super().run()

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
                self.record("cpu" if reason else "cuda", reason if mode == "auto" else None)
            except Exception as error:  # torch's ninja build raises RuntimeError, distutils its own types
                if mode != "auto":
                    raise
                self.fall_back(error)

        def fall_back(self, error: Exception) -> None:
            """After a failed CUDA build, build the CPU part in a new process with a fresh compiler."""
            failed = f"the build failed: {first_line(error)}"
            if reason is None:
                command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", self.build_lib]
                command += ["--build-temp", self.build_temp]
                environment = os.environ | {"ADMFAST_BUILD": "cpu"}
                if not subprocess.run(command, cwd=ROOT, env=environment).returncode:
                    self.record("cpu", f"the CUDA part: {failed}")
                    return
            self.record("none", failed)
            self.extensions = []

        def record(self, built: str, why: str | None) -> None:
            record(self.place, built, why, None if built == "none" else torch.__version__)

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    if reason is None:
        try:
            return [extension(cuda=True)], {"build_ext": Build}
        except OSError as error:  # torch doesn't find the toolkit's folders
            if mode == "cuda":
                raise
            reason = first_line(error)
    return [extension(cuda=False)], {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["admfast", "admfast.*"]), "admfast.kernels"],
    package_dir={"admfast": "admfast", "admfast.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
