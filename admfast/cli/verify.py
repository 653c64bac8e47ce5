"""`admfast verify MODEL`: how far the fast path is from the float32 reference, on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from admfast.cli.options import options_of
from admfast.cli.sample import parse_numbers, read_low_res
from admfast.cli.sample_options import (
    Classes,
    ClassifierFile,
    Compile,
    CompileCache,
    Device,
    Guidance,
    LowRes,
    Name,
    Precision,
    Preset,
    Set,
    SetClassifier,
    SetUpsampler,
    Solver,
    UpsamplerFile,
    Weights,
)
from admfast.cli.tables import table
from admfast.engine.images import from_uint8
from admfast.engine.options import PLAIN
from admfast.engine.verify import Deviation, Verification
from admfast.errors import OutputError, Unavailable
from admfast.files.atomic import atomic_path, check_folder, check_writable
from admfast.pipeline import Pipeline
from admfast.runs.verify import verify
from admfast.systems import load

PAST_BUDGET = 1
SHOWN_LAYERS = 5
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Seeds, 0-15 or 3,5: one image each (default: 0-3, or as many as --classes or --low-res)."
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        help="Network evaluations an image; so few that x_0 amplifies rounding past the budget are refused."
    ),
]
UpsamplerSteps = Annotated[
    int | None, typer.Option(help="Evaluations of the upsampler (default: as --steps).")
]
Plot = Annotated[
    Path | None, typer.Option(help="Also draw the error of every step into this PNG file (default: don't).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --plot (default: refuse).")]


def run_verify(
    name: Name,
    weights: Weights = None,
    classifier: ClassifierFile = None,
    upsampler: UpsamplerFile = None,
    preset: Preset = None,
    low_res: LowRes = None,
    classes: Classes = None,
    seeds: Seeds = None,
    steps: Steps = 25,
    solver: Solver = "ddim",
    guidance: Guidance = None,
    upsampler_steps: UpsamplerSteps = None,
    precision: Precision = "auto",
    device: Device = None,
    compile: Compile = False,
    compile_cache: CompileCache = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
    set_: Set = None,
    set_classifier: SetClassifier = None,
    set_upsampler: SetUpsampler = None,
) -> int:
    """Sample the same seeds on the fast path and on the float32 reference; exit 1 past the budget."""
    _check_places(plot, overwrite, compile_cache)
    images: dict[str, Any] = dict(classes=_numbers("classes", classes), seeds=_numbers("seeds", seeds))
    if low_res is not None:
        images["low_res"] = from_uint8(torch.from_numpy(read_low_res(low_res).images))
    given: dict[str, Any] = dict(
        weights=weights,
        classifier=classifier,
        upsampler=upsampler,
        preset=preset,
        device=device,
        classifier_options=options_of("--set-classifier", set_classifier),
        upsampler_options=options_of("--set-upsampler", set_upsampler, also=["low_res_size"]),
        **options_of("--set", set_),
    )
    pipe = load(name, precision=precision, compile=compile, compile_cache=compile_cache, **given)
    reference = load(name, precision="fp32", engine=PLAIN, **given)
    more: dict[str, Any] = dict(
        steps=steps, solver=solver, guidance=guidance, upsampler_steps=upsampler_steps
    )
    print(table(_resolved(pipe, steps, upsampler_steps, solver, guidance)), flush=True)
    found = verify(pipe, reference, **images, **more)
    print("\n" + report(found))
    if plot is not None:
        draw(found, plot, pipe.precision)
        print(plot.resolve())
    return PAST_BUDGET if found.failures else 0


def _check_places(plot: Path | None, overwrite: bool, cache: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result goes there."""
    if cache is not None:
        check_folder(cache)
    if plot is None:
        return
    _plotting()
    check_writable(plot)
    if plot.exists() and not overwrite:
        raise OutputError(f"plot={str(plot)!r}: is there already; give another file, or --overwrite")


def _numbers(name: str, text: str | None) -> list[int] | None:
    return None if text is None else parse_numbers(name, text)


def _resolved(
    pipe: Pipeline, steps: int, upsampler_steps: int | None, solver: str, guidance: float | None
) -> list[tuple[str, str]]:
    """What will be compared, as a table."""
    scale = pipe.guidance if guidance is None else guidance
    rows = [
        ("system", pipe.name),
        ("solver", f"{solver}, {steps} steps"),
        ("guidance", "none" if pipe.classifier is None else f"{scale:g}"),
        ("device", str(pipe.device)),
    ]
    if pipe.upsampler is not None:
        count = steps if upsampler_steps is None else upsampler_steps
        rows.insert(2, ("upsampler", f"{pipe.upsampler.name}, {count} steps"))
    return rows + list(pipe.policy.parts().items())


def report(found: Verification) -> str:
    """The tables and the verdict."""
    steps = [(d.name, f"{d.error:.2e}", f"{d.allowed:.2e}", _bar(d)) for d in found.steps]
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
            table(steps, ("images against the reference", "relative error", "allowed", "1e-8 to 1, log")),
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
