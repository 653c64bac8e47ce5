"""The HTML of a report: functions that write a page, tables, images and bars.

Arguments named `html` or `cells` hold HTML; all others are plain text, which is escaped.
"""

from __future__ import annotations

import base64
import html as html_module
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admfast.evaluation.report_style import STYLE
from admfast.files.images import encode_png

# Images with a longer side below SMALL are enlarged by a whole factor, without blending, up to TILE pixels.
SMALL, TILE = 64, 96
_WIDEST = 128  # pixels of the page for other images


@dataclass(frozen=True, eq=False)
class Tile:
    """An image of a report.

    Attributes:
        image: uint8 [H, W, C] with C = 1, 3 or 4.
        alt: what the image is, for those who can't see it.
        file: name of the image, shown when the pointer rests on it.
        caption: HTML below the image; empty for none.
    """

    image: NDArray[np.uint8]
    alt: str
    file: str
    caption: str = ""


def escape(text: object) -> str:
    """Return a value's text as HTML, for content and for quoted attributes.

    Names of files may hold bytes that are no UTF-8; these are written as \\\\udc80 and the like.
    """
    return html_module.escape(str(text).encode("utf-8", "backslashreplace").decode(), quote=True)


def write_page(title: str, html: str) -> str:
    """Return a whole document, whose policy forbids to load anything that is not in it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
{html}
</body>
</html>
"""


def write_section(name: str, title: str, html: str, lead: str = "") -> str:
    """Return a section with a heading, to which the fragment `#name` leads."""
    lead = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{lead}{html}\n</section>'


def write_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[int] = (),
    marked_rows: Sequence[int] = (),
) -> str:
    """Return a table whose first column heads its rows.

    columns: their names. rows: HTML of the cells. numbers: columns that are aligned to the right.
    marked_rows: rows that stand out.
    """
    number = ' class="number"'
    head = "".join(
        f'<th scope="col"{number if i in numbers else ""}>{escape(name)}</th>'
        for i, name in enumerate(columns)
    )
    lines = []
    for index, (first, *cells) in enumerate(rows):
        line = "".join(
            f"<td{number if i in numbers else ''}>{cell}</td>" for i, cell in enumerate(cells, start=1)
        )
        mark = ' class="ours"' if index in marked_rows else ""
        lines.append(f'<tr{mark}><th scope="row">{first}</th>{line}</tr>')
    body = "\n".join(lines)
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>\n{table}\n</table></div>'


def write_tile(tile: Tile, side: int) -> str:
    """Return a figure; an image with a longer side above `side` pixels is reduced to it."""
    image = shrink(tile.image, side)
    height, width = image.shape[:2]
    data = base64.b64encode(encode_png(image)).decode()
    small = ' class="small"' if is_small(image) else ""
    caption = f"<figcaption>{tile.caption}</figcaption>" if tile.caption else ""
    return (
        f'<figure><img{small} src="data:image/png;base64,{data}" width="{width}" height="{height}"'
        f' alt="{escape(tile.alt)}" title="{escape(tile.file)}">{caption}</figure>'
    )


def write_tiles(tiles: Sequence[Tile], side: int) -> str:
    """Return figures in rows of 8; small images are enlarged by a whole factor."""
    longest = max(max(tile.image.shape[:2]) for tile in tiles)
    captions = " captions" if any(tile.caption for tile in tiles) else ""
    figures = "\n".join(write_tile(tile, side) for tile in tiles)
    width = longest * (TILE // longest) if longest < SMALL else _WIDEST
    return f'<div class="tiles{captions}" style="--tile: {width}px">\n{figures}\n</div>'


def is_small(image: NDArray[np.uint8]) -> bool:
    """Tell whether an image is enlarged without blending."""
    return max(image.shape[:2]) < SMALL


def write_card(tiles: Iterable[Tile], side: int) -> str:
    """Return figures that belong together, in one row."""
    return f'<div class="card">{"".join(write_tile(tile, side) for tile in tiles)}</div>'


def write_cards(cards: Sequence[str], name: str = "cards") -> str:
    """Return cards side by side. name: of their style."""
    # Without white space between them, so that cards of half a line fit into it.
    return f'<div class="{name}">{"".join(cards)}</div>'


def write_bars(counts: dict[str, int]) -> str:
    """Return a bar for each name, relative to the largest count."""
    longest = max(counts.values()) or 1
    bars = "\n".join(
        f'<li><span>{escape(name)}</span> <span class="count">{count:,}</span><span class="track"'
        f' aria-hidden="true"><i style="width: {100 * count / longest:.4g}%"></i></span></li>'
        for name, count in counts.items()
    )
    return f'<ul class="bars">\n{bars}\n</ul>'


def write_profile(counts: Sequence[int], alt: str) -> str:
    """Return a drawing of many counts side by side, from the first to the last."""
    top = max(counts) or 1
    steps = "".join(f"V{100 - 95 * count / top:.4g}h1" for count in counts)
    return (
        f'<svg class="profile" role="img" aria-label="{escape(alt)}" viewBox="0 0 {len(counts)} 100"'
        f' preserveAspectRatio="none"><path d="M0 100{steps}V100Z"/></svg>'
    )


def shrink(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image [H, W, C] whose longer side has at most `side` pixels, reduced by Pillow's Lanczos."""
    if max(image.shape[:2]) <= side:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array
