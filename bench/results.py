"""Result rows: written one by one to a JSON Lines file, read back to resume, to compare and to print.

A row is one measurement, or one thing that could not be measured and why. Its `status` is

- `ok`: measured, after its output was compared with a reference;
- `none`: this machine or this torch has no such thing; `reason` says so;
- `oom`: it did not fit into memory;
- `wrong`: its output failed the comparison, so it was not timed;
- `error`: anything else, with the message; such a row is tried again by the next run.
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
from typing import Any

import torch

Row = dict[str, Any]

FINAL = frozenset({"ok", "none", "oom", "wrong"})

# What "the ceiling" of a kind is: the column, and which row counts. Small copies stay in a cache, so a copy's
# ceiling is its largest size, not its best.
CEILINGS: dict[str, tuple[str, str]] = {
    "matmul": ("tflops", "max"),
    "conv3x3": ("tflops", "max"),
    "conv1x1": ("tflops", "max"),
    "attention": ("tflops", "max"),
    "copy": ("gbps", "largest"),
    "groupnorm_silu": ("gbps", "max"),
    "sampler": ("gbps", "max"),
    "graph_node": ("us_per_node", "min"),
}


def row_key(kind: str, dtype: str, provider: str, shape: Mapping[str, Any], device: str) -> str:
    """What makes two rows the same measurement: kind, dtype, provider, shape, device and torch version."""
    sizes = ",".join(f"{k}={shape[k]}" for k in sorted(shape))
    return "|".join((kind, dtype, provider, sizes, device, f"torch {torch.__version__}"))


class ResultFile:
    """A JSON Lines file that grows by whole rows and survives being stopped between any two of them.

    Args:
        path: the file; it and its folder are made when missing.

    A last line that a killed process left half written is ignored when read and closed off before the next
    row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.by_key = {row["key"]: row for row in read_rows(path)}

    @property
    def rows(self) -> list[Row]:
        """The last row of every key, in the order first written."""
        return list(self.by_key.values())

    def done(self, key: str) -> bool:
        """Whether a row with this key is there and need not be measured again."""
        return self.by_key.get(key, {}).get("status") in FINAL

    def disturbed(self, key: str, limit: float = 0.05) -> bool:
        """Whether a measured row's threads waited for a CPU for more than this part of its time."""
        return self.by_key.get(key, {}).get("waited", 0.0) > limit

    def append(self, row: Row) -> None:
        """Write one row and flush it to the disk."""
        with self.path.open("a+b") as file:
            half_line = False
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                half_line = file.read(1) != b"\n"
            file.write((b"\n" if half_line else b"") + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_key[row["key"]] = row


def read_rows(path: Path) -> list[Row]:
    """The last row of every key in a JSON Lines file, in the order first written; [] where there is none."""
    if not path.exists():
        return []
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "key" in row:
            rows[row["key"]] = row
    return list(rows.values())


def ceiling(
    results_path: str | Path, kind: str, dtype: str | None = None, device: str | None = None
) -> float | None:
    """The measured ceiling of a kind: TFLOP/s, GB/s (1e9 bytes) or, for `graph_node`, microseconds a node.

    Args:
        results_path: a `ceilings.jsonl`, or the folder that holds one.
        kind: one of `CEILINGS`.
        dtype: "fp32", "tf32", "bf16", "fp16", "fp8", or None for the best of any.
        device: a device name; needed only where a file holds rows of several.

    Returns:
        The rate, or None where no such row was measured.

    Raises:
        ValueError: the kind is unknown, or the file holds several devices and none was named.
    """
    if kind not in CEILINGS:
        raise ValueError(f"kind={kind!r}: known kinds are {', '.join(sorted(CEILINGS))}")
    path = Path(results_path)
    rows = read_rows(path / "ceilings.jsonl" if path.is_dir() else path)
    return ceiling_of(rows, kind, dtype, device)


def ceiling_of(
    rows: Iterable[Row], kind: str, dtype: str | None = None, device: str | None = None
) -> float | None:
    """`ceiling` over rows already read."""
    column, pick = CEILINGS[kind]
    found = [r for r in rows if r["kind"] == kind and r["status"] == "ok" and r.get(column) is not None]
    found = [r for r in found if dtype in (None, r["dtype"]) and device in (None, r["device"])]
    names = sorted({r["device"] for r in found})
    if len(names) > 1:
        raise ValueError(f"device=None: the rows hold several devices, name one of {names}")
    if not found:
        return None
    if pick == "largest":
        largest = max(r["bytes"] for r in found)
        found = [r for r in found if r["bytes"] == largest]
    values = [float(r[column]) for r in found]
    return min(values) if pick == "min" else max(values)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its model number and how many of its CPUs torch may use.

    The count is part of the name because one thread and two are two different machines to a measurement.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = f"model {fields['model']}, " if "model" in fields else ""
    return f"{name} ({model}{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} CPUs)"


def cpu_extensions() -> list[str]:
    """The instruction sets that decide a CPU's rate in half precision; a virtual machine may hide some."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")
    return [name for name in known if flags and name in flags.group(1).split()]


def slug(name: str) -> str:
    """A device's name as a folder name: "Intel(R) Xeon(R)" becomes "intel-xeon"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


@functools.cache
def git_state() -> tuple[str, bool | None]:
    """(revision, dirty) of this checkout.

    A copy without its git folder, as is carried to a machine without network, takes the revision from
    `ADMFAST_REVISION`, and whether it was changed is then unknown (None).
    """

    def git(*arguments: str) -> str | None:
        root = Path(__file__).resolve().parent
        try:
            found = subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    named = os.environ.get("ADMFAST_REVISION")
    status = git("status", "--porcelain")
    if status is None:
        return named or "unknown", None
    return git("rev-parse", "--short=12", "HEAD") or named or "no commit", bool(status)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> Row:
    """What every row says of where it was taken: device, versions, revision. Read once a run."""
    revision, dirty = git_state()
    out: Row = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "revision": revision,
        "dirty": dirty,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        out["cudnn"] = torch.backends.cudnn.version()
    else:
        out["isa"] = " ".join(cpu_extensions())
        out["threads"] = torch.get_num_threads()
    return out


class Conditions:
    """What changes during a run: date, load average, and a GPU's power, clocks and temperature by nvidia-smi.

    nvidia-smi takes longer than most measurements, so its answer is kept for `every` seconds.
    """

    FIELDS = {
        "power.draw": "power_w",
        "clocks.sm": "sm_mhz",
        "clocks.mem": "mem_mhz",
        "temperature.gpu": "celsius",
    }

    def __init__(self, device: torch.device, every: float = 5.0) -> None:
        self.every = every
        self.smi = shutil.which("nvidia-smi") if device.type == "cuda" else None
        self.index = device.index or 0
        self._gpu: Row = {}
        self._read_at = float("-inf")

    def now(self) -> Row:
        """The present conditions as row fields."""
        out: Row = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "load": [round(x, 2) for x in os.getloadavg()],
        }
        if self.smi and time.monotonic() - self._read_at > self.every:
            self._gpu = self._ask()
            self._read_at = time.monotonic()
        return out | self._gpu

    def _ask(self) -> Row:
        query = (str(self.smi), f"--id={self.index}", f"--query-gpu={','.join(self.FIELDS)}")
        try:
            found = subprocess.run(
                (*query, "--format=csv,noheader,nounits"), capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return {}
        return self.parse(found.stdout) if found.returncode == 0 else {}

    @classmethod
    def parse(cls, line: str) -> Row:
        """Fields of one line of nvidia-smi's csv; what it can't say ("[N/A]") is left out."""
        out: Row = {}
        for name, text in zip(cls.FIELDS.values(), line.split(","), strict=False):
            try:
                out[name] = float(text)
            except ValueError:
                continue
        return out


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table; None becomes "-", a float three significant digits, and "|" in a text is escaped."""

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
