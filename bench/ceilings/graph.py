"""What one node of a CUDA graph costs when it does nearly nothing: the floor under many small kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Measure, Settings, WrongResult, timed, unavailable
from bench.registry import GRAPH_NODES
from bench.results import Row
from bench.timing import captured

ELEMENTS = 128


def cases(settings: Settings) -> Iterator[Case]:
    """A chain of dependent small additions: replayed from a graph, and for comparison issued by the host."""
    for nodes in GRAPH_NODES[:1] if settings.quick else GRAPH_NODES:
        sizes = {"nodes": nodes, "elements": ELEMENTS}
        graph = _chain(nodes, replayed=True) if settings.cuda else unavailable("needs cuda")
        yield Case("graph_node", "fp32", "add_ in a CUDA graph", sizes, graph)
        yield Case("launch", "fp32", "add_ issued by the host", sizes, _chain(nodes, replayed=False))


def _chain(nodes: int, replayed: bool) -> Measure:
    def measure(settings: Settings) -> Row:
        x = torch.zeros(ELEMENTS, device=settings.device)

        def run() -> None:
            for _ in range(nodes):
                x.add_(1.0)

        if replayed:
            run = captured(lambda: x.add_(1.0), nodes).replay
        x.zero_()
        run()
        if not torch.equal(x, torch.full_like(x, nodes)):
            raise WrongResult(f"{nodes} additions of 1 gave {x[0].item()}")
        row = timed(run, settings)
        row["us_per_node"] = float(f"{row['ms'] * 1e3 / nodes:.4g}")
        return row

    return measure
