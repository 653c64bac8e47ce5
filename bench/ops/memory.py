"""Measurements of copies within device memory, and of the time of a nearly empty node of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.measure import Case, Settings, WrongResult, measure_call, round_to_5_digits, unavailable
from bench.results import Row
from bench.shapes import COPY_BYTES, GRAPH_NODES, MIB

REPEATS = 20  # copies in a graph
ELEMENTS = 128  # elements of each dependent addition


def capture_graph(fn: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `repeats` calls of `fn`, captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            fn()
    return graph


def check_equal(out: Tensor, expected: Tensor) -> float:
    """Return 0 if all elements are equal; else raise WrongResult."""
    if not torch.equal(out, expected):
        raise WrongResult(f"{int((out != expected).sum())} of {out.numel()} elements differ")
    return 0.0


def copies(settings: Settings) -> Iterator[Case]:
    """Yield a copy of every size with flushed caches, and on a GPU small ones again with a warm L2."""
    sizes = (MIB,) if settings.quick else COPY_BYTES[settings.device.type]
    for size in sizes:
        yield Case("copy", "fp32", "copy_", {"mib": size // MIB}, partial(_copy, size, 1))
    if settings.cuda:
        for size in (s for s in sizes if s <= 16 * MIB):
            name = f"copy_ {REPEATS} times in a graph"
            yield Case("copy_warm", "fp32", name, {"mib": size // MIB}, partial(_copy, size, REPEATS))


def _copy(size: int, repeats: int, settings: Settings) -> Row:
    source = torch.randn(size // 4, device=settings.device)
    target = torch.full_like(source, float("nan"))
    run: Callable[[], object] = partial(target.copy_, source)
    if repeats > 1:
        run = capture_graph(run, repeats).replay
        target.fill_(float("nan"))
    row = measure_call(run, settings, check=lambda _: check_equal(target, source), nbytes=2 * size * repeats)
    del row["rel_err"]
    return row


def graphs(settings: Settings) -> Iterator[Case]:
    """Yield a chain of small dependent additions, replayed from a graph, and issued by the host."""
    for nodes in GRAPH_NODES[: 1 if settings.quick else None]:
        sizes = {"nodes": nodes, "elements": ELEMENTS}
        graph = partial(_chain, nodes, True) if settings.cuda else unavailable("needs cuda")
        yield Case("graph_node", "fp32", "add_ in a CUDA graph", sizes, graph)
        yield Case("launch", "fp32", "add_ issued by the host", sizes, partial(_chain, nodes, False))


def _chain(nodes: int, replayed: bool, settings: Settings) -> Row:
    x = torch.zeros(ELEMENTS, device=settings.device)

    def run() -> None:
        for _ in range(nodes):
            x.add_(1.0)

    if replayed:
        run = capture_graph(lambda: x.add_(1.0), nodes).replay
        x.zero_()
    row = measure_call(run, settings, check=lambda _: check_equal(x, torch.full_like(x, nodes)))
    del row["rel_err"]
    return row | {"us_per_node": round_to_5_digits(row["ms"] * 1e3 / nodes)}
