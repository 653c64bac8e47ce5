"""Winograd's F(4x4, 3x3): the matrices, the transformed weights, and their effect on rounding errors.

Four outputs of a correlation with three weights need six products, one for each point p at which the two
polynomials are evaluated and multiplied (Winograd 1980; for convolutional networks Lavin & Gray 2016). With
six inputs d and three weights g, y = A^T ((G g) * (B^T d)), and in two dimensions
Y = A^T ((G g G^T) * (B^T d B)) A. So 36 products give 16 outputs of nine weights each; the direct sums take
144.

The points decide how much larger the products are than the terms of the direct sum, and so the rounding error
(Barabasz et al. 2020). With independent inputs and weights, the squares of the products that make output j
are larger by the factor

    k_j = sum_i A_ji^2 |B_i|^2 |G_i|^2 / 3

in one dimension and k_j k_j' in two. If both algorithms round equally often, the squared error is larger by
the same factor. Its square root is 31 at the worst of the 16 outputs and 10.8 on average for the usual points
0, +-1, +-2, infinity; for 0, +-3/4, +-3/2, infinity it is 8.8 and 5.1. With 768 channels and one running sum
per product, the measured rms errors of the two are 5.5e-6 and 2.6e-6 for outputs of order one. Points in
thirds or eighths gain 7 % at most, and lose more than that if an image has a large mean.

The weights' gradient uses the transposed algorithm: dg = G^T ((A dy A^T) * (B^T d B)) G, summed over the
tiles. Its factors are 7.2 and 5.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

# In the order of csrc/conv_winograd_loops.h, which has A and B; the sixth point is infinity.
POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))
OUTPUTS, WEIGHTS = 4, 3
PANEL = 32  # output channels that are adjacent in the transformed weights

Matrix = list[list[Fraction]]


def _multiply_polynomials(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    """Multiply two polynomials, lowest power first."""
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product


@functools.cache
def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """Return A^T [4, 6], B^T [6, 6] and G [6, 3] as exact fractions; only G has the factors of the points."""
    size = len(POINTS) + 1
    output = [[p**power for p in POINTS] + [Fraction(power == OUTPUTS - 1)] for power in range(OUTPUTS)]
    inputs, weights = [], []
    for p in (*POINTS, None):
        others = [q for q in POINTS if q != p]
        row = functools.reduce(_multiply_polynomials, ([-q, Fraction(1)] for q in others), [Fraction(1)])
        inputs.append(row + [Fraction(0)] * (size - len(row)))
        scale = math.prod((p - q for q in others), start=Fraction(1)) if p is not None else Fraction(1)
        last = [Fraction(power == WEIGHTS - 1) for power in range(WEIGHTS)]
        weights.append(last if p is None else [p**power / scale for power in range(WEIGHTS)])
    return output, inputs, weights


def amplification() -> tuple[float, float]:
    """Return the rounding error relative to a direct sum's: at the worst output, and as rms over outputs."""
    output, inputs, weights = matrices()
    terms = [
        _squared_norm(row) * _squared_norm(taps) / WEIGHTS for row, taps in zip(inputs, weights, strict=True)
    ]
    return _growth(output, terms)


def gradient_amplification() -> tuple[float, float]:
    """Return the same for the weights' gradient G^T ((A dy) * (B^T d)), which sums four outputs per tile."""
    output, inputs, weights = matrices()
    powers = zip(*output, strict=True)
    terms = [
        _squared_norm(row) * _squared_norm(column) / OUTPUTS
        for row, column in zip(inputs, powers, strict=True)
    ]
    return _growth([list(taps) for taps in zip(*weights, strict=True)], terms)


def _squared_norm(row: Iterable[Fraction]) -> Fraction:
    return sum((value * value for value in row), Fraction(0))


def _growth(rows: Matrix, terms: Sequence[Fraction]) -> tuple[float, float]:
    """Return the maximum and the mean over the rows j of sum_i A_ji^2 terms_i."""
    growth = [sum(a * a * t for a, t in zip(row, terms, strict=True)) for row in rows]
    return float(max(growth)), float(sum(growth) / len(growth))


def winograd_weights_ref(weight: Tensor) -> Tensor:
    """Compute the compiled op `winograd_weights` in plain PyTorch: U = G g G^T for every pair of channels.

    [C_out, C_in, 3, 3] -> [ceil(C_out / 32), 36, C_in, 32] float32, computed in float64 and rounded once; the
    last panel of 32 output channels is padded with zeros.
    """
    c_out, c_in = weight.shape[:2]
    g = weight_transform()
    kronecker = torch.kron(g, g)  # [36, 9]
    u = torch.zeros(-(-c_out // PANEL), kronecker.shape[0], c_in, PANEL, dtype=torch.float32, device="cpu")
    for panel, taps in zip(u, weight.split(PANEL), strict=True):
        values = taps.double().reshape(-1, c_in, kronecker.shape[1]) @ kronecker.t()  # [32, C_in, 36]
        panel[..., : len(taps)] = values.permute(2, 1, 0)
    return u


def weight_transform() -> Tensor:
    """Return G [6, 3] in float64."""
    rows = [[float(g) for g in row] for row in matrices()[2]]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
