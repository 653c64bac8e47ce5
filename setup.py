"""Build of the compiled ops; all metadata is in pyproject.toml.

ADMFAST_BUILD=auto (default) builds what this machine can and records why not more; cuda, cpu and none ask for
exactly that, and a failure is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INFO = ROOT / "admfast" / "_build_info.json"
MODES = ("auto", "cuda", "cpu", "none")
mode = os.environ.get("ADMFAST_BUILD", "auto")
if mode not in MODES:
    sys.exit(f"ADMFAST_BUILD={mode!r}: one of {', '.join(MODES)}")


def record(built: str, reason: str | None) -> None:
    """Keep what was wanted, what was built and why not more, for `admfast info`."""
    INFO.write_text(json.dumps({"wanted": mode, "built": built, "reason": reason}, indent=1) + "\n")


def extensions() -> tuple[list, dict]:
    """The extension modules and the build command, or nothing with the reason recorded."""
    if mode == "none":
        record("none", "ADMFAST_BUILD=none")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if mode != "auto":
            raise
        record("none", f"torch is not there at build time: {error}")
        return [], {}
    if mode == "auto" and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")):
        record("none", "no C++ compiler was found")
        return [], {}
    if mode == "cuda":
        sys.exit("ADMFAST_BUILD='cuda': there is no CUDA source in this version; cpu builds all there is")

    class Build(BuildExtension):
        """Builds; in mode auto a failure leaves a package without compiled ops, and its reason."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # torch's ninja path raises RuntimeError, distutils its own
                if mode != "auto":
                    raise
                reason = str(error).strip().splitlines()
                record("none", f"the build failed: {reason[0] if reason else type(error).__name__}")
                self.extensions = []
                return
            record("cpu", None)

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    # No contraction: the noise must round every product and sum by itself, on every machine.
    flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # at::parallel_for is a template of a header: without this it is compiled as a plain loop, without a word.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    extension = CppExtension(
        "admfast._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
        extra_compile_args={"cxx": flags + openmp},
        extra_link_args=openmp,
    )
    return [extension], {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["admfast", "admfast.*"]), "admfast.kernels"],
    package_dir={"admfast": "admfast", "admfast.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
