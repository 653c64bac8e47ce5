"""`admfast verify MODEL`: how far the fast path is from the float32 reference, on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from admfast.cli.options import options_of
from admfast.cli.sample import parse_numbers
from admfast.cli.sample_options import (
    ClassifierFile,
    Device,
    Guidance,
    Name,
    Precision,
    Preset,
    Set,
    SetClassifier,
    Weights,
)
from admfast.cli.tables import table
from admfast.engine.options import PLAIN
from admfast.engine.verify import Deviation, Verification
from admfast.errors import Unavailable
from admfast.files.atomic import atomic_path
from admfast.runs.verify import verify
from admfast.systems import load

PAST_BUDGET = 1
SHOWN_LAYERS = 5
Seeds = Annotated[str, typer.Option(help="Seeds, 0-15 or 3,5: one image each.")]
Steps = Annotated[int, typer.Option(help="Network evaluations an image.")]
Solver = Annotated[str, typer.Option(help="ddpm or ddim.")]
Plot = Annotated[
    Path | None, typer.Option(help="Also draw the error of every step, as PNG (default: don't).")
]


def run_verify(
    name: Name,
    weights: Weights = None,
    classifier: ClassifierFile = None,
    preset: Preset = None,
    seeds: Seeds = "0-3",
    steps: Steps = 25,
    solver: Solver = "ddim",
    guidance: Guidance = None,
    precision: Precision = "auto",
    device: Device = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the step (default: don't).")
    ] = False,
    plot: Plot = None,
    set_: Set = None,
    set_classifier: SetClassifier = None,
) -> int:
    """Sample the same seeds on the fast path and on the float32 reference; exit 1 past the budget."""
    if plot is not None:
        _plotting()
    given: dict[str, Any] = dict(
        weights=weights,
        classifier=classifier,
        preset=preset,
        device=device,
        classifier_options=options_of("--set-classifier", set_classifier),
        **options_of("--set", set_),
    )
    pipe = load(name, precision=precision, compile=compile, **given)
    reference = load(name, precision="fp32", engine=PLAIN, **given)
    rows = [("system", pipe.name), ("device", str(pipe.device)), ("precision", pipe.precision)]
    rows += [(part, words) for part, words in pipe.policy.parts().items()]
    print(table(rows), flush=True)
    found = verify(
        pipe,
        reference,
        seeds=parse_numbers("seeds", seeds),
        steps=steps,
        solver=solver,
        guidance=guidance,
    )
    print(report(found))
    if plot is not None:
        draw(found, plot, pipe.precision)
        print(plot.resolve())
    return PAST_BUDGET if found.failures else 0


def report(found: Verification) -> str:
    """The tables and the verdict."""
    steps = [(d.name, f"{d.error:.2e}", _bar(d)) for d in found.steps]
    layers = sorted(found.layers, key=lambda d: -d.error / d.allowed)[:SHOWN_LAYERS]
    worst = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}") for d in layers]
    psnr = "no difference" if math.isinf(found.psnr) else f"{found.psnr:.1f} dB"
    images = [
        ("PSNR", psnr, f"{found.budget.psnr:.0f} dB or more"),
        ("8-bit values that differ", f"{100 * found.differing:.3f} %", ""),
        ("largest difference", f"{found.largest} of 255", ""),
    ]
    failures = found.failures
    verdict = "past the budget: " + "; ".join(failures) if failures else "within the budget"
    return "\n\n".join(
        [
            table(steps, ("images against the reference", "relative error", "1e-8 to 1, log")),
            table(worst, (f"worst of {len(found.layers)} layers", "relative error", "allowed")),
            table(images, ("images at the end", "", "budget")),
            verdict,
        ]
    )


def _bar(deviation: Deviation) -> str:
    """The error on a logarithmic scale from 1e-8 to 1, a mark every factor of 10^(1/4)."""
    if not math.isfinite(deviation.error):
        return "not finite"
    marks = 0 if deviation.error <= 1e-8 else round(4 * (math.log10(deviation.error) + 8))
    return "#" * min(marks, 32)


def _plotting() -> Any:
    """matplotlib's figures, without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable("plot: matplotlib is not installed (pip install 'admfast[bench]')") from None
    return Figure


def draw(found: Verification, path: Path, title: str) -> None:
    """The error of every step and what is allowed, as a PNG file."""
    figure = _plotting()(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=f"Fast path against the float32 reference ({title})")
    axes.semilogy(range(1, len(found.steps) + 1), [d.error for d in found.steps], marker=".", label="x")
    axes.axhline(found.budget.step, color="tab:red", label="allowed")
    axes.set(xlabel="step", ylabel="relative error")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
