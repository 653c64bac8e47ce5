"""`admfast verify MODEL`: measure the error of the fast path against the float32 reference."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from admfast.checks import parse_numbers
from admfast.cli import guidance as guiding
from admfast.cli import sample_options as option
from admfast.cli.options import load_arguments
from admfast.cli.sample import read_low_res, settings_rows
from admfast.engine.options import PLAIN, EngineOptions
from admfast.files.atomic import check_folder
from admfast.files.levels import from_uint8
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.sampling.load import load
from admfast.sampling.plan import plan
from admfast.verify.compare import STEPS, request_for, verify
from admfast.verify.report import report

EXCEEDS_BUDGET = 1
Solver = Annotated[str, typer.Option(help=f"{option.SOLVER_HELP}.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Seeds, 0-15 or 3,5: one image each (default: 0-3, or as many as --classes or --low-res)."
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        help="Network evaluations per image; refused if so few that rounding errors exceed the budget."
    ),
]
UpsamplerSteps = Annotated[
    int | None, typer.Option(help="Evaluations of the upsampler per image (default: as --steps).")
]


def run_verify(
    name: option.Name,
    weights: option.Weights = None,
    classifier: option.ClassifierFile = None,
    upsampler: option.UpsamplerFile = None,
    preset: option.Preset = None,
    low_res: option.LowRes = None,
    classes: option.Classes = None,
    seeds: Seeds = None,
    size: option.Size = None,
    steps: Steps = STEPS,
    solver: Solver = "ddim",
    guidance: guiding.Guidance = None,
    cfg_scale: guiding.CfgScale = None,
    weak: guiding.WeakFile = None,
    autoguidance_scale: guiding.AutoguidanceScale = None,
    upsampler_steps: UpsamplerSteps = None,
    precision: option.Precision = "auto",
    device: option.Device = None,
    threads: option.Threads = None,
    compile: option.Compile = False,
    compile_cache: option.CompileCache = None,
    set_: option.Set = None,
    set_classifier: option.SetClassifier = None,
    set_upsampler: option.SetUpsampler = None,
    set_weak: option.SetWeak = None,
) -> int:
    """Compare samples of the fast path with the float32 reference; exit with status 1 past the budget."""
    if compile_cache is not None:
        check_folder(user_path("compile_cache", compile_cache))
    guiding.check_weak(weak, autoguidance_scale)
    settings = _parse_images(classes, seeds)
    arguments = load_arguments(
        set_, set_classifier, set_upsampler, set_weak, weights=weights, classifier=classifier,
        upsampler=upsampler, weak=weak, preset=preset, device=device,
    )  # fmt: skip
    engine = EngineOptions(threads=threads)
    pipe = load(
        name, precision=precision, compile=compile, compile_cache=compile_cache, engine=engine, **arguments
    )
    settings |= dict(steps=steps, solver=solver, upsampler_steps=upsampler_steps, size=size)
    settings |= guiding.guidance_settings(
        pipe.guidance, guidance, cfg_scale=cfg_scale, autoguidance_scale=autoguidance_scale
    )
    if low_res is not None:
        images = read_low_res(low_res, pipe.config.in_channels).images
        settings["low_res"] = from_uint8(torch.from_numpy(images))
    request = request_for(pipe, **settings)
    reference = load(name, precision="fp32", engine=PLAIN, **arguments)
    print(
        table([*settings_rows(pipe, request, plan(request, pipe)), *pipe.policy.parts().items()]), flush=True
    )
    verification = verify(pipe, reference, request)
    print("\n" + report(verification))
    return EXCEEDS_BUDGET if verification.failures else 0


def _parse_images(classes: str | None, seeds: str | None) -> dict[str, Any]:
    """Return the settings of these texts."""
    numbers = {"classes": classes, "seeds": seeds}
    return {name: parse_numbers(name, text) for name, text in numbers.items() if text is not None}
