"""Result rows: written one by one to a JSON Lines file, and read back to resume, to compare and to print.

A row is one measurement, or says why something could not be measured. Its `status` is

- `ok`: measured, after its output was compared with a reference;
- `none`: this machine or this torch doesn't have it; `reason` says why;
- `oom`: it did not fit into memory;
- `wrong`: its output failed the comparison, so it was not timed;
- `too slow`: it would have taken longer than `limit` seconds; tried again by a bench with a longer limit;
- `error`: any other error, with its message; tried again at the next start of the bench.

Torch is imported only inside functions, because the process that watches a bench does not need it.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]

FINAL = frozenset({"ok", "none", "oom", "wrong", "too slow"})

# The ceiling of each kind: its column, and the row that counts. Small copies stay in a cache, so the ceiling
# of copies is the rate of the largest one, not the best rate.
CEILINGS: dict[str, tuple[str, str]] = {
    "matmul": ("tflops", "highest"),
    "conv3x3": ("tflops", "highest"),
    "conv1x1": ("tflops", "highest"),
    "attention": ("tflops", "highest"),
    "copy": ("gbps", "at the largest size"),
    "groupnorm_silu": ("gbps", "highest"),
    "sampler": ("gbps", "highest"),
    "graph_node": ("us_per_node", "lowest"),
}

# dtype of the products that a step is compared with, by the name of the policy, if they differ. On a CPU,
# torch's products of 8 bits are slower than those in bf16.
PRODUCT_DTYPE = {"auto": "bf16", "int8": "bf16"}

# Fields of nvidia-smi, and their names in a row.
SMI_FIELDS = {
    "power.draw": "power_w",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "mem_mhz",
    "temperature.gpu": "celsius",
}
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)
CPU_FLAGS += ("asimd", "bf16", "sve")


def row_key(kind: str, dtype: str, provider: str, shape: Mapping[str, Any], device: str, torch: str) -> str:
    """Return the key of a measurement: rows with the same key replace each other. torch: its version."""
    sizes = ",".join(f"{k}={shape[k]}" for k in sorted(shape))
    return "|".join((kind, dtype, provider, sizes, device, f"torch {torch}"))


class ResultFile:
    """A JSON Lines file of rows, to which whole rows are appended; it stays readable if a bench is killed.

    A last line that was only partly written is ignored when read, and ended before the next row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.by_key = {row["key"]: row for row in read_rows(path)}

    @property
    def rows(self) -> list[Row]:
        """The last row of every key, in the order in which the keys were first written."""
        return list(self.by_key.values())

    def append(self, row: Row) -> None:
        """Write one row and flush it to the disk."""
        with self.path.open("a+b") as file:
            ends_in_partial_line = False
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                ends_in_partial_line = file.read(1) != b"\n"
            file.write((b"\n" if ends_in_partial_line else b"") + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_key[row["key"]] = row


def is_final(row: Row, limit: float) -> bool:
    """Tell whether a row need not be measured again by a bench that has `limit` seconds for it."""
    return row["status"] in FINAL and not (row["status"] == "too slow" and row.get("limit", limit) < limit)


def was_disturbed(row: Row, limit: float = 0.05) -> bool:
    """Tell whether a row's threads waited for a CPU for more than this share of its time."""
    return row.get("waited", 0.0) > limit


def read_rows(path: Path) -> list[Row]:
    """Return the last row of every key, in the order of `ResultFile.rows`; [] if the file does not exist."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "key" in row:
            rows[row["key"]] = row
    return list(rows.values())


def ceiling(rows: Iterable[Row], kind: str, dtype: str | None = None) -> float | None:
    """Return the measured ceiling of a kind: TFLOP/s, GB/s (1e9 bytes) or, for `graph_node`, us per node.

    Args:
        rows: rows of one device, as `read_rows` returns them.
        kind: one of `CEILINGS`.
        dtype: "fp32", "tf32", "bf16", "fp16", "fp8", or None for the best of any.

    Returns:
        The rate, or None if no such row was measured.

    Raises:
        ValueError: the kind is unknown, or the rows are of several devices.
    """
    if kind not in CEILINGS:
        raise ValueError(f"kind={kind!r}: known kinds are {', '.join(sorted(CEILINGS))}")
    column, pick = CEILINGS[kind]
    found = [r for r in rows if r["kind"] == kind and r["status"] == "ok" and r.get(column) is not None]
    found = [r for r in found if dtype in (None, r["dtype"])]
    if len({r["device"] for r in found}) > 1:
        raise ValueError("rows: must be of a single device, because ceilings differ by device")
    if not found:
        return None
    if pick == "at the largest size":
        return float(max(found, key=lambda row: row["bytes"])[column])
    return float((min if pick == "lowest" else max)(row[column] for row in found))


def _cpu_fields() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo; {} if there is no such file."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with its model number and its number of CPUs that torch uses.

    The number is part of the name because rows of one thread and of two must not be mixed.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = f"model {fields['model']}, " if "model" in fields else ""
    return f"{name} ({model}{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} CPUs)"


@functools.cache
def git_state() -> tuple[str, bool | None]:
    """Return (revision, dirty) of this checkout.

    In a copy without its git folder, the revision comes from `ADMFAST_REVISION`, and `dirty` is None, because
    it is unknown whether the copy was changed.
    """
    named_revision = os.environ.get("ADMFAST_REVISION")
    root = Path(__file__).resolve().parent
    status, revision = (
        _command_output("git", "-C", str(root), *arguments)
        for arguments in (("status", "--porcelain"), ("rev-parse", "--short=12", "HEAD"))
    )
    if status is None:
        return named_revision or "unknown", None
    return (revision or named_revision or "no commit").strip(), bool(status.strip())


def _command_output(*command: str) -> str | None:
    """Return the output of a short command; None if it fails."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def environment(device: torch.device) -> Row:
    """Return the fields of every row that don't change during a bench: device, versions, revision."""
    import torch

    revision, dirty = git_state()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    fields: Row = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "revision": revision,
        "dirty": dirty,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        return fields | {"cudnn": torch.backends.cudnn.version()}
    cpu_fields = _cpu_fields()
    flags = cpu_fields.get("flags", cpu_fields.get("Features", "")).split()
    isa = " ".join(name for name in CPU_FLAGS if name in flags)
    return fields | {"isa": isa, "threads": torch.get_num_threads()}


def conditions(device: torch.device) -> Row:
    """Return the fields that change during a bench: date, load, and a GPU's power, clocks and temperature."""
    fields: Row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    if device.type == "cuda":
        # nvidia-smi takes longer than most measurements, so its answer is cached for five seconds.
        fields |= _gpu_conditions(device.index or 0, int(time.monotonic() / 5))
    return fields


@functools.lru_cache(maxsize=1)
def _gpu_conditions(index: int, five_seconds: int) -> Row:
    smi = shutil.which("nvidia-smi")
    query = (f"--id={index}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits")
    return read_smi((smi and _command_output(smi, *query)) or "")


def read_smi(line: str) -> Row:
    """Return the fields of one line of nvidia-smi's CSV, without those that it does not know ("[N/A]")."""
    values = zip(SMI_FIELDS.values(), line.split(","), strict=False)
    return {name: float(text) for name, text in values if re.fullmatch(r"\s*[\d.]+\s*", text)}


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table: None becomes "-", floats get three significant digits, "|" is escaped."""

    def cell(value: object) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a line of {len(line)} cells under {len(header)} columns: {line}")
        out.append("| " + " | ".join(cell(v) for v in line) + " |")
    return "\n".join(out)
