"""Tests that a wheel made from the sdist, compiled or not, samples in a bare environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import admfast
from admfast.files.npz import read_samples

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# Files of a checkout that aren't sources.
MADE = [".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "_build_info.json"]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def run(command: list[object], cwd: Path, path: str = "") -> str:
    """Run a command outside the checkout, with `path` as its PATH, and return its output."""
    taken = ("PYTHONPATH", "VIRTUAL_ENV", "ADMFAST_BUILD", "CC", "CXX")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= {"PATH": path or str(cwd / "no programs"), "MAX_JOBS": "2"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Make the sdist of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*MADE))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", code], folder / "copy")
    return folder / f"admfast-{admfast.__version__}.tar.gz"


@pytest.fixture(
    scope="module", params=[pytest.param(True, marks=needs_compiler), False], ids=["compiler", "no compiler"]
)
def wheel(request, sdist, tmp_path_factory) -> Path:
    """Make the wheel of the sdist, with or without a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}" if request.param else ""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*command, "--disable-pip-version-check", "--wheel-dir", folder, sdist], folder, programs)
    [made] = folder.glob("*.whl")
    assert made.name.endswith("-py3-none-any.whl") != request.param, "compiled ops must make a platform wheel"
    return made


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """Install the wheel and only its requirements into a new environment, and return its Python."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run([*pip, "--disable-pip-version-check", wheel], folder)
    [site] = (folder / "env").glob("lib/python*/site-packages")
    [own] = importlib.metadata.distributions(path=[str(site)], name="admfast")
    assert own.version == admfast.__version__
    for found in required(own):
        for part in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / part).exists():
                (site / part).symlink_to(Path(str(found.locate_file(part))))
    return python


def required(start: importlib.metadata.Distribution) -> list[importlib.metadata.Distribution]:
    """Return all direct and indirect requirements of a distribution, as installed for the running Python."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [start]
    while waiting:
        for text in waiting.pop().requires or ():
            wanted = Requirement(text)
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            if name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                found[name] = importlib.metadata.distribution(name)
                waiting.append(found[name])
    return list(found.values())


def test_the_wheel_holds_what_the_checkout_has(wheel):
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "admfast").rglob("*")
        if path.suffix in (".py", ".typed", ".json", ".safetensors") and "__pycache__" not in path.parts
    }
    sources |= {f"admfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*") if path.is_file()}
    compiled = {name for name in there if name.startswith("admfast/_C.")}
    assert there - compiled == sources | {"admfast/_build_info.json"}
    assert len(compiled) == (not wheel.name.endswith("-any.whl"))


def test_a_bare_environment_says_what_it_has_and_samples(bare, wheel, tmp_path):
    compiled = not wheel.name.endswith("-any.whl")
    said = run([bare.parent / "admfast", "info"], tmp_path)
    rows = dict(line.split(maxsplit=1) for line in said.splitlines()[:1])
    assert rows == {"admfast": admfast.__version__}
    built = r"cpu|cuda" if compiled else r"none, wanted auto \(no C\+\+ compiler was found\)"
    assert re.search(rf"^compiled ops +({built})", said, re.M), said
    reason = "available" if compiled else "no: not built: no C++ compiler was found"
    assert re.search(rf"^sampler_step: cpp +{re.escape(reason)}", said, re.M), said

    words = (
        "sample digits32 --classes 0-9 --per-class 1 --steps 2 --device cpu --precision fp32 --out samples"
    )
    run([bare.parent / "admfast", *words.split()], tmp_path)
    made = read_samples(tmp_path / "samples" / "samples_10x32x32x1.npz").images
    pipe = admfast.load("digits32", device="cpu", precision="fp32")
    own = pipe.sample(classes=range(10), seeds=range(10), steps=2).numpy()
    assert np.abs(made.astype(int) - own).max() <= 1, "images differ by more than one level"


# Leaves out programs, Triton's modules, and the module that takes the published package's name.
IMPORTS = """
import importlib, importlib.util, pkgutil, admfast
import torch  # loads the libraries that the extension is linked with
assert "site-packages" in admfast.__file__, admfast.__file__
for module in pkgutil.walk_packages(admfast.__path__, "admfast."):
    if not any(part in module.name for part in (".__main__", ".kernels", ".front.")):
        importlib.import_module(module.name)
assert importlib.util.find_spec("admfast.kernels.group_norm")
"""


def test_every_module_imports_there(bare, tmp_path):
    run([bare, "-I", "-c", IMPORTS], tmp_path)
