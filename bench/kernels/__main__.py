"""`python -m bench.kernels`: measure every op of the package (the flags are those of `bench.command`)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.command import bench_main, run_as_program
from bench.kernels import attention, conv, norm, sampler
from bench.kernels.providers import with_reasons
from bench.kernels.report import plot, render
from bench.runner import Groups

GROUPS: Groups = {
    name: (share, with_reasons(cases))
    for name, share, cases in (
        ("sampler", 0.15, sampler.cases),
        ("norm", 0.25, norm.forward_cases),
        ("norm-gradient", 0.2, norm.gradient_cases),
        ("attention", 0.15, attention.cases),
        ("conv", 0.25, conv.cases),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, write rows, table and plot; returns the exit status."""
    return bench_main(
        "kernels", "Measure every op beside eager PyTorch and torch.compile.", GROUPS, render, argv, plot
    )


if __name__ == "__main__":
    run_as_program(main)
