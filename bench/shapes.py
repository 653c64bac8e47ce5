"""The shapes every bench measures: the expensive convolutions, norms and attentions of the ADM models.

They are those of the ops' `cases.py`, so that two who speak of "the 256 px model's first convolution" mean
the same one. The numbers were counted on the published networks; a multiply-add is two operations (FLOP).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUPS = 32  # every GroupNorm of ADM

MATMUL_SIZES = {"cuda": (8192, 4096, 2048, 1024), "cpu": (2048, 1024)}

MIB = 1 << 20
# On both sides of an H100's 50 MB L2: a copy of n bytes touches 2n. On the CPU, from inside one core's L2 to
# beyond the L3.
COPY_BYTES = {
    "cuda": tuple(n * MIB for n in (4096, 1024, 256, 64, 16, 4, 1)),
    "cpu": tuple(n * MIB for n in (512, 64, 16, 1)),
}

# The first is measured first: where time runs short it is the one that counts.
BATCHES = {"cuda": (8, 1, 32), "cpu": (1, 4)}

# Bytes that a second read finds in an H100's 50 MB L2, beside what else is there.
L2_BYTES = 40e6
# One call at the two CPUs' rate of these machines is then a third of a second: a row in two to three seconds.
CPU_FLOP_LIMIT = 50e9

GRAPH_NODES = (500, 1000)


@dataclass(frozen=True)
class ConvShape:
    """One convolution's shape; `share` is the part of its model's forward operations in percent."""

    model: str
    kernel: int
    cin: int
    cout: int
    side: int
    share: float

    @property
    def flop(self) -> int:
        """Operations of one such convolution for one image: 2 cin cout k^2 H W."""
        return 2 * self.cin * self.cout * self.kernel**2 * self.side**2

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(kernel, cin, cout, side): what a machine sees of it."""
        return self.kernel, self.cin, self.cout, self.side


@dataclass(frozen=True)
class NormShape:
    """A GroupNorm + SiLU over [N, channels, side, side] in 32 groups."""

    model: str
    channels: int
    side: int


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention over `tokens` = S = H*W positions with `heads` heads of `head_dim` channels."""

    model: str
    tokens: int
    heads: int
    head_dim: int

    @property
    def flop(self) -> int:
        """Operations of the two matrix products for one image: 4 heads S^2 d."""
        return 4 * self.heads * self.tokens**2 * self.head_dim


def real(op: str) -> Mapping[str, dict[str, Any]]:
    """The calls of an op in the ADM models; imported here, as whoever watches a bench has no torch."""
    from admfast.ops.cases import all_cases

    return next(cases.real for cases in all_cases() if cases.op == op)


@functools.cache
def conv_shapes() -> tuple[ConvShape, ...]:
    """The dearest convolutions of every model."""
    from admfast.ops.conv.cases import SHAPES

    return tuple(ConvShape(*shape) for shape in SHAPES)


@functools.cache
def norm_shapes() -> tuple[NormShape, ...]:
    """The dearest GroupNorm + SiLU before a convolution."""
    calls = real("group_norm_silu").items()
    return tuple(NormShape(name.split()[0], call["c1"], call["spatial"][0]) for name, call in calls)


@functools.cache
def attention_shapes() -> tuple[AttentionShape, ...]:
    """The attentions of every model."""
    return tuple(AttentionShape(name.split()[0], **call) for name, call in real("attention").items())


def sampler_sides() -> list[int]:
    """The sides of the images that are sampled."""
    return [call["spatial"][0] for call in real("sampler_step").values()]


def distinct_convs() -> list[tuple[ConvShape, str]]:
    """Each size once, dearest first, with the text "model share %" of every model that has it.

    "Dearest" is the largest share of any model's operations, so that each model's own bottleneck comes early.
    """
    by_size: dict[tuple[int, int, int, int], list[ConvShape]] = {}
    for shape in sorted(conv_shapes(), key=lambda shape: -shape.share):
        by_size.setdefault(shape.size, []).append(shape)
    return [(same[0], ", ".join(f"{s.model} {s.share:g} %" for s in same)) for same in by_size.values()]
