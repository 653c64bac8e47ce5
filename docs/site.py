"""Add the repository's other pages to the site: the README as its first page, notes, measured rows.

Links are written for readers of the repository. This hook changes each into a link to the file's place in the
site. MkDocs calls the functions `on_...` (see `hooks` in mkdocs.yml).
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
ROWS = "bench/results/"  # tables of a thousand numbers: a search would find them before any sentence
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?=[)#])")
# In a class's list of attributes, mkdocstrings reads "a, b: text" as the attribute "a," of the type "b".
PAIR = re.compile(r"(?P<first>\w+),</span></code></b>\s*\(<code><span[^>]*>(?P<second>\w+)</span></code>\)")


def place_in_site(path: str) -> str:
    """Return where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_config(config: Any) -> Any:
    """Leave out the page for missing addresses: only a server shows it."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = place_in_site(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change the links of a page, and say which parts of the window it needs."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri.startswith(ROWS):
        page.meta["search"] = {"exclude": True}
        page.meta["hide"] = ["navigation", "toc"]  # wide tables
    elif page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would list this page only

    def changed(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(source, link["path"]))
        return posixpath.relpath(place_in_site(path), here or ".")

    return LINK.sub(changed, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Show two attributes that share one text as two names."""
    return PAIR.sub(r"\g<first>, \g<second></span></code></b>", output)
