"""Tables of a bench's rows: one section per kind, one line per row, without columns that are empty.

`python -m bench.report FOLDER` writes the tables of all rows in a folder again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.results import CEILINGS, PRODUCT_DTYPE, Row, ceiling, markdown_table, read_rows

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
    "group_norm_silu": "GroupNorm + SiLU (+ adaptive, + resampling), forward",
    "group_norm_silu_grad": "GroupNorm + SiLU, gradient in the input with frozen parameters",
    "attention_grad": "Attention, gradient",
    "conv": "Convolution with frozen weights and a bias",
    "conv_grad": "Convolution with frozen weights, gradient in the input",
    "sampler_step": "One guided sampler update, noise included",
    "guided_step": "A guided step: network, classifier gradient, update",
    "step": "A step without guidance: network, update",
    "train_step": "A training step: loss, gradients, AdamW, an average of the weights",
    "program": "Cores of other programs, by their own network and by the accelerated one",
    "threads": "A guided step by its number of threads, beside so many busy processes",
    "training_jpeg": "Training images from JPEG files",
    "training_png": "Training images from PNG files",
    "training_cache": "Training images from the decoded cache",
    "start": "Seconds until the first image of a fresh process; making weights is not counted",
    "ablation_added": "What each part adds, one after another",
    "ablation_without": "The whole engine less one part",
    "profile": "Where a step's time goes: ms (share of the profiled step)",
}
# Providers to compare with: column "x eager" says how many times as fast as eager a row is.
BASELINES: tuple[str, ...] = ("copy", "eager", "eager channels-first", "torch.compile")
BASELINES += ("published", "published, channels-last", "published, compiled", "program")
# The kind whose ceiling limits each kind: matrix products for operations, copies for bytes.
CEILING_KIND = {"conv3x3": "matmul", "conv1x1": "matmul", "attention": "matmul", "guided_step": "matmul"}
CEILING_KIND |= {"step": "matmul", "train_step": "matmul", "groupnorm_silu": "copy", "sampler": "copy"}
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s", "us_per_node": "us a node"}
# What a file of rows of steps needs to have a row of each peer, and a bench to have tables of a GPU.
PUBLISHED_NEEDS = "--guided-diffusion PATH"
PEER_NEEDS = {
    "published": PUBLISHED_NEEDS,
    "published, channels-last": PUBLISHED_NEEDS,
    "published, compiled": f"{PUBLISHED_NEEDS} --peers compiled",
}
PEERS_OF = {"guided_step": PEER_NEEDS, "step": PEER_NEEDS | {"openvino": "--peers openvino"}}
GPU_BENCHES = ("ceilings", "kernels", "sampling", "profile")  # stages of `make gpu`
LISTED_OPERATIONS = 12  # operations that are listed for each profiled step

Value = Callable[[Row, Sequence[Row]], Any]


def share_of_ceiling(row: Row, rows: Sequence[Row]) -> str | None:
    """Return a row's rate divided by its ceiling in the same file, which for a step is a matrix product's.

    A CPU's step is compared with products that were timed in turns with it.
    """
    if "product_share" in row:
        return f"{row['product_share']:.0%}"
    ceiling_kind = CEILING_KIND.get(row["kind"])
    rate = row.get("gbps" if ceiling_kind == "copy" else "tflops")
    dtype = PRODUCT_DTYPE.get(row["dtype"], row["dtype"]) if ceiling_kind == "matmul" else None
    ceiling_rate = ceiling_kind and ceiling(rows, ceiling_kind, dtype)
    return f"{rate / ceiling_rate:.0%}" if rate and ceiling_rate else None


def faster_than(row: Row, other: str, rows: Iterable[Row]) -> float | None:
    """Return how many times as fast as `other` a row is: by rounds if it has such ratios, else by medians."""
    for name, ratio in row.get("faster_than", {}).items():
        if name.rpartition(" ")[0] == other:
            return ratio
    if row["provider"] == other or "rounds_ms" in row or "ms" not in row:
        return None
    same = ("kind", "dtype", "shape", "device")
    for one in rows:
        if one["provider"] == other and all(one[name] == row[name] for name in same) and "ms" in one:
            return one["ms"] / row["ms"]
    return None


def with_ablation_times(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, with `ms` and `saves` in those of kind "ablation_added".

    Such a row's `ratio` is its time relative to the whole engine, measured in turns. `ms` is the ratio times
    the median time of the whole engine. `saves` is the time saved relative to the row before, as a share of
    the first row's time. Rows are grouped by preset, batch and precision.
    """
    ladders: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "ablation_added" and row["status"] == "ok":
            ladders.setdefault((*row["shape"].values(), row["dtype"]), []).append(row)
    found = {}
    for ladder in ladders.values():
        middle = sorted(row["whole_ms"] for row in ladder)[len(ladder) // 2]
        before = None
        for row in ladder:
            saves = None if before is None else (before - row["ratio"]) / ladder[0]["ratio"]
            found[id(row)] = row | {"ms": row["ratio"] * middle, "saves": saves}
            before = row["ratio"]
    return [found.get(id(row), row) for row in rows]


def read_field(name: str, template: str = "{}") -> Value:
    """Return a function that reads a field of a row, and formats it unless `template` is "{}"."""

    def value(row: Row, rows: Sequence[Row]) -> Any:
        got = row.get(name)
        return got if got is None or template == "{}" else template.format(got)

    return value


COLUMNS: dict[str, Value] = {
    "ms": read_field("ms"),
    "best ms": read_field("best_ms"),
    "20-80 %": lambda row, rows: f"{row['ms_q20']:.3g}-{row['ms_q80']:.3g}" if "ms_q20" in row else None,
    "images/s": read_field("images_per_s"),
    "images/s and core": read_field("images_per_core_s"),
    "cores for an H100": read_field("cores_for_h100"),
    **{unit: read_field(name) for name, unit in UNITS.items()},
    "of ceiling": share_of_ceiling,
    **{f"x {name}": lambda row, rows, name=name: faster_than(row, name, rows) for name in BASELINES},  # type: ignore[misc]
    "products TFLOP/s": read_field("product_tflops"),
    "host ms": read_field("host_ms"),
    "CPU ms": read_field("cpu_ms"),
    "launches": read_field("launches"),
    "kernels": read_field("kernels"),
    "peak MB": read_field("peak_mb"),
    "saves": read_field("saves", "{:+.1%}"),
    "whole engine ms": read_field("whole_ms"),
    "of its time": read_field("ratio", "{:.1%}"),
    "empty caches": read_field("cold_s"),
    "kept caches": read_field("kept_s"),
    "imports": read_field("import_s"),
    "preparing": read_field("prepare_s"),
    "first image": read_field("first_s"),
    "second image": read_field("warm_s"),
    "ms profiled": read_field("profiled_ms"),
    "error": read_field("rel_err", "{:.1e}"),
    "waited": read_field("waited"),
    "operations": lambda row, rows: row.get("operations") if row["kind"] != "profile" else None,
    "output layout": read_field("output_layout"),
    "runs on": read_field("implementation"),
    "models": lambda row, rows: row.get("models") or row.get("also"),
    "reason": lambda row, rows: str(row["reason"])[:120] if row.get("reason") else None,
}


def section(rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """Return the table of the rows of one kind and one device."""
    sizes = list(dict.fromkeys(name for row in rows for name in row["shape"]))
    classes = list(dict.fromkeys(name for row in rows for name in row.get("class_ms", ())))
    header = [*sizes, "dtype", "provider", "status", *classes, *COLUMNS]
    lines = []
    for row in rows:
        line = [row["shape"].get(name) for name in sizes] + [row["dtype"], row["provider"]]
        line.append(None if row["status"] == "ok" else row["status"])
        for name in classes:
            ms, share = (row.get(part, {}).get(name) for part in ("class_ms", "shares"))
            line.append(None if ms is None else f"{ms:.3g} ({share:.0%})")
        lines.append(line + [value(row, all_rows) for value in COLUMNS.values()])
    filled = [i for i in range(len(header)) if any(line[i] not in (None, "") for line in lines)]
    return markdown_table([header[i] for i in filled], [[line[i] for i in filled] for line in lines])


def missing_peers(kind: str, rows: Iterable[Row]) -> list[str]:
    """Return a line with the peers that no row of a comparison has, and the flags that measure them."""
    measured = {row["provider"] for row in rows if row["kind"] == kind and row["status"] == "ok"}
    needs = PEERS_OF.get(kind, {})
    missing = "; ".join(f"{name} (`{needs[name]}`)" for name in needs if name not in measured)
    return [f"Not measured: {missing}."] if missing else []


def summary(rows: Sequence[Row]) -> str:
    """Return the ceiling of every kind and dtype, as `bench.results.ceiling` returns it."""
    lines: list[Sequence[object]] = []
    for kind, (column, pick) in CEILINGS.items():
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["kind"] == kind):
            value = ceiling(rows, kind, dtype)
            same_rows = (row for row in rows if row["kind"] == kind and row["dtype"] == dtype)
            reason = next((str(row["reason"])[:120] for row in same_rows if row.get("reason")), "no row")
            cells = ("none", reason) if value is None else (f"{value:.4g} {UNITS[column]}", pick)
            lines.append((kind, dtype, *cells))
    return markdown_table(("kind", "dtype", "ceiling", "which"), lines)


def conditions(rows: Sequence[Row]) -> str:
    """Return one paragraph with the versions, revisions, dates, load and waiting of these rows."""

    def join_values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)) or "-"

    def format_range(name: str, values: Iterable[Any], unit: str = "") -> str:
        found = sorted(value for value in values if value is not None)
        return f"{name} {found[0]} to {found[-1]}{unit}. " if found else ""

    changed = " with uncommitted changes" if any(row.get("dirty") for row in rows) else ""
    text = f"torch {join_values('torch')}, triton {join_values('triton')}, CUDA {join_values('cuda')}, "
    text += f"Python {join_values('python')}; revision {join_values('revision')}{changed}. "
    text += format_range("Taken", [row.get("date") for row in rows])
    text += format_range("Load average (1 min)", [row["load"][0] for row in rows if row.get("load")])
    text += format_range("Just after a row", [row.get("power_w") for row in rows], " W")
    text += format_range("Clock", [row.get("sm_mhz") for row in rows], " MHz")
    waited_shares = [row["waited"] for row in rows if row.get("threads") and row.get("waited") is not None]
    if waited_shares:
        count = sum(share > 0.05 for share in waited_shares)
        text += f"{join_values('isa')}. {count} of {len(waited_shares)} rows waited for a CPU over 5 % of "
        text += "their time."
    return text.strip()


def render(name: str, rows: Sequence[Row]) -> str:
    """Return Markdown for all rows of one bench's file, with one part for each device."""
    sections = []
    for device in dict.fromkeys(row["device"] for row in rows):
        rows_of_device = with_ablation_times([row for row in rows if row["device"] == device])
        sections += [f"# {name.capitalize()}: {device}", conditions(rows_of_device)]
        sections += [summary(rows_of_device)] if name == "ceilings" else []
        for kind in sorted({row["kind"] for row in rows_of_device}, key=lambda k: [*TITLES, k].index(k)):
            sections += [
                f"## {TITLES.get(kind, kind)}",
                section([r for r in rows_of_device if r["kind"] == kind], rows_of_device),
                *missing_peers(kind, rows_of_device),
            ]
        for row in (row for row in rows_of_device if row["kind"] == "profile" and row["status"] == "ok"):
            listed = [(f"`{op}`", ms, calls) for op, ms, calls in row["operations"][:LISTED_OPERATIONS]]
            title = ", ".join(str(value) for value in (*row["shape"].values(), row["provider"], row["dtype"]))
            sections += [f"## {title}", markdown_table(("operation", "ms a step", "calls a step"), listed)]
    if name in GPU_BENCHES and not any(row.get("cuda") for row in rows):
        sections.append("Tables of a GPU need a CUDA device: `make gpu`.")
    return "\n\n".join(sections) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write NAME.md next to every NAME.jsonl in the folders of the command line."""
    for folder in sys.argv[1:] if argv is None else argv:
        for path in Path(folder).glob("*.jsonl"):
            path.with_suffix(".md").write_text(render(path.stem, read_rows(path)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
