"""Squared distances between features in strips of bounded memory, as the published evaluator rounds them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 10_000  # rows and columns of a block, within which the published evaluator chooses its precision
_STRIP_BYTES = 2**26
_SPARE = 8  # candidates beyond the k nearest, because the formula cancels between near copies


def squared_distances(a: Tensor, b: Tensor, half: bool) -> Tensor:
    """Return max(|a|^2 - 2 a . b + |b|^2, 0) of all pairs, as float32 [N, M].

    half: round features, squares, norms, products and sums to float16, as the published evaluator does; sums
    within a norm or a product are in float32, as a GPU's are.
    """
    if not half:
        a, b = a.float(), b.float()
        norms = (a.square().sum(1, keepdim=True), b.square().sum(1)[None])
        return (norms[0] - 2 * (a @ b.T) + norms[1]).clamp_(min=0)
    a, b = a.half(), b.half()
    left, right = (x.square().float().sum(1).half() for x in (a, b))
    # A product of half-precision numbers is exact in float32.
    products = a @ b.T if a.is_cuda else (a.float() @ b.float().T).half()
    products.mul_(-2).add_(left[:, None]).add_(right[None])
    return products.float().clamp_(min=0)  # NaN and infinity stay


def distance_strips(a: Tensor, b: Tensor, half: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, distances) that cover all pairs of a [N, D] and b [M, D].

    For each strip of rows, all columns come in turn. half: compute a block in half precision, or in float32
    if one of its numbers is not finite. The blocks, of `BLOCK` rows and columns, are the published
    evaluator's.
    """
    size = max(1, _STRIP_BYTES // (4 * min(BLOCK, len(b))))
    columns = [slice(left, min(left + BLOCK, len(b))) for left in range(0, len(b), BLOCK)]
    for top in range(0, len(a), BLOCK):
        block = a[top : top + BLOCK]
        halves = [half and _is_finite_in_half(block, b[part], size) for part in columns]
        for first in range(0, len(block), size):
            strip = block[first : first + size]
            rows = slice(top + first, top + first + len(strip))
            for part, half_here in zip(columns, halves, strict=True):
                yield rows, part, squared_distances(strip, b[part], half_here)


def _is_finite_in_half(a: Tensor, b: Tensor, size: int) -> bool:
    """Tell whether all half-precision distances of a block are finite. size: rows to compute at a time."""
    # All steps of the formula are at most (|a| + |b|)^2. Only where that is near 65504 they are computed.
    longest = sum(float(x.half().float().norm(dim=1).max()) for x in (a, b))
    if longest**2 < 65_000:
        return True
    return all(bool(squared_distances(strip, b, True).isfinite().all()) for strip in a.split(size))


def neighbour_radii(features: Tensor, k: int, half: bool) -> Tensor:
    """Return the squared distance [N] of each row to its k-th nearest other row, in float32.

    It is the (k + 1)-th smallest distance to all rows, as the row itself is one of them.
    """
    radii, nearest = [], features.new_empty(0, 0, dtype=torch.float32)
    for _, columns, distances in distance_strips(features, features, half):
        candidates = distances if columns.start == 0 else torch.cat([nearest, distances], dim=1)
        nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        if columns.stop == len(features):
            radii.append(nearest[:, k])
    return torch.cat(radii)


def nearest_rows(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return distances and indices, [N, min(k, M)], of the k rows of b [M, D] nearest to each row of a.

    Distances are Euclidean, in float64, nearest first; equal ones are in the order of b. Candidates are the
    k + 8 nearest by the formula of `squared_distances`; their distances are then computed from
    differences, so that the distance to a copy is 0. Memory: the result and 200 MB. Not differentiable.
    """
    distances, indices = [], []
    best = a.new_empty(0, 0, dtype=torch.float32)
    chosen = torch.empty(0, 0, dtype=torch.int64, device=a.device)
    for rows, columns, strip in distance_strips(a, b, half=False):
        found = strip.topk(min(k + _SPARE, strip.shape[1]), largest=False)
        if columns.start == 0:
            best, chosen = found.values, found.indices
        else:
            best = torch.cat([best, found.values], dim=1)
            chosen = torch.cat([chosen, found.indices + columns.start], dim=1)
            best, kept = best.topk(min(k + _SPARE, best.shape[1]), largest=False)
            chosen = chosen.gather(1, kept)
        if columns.stop == len(b):
            exact, order = _exact_order(a[rows], b, chosen)
            distances.append(exact[:, :k])
            indices.append(order[:, :k])
    return torch.cat(distances), torch.cat(indices)


def _exact_order(a: Tensor, b: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact distances of the candidates [N, c], rows of b for each row of a, sorted, and their
    indices."""
    candidates = candidates.sort(dim=1).values
    size = max(1, _STRIP_BYTES // (8 * candidates.shape[1] * a.shape[1]))
    parts = zip(a.split(size), candidates.split(size), strict=True)
    exact = torch.cat([(x.double()[:, None] - b[c].double()).square().sum(2).sqrt() for x, c in parts])
    exact, order = exact.sort(dim=1, stable=True)
    return exact, candidates.gather(1, order)
