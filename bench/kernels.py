"""`python -m bench.kernels`: compare every op of the package with eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from bench.command import Bench, bench_main

NAMES = ("sampler", "norm", "norm-gradient", "attention", "conv", "others")


def groups(arguments: argparse.Namespace, settings: Any) -> Any:
    """Return the groups in the order in which they run, with their shares of the budget."""
    from bench.ops import attention, matmul_and_conv, norm, other_ops, update

    cases = (update.kernels, norm.kernels, norm.gradient_kernels, attention.kernels)
    cases += (matmul_and_conv.conv_kernels, other_ops.kernels)
    return dict(zip(NAMES, zip((0.1, 0.25, 0.2, 0.2, 0.25, 0.1), cases, strict=True), strict=True))


BENCH = Bench("kernels", "Compare every op with eager PyTorch and torch.compile.", NAMES, groups)
main = functools.partial(bench_main, BENCH)

if __name__ == "__main__":
    sys.exit(main())
