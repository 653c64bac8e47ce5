"""One step of a stage as a process of its own: how long it may run, and what of its output is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.gpu.stages import Plan, Step

LOG_LIMIT = 4 << 20  # bytes a step may add to the log, so that a loop that prints can't make it too big


def run_step(step: Step, plan: Plan, seconds: float, log: Path) -> dict[str, Any]:
    """Run one step for at most `seconds`, its output appended to `log`.

    Returns:
        `exit` (None when it was stopped), `seconds`, `last`, the last line it printed, and `log_end`, the
        log's size after it.
    """
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(step.command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            step.command,
            cwd=plan.root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    last = _trim(log, start)
    seconds = round(time.monotonic() - begin, 1)
    return {"exit": code, "seconds": seconds, "last": last, "log_end": log.stat().st_size}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and whatever it started: an interrupt first, so that it can write what it has."""
    for sign, patience in ((signal.SIGINT, 6.0), (signal.SIGKILL, 6.0)):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # compile workers outlive their parent
    except ProcessLookupError:
        pass


def _trim(log: Path, start: int) -> str:
    """Cut what was added since `start` to LOG_LIMIT bytes, in its middle; returns its last line with text."""
    with log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size - start > LOG_LIMIT:
            file.seek(size - LOG_LIMIT // 2)
            tail = file.read()
            file.seek(start + LOG_LIMIT // 2)
            file.truncate()
            file.write(b"\n... shortened ...\n" + tail)
            size = file.tell()
        file.seek(max(start, size - 65536))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""
