"""torch.compile around a prepared step, and its artefacts on disk so that a second process starts warm."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from admfast.errors import InvalidArgument
from admfast.files.atomic import write_bytes

if TYPE_CHECKING:
    from admfast.engine.step import PreparedStep

LOG = logging.getLogger("admfast")


def compile_step(step: PreparedStep, cache: str | PathLike[str] | None = None) -> None:
    """Compile the bodies of a step as one graph each; they are compiled when they first run, here.

    The step must not be filled yet. Our own ops stay as they are; the gradient is traced with the networks.
    cache: a file of artefacts, read where it is there, else written.
    """
    device = step.state.x.device
    warm = cache is not None and Path(cache).exists()
    if cache is not None and warm:
        load_artefacts(cache)
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    for guided, body in list(step.run.items()):
        began = time.monotonic()
        # What layers derive at their first call is there before they are traced.
        step.counters.zero_()
        with torch.no_grad():
            body()
        LOG.warning("compiling the %s step of %s ...", "guided" if guided else "plain", step.key.shape)
        step.run[guided] = _traced(torch.compile(body, fullgraph=True, mode=mode))
        step.counters.zero_()
        with torch.no_grad():
            step.run[guided]()
        LOG.warning("compiled in %.0f s", time.monotonic() - began)
    if cache is not None and not warm:
        save_artefacts(cache)


def _traced(body: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(body)
    def run() -> None:
        # The guidance gradient is taken inside; without this torch.autograd.grad breaks the graph.
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # type: ignore[attr-defined]
            body()

    return run


def save_artefacts(path: str | PathLike[str]) -> int:
    """Write what this process compiled to a file for `load_artefacts`; returns its bytes, 0 for nothing.

    They serve the same torch, Triton and GPU.
    """
    artefacts = torch.compiler.save_cache_artifacts()
    if artefacts is None:
        return 0
    write_bytes(Path(path), artefacts[0])
    return len(artefacts[0])


def load_artefacts(path: str | PathLike[str]) -> None:
    """Take what another process compiled; only from files that you trust, as they hold code.

    Raises: InvalidArgument for a file that isn't there.
    """
    if not Path(path).is_file():
        raise InvalidArgument(f"path={str(path)!r}: no such file")
    torch.compiler.load_cache_artifacts(Path(path).read_bytes())
