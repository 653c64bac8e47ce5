"""Tests that the site builds without warnings, lists every public name, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import admfast
import admfast.compat.guided_diffusion
from tests.docs.pages import ROOT

pytest.importorskip("mkdocs", reason="the docs' packages aren't installed: pip install -e '.[docs]'")
# Modules whose public names must all be in the reference. The training page lists its names one by one.
MODULES = (
    "admfast",
    "admfast.accelerate",
    "admfast.solvers",
    "admfast.sampling.guides",
    "admfast.ops",
    "admfast.models",
    "admfast.checkpoints",
    "admfast.diffusion",
    "admfast.engine.options",
    "admfast.sampling.request",
)
# Modules of `compat` that the published package doesn't have; they run its loops.
OURS = {"prepared_loops", "change_guard"}


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site and return its folder."""
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(
    "text", ["[a page](nowhere.md)", "[a place](index.md#nowhere)", "::: admfast.nothing"]
)
def test_a_broken_link_or_name_fails(text, tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# Title\n\n{text}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: pages\nhooks: []\nnav: [index.md]\n")
    assert build(config, tmp_path / "out").returncode != 0
    (tmp_path / "pages" / "index.md").write_text("# Title\n\n[the title](#title)\n")
    done = build(config, tmp_path / "out")
    assert done.returncode == 0, done.stderr


# Public names


def documented(site: Path) -> set[str]:
    """Return the dotted names in the site's inventory, which are those of the reference."""
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a module with their values."""
    home = module.__name__
    homes = {name: getattr(value, "__module__", None) or "" for name, value in vars(module).items()}
    # Without `__all__`, the public names of a package are those that its files define.
    own = [name for name, place in homes.items() if place == home or place.startswith(f"{home}.")]
    for name in getattr(module, "__all__", own):
        if not name.startswith("_"):
            yield name, getattr(module, name)


def members(value: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines, with the functions behind them."""
    for name, member in vars(value).items():
        if isinstance(member, property | cached_property):
            member = member.fget if isinstance(member, property) else member.func
        member = getattr(member, "__func__", member)
        field = name in getattr(value, "__dataclass_fields__", ())
        if not name.startswith("_") and not field and inspect.isroutine(member):
            yield name, member


def described(value: Any) -> bool:
    """Tell whether a value has a docstring other than the signature that a dataclass generates."""
    text = (value.__doc__ or "").strip()
    return bool(text) and not (inspect.isclass(value) and text.startswith(f"{value.__name__}("))


def lacking(modules: list[Any], known: set[str]) -> list[str]:
    """Return the public names that lack a docstring or an entry in the reference."""
    found = []
    for module in modules:
        for name, value in public(module):
            ours = getattr(value, "__module__", "").partition(".")[0] == module.__name__.partition(".")[0]
            if ours and (inspect.isclass(value) or inspect.isroutine(value)):
                homes = {f"{module.__name__}.{name}", f"{value.__module__}.{name}"}
                if not described(value) or not homes & known:
                    found.append(f"{module.__name__}.{name}")
                if inspect.isclass(value):
                    for member, function in members(value):
                        if not described(function) or not {f"{home}.{member}" for home in homes} & known:
                            found.append(f"{module.__name__}.{name}.{member}")
    return found


def test_every_public_name_is_in_the_reference(site):
    modules = [importlib.import_module(name) for name in MODULES]
    assert lacking(modules, documented(site)) == []
    errors = {f"admfast.errors.{error.__name__}" for error in admfast.AdmfastError.__subclasses__()}
    assert {name for name in errors if hasattr(admfast.errors, name.rpartition(".")[2])} <= documented(site)


def test_a_line_of_a_docstring_is_not_shown_as_a_box(site):
    """`Source: ...` with an indented second line would become a box with the first line as its title."""
    pages = sorted((site / "reference").glob("*.html"))
    boxes = {page.name: re.findall(r'<details class="([\w -]+)"', page.read_text("utf-8")) for page in pages}
    assert boxes and not any(boxes.values()), boxes


def test_every_module_of_the_published_package_is_in_the_reference(site):
    package = admfast.compat.guided_diffusion
    names = {entry.name for entry in pkgutil.iter_modules(package.__path__)} - OURS
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]
    # Methods are left out: they are the published ones, and the published code documents them.
    assert [name for name in lacking(modules, documented(site)) if name.count(".") == 4] == []


def test_a_name_without_docstring_or_place_is_found():
    module = type(sys)("made")

    def bare() -> None: ...

    def told() -> None:
        """Do nothing."""

    for function in (bare, told):
        function.__module__ = "made"
        setattr(module, function.__name__, function)
    assert lacking([module], {"made.bare", "made.told"}) == ["made.bare"]
    assert lacking([module], {"made.bare"}) == ["made.bare", "made.told"]


# Addresses that pages load


class Loads(HTMLParser):
    """A parser that collects the addresses a page loads by itself, which excludes links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag != "a" and (tag != "link" or given.get("rel") not in ("canonical", "next", "prev")):
            loaded = ("src", "srcset", "href", "data", "poster")
            self.found += [given[name] for name in loaded if name in given]
        self.found += re.findall(r"url\(([^)]*)\)", given.get("style", ""))


def elsewhere(address: str) -> bool:
    """Tell whether an address is on another machine."""
    return re.match(r"[\"']?\s*(\w+:)?//", address) is not None


def loads(page: str) -> list[str]:
    """Return the addresses on other machines that a page loads."""
    parser = Loads()
    parser.feed(page)
    return [address for address in parser.found if elsewhere(address)]


def test_pages_load_nothing_from_another_machine(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert loads(text) == [], page
        assert 'class="mermaid"' not in text, f"{page}: the theme would fetch a program to draw it"
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"url\(([^)]*)\)|@import\s+([^;]+);", sheet.read_text(encoding="utf-8"))
        assert not any(elsewhere(address) for pair in addresses for address in pair), sheet


def test_an_address_on_another_machine_is_found():
    for text in (
        '<script src="https://a.b/c.js"></script>',
        '<link rel="stylesheet" href="//a.b/c.css">',
        '<img src="http://a.b/c.png">',
        '<div style="background: url(https://a.b/c.png)">',
    ):
        assert loads(text), text
    assert loads('<a href="https://a.b">x</a><img src="pictures/a.png"><script src="../a.js"></script>') == []
