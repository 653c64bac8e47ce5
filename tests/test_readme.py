"""The README's Python runs as it stands, its commands have these options, its table has every op.

So have the commands of docs/export.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import admfast
from admfast.ops import TABLES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPORT = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run(monkeypatch):
    """The second one with the digits in the place of the released files, which are not here."""
    digits, released = BLOCKS
    names: dict[str, object] = {}
    own = admfast.Pipeline.sample
    # Every step of every image would take half a minute: a call that names no steps gets two.
    monkeypatch.setattr(
        admfast.Pipeline,
        "sample",
        lambda self, *images, steps=None, **settings: own(self, *images, steps=2, **settings),
    )
    exec(digits, names)
    assert names["images"].shape == (10, 32, 32, 1) and names["images"].dtype == torch.uint8
    assert names["x0"].requires_grad and names["noise"].shape == (1, 1, 32, 32)

    load = admfast.load

    def stand_in(name, weights):
        assert (name, weights) == ("imagenet256", "models/") and name in admfast.models.presets.SYSTEMS
        pipe = load("digits32", device="cpu")
        monkeypatch.setattr(
            type(pipe),
            "sample",
            lambda self, classes, seeds, **settings: own(
                self, [c % 10 for c in classes], seeds, **{**settings, "steps": 2}
            ),
        )
        return pipe

    monkeypatch.setattr(admfast, "load", stand_in)
    exec(released, {"admfast": admfast})


@pytest.mark.parametrize(
    "line",
    re.findall(r"^admfast (?:sample|train|export|inspect|fetch|models).*$", README + EXPORT, re.M),
)
def test_the_options_of_the_commands_exist(line):
    from admfast.cli.commands import app

    name, *words = line.split()[1:]
    command = app.get_command(None, name)
    command = getattr(command, "commands", {}).get(words[0] if words else "", command)
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<=\s)--[\w-]+", line.partition("#")[0])) <= known


@pytest.mark.parametrize("op", TABLES)
def test_the_table_of_ops_names_every_implementation(op):
    (row,) = (line for line in README.splitlines() if re.match(rf"\| [^|]*`{op}`", line))
    assert {name for name in TABLES[op].names() if name != "reference"} <= set(re.findall(r"`([\w-]+)`", row))
