"""The shapes every bench measures: the expensive convolutions, norms and attentions of the ADM models.

A bench names its shapes here and nowhere else, so that two benches that speak of "the 256 px model's
first convolution" mean the same one. The numbers were counted on the published networks; a multiply-add
is two operations (FLOP).
"""

from __future__ import annotations

from dataclasses import dataclass

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

SAMPLER_SIDES = (64, 128, 256, 512)
GRAPH_NODES = (500, 1000)

# Per model its forward operations for one image (1e9), its six most expensive 3x3 and two most expensive 1x1
# shapes (three and one for the classifiers) as "channels in > channels out @ side * how often". Stride 1,
# padding (kernel - 1) / 2, square input. The query-key-value projections of attention are 1x1 convolutions
# over side * side tokens and are listed as such.
CONVS = """
unet64 219.356 3x3 192>192@64*10 384>384@32*9 384>384@64*2 384>192@64*3 576>576@16*9 576>576@32*2
  1x1 384>1152@32*7 576>1728@16*7
unet128 613.856 3x3 256>256@128*9 512>256@128*3 256>256@64*9 512>512@64*2 512>512@32*6 768>768@32*2
  1x1 512>256@128*3 512>1536@32*5
unet256 2239.666 3x3 256>256@256*9 512>256@256*3 256>256@128*9 512>512@64*8 512>512@128*2 1024>512@64*2
  1x1 512>256@256*3 1024>512@64*2
unet512 3964.670 3x3 256>256@256*8 256>256@512*2 128>128@512*7 512>256@256*2 256>128@512*2 384>128@512*1
  1x1 512>256@256*2 256>128@512*2
up64_256 1263.285 3x3 192>192@256*9 384>192@256*3 192>192@128*9 384>384@64*8 384>384@128*2 768>384@64*2
  1x1 384>192@256*3 768>384@64*2
up128_512 5009.570 3x3 192>192@512*9 384>192@512*3 192>192@256*9 384>384@128*8 384>384@256*2 768>384@128*2
  1x1 384>192@512*3 768>384@128*2
clf64 38.158 3x3 128>128@64*8 256>256@32*7 384>384@16*7
1x1 256>768@32*4
clf128 42.081 3x3 128>128@128*4 128>128@64*6 256>256@32*3
1x1 256>768@32*2
clf256 146.697 3x3 128>128@256*4 128>128@128*6 256>256@64*3
1x1 256>768@32*2
clf512 225.534 3x3 64>64@512*4 128>128@256*3 128>128@128*6
1x1 64>128@256*1
"""

# GroupNorm + SiLU in 32 groups before a convolution: "model channels @ side".
NORMS = """
unet64 192@64   unet256 256@256  unet256 512@256   unet512 128@512  unet128 256@128   unet64 384@32
unet64 576@16   unet64 768@8     unet64 576@64     unet256 512@64   unet256 1024@16   unet512 384@512
up64_256 192@256   up128_512 192@512   clf256 128@256   clf512 64@512
"""

# Self-attention, "model tokens x heads x channels a head". Heads of 64 channels, except the 128 px model and
# the 64->256 upsampler, which fix four heads instead. 32 channels a head belongs to no released model; it is
# the width small models are trained with.
ATTENTIONS = """
unet256 1024x8x64   unet256 256x16x64   unet256 64x16x64   unet64 1024x6x64   unet64 256x9x64  unet64 64x12x64
unet128 1024x4x128  unet128 256x4x192   unet128 64x4x256   up64_256 1024x4x96 up64_256 256x4x192
up64_256 64x4x192   up128_512 1024x12x64   clf64 1024x4x64  clf64 256x6x64   clf64 64x8x64
small 256x4x32   small 64x4x32
"""


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


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.translate(str.maketrans(">@*x", "    ")).split()]


def _convs(table: str) -> list[ConvShape]:
    shapes, model, total = [], "", 0.0
    for line in table.strip().splitlines():
        words = line.split()
        if len(words[0]) > len("3x3"):
            model, total, words = words[0], 1e9 * float(words[1]), words[2:]
        for word in words[1:]:
            *size, count = _numbers(word)
            shape = ConvShape(model, int(words[0][0]), *size, share=0.0)
            share = round(100 * count * shape.flop / total, 2)
            shapes.append(ConvShape(model, *shape.size, share=share))
    return shapes


CONV_SHAPES = tuple(_convs(CONVS))
NORM_SHAPES = tuple(NormShape(m, *_numbers(size)) for m, size in zip(*[iter(NORMS.split())] * 2, strict=True))
ATTENTION_SHAPES = tuple(
    AttentionShape(model, *_numbers(size))
    for model, size in zip(*[iter(ATTENTIONS.split())] * 2, strict=True)
)


def distinct_convs() -> list[tuple[ConvShape, str]]:
    """Each size once, dearest first, with the text "model share %" of every model that has it.

    "Dearest" is the largest share of any model's operations, so that each model's own bottleneck comes early.
    """
    by_size: dict[tuple[int, int, int, int], list[ConvShape]] = {}
    for shape in sorted(CONV_SHAPES, key=lambda shape: -shape.share):
        by_size.setdefault(shape.size, []).append(shape)
    return [(same[0], ", ".join(f"{s.model} {s.share:g} %" for s in same)) for same in by_size.values()]
