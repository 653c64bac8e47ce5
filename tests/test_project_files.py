"""Tests that files for building, testing, bug reports and citing parse and agree with the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import admfast

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
[OLDEST] = [need.removeprefix("torch>=") for need in PROJECT["dependencies"] if need.startswith("torch>=")]


def parsed(path: str) -> Any:
    """Return the content of a YAML file. The parser is a development requirement."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_read_without_importing_the_package():
    record = ROOT / "admfast" / "_build_info.json"
    before = record.exists() and record.read_bytes()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "ADMFAST_BUILD": "none"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1:] == [admfast.__version__], done.stderr[-2000:]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "setuptools" in imported and not {"admfast", "torch"} & imported
    assert "version" not in PROJECT and (record.exists() and record.read_bytes()) == before


def test_the_workflow_runs_what_the_project_promises():
    jobs = parsed(".github/workflows/test.yml")["jobs"]
    told = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == told
    assert f">={told[0]}" == PROJECT["requires-python"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    targets = {step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")}
    assert targets == {"lint", "test-oldest"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)
    assert OLDEST in jobs["oldest"]["name"]


def test_the_oldest_torch_is_the_one_that_is_allowed():
    assert re.search(rf'^OLDEST_PAIR := "torch=={re.escape(OLDEST)}\.\*"', MAKEFILE, re.M)
    smoke = re.search(r"^SMOKE := ((?:.*\\\n)*.*)", MAKEFILE, re.M)
    paths = re.findall(r"tests/\S+", smoke[1])
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def test_a_report_of_a_bug_needs_what_info_prints():
    form = parsed(".github/ISSUE_TEMPLATE/bug.yml")
    [asked] = [field for field in form["body"] if "`admfast info`" in field["attributes"]["label"]]
    assert asked["validations"]["required"]


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*")), ids=lambda path: path.name)
def test_a_form_has_what_the_site_asks_for(path):
    form = parsed(str(path))
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and all(field["type"] == "textarea" for field in form["body"])


def test_software_and_paper_are_cited():
    cited = parsed("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert [author["name"] for author in cited["authors"]] == [a["name"] for a in PROJECT["authors"]]
    assert cited["license"] == PROJECT["license"]
    [paper] = cited["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2105.05233" in paper["identifiers"][0]["value"]
