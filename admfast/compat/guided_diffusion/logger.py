"""Logging under the names of the published `logger.py`, as text, tables, CSV and JSON lines.

`configure` opens the folder that is named, or OPENAI_LOGDIR, or a dated folder among the temporary files. Its
formats come from OPENAI_LOG_FORMAT (default "stdout,log,csv"), or in processes other than the first from
OPENAI_LOG_FORMAT_MPI (default "log"). Before `configure` is called, the log goes to the standard output.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from admfast.errors import allowed_names, invalid

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
_MAX_WIDTH = 30
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


class HumanOutputFormat:
    """Writer of text to a file; it writes numbers as a text table."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write names and numbers as a table, sorted by name."""
        if not kvs:
            return
        rows = sorted((_shorten(key), _shorten(_format_value(value))) for key, value in kvs.items())
        rows.sort(key=lambda row: row[0].lower())
        left, right = (max(len(row[i]) for row in rows) for i in range(2))
        rule = "-" * (left + right + 7)
        lines = [rule, *(f"| {key:{left}} | {value:{right}} |" for key, value in rows), rule]
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()

    def writeseq(self, seq: Sequence[str]) -> None:
        """Write strings as one line."""
        self.file.write(" ".join(seq) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not sys.stdout:
            self.file.close()


class JSONOutputFormat:
    """Writer of a line of JSON for the numbers of each iteration."""

    def __init__(self, filename: str) -> None:
        self.file = open(filename, "w")  # noqa: SIM115

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write names and numbers as a JSON object."""
        self.file.write(json.dumps({k: _to_python_number(kvs[k]) for k in sorted(kvs)}) + "\n")
        self.file.flush()

    def writeseq(self, seq: Sequence[str]) -> None:
        """Write no text."""

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat:
    """Writer of a CSV row for each iteration's numbers; a new name gets a column, empty in older rows."""

    def __init__(self, filename: str) -> None:
        self.file = open(filename, "w+", newline="")  # noqa: SIM115
        self.keys: list[str] = []

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write names and numbers as a row."""
        new = sorted(kvs.keys() - set(self.keys))
        self.keys += new
        writer = csv.DictWriter(self.file, self.keys)
        if new:
            self.file.seek(0)
            before = list(csv.DictReader(self.file))
            self.file.seek(0)
            self.file.truncate()
            writer.writeheader()
            writer.writerows(before)
        writer.writerow({key: _to_python_number(value) for key, value in kvs.items()})
        self.file.flush()

    def writeseq(self, seq: Sequence[str]) -> None:
        """Write no text."""

    def close(self) -> None:
        self.file.close()


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """Return the writer for the format "stdout", "log", "csv" or "json", with its file in `ev_dir`."""
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "log":
        return HumanOutputFormat(open(os.path.join(ev_dir, f"log{log_suffix}.txt"), "w"))  # noqa: SIM115
    if format == "json":
        return JSONOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.json"))
    if format == "csv":
        return CSVOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.csv"))
    raise invalid("format", format, allowed_names(format, ["stdout", "log", "csv", "json"]))


class Logger:
    """The numbers of the current iteration, and the writers that they go to.

    dir: the folder of the log, or None. output_formats: writers; see `make_output_format`.
    """

    DEFAULT: Logger
    CURRENT: Logger

    def __init__(self, dir: str | None, output_formats: Sequence[Any], comm: None = None) -> None:
        if comm is not None:
            raise invalid("comm", comm, "None: there is no MPI")
        self.dir, self.output_formats, self.level = dir, list(output_formats), INFO
        self.name2val: dict[str, Any] = {}
        self.name2cnt: dict[str, int] = {}

    def logkv(self, key: str, val: Any) -> None:
        """Set a number of this iteration."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        """Add a number to its mean over this iteration."""
        count = self.name2cnt.get(key, 0)
        before = self.name2val.get(key, 0.0)
        self.name2val[key] = before * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write this iteration's numbers, return them, and begin the next."""
        numbers = dict(self.name2val)
        for output in self.output_formats:
            output.writekvs(numbers)
        self.name2val.clear()
        self.name2cnt.clear()
        return numbers

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write the arguments as one line, if `level` is at least the logger's level."""
        if self.level <= level:
            for output in self.output_formats:
                output.writeseq([str(arg) for arg in args])

    def close(self) -> None:
        """Close the files."""
        for output in self.output_formats:
            output.close()


Logger.DEFAULT = Logger.CURRENT = Logger(None, [HumanOutputFormat(sys.stdout)])


def configure(
    dir: str | None = None,
    format_strs: Sequence[str] | None = None,
    comm: None = None,
    log_suffix: str = "",
) -> None:
    """Open a folder and log to it from now on; see the module for the defaults."""
    if dir is None:
        dated_name = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        dir = os.getenv("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), dated_name)
    dir = os.path.expanduser(dir)
    os.makedirs(dir, exist_ok=True)
    rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)
    if rank:
        log_suffix += f"-rank{rank:03}"
    if format_strs is None:
        variable, default_formats = ("_MPI", "log") if rank else ("", "stdout,log,csv")
        format_strs = os.getenv(f"OPENAI_LOG_FORMAT{variable}", default_formats).split(",")
    outputs = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir, outputs, comm)
    if outputs:
        log(f"Logging to {dir}")


def reset() -> None:
    """Close the current folder; log to the standard output again."""
    if Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: None = None
) -> Iterator[None]:
    """Log to another folder within the `with` block."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = before


def logkv(key: str, val: Any) -> None:
    """Set a number of this iteration."""
    Logger.CURRENT.logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Add a number to its mean over this iteration."""
    Logger.CURRENT.logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several numbers of this iteration."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Write this iteration's numbers, return them, and begin the next."""
    return Logger.CURRENT.dumpkvs()


def getkvs() -> dict[str, Any]:
    """Return this iteration's numbers."""
    return Logger.CURRENT.name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write the arguments as one line, if `level` is at least the logger's level."""
    Logger.CURRENT.log(*args, level=level)


def debug(*args: Any) -> None:
    """Write a line of level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Write a line of level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Write a line of level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """Write a line of level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Log only lines of this level or above from now on."""
    Logger.CURRENT.level = level


def get_dir() -> str | None:
    """Return the folder of the log; None before `configure`."""
    return Logger.CURRENT.dir


def _to_python_number(value: Any) -> Any:
    """Return a number of NumPy or torch as a Python float, and any other value itself."""
    return float(value) if hasattr(value, "dtype") else value


def _format_value(value: Any) -> str:
    return f"{float(value):<8.3g}" if hasattr(value, "__float__") else str(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."
