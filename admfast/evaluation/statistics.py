"""Mean and covariance of features, summed batch by batch and over processes in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from admfast.errors import invalid

ASYMMETRY = 1e-5  # of a covariance, as a share of its largest entry; float32 sums stay below


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `mu` [D] and covariance `sigma` [D, D] (divided by N - 1) of features, in float64."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, dims in (("mu", 1), ("sigma", 2)):
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in "fiu":
                raise invalid(f"{name}.dtype", str(array.dtype), "real numbers")
            width = max(np.shape(self.mu)[:1], default=0)
            if not width or array.shape != (width,) * dims:
                raise invalid(f"{name}.shape", array.shape, "mu [D] and sigma [D, D]")
            array = array.astype(np.float64)
            if not np.isfinite(array).all():
                raise invalid(name, "NaN or infinity", "finite numbers")
            object.__setattr__(self, name, array)
        scale = np.abs(self.sigma).max()
        if np.abs(self.sigma - self.sigma.T).max() > ASYMMETRY * scale or self.sigma.diagonal().min() < 0:
            raise invalid("sigma", "not a covariance", "symmetric, and no variance below 0")


class StatisticsSum:
    """Sums from which `Statistics` are made: add batches of features, and the sums of other processes.

    All sums are of x - shift, where `shift` is the mean of the first batch, so that the products of large
    means don't cancel. They are in float64 on the device of the features.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum: Tensor
        self._products: Tensor

    def add(self, features: Tensor) -> None:
        """Add features [n, D]. Raises InvalidArgument for NaN or infinity."""
        if not bool(features.isfinite().all()):
            raise invalid("features", "NaN or infinity", "finite numbers")
        x = features.double()
        if self._shift is None:
            self._shift = x.mean(0)
            self._sum, self._products = torch.zeros_like(self._shift), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._products.addmm_(x.T, x)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the count [1], the mean [D] and the centred products [D, D], which `merged` adds up."""
        assert self._shift is not None
        offset = self._sum / self.count
        products = self._products - self.count * torch.outer(offset, offset)
        return products.new_tensor([self.count]), self._shift + offset, products

    def statistics(self) -> Statistics:
        """Return mean and covariance. Raises InvalidArgument for fewer than two rows."""
        if self.count < 2:
            raise invalid("features", f"{self.count} rows", "at least 2")
        return merged([self.moments()])


def merged(moments: list[tuple[Tensor, Tensor, Tensor]]) -> Statistics:
    """Return the statistics of all rows from the moments of parts of them (Chan et al. 1979)."""
    count, mean, products = (tensor.clone() for tensor in moments[0])
    for other_count, other_mean, other_products in moments[1:]:
        difference, total = other_mean - mean, count + other_count
        products += other_products + torch.outer(difference, difference) * (count * other_count / total)
        mean += difference * (other_count / total)
        count = total
    return Statistics(mean.cpu().numpy(), (products / (count - 1)).cpu().numpy())


def statistics_of(features: Any, batch_size: int = 1024) -> Statistics:
    """Return the statistics of features [N, D] (array or tensor; N of at least 2).

    Raises InvalidArgument for another shape, fewer than 2 rows, or NaN or infinity.
    """
    rows = feature_rows("features", features)
    total = StatisticsSum()
    for batch in rows.split(batch_size):
        total.add(batch)
    return total.statistics()


def feature_rows(name: str, features: Any, least: int = 2) -> Tensor:
    """Return features as a floating tensor [N, D]. Raises InvalidArgument if they aren't at least `least`
    rows."""
    if isinstance(features, np.ndarray):  # torch takes no negative strides and no other order of bytes
        features = np.ascontiguousarray(features)
        if features.dtype.kind in "fiub":
            features = features.astype(features.dtype.newbyteorder("="))
    try:
        rows = torch.as_tensor(features)
    except (TypeError, ValueError, RuntimeError):
        raise invalid(name, type(features).__name__, "an array [N, D]") from None
    if rows.dim() != 2 or not rows.shape[1]:
        raise invalid(f"{name}.shape", tuple(rows.shape), "[N, D]")
    if len(rows) < least:
        raise invalid(name, f"{len(rows)} rows", f"at least {least}")
    if rows.is_complex():
        raise invalid(f"{name}.dtype", str(rows.dtype), "real numbers")
    rows = rows.detach() if rows.dtype in (torch.float32, torch.float64) else rows.detach().double()
    if not bool(rows.isfinite().all()):
        raise invalid(name, "NaN or infinity", "finite numbers")
    return rows
