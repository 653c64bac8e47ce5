"""Tests that every code block of the documentation runs, page by page, each in a folder of its own.

Small random files stand in for released weights and photographs (`stand_ins.py`). Sampling and training
take two steps, except in Python code that gives a respacing. The pages' own asserts check their results.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import admfast
from admfast.checkpoints.snapshots import RUN_FILE
from admfast.cli.main import main
from bench.program_cores import StandIns
from tests.docs import stand_ins
from tests.docs.pages import LIBRARIES, PAGES, ROOT, Block, blocks, text_of

# Appended to commands: the last value of an option counts.
SHORT = {
    "sample": ["--steps", "2"],
    "train": ["--steps", "2", "--batch-size", "2", "--grid-every", "0"],
    "verify": ["--steps", "4", "--seeds", "0"],
}
LANGUAGES = {"python", "sh", "text"}
CODE = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]
WITH_LIBRARIES = [page for page in CODE if any(block.needs for block in blocks(page))]
MAKE = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("page", PAGES)
def test_a_block_says_its_language_and_text_holds_no_code(page):
    found = blocks(page)
    assert {block.language for block in found} <= LANGUAGES, [block.where for block in found]
    assert text_of(page).count("```") == 2 * len(found)
    code = re.compile(r"^\s*(admfast|python|pip|make|torchrun|import|from) ", re.M)
    assert [block.where for block in found if block.language == "text" and code.search(block.text)] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a working folder, small presets, and two sampling steps unless a respacing is given."""
    stand_ins.replace_presets(monkeypatch)
    own = admfast.Pipeline.sample

    def short(self: Any, *images: Any, **settings: Any) -> torch.Tensor:
        if settings.get("respacing") is None and settings.get("quality") is None:
            settings["steps"] = 2
        if self.upsampler is not None:
            settings["upsampler_steps"] = 2
        return own(self, *images, **settings)

    monkeypatch.setattr(admfast.Pipeline, "sample", short)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("page", CODE)
def test_the_code_of_a_page_runs(page, folder, monkeypatch, capsys):
    """Blocks that need an optional library are left to the next test."""
    run_page(page, [block for block in blocks(page) if not block.needs], folder, monkeypatch, capsys)
    commands = "\n".join(c for block in blocks(page) if block.language == "sh" for c in block.commands())
    trained = set(re.findall(r"train (?:diffusion|classifier|upsampler) .*--out (\S+)", commands))
    assert {run for run in trained if not (folder / run / RUN_FILE).exists()} == set()


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_LIBRARIES)
def test_the_code_of_a_page_runs_with_other_libraries(page, folder, monkeypatch, capsys):
    finder = StandIns(["torchvision"])  # can't be imported with a CPU build of torch
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for name in LIBRARIES:
        pytest.importorskip(name, reason="pip install --no-deps -r tests/accelerate/requirements.txt")
    stand_ins.replace_downloads(monkeypatch)
    run_page(page, blocks(page), folder, monkeypatch, capsys)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def run_page(page: str, parts: list[Block], folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Run the blocks of a page in order. Its Python blocks share one namespace."""
    text = text_of(page)
    stand_ins.write_files(folder, text)
    names: dict[str, Any] = {"__name__": "page"}
    if "sample.py" in text or "image_sample" in text:
        names["model"] = stand_ins.program(folder)
        monkeypatch.setenv("MODEL_FLAGS", stand_ins.FLAGS)
    for block in parts:
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(ROOT / page), "exec"), names)
        elif block.language == "sh":
            for command in block.commands():
                run_command(command, block, monkeypatch, capsys)


def run_command(command: str, block: Block, monkeypatch: Any, capsys: Any) -> None:
    """Run a command of a shell block. If it would take hours or change the machine, only check its words."""
    where = f"{block.where}: {command}"
    words = shlex.split(re.sub(r"\$\(\((.*?)\)\)", lambda sum_: str(eval(sum_[1])), command))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    first, *rest = words
    if first == "torchrun":
        first, *rest = words[words.index("-m") + 1 :]
    if first == "admfast":
        short = SHORT.get(rest[0], [])
        if rest[0] == "train" and rest[1] == "export":
            short = []
        elif any(flag in rest for flag in ("--respacing", "--timestep_respacing")):
            short = ["--respacing", "2"]
        elif "--quality" in rest:
            short = []
        if rest[0] == "sample" and ("--upsampler" in rest or rest[1].endswith("-up")):
            short = [*short, "--upsampler-steps", "2"]
        if rest[0] == "app":
            monkeypatch.setattr("admfast.app.server.serve", lambda *arguments: None)
        status = main([*rest, *short])
        assert status == 0, f"{where}: {capsys.readouterr().err}"
    elif first == "make":
        assert set(rest) <= set(MAKE), where
    elif first == "pip":
        check_install(rest, where)
    elif (first, rest[:1]) == ("git", ["clone"]):
        assert rest[1].startswith("https://github.com/"), where
    elif first == "python" and rest[0] == "-m" and rest[1].startswith("bench."):
        check_bench(rest[1], rest[2:], where, monkeypatch, capsys)
    elif first == "python" and rest[0].startswith("examples/"):
        monkeypatch.setattr(sys, "argv", [*rest, "--steps", "2"])
        runpy.run_path(rest[0], run_name="__main__")
    elif first.endswith("python") and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith("tests/")), where
    elif first == "python":
        run_python(command, where)
    else:
        pytest.fail(f"{where}: unknown command")


def run_python(command: str, where: str) -> None:
    """Run a `python` command in a shell, with the published package's names on its path."""
    paths = [str(ROOT), *(["admfast/compat/front"] if "accelerate" not in command else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in paths)}
    shell = f'python() {{ "{sys.executable}" "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-ec", shell], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{where}: {done.stderr[-2000:]}"


def check_install(words: list[str], where: str) -> None:
    """Check that the words after `pip` name existing extras, existing files, or packages of an extra."""
    assert words[0] == "install", where
    known = {re.split(r"[;>= ]", package)[0] for extra in EXTRAS.values() for package in extra}
    for word in words[1:]:
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), where
        elif not word.startswith("-"):
            name, _, extras = re.sub(r"==[0-9.]+$", "", word).rstrip("]").partition("[")
            assert name in {".", "admfast", "dist/admfast-*.whl", "torch", "torchvision", *known}, where
            assert set(filter(None, extras.split(","))) <= set(EXTRAS), where


def check_bench(name: str, words: list[str], where: str, monkeypatch: Any, capsys: Any) -> None:
    """Check that a bench accepts these flags and values, without measuring, which would take minutes."""
    try:
        module = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main([*words, "--help"])
    usage = capsys.readouterr().out
    assert ended.value.code == 0, where
    assert all(word in usage for word in words if word.startswith("--")), where


@pytest.mark.parametrize("text", ["```sh\nadmfast sample nothing\n```\n", "```sh\nrm -r .\n```\n",
                                  "```python\nimport admfast\nadmfast.nothing\n```\n"])  # fmt: skip
def test_a_block_that_does_not_run_fails(text, folder, monkeypatch, capsys):
    monkeypatch.setattr("tests.docs.test_docs_code.text_of", lambda page: text)
    with pytest.raises((AssertionError, pytest.fail.Exception, AttributeError)):
        run_page("README.md", blocks("README.md", text), folder, monkeypatch, capsys)
