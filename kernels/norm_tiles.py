"""Share code among the kernels of `group_norm_silu`: channels-last tiles, affine, statistics, resampling.

A tile is [positions, channels] of one image. Its channel c comes from x below C1 and from x2 above, by two
masked loads (a masked-off load moves nothing), so that a group may straddle the sources. Two of the spatial
dimensions are resampled (DIMS = 2), or the only one (DIMS = 1); what stands before them (a volume's depth)
is counted in planes of H rows. All arithmetic is in float32; offsets are int64.
"""

import triton
import triton.language as tl

# Of the integers only the channel counts tell how wide a load may be; the others would only multiply what is
# compiled, and a 1 among them would arrive as a constant.
PLAIN = [
    *("N", "P", "P_OUT", "H", "W", "G", "D", "width", "pieces", "chunk", "chunks", "blocks", "span", "spans"),
    *("scale_stride", "shift_stride"),
]


@triton.jit
def load_source(x_ptr, x2_ptr, n, position, inside, c, wanted, P, C1, C2):
    """[x, x2] of image n in float32; 0 where not `inside` (positions) or not `wanted` (channels)."""
    row = (n.to(tl.int64) * P + position)[:, None]
    own = inside[:, None] & (wanted & (c < C1))[None, :]
    value = tl.load(x_ptr + row * C1 + c[None, :], mask=own, other=0.0).to(tl.float32)
    if x2_ptr is not None:
        other = inside[:, None] & (wanted & (c >= C1))[None, :]
        second = tl.load(x2_ptr + row * C2 + (c - C1)[None, :], mask=other, other=0.0).to(tl.float32)
        value = tl.where((c < C1)[None, :], value, second)
    return value


@triton.jit
def store_source(dx_ptr, dx2_ptr, value, n, position, inside, c, wanted, P, C1, C2):
    """Write a tile of the gradient to the source that each channel came from."""
    row = (n.to(tl.int64) * P + position)[:, None]
    own = inside[:, None] & (wanted & (c < C1))[None, :]
    tl.store(dx_ptr + row * C1 + c[None, :], value, mask=own)
    if dx2_ptr is not None:
        other = inside[:, None] & (wanted & (c >= C1))[None, :]
        tl.store(dx2_ptr + row * C2 + (c - C1)[None, :], value, mask=other)


@triton.jit
def load_dense(ptr, n, position, inside, c, wanted, P, C):
    """A tile of a dense tensor of P positions and C channels, in float32."""
    offset = (n.to(tl.int64) * P + position)[:, None] * C + c[None, :]
    return tl.load(ptr + offset, mask=inside[:, None] & wanted[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_dense(ptr, value, n, position, inside, c, wanted, P, C):
    """Write a tile of a dense tensor of P positions and C channels."""
    offset = (n.to(tl.int64) * P + position)[:, None] * C + c[None, :]
    tl.store(ptr + offset, value, mask=inside[:, None] & wanted[None, :])


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, wanted, scale_stride, shift_stride):
    """w' = weight (1 + scale) and b' = bias (1 + scale) + shift of the channels c of image n."""
    w = tl.load(weight_ptr + c, mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, mask=wanted, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        row = n.to(tl.int64)
        factor = 1.0 + tl.load(scale_ptr + row * scale_stride + c, mask=wanted, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride + c, mask=wanted, other=0.0).to(tl.float32)
        w = w * factor
        b = b * factor + shift
    return w, b


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, n, c, wanted, N, G, D):
    """mean, what float32 left out of it, and rstd of each channel's group; mean is [2, N, G]."""
    at = n.to(tl.int64) * G + c // D
    low_ptr = mean_ptr + N.to(tl.int64) * G
    mean = tl.load(mean_ptr + at, mask=wanted, other=0.0)
    low = tl.load(low_ptr + at, mask=wanted, other=0.0)
    return mean, low, tl.load(rstd_ptr + at, mask=wanted, other=0.0)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, mean, low, rstd, n, c, lane, wanted, N, G, D):
    """Write what the channels of a group agree on, by the first of each."""
    at = n.to(tl.int64) * G + c // D
    first = wanted & (lane % D == 0)
    tl.store(mean_ptr + at, mean, mask=first)
    tl.store(mean_ptr + N.to(tl.int64) * G + at, low, mask=first)
    tl.store(rstd_ptr + at, rstd, mask=first)


@triton.jit
def over_group(value, lane, D, SINGLE: tl.constexpr):
    """The sum of `value` [channels] over each channel's group, at every channel; lane 0 begins a group.

    A select, not a product with 0 and 1: a NaN must stay in its group.
    """
    if SINGLE:
        total = tl.zeros_like(value) + tl.sum(value, axis=0)
    else:
        same = (lane // D)[:, None] == (lane // D)[None, :]
        total = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
    return total


@triton.jit
def first_of_block(q, H, W, DIMS: tl.constexpr):
    """The position of the first input that is averaged into output position q; odd remainders dropped."""
    row = q // (W // 2)
    column = q - row * (W // 2)
    if DIMS == 2:
        # Plane * H + 2 * (row in its plane): an odd H leaves one row a plane out.
        row = 2 * row + (row // (H // 2)) * (H % 2)
    return row * W + 2 * column


@triton.jit
def first_of_copies(p, W, DIMS: tl.constexpr):
    """The first output position that input position p is copied to; the others are 1 and 2 W further."""
    row = p // W
    column = p - row * W
    return row * DIMS * (2 * W) + 2 * column


@triton.jit
def load_unresampled(
    dy_ptr, n, p, inside, c, wanted, P_OUT, H, W, C, RESAMPLE: tl.constexpr, DIMS: tl.constexpr
):
    """The gradient at the output brought back to input positions p, in float32."""
    if RESAMPLE == "up":
        first = first_of_copies(p, W, DIMS)
        value = load_dense(dy_ptr, n, first, inside, c, wanted, P_OUT, C)
        value += load_dense(dy_ptr, n, first + 1, inside, c, wanted, P_OUT, C)
        if DIMS == 2:
            value += load_dense(dy_ptr, n, first + 2 * W, inside, c, wanted, P_OUT, C)
            value += load_dense(dy_ptr, n, first + 2 * W + 1, inside, c, wanted, P_OUT, C)
    elif RESAMPLE == "down":
        row = p // W
        column = (p - row * W) // 2
        kept = inside & (column < W // 2)
        if DIMS == 2:
            plane = row // H
            row_of_plane = (row - plane * H) // 2
            kept = kept & (row_of_plane < H // 2)
            row = plane * (H // 2) + row_of_plane
        at = row * (W // 2) + column
        value = load_dense(dy_ptr, n, at, kept, c, wanted, P_OUT, C) * (0.5 / DIMS)
    else:
        value = load_dense(dy_ptr, n, p, inside, c, wanted, P_OUT, C)
    return value


@triton.jit
def activate(x, mean, a, b, SILU: tl.constexpr):
    """act((x - mean) a + b), with mean, a, b a channel."""
    u = (x - mean[None, :]) * a[None, :] + b[None, :]
    if SILU:
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def through_activation(g, x, mean, a, b, SILU: tl.constexpr):
    """du = g act'(u), and x - mean: u is made again from x, not kept."""
    centred = x - mean[None, :]
    if SILU:
        u = centred * a[None, :] + b[None, :]
        sigmoid = tl.sigmoid(u)
        g = g * (sigmoid * (1.0 + u * (1.0 - sigmoid)))
    return g, centred
