"""The table of a ceilings file: first the ceilings, then every row by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.results import CEILINGS, Row, ceiling_of, markdown_table

TITLES = {
    "matmul": "Matrix products",
    "copy": "Copies",
    "copy_warm": "Copies, L2 warm",
    "conv3x3": "3x3 convolutions",
    "conv1x1": "1x1 convolutions",
    "groupnorm_silu": "GroupNorm + SiLU (two reads and one write counted)",
    "attention": "Attention",
    "sampler": "Published sampler update",
    "graph_node": "Nodes of a CUDA graph",
    "launch": "Launches by the host",
}
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s", "us_per_node": "us a node"}


def render(rows: Sequence[Row]) -> str:
    """Markdown for all rows of one file, a section per device where there are several."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"# Ceilings: {device}", conditions(mine), summary(mine)]
        for kind in [*TITLES, *sorted({row["kind"] for row in mine} - set(TITLES))]:
            same = [row for row in mine if row["kind"] == kind]
            if same:
                parts += [f"## {TITLES.get(kind, kind)}", section(kind, same, mine)]
    return "\n\n".join(parts) + "\n"


def conditions(rows: Sequence[Row]) -> str:
    """Versions, revision, dates and load of these rows, in one paragraph."""

    def several(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)) or "-"

    loads = [row["load"][0] for row in rows if row.get("load")]
    dates = sorted(row["date"] for row in rows if row.get("date"))
    changed = " with uncommitted changes" if any(row.get("dirty") for row in rows) else ""
    text = f"torch {several('torch')}, triton {several('triton')}, CUDA {several('cuda')}, "
    text += f"Python {several('python')}; "
    text += f"revision {several('revision')}{changed}. "
    if dates:
        text += f"Taken {dates[0]} to {dates[-1]}. "
    if loads:
        text += f"Load average (1 min) {min(loads)} to {max(loads)}. "
    if any(row.get("threads") for row in rows):
        text += f"{several('isa')}. "
    waits = [row["waited"] for row in rows if row.get("waited") is not None and row.get("threads")]
    if waits:
        text += (
            f"{sum(w > 0.05 for w in waits)} of {len(waits)} rows waited for a CPU over 5 % of their time. "
        )
    power = [row["power_w"] for row in rows if row.get("power_w") is not None]
    clocks = [row["sm_mhz"] for row in rows if row.get("sm_mhz") is not None]
    if power and clocks:
        text += f"Just after a row: {min(power):.0f} to {max(power):.0f} W, "
        text += f"{min(clocks):.0f} to {max(clocks):.0f} MHz. "
    return text.strip()


def summary(rows: Sequence[Row]) -> str:
    """The best of every kind and dtype: what `bench.results.ceiling` returns."""
    lines: list[Sequence[object]] = []
    for kind, (column, pick) in CEILINGS.items():
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["kind"] == kind):
            same = [row for row in rows if row["kind"] == kind and row["dtype"] == dtype]
            value = ceiling_of(same, kind, dtype)
            if value is None:
                reason = next((row.get("reason") for row in same if row.get("reason")), "no row")
                lines.append((kind, dtype, "none", str(reason)[:120]))
            else:
                best = {"max": "highest", "min": "lowest", "largest": "at the largest size"}[pick]
                lines.append((kind, dtype, f"{value:.4g} {UNITS[column]}", best))
    return markdown_table(("kind", "dtype", "ceiling", "which"), lines)


def section(kind: str, rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """All rows of one kind; the ratio's denominator is the same dtype's matrix product, or the copy."""
    shape_names = list(dict.fromkeys(name for row in rows for name in row["shape"]))
    extra = [name for name in ("operations", "output_layout") if any(name in row for row in rows)]
    columns = [name for name in UNITS if any(name in row for row in rows)]
    wait = ["waited"] if any(row.get("threads") for row in rows) else []
    peak = ["peak_mb"] if any("peak_mb" in row for row in rows) else []
    header = [
        *shape_names,
        "dtype",
        "provider",
        "ms",
        "20-80 %",
        *(UNITS[c] for c in columns),
        "of ceiling",
        "error",
    ]
    header += [*wait, *peak, *extra, "models"]
    lines: list[list[object]] = []
    for row in rows:
        line: list[object] = [row["shape"].get(name) for name in shape_names]
        line += [row["dtype"], row["provider"]]
        if row["status"] == "ok":
            line += [row["ms"], f"{row['ms_q20']:.3g}-{row['ms_q80']:.3g}"]
            line += [row.get(c) for c in columns]
            line += [of_ceiling(row, all_rows), f"{row['rel_err']:.1e}" if "rel_err" in row else None]
            line += [row.get(c) for c in (*wait, *peak, *extra)]
        else:
            line += [row["status"], str(row.get("reason", ""))[:120]]
            line += [None] * (len(columns) + 2 + len(wait) + len(peak) + len(extra))
        lines.append([*line, row.get("models")])
    filled = [i for i in range(len(header)) if any(line[i] is not None for line in lines)]
    return markdown_table([header[i] for i in filled], [[line[i] for i in filled] for line in lines])


def of_ceiling(row: Row, rows: Iterable[Row]) -> str | None:
    """The row's rate over its ceiling in percent: products and attention over matmul, traffic over copy."""
    rows = list(rows)
    if row["kind"] in ("conv3x3", "conv1x1", "attention"):
        top, rate = ceiling_of(rows, "matmul", row["dtype"]), row.get("tflops")
    elif row["kind"] in ("groupnorm_silu", "sampler"):
        top, rate = ceiling_of(rows, "copy"), row.get("gbps")
    else:
        return None
    return f"{100 * rate / top:.0f} %" if top and rate else None
