"""A tree of the elements of an HTML page, which must be well formed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def text(self) -> str:
        """Return the text within, with single spaces."""
        parts = (child if isinstance(child, str) else child.text() for child in self.children)
        return " ".join(" ".join(parts).split())

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        """Return the elements within of a tag and, if given, a class."""
        found = (element for element in self.walk() if element.tag == tag)
        return [e for e in found if name is None or name in (e.attributes.get("class") or "").split()]

    def by_id(self, name: str) -> Element | None:
        return next((element for element in self.walk() if element.attributes.get("id") == name), None)

    def rows(self) -> list[list[str]]:
        """Return the text of the cells of all rows within."""
        return [[cell.text() for cell in row.children if isinstance(cell, Element)] for row in self.all("tr")]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document")]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} occurs twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """Return the page as a tree. Elements that are not closed fail."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    (root,) = builder.open
    return root


def pixels(image: Element) -> np.ndarray:
    """Return the pixels of an `img` with a data URI, [H, W, C]."""
    kind, _, data = (image.attributes["src"] or "").partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
        assert picture.format == "PNG"
        array = np.asarray(picture)
    assert image.attributes["width"] == str(array.shape[1])
    assert image.attributes["height"] == str(array.shape[0])
    return array if array.ndim == 3 else array[..., None]
