"""The tables and the plot of a sampling bench's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.ceilings.report import conditions
from bench.results import Row, ceiling_of, markdown_table
from bench.sampling.diffusers_unet import NAME
from bench.sampling.published import FORMS

TITLES = {
    "guided_step": "A guided step: network, classifier gradient, update",
    "step": "A step without guidance: network, update",
    "start": "Until the first image of a fresh process",
    "ablation_added": "What each part adds, one after another",
    "ablation_without": "The whole engine less one part",
    "matmul": "Matrix products in the same run",
}
# What the torso multiplies in, whose product rate is the ceiling.
PRODUCT = {"auto": "bf16"}
Value = Callable[[Row, Iterable[Row]], Any]


def render(rows: Sequence[Row]) -> str:
    """Markdown for all rows of one file, a section per device where there are several."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"# Sampling: {device}", conditions(mine)]
        sections = {"start": start_table, "ablation_added": added_table, "ablation_without": without_table}
        for kind, title in TITLES.items():
            same = [row for row in mine if row["kind"] == kind]
            if same:
                parts += [f"## {title}", sections.get(kind, step_table)(same, mine)]
    return "\n\n".join(parts) + "\n"


def step_table(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """One line a contender; columns that nobody fills are left out."""
    if rows[0]["kind"] == "matmul":
        return _products(rows)
    header = ["preset", "batch", "who", "precision", "ms a step", "20-80 %", *COLUMNS]
    lines = []
    for row in sorted(rows, key=lambda row: (row["shape"]["system"], row["shape"]["batch"])):
        line: list[Any] = [row["shape"]["system"], row["shape"]["batch"], row["provider"], row["dtype"]]
        if row["status"] == "ok":
            line += [row["ms"], f"{row['ms_q20']:.3g}-{row['ms_q80']:.3g}"]
            line += [value(row, every) for value in COLUMNS.values()]
        else:
            line += [row["status"], str(row.get("reason", ""))[:120], *[None] * len(COLUMNS)]
        lines.append(line)
    filled = [i for i in range(len(header)) if any(line[i] not in (None, "") for line in lines)]
    return markdown_table([header[i] for i in filled], [[line[i] for i in filled] for line in lines])


def share_of_product(row: Row, every: Iterable[Row]) -> str | None:
    """The counted operations' rate over that of a matrix product of the same precision in the same run."""
    top = ceiling_of(every, "matmul", PRODUCT.get(row["dtype"], row["dtype"]), row["device"])
    return f"{row['tflops'] / top:.0%}" if top else None


def faster_than(peer: str) -> Value:
    """How many times faster than a peer; nothing for the peer itself."""

    def value(row: Row, every: Iterable[Row]) -> str | None:
        for name, ratio in row.get("faster_than", {}).items():
            if name.rpartition(" ")[0] == peer:
                return f"{ratio:.2f}"
        return None

    return value


def of_row(name: str) -> Value:
    """A field of the row as it stands."""
    return lambda row, every: row.get(name)


# What a step's line says beside its name and time.
COLUMNS: dict[str, Value] = {
    "images/s": of_row("images_per_s"),
    "TFLOP/s": of_row("tflops"),
    "of product": share_of_product,
    **{f"x {form.name}": faster_than(form.name) for form in FORMS.values()},
    f"x {NAME}": faster_than(NAME),
    "host ms": of_row("host_ms"),
    "CPU ms": of_row("cpu_ms"),
    "launches": of_row("launches"),
    "kernels": of_row("kernels"),
    "peak MB": of_row("peak_mb"),
    "error": lambda row, every: f"{row['rel_err']:.1e}",
    "waited": of_row("waited"),
    "runs on": of_row("implementation"),
}


def start_table(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """Seconds; weights are made in memory, which is not counted."""
    header = ("preset", "batch", "who", "precision", "steps", "empty caches", "kept caches", "imports")
    header += ("preparing", "first image", "second image")
    names = ("cold_s", "kept_s", "import_s", "prepare_s", "first_s", "warm_s")
    lines = []
    for row in rows:
        shape = row["shape"]
        line = [shape["system"], shape["batch"], row["provider"], row["dtype"], shape["steps"]]
        told = [row.get(name) for name in names]
        if row["status"] != "ok":
            told = [f"{row['status']}: {str(row.get('reason'))[:120]}", *[None] * (len(names) - 1)]
        lines.append(line + told)
    return markdown_table(header, lines)


def ladder(rows: Sequence[Row]) -> list[tuple[Row, float, float | None]]:
    """For each form in turn: its row, its milliseconds, and the part of the first one's that it took away.

    Milliseconds are the ratio to the whole engine, taken in turns, times the whole engine's median of all.
    """
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return []
    middle = sorted(row["whole_ms"] for row in good)[len(good) // 2]
    out: list[tuple[Row, float, float | None]] = []
    for row in good:
        ms = row["ratio"] * middle
        gain = (out[-1][1] - ms) / out[0][1] if out else None
        out.append((row, ms, gain))
    return out


def added_table(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """A ladder for every preset and batch; gains are parts of the plain step's time."""
    header = ("preset", "batch", "precision", "part", "ms a step", "saves", "predicted", "error")
    lines = []
    for group in groups_of(rows):
        for row, ms, gain in ladder(group):
            shape, guess = row["shape"], row.get("predicted")
            said = [None if value is None else f"{value:+.1%}" for value in (gain, guess)]
            lines.append(
                [shape["system"], shape["batch"], row["dtype"], row["provider"], ms, *said, row["rel_err"]]
            )
        lines += [_failed(row, len(header)) for row in group if row["status"] != "ok"]
    return markdown_table(header, lines)


def without_table(rows: Sequence[Row], every: Sequence[Row]) -> str:
    """How much longer the step takes without each part."""
    header = ("preset", "batch", "precision", "without", "ms a step", "whole engine ms", "longer by", "error")
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append(_failed(row, len(header)))
            continue
        shape, longer = row["shape"], f"{row['ratio'] - 1:+.1%}"
        line = [shape["system"], shape["batch"], row["dtype"], row["provider"]]
        lines.append([*line, row["ms"], row["whole_ms"], longer, row["rel_err"]])
    return markdown_table(header, lines)


def _failed(row: Row, width: int) -> list[Any]:
    start = [row["shape"]["system"], row["shape"]["batch"], row["dtype"], row["provider"], row["status"]]
    return [*start, str(row.get("reason", ""))[:120], *[None] * (width - 6)]


def groups_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same preset, batch and precision together."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["shape"]["system"], row["shape"]["batch"], row["dtype"]), []).append(row)
    return list(found.values())


def _products(rows: Sequence[Row]) -> str:
    lines = [(dtype, ceiling_of(rows, "matmul", dtype)) for dtype in dict.fromkeys(r["dtype"] for r in rows)]
    return markdown_table(("precision", "TFLOP/s"), [line for line in lines if line[1]])


def plot(rows: Sequence[Row], folder: Path) -> None:
    """`waterfall.png`: a ladder for every preset and batch that was taken apart."""
    groups = [
        group for group in groups_of([r for r in rows if r["kind"] == "ablation_added"]) if ladder(group)
    ]
    if not groups:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'admfast[bench]')")
        return
    height = max(len(group) for group in groups)
    size = (6.5 * len(groups), 1.4 + 0.34 * height)
    figure, axes = pyplot.subplots(1, len(groups), figsize=size, squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        _waterfall(axis, group)
    figure.tight_layout()
    figure.savefig(folder / "waterfall.png", dpi=120)
    pyplot.close(figure)


def _waterfall(axis: Any, group: Sequence[Row]) -> None:
    """Bars from the step before to this one, measured beside predicted."""
    steps = ladder(group)
    first, guessed = steps[0][1], steps[0][1]
    for i, (row, ms, _) in enumerate(steps):
        before = steps[i - 1][1] if i else 0.0
        colour = "#3a6ea5" if ms < before or not i else "#b5523b"
        axis.barh(i, ms - before, left=before, height=0.6, color=colour)
        axis.text(max(ms, before) + 0.01 * first, i, f"{ms:.3g}", va="center", fontsize=8)
        guess = row.get("predicted")
        if guess is not None:
            guessed -= guess * first
            label = "predicted" if not axis.get_legend_handles_labels()[0] else None
            axis.plot(guessed, i, "|", color="black", markersize=12, label=label)
    axis.set_yticks(range(len(steps)), [row["provider"] for row, _, _ in steps], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(ms for _, ms, _ in steps))
    shape = steps[0][0]["shape"]
    axis.set(xlabel="ms a step", title=f"{shape['system']}, batch {shape['batch']}, {steps[0][0]['dtype']}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", fontsize=8)
