"""The groups of ceilings, in the order they run."""

from __future__ import annotations

from bench.ceilings import attention, conv, copy, graph, matmul, norm, sampler
from bench.runner import Groups

# With their part of the budget. What a group leaves over goes to those after it, so
# the quick ones come first; compiled norms come last, because a compilation is the least predictable.
GROUPS: Groups = {
    "graph": (0.02, graph.cases),
    "copy": (0.06, copy.cases),
    "sampler": (0.06, sampler.cases),
    "matmul": (0.08, matmul.cases),
    "attention": (0.20, attention.cases),
    "conv": (0.36, conv.cases),
    "norm": (0.22, norm.cases),
}
