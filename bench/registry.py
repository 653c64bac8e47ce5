"""The shapes every bench measures: the expensive convolutions, norms and attentions of the ADM models.

A bench names its shapes here and nowhere else, so that two benches that speak of "the 256 px model's
first convolution" mean the same one. The numbers were counted on the published networks; a multiply-add
is two operations (FLOP) and GF stands for 1e9 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GROUPS = 32  # every GroupNorm of ADM

MATMUL_SIZES = {"cuda": (8192, 4096, 2048, 1024), "cpu": (2048, 1024)}

MIB = 1 << 20
# On both sides of an H100's 50 MB L2: a copy of n bytes touches 2n. On the CPU, from inside one core's L2 to
# beyond the L3.
COPY_BYTES = {
    "cuda": tuple(n * MIB for n in (1, 4, 16, 64, 256, 1024, 4096)),
    "cpu": tuple(n * MIB for n in (1, 16, 64, 512)),
}

# The first is measured first: where time runs short it is the one that counts.
BATCHES = {"cuda": (8, 1, 32), "cpu": (1, 4)}

# Bytes that a second read finds in an H100's 50 MB L2, beside what else is there.
L2_BYTES = 40e6

SAMPLER_SIDES = (64, 128, 256, 512)
GRAPH_NODES = (500, 1000)


@dataclass(frozen=True)
class ConvShape:
    """One convolution shape of one model: stride 1, padding (kernel - 1) / 2, square input.

    `count` is how often the model runs it, `gf` the operations of all of them for one image (1e9), `share`
    their part of the model's forward operations in percent. The query-key-value projections of attention are
    1x1 convolutions over side*side tokens and are listed as such.
    """

    model: str
    kernel: int
    cin: int
    cout: int
    side: int
    count: int
    gf: float
    share: float

    @property
    def flop(self) -> int:
        """Operations of one such convolution for one image: 2 cin cout k^2 H W."""
        return 2 * self.cin * self.cout * self.kernel**2 * self.side**2

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(kernel, cin, cout, side): what a machine sees of it."""
        return self.kernel, self.cin, self.cout, self.side


# Per model the six most expensive 3x3 and the two most expensive 1x1 shapes; three and one for the
# classifiers.
CONV_SHAPES: tuple[ConvShape, ...] = (
    ConvShape("unet64", 3, 192, 192, 64, 10, 27.179, 12.39),
    ConvShape("unet64", 3, 384, 384, 32, 9, 24.461, 11.15),
    ConvShape("unet64", 3, 384, 384, 64, 2, 21.743, 9.91),
    ConvShape("unet64", 3, 384, 192, 64, 3, 16.307, 7.43),
    ConvShape("unet64", 3, 576, 576, 16, 9, 13.759, 6.27),
    ConvShape("unet64", 3, 576, 576, 32, 2, 12.231, 5.58),
    ConvShape("unet64", 1, 384, 1152, 32, 7, 6.342, 2.89),
    ConvShape("unet64", 1, 576, 1728, 16, 7, 3.567, 1.63),
    ConvShape("unet128", 3, 256, 256, 128, 9, 173.946, 28.34),
    ConvShape("unet128", 3, 512, 256, 128, 3, 115.964, 18.89),
    ConvShape("unet128", 3, 256, 256, 64, 9, 43.487, 7.08),
    ConvShape("unet128", 3, 512, 512, 64, 2, 38.655, 6.3),
    ConvShape("unet128", 3, 512, 512, 32, 6, 28.991, 4.72),
    ConvShape("unet128", 3, 768, 768, 32, 2, 21.743, 3.54),
    ConvShape("unet128", 1, 512, 256, 128, 3, 12.885, 2.1),
    ConvShape("unet128", 1, 512, 1536, 32, 5, 8.053, 1.31),
    ConvShape("unet256", 3, 256, 256, 256, 9, 695.785, 31.07),
    ConvShape("unet256", 3, 512, 256, 256, 3, 463.856, 20.71),
    ConvShape("unet256", 3, 256, 256, 128, 9, 173.946, 7.77),
    ConvShape("unet256", 3, 512, 512, 64, 8, 154.619, 6.9),
    ConvShape("unet256", 3, 512, 512, 128, 2, 154.619, 6.9),
    ConvShape("unet256", 3, 1024, 512, 64, 2, 77.309, 3.45),
    ConvShape("unet256", 1, 512, 256, 256, 3, 51.54, 2.3),
    ConvShape("unet256", 1, 1024, 512, 64, 2, 8.59, 0.38),
    ConvShape("unet512", 3, 256, 256, 256, 8, 618.475, 15.6),
    ConvShape("unet512", 3, 256, 256, 512, 2, 618.475, 15.6),
    ConvShape("unet512", 3, 128, 128, 512, 7, 541.166, 13.65),
    ConvShape("unet512", 3, 512, 256, 256, 2, 309.238, 7.8),
    ConvShape("unet512", 3, 256, 128, 512, 2, 309.238, 7.8),
    ConvShape("unet512", 3, 384, 128, 512, 1, 231.928, 5.85),
    ConvShape("unet512", 1, 512, 256, 256, 2, 34.36, 0.87),
    ConvShape("unet512", 1, 256, 128, 512, 2, 34.36, 0.87),
    ConvShape("up64_256", 3, 192, 192, 256, 9, 391.379, 30.98),
    ConvShape("up64_256", 3, 384, 192, 256, 3, 260.919, 20.65),
    ConvShape("up64_256", 3, 192, 192, 128, 9, 97.845, 7.75),
    ConvShape("up64_256", 3, 384, 384, 64, 8, 86.973, 6.88),
    ConvShape("up64_256", 3, 384, 384, 128, 2, 86.973, 6.88),
    ConvShape("up64_256", 3, 768, 384, 64, 2, 43.487, 3.44),
    ConvShape("up64_256", 1, 384, 192, 256, 3, 28.991, 2.29),
    ConvShape("up64_256", 1, 768, 384, 64, 2, 4.832, 0.38),
    ConvShape("up128_512", 3, 192, 192, 512, 9, 1565.516, 31.25),
    ConvShape("up128_512", 3, 384, 192, 512, 3, 1043.677, 20.83),
    ConvShape("up128_512", 3, 192, 192, 256, 9, 391.379, 7.81),
    ConvShape("up128_512", 3, 384, 384, 128, 8, 347.892, 6.94),
    ConvShape("up128_512", 3, 384, 384, 256, 2, 347.892, 6.94),
    ConvShape("up128_512", 3, 768, 384, 128, 2, 173.946, 3.47),
    ConvShape("up128_512", 1, 384, 192, 512, 3, 115.964, 2.31),
    ConvShape("up128_512", 1, 768, 384, 128, 2, 19.327, 0.39),
    ConvShape("clf64", 3, 128, 128, 64, 8, 9.664, 25.33),
    ConvShape("clf64", 3, 256, 256, 32, 7, 8.456, 22.16),
    ConvShape("clf64", 3, 384, 384, 16, 7, 4.756, 12.46),
    ConvShape("clf64", 1, 256, 768, 32, 4, 1.611, 4.22),
    ConvShape("clf128", 3, 128, 128, 128, 4, 19.327, 45.93),
    ConvShape("clf128", 3, 128, 128, 64, 6, 7.248, 17.22),
    ConvShape("clf128", 3, 256, 256, 32, 3, 3.624, 8.61),
    ConvShape("clf128", 1, 256, 768, 32, 2, 0.805, 1.91),
    ConvShape("clf256", 3, 128, 128, 256, 4, 77.309, 52.7),
    ConvShape("clf256", 3, 128, 128, 128, 6, 28.991, 19.76),
    ConvShape("clf256", 3, 256, 256, 64, 3, 14.496, 9.88),
    ConvShape("clf256", 1, 256, 768, 32, 2, 0.805, 0.55),
    ConvShape("clf512", 3, 64, 64, 512, 4, 77.309, 34.28),
    ConvShape("clf512", 3, 128, 128, 256, 3, 57.982, 25.71),
    ConvShape("clf512", 3, 128, 128, 128, 6, 28.991, 12.85),
    ConvShape("clf512", 1, 64, 128, 256, 1, 1.074, 0.48),
)


@dataclass(frozen=True)
class NormShape:
    """A GroupNorm + SiLU over [N, channels, side, side] in 32 groups, before a convolution."""

    model: str
    channels: int
    side: int


NORM_SHAPES: tuple[NormShape, ...] = (
    NormShape("unet64", 192, 64),
    NormShape("unet256", 256, 256),
    NormShape("unet256", 512, 256),
    NormShape("unet512", 128, 512),
    NormShape("unet128", 256, 128),
    NormShape("unet64", 384, 32),
    NormShape("unet64", 576, 16),
    NormShape("unet64", 768, 8),
    NormShape("unet64", 576, 64),
    NormShape("unet256", 512, 64),
    NormShape("unet256", 1024, 16),
    NormShape("unet512", 384, 512),
    NormShape("up64_256", 192, 256),
    NormShape("up128_512", 192, 512),
    NormShape("clf256", 128, 256),
    NormShape("clf512", 64, 512),
)


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

    @property
    def elements(self) -> int:
        """Elements of q, k, v and the output together for one image."""
        return 4 * self.heads * self.tokens * self.head_dim


# Heads of 64 channels, except the 128 px model and the 64->256 upsampler, which fix four heads instead. 32
# channels a head belongs to no released model; it is the width small models are trained with.
ATTENTION_SHAPES: tuple[AttentionShape, ...] = (
    AttentionShape("unet256", 1024, 8, 64),
    AttentionShape("unet256", 256, 16, 64),
    AttentionShape("unet256", 64, 16, 64),
    AttentionShape("unet64", 1024, 6, 64),
    AttentionShape("unet64", 256, 9, 64),
    AttentionShape("unet64", 64, 12, 64),
    AttentionShape("unet128", 1024, 4, 128),
    AttentionShape("unet128", 256, 4, 192),
    AttentionShape("unet128", 64, 4, 256),
    AttentionShape("up64_256", 1024, 4, 96),
    AttentionShape("up64_256", 256, 4, 192),
    AttentionShape("up64_256", 64, 4, 192),
    AttentionShape("up128_512", 1024, 12, 64),
    AttentionShape("clf64", 1024, 4, 64),
    AttentionShape("clf64", 256, 6, 64),
    AttentionShape("clf64", 64, 8, 64),
    AttentionShape("small", 256, 4, 32),
    AttentionShape("small", 64, 4, 32),
)


def distinct_convs(shapes: Iterable[ConvShape] = CONV_SHAPES) -> list[tuple[ConvShape, str]]:
    """Each size once, dearest first, with the text "model share %" of every model that has it.

    "Dearest" is the largest share of any model's operations, so that each model's own bottleneck comes early.
    """
    by_size: dict[tuple[int, int, int, int], list[ConvShape]] = {}
    for shape in shapes:
        by_size.setdefault(shape.size, []).append(shape)
    out = []
    for same in by_size.values():
        same.sort(key=lambda s: -s.share)
        out.append((same[0], ", ".join(f"{s.model} {s.share:g} %" for s in same)))
    return sorted(out, key=lambda pair: -pair[0].share)


# What each form of the ablation was predicted to save, as a part of the plain step's time, before it was
# measured: (device, preset, batch) to form to part. Bytes and operations are those counted on the published
# networks. GPU: over 3.0 TB/s and, at batch 1, 8 us of the host for each launch that goes; published fp16
# eager modelled at 131 ms (256 px, batch 8) and 11.2 ms (64 px, batch 1). CPU: two threads, 0.3 TFLOP/s and
# 15 GB/s in float32, which make 5.8 s of a plain step at 64 px and batch 4 (4.0 s convolutions and products,
# 0.8 s norms, 0.9 s attention) and 25 ms of the digits'; Winograd convolutions taken as 1.5 times as fast.
PREDICTED_GAINS: dict[tuple[str, str, int], dict[str, float]] = {
    ("cpu", "imagenet64", 4): {
        "channels-last": 0.03,
        "fused norm": 0.11,
        "fused attention": 0.14,
        "prepared step": 0.0,
        "folded convolutions": 0.0,
        "fastest convolution": 0.19,
        "two sources": 0.004,
        "residual in the convolution": 0.006,
        "qkv rows": 0.0,
        "embeddings at once": 0.003,
    },
    ("cpu", "digits32", 4): {
        "channels-last": 0.2,
        "fused norm": 0.15,
        "fused attention": 0.02,
        "prepared step": 0.0,
        "folded convolutions": 0.01,
        "fastest convolution": 0.15,
        "two sources": 0.01,
        "residual in the convolution": 0.02,
        "qkv rows": 0.0,
        "embeddings at once": 0.03,
    },
    ("cuda", "imagenet256", 8): {
        "channels-last": 0.08,
        "fused norm": 0.25,
        "fused attention": 0.024,
        "prepared step": 0.0,
        "folded convolutions": 0.005,
        "fastest convolution": 0.0,
        "two sources": 0.012,
        "residual in the convolution": 0.014,
        "qkv rows": 0.0,
        "embeddings at once": 0.001,
        "graph": 0.0,
        "two branches": 0.004,
    },
    ("cuda", "imagenet64", 1): {
        "channels-last": 0.0,
        "fused norm": 0.26,
        "fused attention": 0.08,
        "prepared step": 0.0,
        "folded convolutions": 0.02,
        "fastest convolution": 0.0,
        "two sources": 0.02,
        "residual in the convolution": 0.05,
        "qkv rows": 0.0,
        "embeddings at once": 0.03,
        "graph": 0.35,
        "two branches": 0.035,
    },
}
