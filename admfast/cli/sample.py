"""`admfast sample NAME`: sample images into a folder."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from admfast.cli import sample_options as option
from admfast.cli.commands import drop_output
from admfast.cli.options import parts_of
from admfast.engine.numerics import peak_memory
from admfast.engine.options import EngineOptions
from admfast.errors import AdmfastError, InvalidArgument, invalid
from admfast.files.atomic import check_folder
from admfast.files.images import MODES
from admfast.files.npz import Samples
from admfast.files.paths import user_path
from admfast.files.sets import read_set
from admfast.files.tables import table
from admfast.runs.sampling import SampleRun
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan, images_of
from admfast.sampling.profile import profile_text
from admfast.sampling.request import SampleRequest
from admfast.solvers import make_solver

# Most images of one call: a typo such as 0-99999999999 is an error and does not fill the memory.
MANY = 10_000_000


def run_sample(
    name: option.Name,
    weights: option.Weights = None,
    classifier: option.ClassifierFile = None,
    upsampler: option.UpsamplerFile = None,
    preset: option.Preset = None,
    low_res: option.LowRes = None,
    classes: option.Classes = None,
    per_class: option.PerClass = None,
    seeds: option.Seeds = None,
    size: option.Size = None,
    steps: option.Steps = None,
    solver: option.Solver = "ddpm",
    eta: option.Eta = None,
    respacing: option.Respaced = None,
    guidance: option.Guidance = None,
    guidance_interval: option.Interval = None,
    upsampler_steps: option.UpsamplerSteps = None,
    batch: option.Batch = None,
    precision: option.Precision = "auto",
    device: option.Device = None,
    threads: option.Threads = None,
    compile: option.Compile = False,
    compile_cache: option.CompileCache = None,
    verbose: option.Verbose = False,
    profile: option.Profile = False,
    out: option.Out = Path("out"),
    overwrite: option.Overwrite = False,
    intermediates: option.Intermediates = 0,
    set_: option.Set = None,
    set_classifier: option.SetClassifier = None,
    set_upsampler: option.SetUpsampler = None,
) -> None:
    """Sample images: PNG files, one labelled grid, and an npz as the published scripts write it."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    _check_early(batch, solver, compile_cache)
    engine = EngineOptions(threads=threads)
    parts = parts_of(
        set_, set_classifier, set_upsampler, weights=weights, classifier=classifier, upsampler=upsampler,
        preset=preset, device=device,
    )  # fmt: skip
    pipe = load(
        name, precision=precision, compile=compile, compile_cache=compile_cache, engine=engine, **parts
    )
    images = None if low_res is None else read_low_res(low_res, pipe.config.in_channels)
    wanted, keys = _wanted(pipe, classes, per_class, seeds, images)
    request = SampleRequest(
        wanted, keys, size=size, steps=steps, solver=solver, eta=eta, respacing=respacing,
        guidance=guidance, guidance_interval=parse_interval(guidance_interval),
        upsampler_steps=upsampler_steps, batch_size=batch,
    )  # fmt: skip
    small = None if images is None else images.images
    run = SampleRun(pipe, request, out, overwrite, intermediates, low_res=small)
    _run(run, list(pipe.policy.parts().items()) if verbose else [])
    if profile:
        _profile(pipe)


def _check_early(batch: int | None, solver: str, compile_cache: Path | None) -> None:
    """Reject wrong options that can be recognized without a model."""
    if batch is not None and batch < 1:
        raise invalid("batch", batch, "1 or more")
    if (chosen := make_solver(solver)).starts_from == "image":
        allowed = f"in Python only: pipe.sample(x_start=images, solver='{chosen}', output='float')"
        raise invalid("solver", solver, f"{allowed}; PNG files can't hold noise")
    if compile_cache is not None:
        check_folder(user_path("compile_cache", compile_cache))


def _run(run: SampleRun, more: list[tuple[str, str]]) -> None:
    """Check everything, print the settings, sample, and print where the files are."""
    rows = resolved(run.pipe, run.request, run.check())
    _say(table([*rows, ("out", str(run.out.resolve())), *more]))
    started = time.time()
    count = len(run.seeds)
    try:
        written = run.run()
    except (AdmfastError, KeyboardInterrupt):
        if run.finished:
            _say(f"{run.finished} of {count} images are finished and kept in {run.kept.resolve()}")
        raise
    spent = time.time() - started
    peak = f"peak memory {peak_memory(run.pipe.device) / 1e9:.1f} GB"
    _say(f"{count} images in {spent:.1f} s ({count / spent:.2f} images/s), {peak}")
    for path in (run.out / "images", *written):
        _say(str(path.resolve()))


def _profile(pipe: Pipeline) -> None:
    """Print how the run went, and how that compares with what the machine can do."""
    report = pipe.last_run
    assert report is not None  # a run has at least one image
    _say(f"\n{report}\n\n{profile_text(report, pipe)}")


def _say(text: str) -> None:
    """Print a text; sampling goes on even if nobody reads the output any more (as with `| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def read_low_res(path: Path, channels: int = 3) -> Samples:
    """Read the images to enlarge, for a network of `channels` channels; InvalidArgument names the option."""
    try:
        return read_set(path, channels if channels in MODES else None)
    except InvalidArgument as error:
        raise InvalidArgument(f"--low-res: {error}") from None


def _wanted(
    pipe: Pipeline, classes: str | None, per_class: int | None, seeds: str | None, small: Samples | None
) -> tuple[list[int] | None, list[int] | None]:
    """Return classes and seeds; by default one seed for each image to enlarge, with its class if known."""
    labels = None if classes is None else parse_numbers("classes", classes)
    keys = None if seeds is None else parse_numbers("seeds", seeds)
    if small is not None and keys is None and per_class is None:
        keys = list(range(len(small.images)))
        if labels is None and small.labels is not None and pipe.num_classes is not None:
            labels = small.labels.tolist()
    if per_class is None:
        return labels, keys
    return of_each_class(labels, per_class, keys, pipe.default_classes)


def parse_numbers(name: str, text: str) -> list[int]:
    """Read "0-9", "207,360" or "0-3,7"; raises InvalidArgument."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:-\s*(\d{1,20})\s*)?", part)
        if match is None:
            raise invalid(name, text, "whole numbers and ranges separated by commas, such as 0-9 or 207,360")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise invalid(name, text, f"the range {part.strip()} runs backwards")
        if last - first >= MANY or len(numbers) + last - first >= MANY:
            raise invalid(name, text, f"at most {MANY:,} numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def parse_interval(text: str | None) -> tuple[float, ...] | None:
    """Read "200,800"; raises InvalidArgument."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise invalid("guidance-interval", text, "two timesteps, LOWEST,HIGHEST such as 200,800") from None


def of_each_class(
    classes: list[int] | None, count: int, seeds: list[int] | None, num_classes: int | None
) -> tuple[list[int], list[int] | None]:
    """Return the class of every image, grouped by class, and the seeds: one for each image, or None."""
    if num_classes is None:
        raise invalid("per-class", count, "this model has no classes; --seeds sets the number of images")
    if count < 1:
        raise invalid("per-class", count, "1 or more")
    asked = range(num_classes) if classes is None else classes
    if count * len(asked) > MANY:
        raise invalid("per-class", count, f"at most {MANY:,} images in all")
    labels = [label for label in asked for _ in range(count)]
    if seeds is not None and len(seeds) != len(labels):
        raise invalid("seeds", f"{len(seeds)} seeds", f"one for each of the {len(labels)} images, or none")
    return labels, seeds


def resolved(pipe: Pipeline, request: SampleRequest, planned: Plan) -> list[tuple[str, str]]:
    """Return the resolved settings, as rows of (name, value)."""
    seeds, classes, _ = images_of(request, pipe)
    sides = {stage: "x".join(map(str, of_stage)) for stage, of_stage in planned.sides.items()}
    steps = f"{request.steps or pipe.steps} steps"
    if request.respacing is not None:
        steps = f"respacing {request.respacing}"
    rows = [
        ("system", pipe.name),
        ("images", f"{len(seeds)} of {sides['base']}, {planned.batch_size} at a time"),
        ("seeds", _in_short(seeds)),
        ("classes", "none" if classes is None else _in_short(classes)),
        ("solver", f"{request.solver}, {steps}"),
    ]
    if (up := pipe.upsampler) is not None:
        rows.append(("upsampler", f"to {sides['upsampler']}, {request.upsampler_steps or up.steps} steps"))
    scale = pipe.guidance if request.guidance is None else request.guidance
    rows.append(("guidance", "none" if pipe.classifier is None else f"{scale:g}"))
    return [*rows, ("device", str(pipe.device)), ("precision", pipe.precision)]


def _in_short(numbers: Sequence[int]) -> str:
    """Return the numbers as text, or of many the first and the last few."""
    if len(numbers) <= 12:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:6]))}, ..., {', '.join(map(str, numbers[-3:]))}"
