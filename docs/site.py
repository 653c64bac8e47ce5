"""Take the repository's own pages into the site: the README as its first page, notes, measured rows.

Links are written for readers of the repository. Here each is turned to the place of its file in the site.
MkDocs calls `on_files` and `on_page_markdown` (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "*/README.md",
    "bench/results/**/*.md",
    "bench/results/**/*.json",
    "bench/results/**/*.png",
    "examples/*.py",
)
ROWS = "bench/results/"  # tables of a thousand numbers, which a search would find before any sentence
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?=[)#])")


def place_in_site(path: str) -> str:
    """Return where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = place_in_site(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page to the places in the site."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri.startswith(ROWS):
        page.meta["search"] = {"exclude": True}

    def turned(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(source, link["path"]))
        return posixpath.relpath(place_in_site(path), here or ".")

    return LINK.sub(turned, markdown)
