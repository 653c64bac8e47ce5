"""The pages of the documentation and their code blocks."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("README.md", "CONTRIBUTING.md", "bench/README.md", "csrc/README.md", "kernels/README.md")
PAGES = [*BESIDE, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
LIBRARIES = ("azula", "deepinv", "diffusers")  # optional libraries that some blocks need
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*?)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and the line of the page at which the text begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        """Page and line, as errors show them."""
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> set[str]:
        """The optional libraries that the block uses."""
        used = r"\b{0}\.|(import|from) {0}\b|denoiser\(\w+, \"{0}\"\)"
        return {name for name in LIBRARIES if re.search(used.format(name), self.text)}

    def commands(self) -> list[str]:
        """Return the commands of a shell block, one per line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def text_of(page: str) -> str:
    """Return the text of a page, named as in `PAGES`."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the code blocks of a page, in order."""
    text = text_of(page) if text is None else text
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            textwrap.dedent(found["text"]),
        )
        for found in FENCE.finditer(text)
    ]
