"""Code that the kernels of `group_norm_silu` share: channels-last tiles, affine, statistics, resampling.

A tile is [positions, channels] of one image. Channels below C1 are loaded from x and the others from x2, by
two masked loads (lanes that are masked off move no data), so a group may span both sources. The last two
spatial dimensions are resampled (DIMS = 2), or the only one (DIMS = 1). A volume is seen as planes of H rows.
All arithmetic is in float32; offsets are int64.
"""

import triton
import triton.language as tl

# Integer arguments for which the compiler makes no special variants. Only the channel counts determine how
# wide a load may be; variants for the others would only add compilations, and an argument of 1 would become a
# constant.
UNSPECIALISED = [
    *("N", "P", "P_OUT", "H", "W", "G", "D", "width", "pieces", "chunk", "chunks", "blocks", "span", "spans"),
    *("scale_stride", "shift_stride", "x_bias_stride", "chunk2", "chunks2"),
]


@triton.jit
def load_source(x_ptr, x2_ptr, n, position, p_mask, c, c_mask, P, C1, C2):
    """Load [x, x2] of image n in float32; 0 where `p_mask` (positions) or `c_mask` (channels) is false."""
    row = (n.to(tl.int64) * P + position)[:, None]
    x_mask = p_mask[:, None] & (c_mask & (c < C1))[None, :]
    value = tl.load(x_ptr + row * C1 + c[None, :], mask=x_mask, other=0.0).to(tl.float32)
    if x2_ptr is not None:
        x2_mask = p_mask[:, None] & (c_mask & (c >= C1))[None, :]
        second = tl.load(x2_ptr + row * C2 + (c - C1)[None, :], mask=x2_mask, other=0.0).to(tl.float32)
        value = tl.where((c < C1)[None, :], value, second)
    return value


@triton.jit
def store_source(dx_ptr, dx2_ptr, value, n, position, p_mask, c, c_mask, P, C1, C2):
    """Write a tile of the gradient to the source that each channel came from."""
    row = (n.to(tl.int64) * P + position)[:, None]
    x_mask = p_mask[:, None] & (c_mask & (c < C1))[None, :]
    tl.store(dx_ptr + row * C1 + c[None, :], value, mask=x_mask)
    if dx2_ptr is not None:
        x2_mask = p_mask[:, None] & (c_mask & (c >= C1))[None, :]
        tl.store(dx2_ptr + row * C2 + (c - C1)[None, :], value, mask=x2_mask)


@triton.jit
def load_dense(ptr, n, position, p_mask, c, c_mask, P, C):
    """Load a tile of a dense tensor of P positions and C channels, in float32."""
    offset = (n.to(tl.int64) * P + position)[:, None] * C + c[None, :]
    return tl.load(ptr + offset, mask=p_mask[:, None] & c_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_dense(ptr, value, n, position, p_mask, c, c_mask, P, C):
    """Write a tile of a dense tensor of P positions and C channels."""
    offset = (n.to(tl.int64) * P + position)[:, None] * C + c[None, :]
    tl.store(ptr + offset, value, mask=p_mask[:, None] & c_mask[None, :])


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride):
    """Return w' = weight (1 + scale) and b' = bias (1 + scale) + shift of the channels c of image n."""
    w = tl.load(weight_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        row = n.to(tl.int64)
        factor = 1.0 + tl.load(scale_ptr + row * scale_stride + c, mask=c_mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride + c, mask=c_mask, other=0.0).to(tl.float32)
        w = w * factor
        b = b * factor + shift
    return w, b


@triton.jit
def two_sum(a, b):
    """Return a + b rounded to float32, and the rounding remainder (Knuth 1969)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def load_x_bias(x_bias_ptr, n, c, c_mask, x_bias_stride):
    """Load the x_bias of the channels c of image n."""
    index = n.to(tl.int64) * x_bias_stride + c
    return tl.load(x_bias_ptr + index, mask=c_mask, other=0.0).to(tl.float32)


@triton.jit
def moments(pivot, total, squares, count):
    """Return the mean, as the sum of pivot and mean_offset, and the squared deviations of each channel.

    total, squares: [positions, channels] sums of x - pivot and of its square. count: values of a channel.
    """
    mean_offset = tl.sum(total, axis=0) / count
    return pivot, mean_offset, tl.sum(squares, axis=0) - mean_offset * mean_offset * count


@triton.jit
def store_moments(partial_ptr, pivot, mean_offset, deviations, n, k, c, c_mask, chunks, C):
    """Write the results of `moments` for chunk k to partial [N, chunks, 3, C]."""
    index = (n.to(tl.int64) * chunks + k) * 3 * C + c
    tl.store(partial_ptr + index, pivot, mask=c_mask)
    tl.store(partial_ptr + index + C, mean_offset, mask=c_mask)
    tl.store(partial_ptr + index + 2 * C, deviations, mask=c_mask)


@triton.jit
def load_moments(partial_ptr, n, k, c, c_mask, P, C, chunk, chunks):
    """Load the moments of the chunks k, and the number of positions of each chunk: [chunks, channels]."""
    mask = (k < chunks)[:, None] & c_mask[None, :]
    index = ((n.to(tl.int64) * chunks + k) * 3 * C)[:, None] + c[None, :]
    pivot = tl.load(partial_ptr + index, mask=mask, other=0.0)
    mean_offset = tl.load(partial_ptr + index + C, mask=mask, other=0.0)
    deviations = tl.load(partial_ptr + index + 2 * C, mask=mask, other=0.0)
    sizes = tl.where(mask, tl.minimum(P - k * chunk, chunk).to(tl.float32)[:, None], 0.0)
    return pivot, mean_offset, deviations, sizes


@triton.jit
def subtract_x_bias(mean, low, x_bias_ptr, n, c, c_mask, x_bias_stride):
    """Return the mean to subtract from each channel of x before x_bias is added: a sum of two numbers."""
    if x_bias_ptr is not None:
        mean, remainder = two_sum(mean, -load_x_bias(x_bias_ptr, n, c, c_mask, x_bias_stride))
        low += remainder
    return mean, low


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, x_bias_ptr, n, c, c_mask, N, G, D, x_bias_stride):
    """Load the mean to subtract from each channel of x, its rounding remainder, and rstd of its group.

    mean_ptr is [2, N, G].
    """
    index = n.to(tl.int64) * G + c // D
    low_ptr = mean_ptr + N.to(tl.int64) * G
    mean = tl.load(mean_ptr + index, mask=c_mask, other=0.0)
    low = tl.load(low_ptr + index, mask=c_mask, other=0.0)
    mean, low = subtract_x_bias(mean, low, x_bias_ptr, n, c, c_mask, x_bias_stride)
    return mean, low, tl.load(rstd_ptr + index, mask=c_mask, other=0.0)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, mean, low, rstd, n, c, lane, c_mask, N, G, D):
    """Write the statistics of each group, from the lane of its first channel."""
    index = n.to(tl.int64) * G + c // D
    first = c_mask & (lane % D == 0)
    tl.store(mean_ptr + index, mean, mask=first)
    tl.store(mean_ptr + N.to(tl.int64) * G + index, low, mask=first)
    tl.store(rstd_ptr + index, rstd, mask=first)


@triton.jit
def group_sum(value, lane, D, SINGLE: tl.constexpr):
    """Return the sum of `value` [channels] over the group of each channel; a group begins at lane 0.

    Other groups are masked by a select, not by a product with 0: a NaN must stay in its group.
    """
    if SINGLE:
        total = tl.zeros_like(value) + tl.sum(value, axis=0)
    else:
        same = (lane // D)[:, None] == (lane // D)[None, :]
        total = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
    return total


@triton.jit
def first_pooled_position(q, H, W, DIMS: tl.constexpr):
    """Return the first input position that is averaged into output position q.

    The last row or column of an odd size is averaged into none.
    """
    row = q // (W // 2)
    column = q - row * (W // 2)
    if DIMS == 2:
        # Plane * H + 2 * (row in its plane): an odd H leaves out one row per plane.
        row = 2 * row + (row // (H // 2)) * (H % 2)
    return row * W + 2 * column


@triton.jit
def first_copy_position(p, W, DIMS: tl.constexpr):
    """Return the first output position that gets a copy of input p; the others are +1, +2 W and +2 W + 1."""
    row = p // W
    column = p - row * W
    return row * DIMS * (2 * W) + 2 * column


@triton.jit
def load_output_gradient(
    dy_ptr, n, p, p_mask, c, c_mask, P_OUT, H, W, C, RESAMPLE: tl.constexpr, DIMS: tl.constexpr
):
    """Load the gradient of the output, brought back to input positions p, in float32."""
    if RESAMPLE == "up":
        first = first_copy_position(p, W, DIMS)
        value = load_dense(dy_ptr, n, first, p_mask, c, c_mask, P_OUT, C)
        value += load_dense(dy_ptr, n, first + 1, p_mask, c, c_mask, P_OUT, C)
        if DIMS == 2:
            value += load_dense(dy_ptr, n, first + 2 * W, p_mask, c, c_mask, P_OUT, C)
            value += load_dense(dy_ptr, n, first + 2 * W + 1, p_mask, c, c_mask, P_OUT, C)
    elif RESAMPLE == "down":
        row = p // W
        column = (p - row * W) // 2
        used_mask = p_mask & (column < W // 2)
        if DIMS == 2:
            plane = row // H
            row_of_plane = (row - plane * H) // 2
            used_mask = used_mask & (row_of_plane < H // 2)
            row = plane * (H // 2) + row_of_plane
        index = row * (W // 2) + column
        value = load_dense(dy_ptr, n, index, used_mask, c, c_mask, P_OUT, C) * (0.5 / DIMS)
    else:
        value = load_dense(dy_ptr, n, p, p_mask, c, c_mask, P_OUT, C)
    return value


@triton.jit
def activate(x, mean, a, b, SILU: tl.constexpr):
    """Return act((x - mean) a + b), with one mean, a and b per channel."""
    u = (x - mean[None, :]) * a[None, :] + b[None, :]
    if SILU:
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def activation_backward(g, x, mean, a, b, SILU: tl.constexpr):
    """Return du = g act'(u), and x - mean; u is recomputed from x."""
    centred = x - mean[None, :]
    if SILU:
        u = centred * a[None, :] + b[None, :]
        sigmoid = tl.sigmoid(u)
        g = g * (sigmoid * (1.0 + u * (1.0 - sigmoid)))
    return g, centred
