"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, indent: str = "") -> str:
    """Return rows of cells as aligned lines: two spaces between columns, no spaces at the end.

    Args:
        rows: cells of every row; all rows have the same number.
        header: names of the columns, underlined.
        indent: text before every line.
    """
    lines = [list(row) for row in rows]
    if header is not None:
        widths = [max(len(row[i]) for row in [list(header), *lines]) for i in range(len(header))]
        lines = [list(header), ["-" * width for width in widths], *lines]
    if not lines:
        return ""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )
