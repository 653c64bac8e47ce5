"""Shapes that the benches measure: the expensive convolutions, norms and attentions of the ADM models.

They are read from the ops' `cases.py`, so that all benches and tests use the same shapes. Operations were
counted on the published networks; a multiply-add is two operations (FLOP).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUPS = 32  # every GroupNorm of ADM

MATMUL_SIZES = {"cuda": (8192, 4096, 2048, 1024), "cpu": (2048, 1024)}

MIB = 1 << 20
# On a GPU, sizes below and above an H100's 50 MB L2; a copy of n bytes touches 2n. On a CPU, from sizes that
# fit into one core's L2 to sizes beyond the L3.
COPY_BYTES = {
    "cuda": tuple(n * MIB for n in (4096, 1024, 256, 64, 16, 4, 1)),
    "cpu": tuple(n * MIB for n in (512, 64, 16, 1)),
}

# The most important one comes first, in case the time runs out.
BATCHES = {"cuda": (8, 1, 32), "cpu": (1, 4)}

# Largest tensor of which a second read comes from an H100's 50 MB L2, which also holds other data.
L2_BYTES = 40e6
# At this limit a call takes a third of a second on two CPUs, and a row two to three seconds.
CPU_FLOP_LIMIT = 50e9

GRAPH_NODES = (500, 1000)


@dataclass(frozen=True)
class ConvShape:
    """Shape of a convolution; `share` is its percentage of the model's operations in a forward pass."""

    model: str
    kernel: int
    cin: int
    cout: int
    side: int
    share: float

    @property
    def flop(self) -> int:
        """Operations for one image: 2 cin cout k^2 H W."""
        return 2 * self.cin * self.cout * self.kernel**2 * self.side**2

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(kernel, cin, cout, side), without the model."""
        return self.kernel, self.cin, self.cout, self.side


@dataclass(frozen=True)
class NormShape:
    """Shape of a GroupNorm + SiLU over [N, channels, side, side] in 32 groups."""

    model: str
    channels: int
    side: int


@dataclass(frozen=True)
class AttentionShape:
    """Shape of self-attention over `tokens` = S = H*W positions with `heads` heads of `head_dim` channels."""

    model: str
    tokens: int
    heads: int
    head_dim: int

    @property
    def flop(self) -> int:
        """Operations of the two matrix products for one image: 4 heads S^2 d."""
        return 4 * self.heads * self.tokens**2 * self.head_dim


def real(op: str) -> Mapping[str, dict[str, Any]]:
    """Return the calls of an op in the ADM models, by name.

    The import is inside because it loads torch, which the process that watches a bench does not need.
    """
    from admfast.ops.cases import all_cases

    return next(cases.real for cases in all_cases() if cases.op == op)


@functools.cache
def conv_shapes() -> tuple[ConvShape, ...]:
    """Return the most expensive convolutions of every model."""
    from admfast.ops.conv.cases import SHAPES

    return tuple(ConvShape(*shape) for shape in SHAPES)


@functools.cache
def norm_shapes() -> tuple[NormShape, ...]:
    """Return the most expensive GroupNorm + SiLU before a convolution of every model."""
    calls = real("group_norm_silu").items()
    return tuple(NormShape(name.split()[0], call["c1"], call["spatial"][0]) for name, call in calls)


@functools.cache
def attention_shapes() -> tuple[AttentionShape, ...]:
    """Return the attentions of every model."""
    return tuple(AttentionShape(name.split()[0], **call) for name, call in real("attention").items())


def sampler_sides() -> list[int]:
    """Return the sides of the sampled images."""
    return [call["spatial"][0] for call in real("sampler_step").values()]


def distinct_convs() -> list[tuple[ConvShape, str]]:
    """Return each size once, most expensive first, with "model share %" of every model that has it.

    The most expensive one has the largest share of any model's operations, so that the bottleneck of each
    model comes early.
    """
    by_size: dict[tuple[int, int, int, int], list[ConvShape]] = {}
    for shape in sorted(conv_shapes(), key=lambda shape: -shape.share):
        by_size.setdefault(shape.size, []).append(shape)
    return [(same[0], ", ".join(f"{s.model} {s.share:g} %" for s in same)) for same in by_size.values()]
