"""The table of a kernels file: a line a shape, providers side by side, ratios of ours to each; and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.ceilings.report import conditions
from bench.results import Row, markdown_table

TITLES = {
    "group_norm_silu": "GroupNorm + SiLU (+ adaptive, + resampling), forward",
    "group_norm_silu_grad": "GroupNorm + SiLU, gradient in the input with frozen parameters",
    "attention": "Attention",
    "attention_grad": "Attention, gradient",
    "conv": "Convolution with frozen weights and a bias",
    "conv_grad": "Convolution with frozen weights, gradient in the input",
    "sampler_step": "One guided sampler update, noise included",
}
OTHERS = (
    "copy", "eager", "eager channels-first", "torch.compile", "apex", "liger", "reference",
)  # fmt: skip
LIBRARIES = ("attention", "attention_grad")  # every provider is a library's: the ratio is to the best of them


def lines_of(kind: str, rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows of one kind by shape and dtype: provider to row."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            key = (*row["shape"].values(), row["dtype"])
            found.setdefault(key, {})[row["provider"]] = row
    return list(found.values())


def ours_of(line: dict[str, Row]) -> Row | None:
    """The fastest row that isn't another's."""
    own = [row for name, row in line.items() if name not in OTHERS and row["status"] == "ok"]
    return min(own, key=lambda row: row["ms"], default=None)


def ratio(line: dict[str, Row], to: str) -> float | None:
    """How many times faster ours is than `to`; for a copy, the share of its bandwidth."""
    ours, other = ours_of(line), line.get(to)
    if ours is None or other is None or other["status"] != "ok":
        return None
    return other["ms"] / ours["ms"]


def section(kind: str, rows: Sequence[Row]) -> str:
    """The table of one kind."""
    lines = lines_of(kind, rows)
    shape_names = list(lines[0].values())[0]["shape"]
    providers = list(dict.fromkeys(name for line in lines for name in line))
    compared = [name for name in providers if name in OTHERS]
    rate = "gbps" if any("gbps" in row for line in lines for row in line.values()) else "tflops"
    unit = {"gbps": "GB/s", "tflops": "TFLOP/s"}[rate]
    header = [*shape_names, "dtype", *(f"{name} ms" for name in providers), unit]
    header += [("share of copy" if name == "copy" else f"x {name}") for name in compared] + [
        "error",
        "waited",
    ]
    cells: list[list[object]] = []
    for line in lines:
        some, ours = next(iter(line.values())), ours_of(line)
        out: list[object] = [*some["shape"].values(), some["dtype"]]
        for name in providers:
            row = line.get(name)
            out.append(None if row is None else row["ms"] if row["status"] == "ok" else row["status"])
        out.append(ours and ours.get(rate))
        for name in compared:
            value = ratio(line, name)
            out.append(value if value is None or name != "copy" else f"{value:.0%}")
        out += [ours and ours.get("rel_err"), max((row.get("waited") or 0) for row in line.values())]
        cells.append(out)
    return markdown_table(header, cells)


def render(rows: Sequence[Row]) -> str:
    """Markdown for all rows of one file, a section per device where there are several."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"# Kernels: {device}", conditions(mine)]
        for kind in dict.fromkeys(row["kind"] for row in mine):
            parts += [f"## {TITLES.get(kind, kind)}", section(kind, mine)]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], folder: Path) -> None:
    """`kernels.png`: how many times faster ours is than eager and torch.compile, a dot a shape."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'admfast[bench]')")
        return
    kinds = [kind for kind in TITLES if kind not in LIBRARIES and lines_of(kind, rows)]
    if not kinds:
        return
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        lines = lines_of(kind, rows)
        for to in ("eager", "torch.compile"):
            values = [(i, ratio(line, to)) for i, line in enumerate(lines)]
            points = [(i, value) for i, value in values if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ".", label=f"over {to}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=kind, xlabel="shape (a row of the table)", ylabel="times faster", yscale="log")
        axis.legend()
    figure.suptitle(rows[0]["device"])
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=110)
