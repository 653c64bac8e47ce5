"""Shapes and checks that the tests of `conv_direct` and of `conv_int8` share: both run on the same blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from admfast.ops import FoldedConv
from tests.ops.tolerance import unmodified

# Of 3x3 convolutions; name: (batch, C_in, C_out, spatial). A group is 16 positions, a panel is 32 outputs, a
# chunk is 32 inputs in bfloat16 and 64 in 8 bits.
SHAPES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "rows of whole groups": (2, 72, 33, (6, 32)),
    "groups over rows": (2, 33, 70, (7, 9)),
    "one column": (3, 20, 6, (11, 1)),
    "one row": (2, 20, 6, (1, 17)),
    "several images a block": (21, 16, 16, (5, 5)),  # three blocks of seven
    "blocks of rows": (1, 24, 32, (80, 48)),
    "few rows a block": (1, 600, 20, (5, 70)),
    "panels in parts": (3, 256, 260, (8, 8)),
}


def by_any_number_of_threads(
    conv: FoldedConv, x: Tensor, residual: Tensor, threads: Callable[[int], None]
) -> Tensor:
    """Return a convolution; assert that no number of threads changes a bit, and no call an argument."""
    found = []
    given = dict(x=x, residual=residual, weight=conv.weight, bias=conv.bias)
    for count in (1, 2, 5):
        threads(count)
        with unmodified(**given):
            found.append(conv(x, residual))
        assert torch.equal(found[0], found[-1]), f"{count} threads"
    return found[0]


def assert_images_are_independent(conv: FoldedConv, x: Tensor, residual: Tensor) -> None:
    """Assert that the place of an image in its batch, and the other images, change no bit of its output."""
    y = conv(x, residual)
    assert torch.equal(conv(x.flip(0), residual.flip(0)), y.flip(0))
    for i in range(len(x)):
        assert torch.equal(conv(x[i : i + 1], residual[i : i + 1]), y[i : i + 1])


def weights_in_form(form: Tensor, c_out: int, c_in: int) -> Tensor:
    """Return the weights [C_out, C_in, taps] in a form; assert that those of other channels are zero.

    form: [panels of 32 outputs, chunks, taps, 2 halves, 16 words, 16 outputs, channels of a word].
    """
    word = form.shape[-1]
    padded = torch.zeros(32 * form.shape[0], 16 * word * form.shape[1], form.shape[2], dtype=form.dtype)
    for panel, chunk, half, pair, output, n in torch.cartesian_prod(
        *(torch.arange(n) for i, n in enumerate(form.shape) if i != 2)
    ).tolist():
        channel = 16 * word * chunk + word * pair + n
        padded[32 * panel + 16 * half + output, channel] = form[panel, chunk, :, half, pair, output, n]
    weights = padded[:c_out, :c_in].clone()
    padded[:c_out, :c_in] = 0
    assert not padded.any(), "channels that don't exist must have zero weights"
    return weights


def assert_compiled_is_eager(conv: FoldedConv, x: Tensor, residual: Tensor) -> None:
    """Assert that a compiled convolution and its gradients have the bits of the eager ones."""
    torch._dynamo.reset()
    compiled = torch.compile(conv, backend="inductor", fullgraph=True)
    leaves = [t.clone().requires_grad_(True) for t in (x, residual)]
    dy = torch.randn_like(residual)
    with torch.no_grad():
        assert torch.equal(compiled(x, residual), conv(x, residual))
    eager, through = (torch.autograd.grad(f(*leaves), leaves, dy) for f in (conv, compiled))
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(eager, through, strict=True))
