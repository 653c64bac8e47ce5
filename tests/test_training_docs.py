"""The commands of docs/training.md run as they stand, one after another."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from admfast.checkpoints.snapshots import RUN_FILE
from admfast.cli.main import main

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", DOCS, re.DOTALL))
COMMANDS = re.findall(r"^(?:torchrun .* -m )?admfast (.*)$", BLOCKS, re.MULTILINE)
SHORT = ["--steps", "2", "--batch-size", "2", "--grid-every", "0"]  # the last value of an option counts


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """In one process, with runs of two steps without grids, and images of two steps."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        words = shlex.split(command)
        trains = words[0] == "train" and words[1] != "export"
        short = SHORT if trains else ["--steps", "2"] if words[0] == "sample" else []
        assert main([*words, *short]) == 0, f"{command}: {capsys.readouterr().err}"
    made = {path.parent.name for path in Path("runs").glob(f"*/{RUN_FILE}")}
    assert made == set(re.findall(r"--out runs/(\w+)", BLOCKS)) and made
