"""`admfast sample NAME`: sample images into a folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from admfast.checks import MAX_NUMBERS, integer_in_environment, parse_numbers
from admfast.cli import guidance as guiding
from admfast.cli import sample_options as option
from admfast.cli.commands import drop_output
from admfast.cli.options import load_arguments
from admfast.engine.numerics import peak_memory
from admfast.engine.options import EngineOptions
from admfast.errors import AdmfastError, InvalidArgument, invalid
from admfast.files.atomic import check_folder
from admfast.files.image_sets import read_image_set
from admfast.files.images import MODES
from admfast.files.npz import Samples
from admfast.files.paths import user_path
from admfast.files.tables import table
from admfast.runs.manifest import BALANCED, RANDOM, random_labels
from admfast.runs.many import ShardedRun
from admfast.runs.sampling import SampleRun
from admfast.sampling.auto import default_scale, requested_steps, resolve
from admfast.sampling.guides import network_guides
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan, requested_images
from admfast.sampling.profile import profile_text
from admfast.sampling.request import AUTO, SampleRequest
from admfast.solvers import make_solver


def run_sample(
    name: option.Name,
    weights: option.Weights = None,
    classifier: option.ClassifierFile = None,
    upsampler: option.UpsamplerFile = None,
    weak: guiding.WeakFile = None,
    preset: option.Preset = None,
    low_res: option.LowRes = None,
    classes: option.Classes = None,
    per_class: option.PerClass = None,
    seeds: option.Seeds = None,
    num: option.Num = None,
    shard: option.Shard = None,
    size: option.Size = None,
    steps: option.Steps = None,
    quality: option.Quality = None,
    solver: option.Solver = None,
    eta: option.Eta = None,
    spacing: option.Spacing = None,
    respacing: option.Respaced = None,
    dynamic_threshold: option.DynamicThreshold = None,
    guidance: guiding.Guidance = None,
    guidance_interval: guiding.GuidanceInterval = None,
    guidance_every: guiding.GuidanceEvery = None,
    guidance_count: guiding.GuidanceCount = None,
    guidance_reuse: guiding.GuidanceReuse = False,
    cfg_scale: guiding.CfgScale = None,
    cfg_interval: guiding.CfgInterval = None,
    autoguidance_scale: guiding.AutoguidanceScale = None,
    autoguidance_interval: guiding.AutoguidanceInterval = None,
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
    set_weak: option.SetWeak = None,
) -> None:
    """Sample images: PNG files, one labelled grid, and an npz as the published scripts write it.

    If a run was interrupted, the same command makes the images that are missing.
    """
    _sample(SimpleNamespace(**locals()))


def _sample(given: SimpleNamespace) -> None:
    """Load the pipeline and sample as the options of `run_sample` say."""
    verbosity = logging.INFO if given.verbose else logging.WARNING
    logging.basicConfig(level=verbosity, format="%(message)s")
    _check_without_model(given.batch, given.solver, given.compile_cache)
    _check_num(given)
    guiding.check_weak(given.weak, given.autoguidance_scale)
    arguments = load_arguments(
        given.set_, given.set_classifier, given.set_upsampler, given.set_weak, weights=given.weights,
        classifier=given.classifier, upsampler=given.upsampler, weak=given.weak, preset=given.preset,
        device=own_device(given.device), precision=given.precision,
        engine=EngineOptions(threads=given.threads), compile=given.compile, compile_cache=given.compile_cache,
    )  # fmt: skip
    pipe = load(given.name, **arguments)
    images = None if given.low_res is None else read_low_res(given.low_res, pipe.config.in_channels)
    request, source = resolve(_request(given, pipe, images), pipe)
    extra_rows = list(pipe.policy.parts().items()) if given.verbose else []
    if given.verbose and source is not None:
        extra_rows.insert(0, ("solver from", source))
    if given.num is None:
        sample_pngs(pipe, request, given.out, given.overwrite, given.intermediates, images, extra_rows)
    else:
        sample_shards(
            pipe, request, given.out, given.num, given.seeds, given.classes, given.shard, extra_rows
        )
    if given.profile:
        _print_profile(pipe)


def _request(given: SimpleNamespace, pipe: Pipeline, images: Samples | None) -> SampleRequest:
    """Return the request of the options, which may still leave the solver to the number of steps."""
    chosen = (None, None)
    if given.num is None:
        chosen = _select_images(pipe, given.classes, given.per_class, given.seeds, images)  # type: ignore[assignment]
    # The published respacings are those of DDPM.
    solver = given.solver or (AUTO if given.respacing is None else "ddpm")
    default = pipe.guidance
    if solver == AUTO and pipe.classifier is not None:
        default = default_scale(pipe, requested_steps(pipe, given.steps, given.quality, given.respacing))
    guidance_options = guiding.guidance_settings(
        default, given.guidance, given.guidance_interval, given.guidance_every, given.guidance_count,
        given.guidance_reuse, given.cfg_scale, given.cfg_interval, given.autoguidance_scale,
        given.autoguidance_interval,
    )  # fmt: skip
    return SampleRequest(
        *chosen, size=given.size, steps=given.steps, quality=given.quality, solver=solver, eta=given.eta,
        spacing=given.spacing, respacing=given.respacing, dynamic_threshold=given.dynamic_threshold,
        upsampler_steps=given.upsampler_steps, batch_size=given.batch, **guidance_options,
    )  # fmt: skip


def _check_without_model(batch: int | None, solver: str | None, compile_cache: Path | None) -> None:
    """Reject wrong options that can be recognized without a model."""
    if batch is not None and batch < 1:
        raise invalid("batch", batch, "1 or more")
    if solver not in (None, AUTO) and make_solver(solver).starts_from == "image":
        allowed = f"in Python only: pipe.sample(x_start=images, solver={solver!r}, output='float')"
        raise invalid("solver", solver, f"{allowed}; PNG files can't hold noise")
    if compile_cache is not None:
        check_folder(user_path("compile_cache", compile_cache))


def sample_pngs(
    pipe: Pipeline,
    request: SampleRequest,
    out: Path,
    overwrite: bool,
    intermediates: int,
    low_res: Samples | None,
    extra_rows: list[tuple[str, str]],
) -> None:
    """Check everything, print the settings, sample a file for each image, and print where they are."""
    low_res_array = None if low_res is None else low_res.images
    run = SampleRun(pipe, request, out, overwrite, intermediates, low_res=low_res_array)
    rows = settings_rows(run.pipe, run.request, run.check())
    _print(table([*rows, ("out", str(run.out.resolve())), *extra_rows]))
    started = time.monotonic()
    count = len(run.seeds)
    try:
        written_paths = run.run()
    except (AdmfastError, KeyboardInterrupt):
        if run.finished:
            _print(
                f"{run.finished} of {count} images are finished and kept in {run.written_folder.resolve()}"
            )
        raise
    seconds = time.monotonic() - started
    peak = f"peak memory {peak_memory(run.pipe.device) / 1e9:.1f} GB"
    images = "1 image" if count == 1 else f"{count} images"
    if run.made < count:
        images = f"{run.made} of {images}, of which {count - run.made} were finished already,"
    _print(f"{images} in {seconds:.1f} s ({run.made / seconds:.2f} images/s), {peak}")
    for path in (run.out / "images", *written_paths):
        _print(str(path.resolve()))


def _check_num(given: SimpleNamespace) -> None:
    """Reject options that need `--num`, or that don't go with it."""
    if given.num is None:
        if given.shard is not None:
            raise invalid("shard", given.shard, "only with --num, for a run in shards")
        return
    if given.per_class is not None:
        raise invalid("per_class", given.per_class, "not together with --num")
    for name in ("low_res", "overwrite", "intermediates"):
        if value := getattr(given, name):
            raise invalid(name, value, "not together with --num")


def sample_shards(
    pipe: Pipeline,
    request: SampleRequest,
    out: Path,
    num: int,
    seeds: str | None,
    classes: str | None,
    shard: int | None,
    extra_rows: list[tuple[str, str]],
) -> None:
    """Take part in a run of `num` images in shards, and print what this process did.

    Of the processes of one machine, the first prints the settings and a progress bar.
    """
    first_seeds = [0] if seeds is None else parse_numbers("seeds", seeds)
    if len(first_seeds) != 1:
        raise invalid("seeds", seeds, "with --num a single number, the first seed; the others follow")
    labels = classes or BALANCED
    rank = integer_in_environment("RANK", integer_in_environment("SLURM_PROCID", 0))
    processes = integer_in_environment("WORLD_SIZE", integer_in_environment("SLURM_NTASKS", 1, 1), 1)
    is_first = integer_in_environment("LOCAL_RANK", integer_in_environment("SLURM_LOCALID", 0)) == 0
    run = ShardedRun(
        pipe, request, out, num, first_seeds[0],
        labels if labels in (BALANCED, RANDOM) else parse_numbers("classes", labels),
        shard_size=shard, rank=rank % processes, processes=processes, shows_bar=is_first,
    )  # fmt: skip
    one_plan = run.check()
    if is_first:
        _print(table([*_sharded_rows(run, one_plan), *extra_rows]))
    started = time.monotonic()
    try:
        run.run()
    except (AdmfastError, KeyboardInterrupt):
        with contextlib.suppress(AdmfastError):
            if run.begun:
                finished = f"{run.finished_images()} of {num} images are finished"
                _print(f"{finished} and kept in {run.out.resolve()}")
        raise
    seconds = time.monotonic() - started
    peak = f"peak memory {peak_memory(pipe.device) / 1e9:.1f} GB"
    rate = f"{run.made / seconds:.2f} images/s" if seconds else ""
    _print(f"{run.made} of {num} images by this process in {seconds:.1f} s ({rate}), {peak}")
    if is_first:
        _print(f"all {num} images are finished: admfast run merge {run.out} --out FILE.npz")


def _sharded_rows(run: ShardedRun, one_plan: Plan) -> list[tuple[str, str]]:
    """Return the resolved settings of a run in shards, as rows of (name, value)."""
    manifest, (_, height, width, _) = run.manifest, (1, *run.manifest.shape)
    shards = "1 shard" if manifest.shards == 1 else f"{manifest.shards} shards"
    classes = manifest.classes
    rows = dict(settings_rows(run.pipe, run.request, one_plan)) | {
        "images": f"{manifest.images} of {height}x{width}, {manifest.batch_size} at a time, in {shards} "
        f"of {manifest.shard_size}",
        "seeds": manifest.seeds,
        "classes": "none" if classes is None else classes if isinstance(classes, str) else _shorten(classes),
    }
    return [*rows.items(), ("out", str(run.out.resolve()))]


def _print_profile(pipe: Pipeline) -> None:
    """Print the report on the run, its share of the machine's rate, and advice."""
    report = pipe.last_run
    if report is None:
        _print("all images were finished already: there is nothing to report")
        return
    _print(f"\n{report}\n\n{profile_text(report, pipe)}")


def _print(text: str) -> None:
    """Print a text; sampling goes on even if nobody reads the output any more (as with `| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def read_low_res(path: Path, channels: int = 3) -> Samples:
    """Read the images to enlarge, for a network of `channels` channels; InvalidArgument names the option."""
    try:
        return read_image_set(path, channels if channels in MODES else None)
    except InvalidArgument as error:
        raise InvalidArgument(f"--low-res: {error}") from None


def _select_images(
    pipe: Pipeline, classes: str | None, per_class: int | None, seeds: str | None, low_res: Samples | None
) -> tuple[list[int] | None, list[int] | None]:
    """Return classes and seeds; by default one seed for each image to enlarge, with its class if known."""
    labels = None if classes in (None, BALANCED, RANDOM) else parse_numbers("classes", classes)
    image_seeds = None if seeds is None else parse_numbers("seeds", seeds)
    if low_res is not None and image_seeds is None and per_class is None:
        image_seeds = list(range(len(low_res.images)))
        if labels is None and low_res.labels is not None and pipe.num_classes is not None:
            labels = low_res.labels.tolist()
    if classes == RANDOM:
        if pipe.default_classes is None or per_class is not None:
            allowed = "not with --per-class" if per_class is not None else f"{pipe.name} has no classes"
            raise invalid("classes", classes, allowed)
        image_seeds = image_seeds or [0]
        labels = random_labels(image_seeds, pipe.default_classes)
    if per_class is None:
        return labels, image_seeds
    return repeat_classes(labels, per_class, image_seeds, pipe.default_classes)


def repeat_classes(
    classes: list[int] | None, count: int, seeds: list[int] | None, num_classes: int | None
) -> tuple[list[int], list[int] | None]:
    """Return the class of every image, grouped by class, and the seeds: one for each image, or None."""
    if num_classes is None:
        raise invalid("per-class", count, "this model has no classes; --seeds sets the number of images")
    if count < 1:
        raise invalid("per-class", count, "1 or more")
    each_class = range(num_classes) if classes is None else classes
    if count * len(each_class) > MAX_NUMBERS:
        raise invalid("per-class", count, f"at most {MAX_NUMBERS:,} images in all")
    labels = [label for label in each_class for _ in range(count)]
    if seeds is not None and len(seeds) != len(labels):
        raise invalid("seeds", f"{len(seeds)} seeds", f"one for each of the {len(labels)} images, or none")
    return labels, seeds


def settings_rows(pipe: Pipeline, request: SampleRequest, plan: Plan) -> list[tuple[str, str]]:
    """Return the resolved settings, as rows of (name, value)."""
    seeds, classes, _ = requested_images(request, pipe)
    sides = {stage: "x".join(map(str, stage_sides)) for stage, stage_sides in plan.sides.items()}
    steps = f"{plan.steps['base']} steps"
    if request.respacing is not None:
        steps = f"respacing {request.respacing}"
    elif request.spacing is not None:
        steps += f", {request.spacing} spacing"
    rows = [
        ("system", pipe.name),
        ("images", f"{len(seeds)} of {sides['base']}, {plan.batch_size} at a time"),
        ("seeds", _shorten(seeds)),
        ("classes", "none" if classes is None else _shorten(classes)),
        ("solver", f"{request.solver}, {steps}"),
    ]
    if request.dynamic_threshold is not None:
        rows.append(("threshold", f"{request.dynamic_threshold:g} of |x_0| in each image"))
    if pipe.upsampler is not None:
        rows.append(("upsampler", f"to {sides['upsampler']}, {plan.steps['upsampler']} steps"))
    guides = network_guides(request, pipe.guidance)
    rows.append(("guidance", "; ".join(map(str, guides)) or "none"))
    return [*rows, ("device", str(pipe.device)), ("precision", pipe.precision)]


def own_device(device: str | None) -> str | None:
    """Return the device of this process: of those of one machine, each takes a GPU of its own."""
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    number = integer_in_environment("LOCAL_RANK", integer_in_environment("SLURM_LOCALID", -1))
    return device if number < 0 else f"cuda:{number % torch.cuda.device_count()}"


def _shorten(numbers: Sequence[int]) -> str:
    """Return the numbers as text, or of many the first and the last few."""
    if len(numbers) <= 12:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:6]))}, ..., {', '.join(map(str, numbers[-3:]))}"
