"""Make the plan of a request: the only module that knows both the request and the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.diffusion import DiffusionConfig, GaussianDiffusion, MeanType, Respacing
from admfast.engine.engine import Engine
from admfast.engine.guidance import RowGuidance
from admfast.engine.step import Batch
from admfast.errors import Unavailable, invalid
from admfast.files.levels import from_uint8, to_uint8
from admfast.models import UpsamplerConfig
from admfast.ops import dispatch
from admfast.ops.update import Clip, SolverTable, Stream, as_seeds
from admfast.sampling.auto import resolve, warn_of_failure
from admfast.sampling.functions import X0_IS_IGNORED
from admfast.sampling.guides import Guide, guidance_by_row, guides_by_function, requested_scale
from admfast.sampling.loop import Callback
from admfast.sampling.predict import Predictor
from admfast.sampling.request import AUTO, SampleRequest
from admfast.sampling.sides import check_classifier_sides, requested_sides, upsampler_sides
from admfast.solvers import Solver

if TYPE_CHECKING:
    from admfast.sampling.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Plan(Batch):
    """A request ready to run: a `Batch` (rows and images on the device) and what else the loop needs.

    engine, process, predictor: those of the model; the process is respaced. timesteps: those of the original
    process, by row. noise: x_T, None for the noise of the seeds. x_start: image to noise and begin from, or
    None. guides: all but the classifier, each with one flag per row that says whether it applies.
    denoised_fn, dynamic_threshold, callback, every, batch_size, output: as in the request. first_stream:
    stream of x_T's noise. first: index of this plan's first image among all requested images. stage: "base"
    or "upsampler". upsampler_plan: plan of the upsampler that follows, or None. downsample_factor: factor by
    which base images are downsampled before the upsampler.
    """

    engine: Engine
    process: GaussianDiffusion
    predictor: Predictor
    timesteps: tuple[float, ...]
    step_noise: Tensor | None = None
    noise: Tensor | None = None
    x_start: Tensor | None = None
    guides: tuple[tuple[Guide, tuple[bool, ...]], ...] = ()
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    dynamic_threshold: float | None = None
    first_stream: Stream = Stream.X_T
    callback: Callback | None = None
    every: int = 1
    batch_size: int = 1
    output: str = "uint8"
    first: int = 0
    stage: str = "base"
    upsampler_plan: Plan | None = None
    downsample_factor: int = 1

    @property
    def unprepared(self) -> dict[str, str]:
        """Say which fields keep a step from being prepared, and why."""
        reasons = {
            "guides": "Python functions",
            "denoised_fn": "a Python function",
            "dynamic_threshold": "a quantile of each image",
        }
        return {name: reason for name, reason in reasons.items() if getattr(self, name)}

    @property
    def steps(self) -> dict[str, int]:
        """Number of rows that run, by stage."""
        return {self.stage: len(self.table)} | (
            {} if self.upsampler_plan is None else self.upsampler_plan.steps
        )

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """Sides of the images, by stage."""
        return {self.stage: self.shape[2:]} | (
            {} if self.upsampler_plan is None else self.upsampler_plan.sides
        )

    def part(self, first: int, size: int) -> Plan:
        """Return the plan of images first..first+size-1."""
        if first == 0 and size >= self.shape[0]:
            return self

        def select(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[first : first + size]

        seeds = self.seeds[first : first + size]
        return replace(
            self,
            shape=(len(seeds), *self.shape[1:]),
            seeds=seeds,
            labels=select(self.labels),
            low_res=select(self.low_res),
            noise=select(self.noise),
            x_start=select(self.x_start),
            step_noise=None if self.step_noise is None else self.step_noise[:, first : first + size],
            first=self.first + first,
            upsampler_plan=None if self.upsampler_plan is None else self.upsampler_plan.part(first, size),
        )

    def with_low_res(self, x: Tensor) -> Plan:
        """Return the upsampler's plan for base images x, converted to uint8 and back as published.

        Images larger than the upsampler was trained to enlarge are average-pooled by `downsample_factor`.
        """
        low_res = from_uint8(to_uint8(x)).to(self.seeds.device)
        if self.downsample_factor > 1:
            low_res = F.avg_pool2d(low_res, self.downsample_factor)
        return replace(self, low_res=low_res)


def plan(request: SampleRequest, pipeline: Pipeline) -> Plan:
    """Return the plan of a request on a pipeline, after all checks that need the model.

    Raises: InvalidArgument for a value that this model does not allow, Unavailable for an implementation that
    this machine lacks.
    """
    _check_implementations(request.impl)
    if request.quality is not None or request.solver == AUTO:
        request, _ = resolve(request, pipeline)
    assert isinstance(request.solver, Solver)
    if request.solver.options.get("order", 1) >= 3:
        warn_of_failure(request, pipeline)
    with torch.inference_mode(False):  # autograd can't use tensors of inference mode
        base = _base_plan(request, pipeline)
        up = pipeline.upsampler
        if up is not None:
            return replace(base, upsampler_plan=_upsampler_plan(request, pipeline, up, base))
    if request.upsampler_steps is not None:
        raise invalid("upsampler_steps", request.upsampler_steps, f"{pipeline.name} has no upsampler")
    return base


def _base_plan(request: SampleRequest, pipeline: Pipeline) -> Plan:
    """Return the plan of the pipeline's own network."""
    check_image_network(pipeline)
    solver, device = request.solver, next(pipeline.net.parameters()).device
    assert isinstance(solver, Solver)
    steps = None if request.respacing is not None else request.steps or pipeline.steps
    process, full_table = _process_and_table("steps", pipeline, request, steps)
    table = full_table
    if request.t_start is not None:
        process, table = _from_timestep(request, process, full_table)
    num_skipped = len(full_table) - len(table)
    seeds, labels, shape = requested_images(request, pipeline)
    _check_shapes(request, shape, len(full_table), pipeline)

    def on_device(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, torch.float32)

    noise, x_start, step_noise = map(on_device, (request.noise, request.x_start, request.step_noise))
    if solver.starts_from == "image" and x_start is not None:
        noise, x_start = x_start, None
    timesteps = _timesteps(process, table)
    guidance = guidance_by_row(request, pipeline.guidance, table.rows, timesteps, num_skipped)
    _check_guidance(request, pipeline, guidance)
    return Plan(
        engine=pipeline.engine,
        predictor=pipeline.predictor,
        process=process,
        table=table,
        timesteps=timesteps,
        shape=shape,
        seeds=as_seeds(seeds).to(device),
        labels=None if labels is None else torch.tensor(labels, device=device),
        guidance=guidance,
        guides=guides_by_function(request, timesteps),
        denoised_fn=request.denoised_fn,
        dynamic_threshold=request.dynamic_threshold,
        noise_row=num_skipped,
        impl=request.impl,
        callback=request.callback,
        every=request.every,
        batch_size=request.batch_size or default_batch_size(pipeline, shape[2:]),
        output=request.output,
        noise=noise,
        x_start=x_start,
        step_noise=None if step_noise is None else step_noise[num_skipped:],
        low_res=on_device(request.low_res),
    )


def _upsampler_plan(request: SampleRequest, pipeline: Pipeline, up: Pipeline, base: Plan) -> Plan:
    """Return the plan of the upsampler after a base plan; `Plan.with_low_res` adds its small images."""
    solver = request.solver
    assert isinstance(solver, Solver)
    if solver.starts_from == "image":
        raise invalid(
            "solver", str(solver), f"not for {pipeline.name}, which has an upsampler; load it without"
        )
    steps = request.upsampler_steps or up.steps
    process, table = _process_and_table("upsampler_steps", up, request, steps)
    downsample_factor, spatial = upsampler_sides(up, pipeline, base.shape[2:])
    device = next(up.net.parameters()).device
    return Plan(
        engine=up.engine,
        predictor=up.predictor,
        process=process,
        table=table,
        timesteps=_timesteps(process, table),
        shape=(base.shape[0], up.config.in_channels, *spatial),
        seeds=base.seeds.to(device),
        labels=None if base.labels is None else base.labels.to(device),
        first_stream=Stream.UPSAMPLER_X_T,
        stream=Stream.UPSAMPLER_STEPS,
        impl=request.impl,
        callback=request.callback,
        every=request.every,
        stage="upsampler",
        dynamic_threshold=request.dynamic_threshold,
        downsample_factor=downsample_factor,
    )


def _process_and_table(
    name: str, pipeline: Pipeline, request: SampleRequest, steps: int | None
) -> tuple[GaussianDiffusion, SolverTable]:
    """Return a respaced process and the solver's rows for it.

    name: the argument that set `steps`. steps: None for the request's respacing.
    """
    solver = request.solver
    assert isinstance(solver, Solver)
    if steps is not None and steps > pipeline.diffusion.steps:
        raise invalid(name, steps, f"a whole number from 1 to {pipeline.diffusion.steps}")
    respacing = request.respacing if steps is None else None
    process, table = _cached_process_and_table(
        pipeline.diffusion,
        solver,
        _clips(request),
        steps,
        request.spacing,
        respacing,  # type: ignore[arg-type]
    )
    for setting in ("denoised_fn", "dynamic_threshold"):
        # Only with clipping does a row show that its update ignores x_0.
        if getattr(request, setting) is None or process.mean_type is not MeanType.PREVIOUS_X:
            continue
        if solver.table(process, clip=True).rows[0].clip == Clip.REPORTED:
            raise invalid(setting, "given", X0_IS_IGNORED)
    return process, table


def _timesteps(process: GaussianDiffusion, table: SolverTable) -> tuple[float, ...]:
    """Return the timesteps of the original process at which the rows of a table evaluate the network."""
    of_step = process.schedule.timestep_map.tolist()
    return tuple(of_step[row.index] if row.timestep is None else row.timestep for row in table.rows)


def _clips(request: SampleRequest) -> bool:
    """Tell whether the rows clip x_0; a dynamic threshold limits it instead."""
    return request.clip and request.dynamic_threshold is None


@functools.lru_cache(maxsize=16)
def _cached_process_and_table(
    diffusion: DiffusionConfig,
    solver: Solver,
    clip: bool,
    steps: int | None,
    spacing: str | None,
    respacing: Respacing | None,
) -> tuple[GaussianDiffusion, SolverTable]:
    """Return the process and its rows, cached: schedules and tables in float64 take milliseconds to make."""
    process = diffusion.build(respacing if steps is None else solver.respacing_for(steps, spacing))
    return process, solver.table(process, clip)


def _from_timestep(
    request: SampleRequest, process: GaussianDiffusion, full_table: SolverTable
) -> tuple[GaussianDiffusion, SolverTable]:
    """Return the process, and the rows that begin with the nearest step at or below `t_start`."""
    t_start, solver = request.t_start, request.solver
    assert t_start is not None and isinstance(solver, Solver)
    timestep_map, last = process.schedule.timestep_map, process.schedule.original_steps - 1
    if t_start > last:
        raise invalid("t_start", t_start, f"a whole number from 0 to {last}")
    if solver.options.get("churn"):
        raise invalid("x_start", "given", f"not for {solver}: churn begins above the noise of a timestep")
    kept = int(np.searchsorted(timestep_map, t_start, side="right"))
    if not kept:
        raise invalid("t_start", t_start, f"{timestep_map[0]:g} or more, the first step of this respacing")
    if any(row.pushes or row.save for row in full_table.rows):
        # A row that uses what earlier rows left can't be the first.
        process = process.first_steps(kept)
        return process, solver.table(process, _clips(request))
    return process, replace(full_table, rows=full_table.rows[-kept:])


def requested_images(
    request: SampleRequest, pipeline: Pipeline
) -> tuple[Sequence[int], list[int] | None, tuple[int, ...]]:
    """Return the seeds, the class labels (None without classes) and the shape of the requested images."""
    classes, seeds, num_classes = request.classes, request.seeds, pipeline.num_classes
    assert classes is None or isinstance(classes, tuple)
    assert seeds is None or isinstance(seeds, tuple)
    if num_classes is None and classes is not None:
        raise invalid("classes", list(classes), f"{pipeline.name} has no classes")
    if classes is not None and num_classes is not None and max(classes) >= num_classes:
        raise invalid("classes", max(classes), f"a whole number from 0 to {num_classes - 1}")
    per_image = [
        value for value in (request.noise, request.x_start, request.low_res, classes) if value is not None
    ]
    image_seeds = seeds if seeds is not None else range(len(per_image[0]) if per_image else 1)
    labels = None
    if (num_sampled := pipeline.default_classes) is not None:
        image_classes = classes or [seed % num_sampled for seed in image_seeds]
        labels = [image_classes[i % len(image_classes)] for i in range(len(image_seeds))]
    return (
        image_seeds,
        labels,
        (len(image_seeds), pipeline.config.in_channels, *requested_sides(request, pipeline)),
    )


def _check_shapes(request: SampleRequest, shape: tuple[int, ...], rows: int, pipeline: Pipeline) -> None:
    """Reject tensors whose shape doesn't fit the images."""
    for name, allowed in (("noise", shape), ("x_start", shape), ("step_noise", (rows, *shape))):
        value = getattr(request, name)
        if value is not None and tuple(value.shape) != allowed:
            raise invalid(f"{name}.shape", tuple(value.shape), f"{allowed}")
    check_low_res(pipeline, request.low_res, shape[0], "seed")


def check_image_network(pipeline: Pipeline) -> None:
    """Reject a network that has neither as many output as input channels, nor twice as many."""
    config = pipeline.config
    if not config.outputs_images:
        allowed = "as many out as in, or twice as many; use this network by pipe.net(x, t) only"
        raise invalid("net", f"{config.in_channels} channels in, {config.out_channels} out", allowed)


def check_low_res(pipeline: Pipeline, low_res: Tensor | None, count: int, counted: str) -> None:
    """Require one low-resolution image per image for an upsampler, and none for any other network.

    count: number of images. counted: noun in the singular for the argument that sets it, such as "seed".
    """
    config = pipeline.config
    is_upsampler = isinstance(config, UpsamplerConfig)
    if low_res is None:
        if is_upsampler:
            raise invalid("low_res", None, "upsamplers need it and no other network takes it")
        return
    shape = tuple(low_res.shape)
    if not is_upsampler:
        raise invalid("low_res.shape", shape, f"no images to enlarge, as {pipeline.name} is no upsampler")
    if len(shape) != config.dims + 2 or shape[:2] != (count, config.in_channels):
        sides = ", ".join("dhw"[3 - config.dims :])
        count_text = f"{count} {counted}" if count == 1 else f"{count} {counted}s"
        raise invalid("low_res.shape", shape, f"({count}, {config.in_channels}, {sides}), for {count_text}")


def default_batch_size(pipeline: Pipeline, sides: tuple[int, ...]) -> int:
    """Return the default batch size for images of these sides.

    The batch fits next to the released models on an 80 GB GPU, or into 16 GB of memory on a CPU.
    """
    largest = math.prod(sides)
    if pipeline.upsampler is not None:
        largest = max(largest, math.prod(upsampler_sides(pipeline.upsampler, pipeline, sides)[1]))
    on_gpu = next(pipeline.net.parameters()).is_cuda
    return max(1, (2**21 if on_gpu else 2**16) // largest)


def _check_guidance(request: SampleRequest, pipeline: Pipeline, guidance: Sequence[RowGuidance]) -> None:
    """Reject guidance by a network that this pipeline lacks, and an interval without a use or a timestep."""
    last = pipeline.diffusion.steps - 1
    own = [("interval", guide.interval) for guide in request.guides]
    for name, interval in [("guidance_interval", request.guidance_interval), *own]:
        if interval is not None and (interval[0] > last or interval[1] < 0):
            raise invalid(name, interval, f"an interval that holds some of the timesteps 0 to {last}")
    if any(row.scale for row in guidance):
        if pipeline.classifier is None:
            scale = next(row.scale for row in guidance if row.scale)
            raise invalid("guidance", scale, f"{pipeline.name} has no classifier; 0 is none")
        check_classifier_sides(request, pipeline)
    has_scale = request.guidance_fn is not None or requested_scale(request, pipeline.guidance)
    if request.guidance_interval is not None and not has_scale:
        allowed = "without guidance there is nothing to limit"
        raise invalid("guidance_interval", request.guidance_interval, allowed)
    if any(row.null for row in guidance) and not pipeline.null_class:
        raise invalid("guides", "null class", f"{pipeline.name} was loaded without null_class=True")
    if any(row.weak for row in guidance) and pipeline.weak is None:
        raise invalid("guides", "weak network", f"{pipeline.name} was loaded without weak=FILE (--weak)")


def _check_implementations(impl: str | None) -> None:
    """Reject unknown implementations, and those that this machine lacks, before anything runs."""
    value = dispatch.impl_setting()
    for op, table in dispatch.TABLES.items():
        name = dispatch.impl_from_setting(op, value)
        reason = name is not None and table.find(name, dispatch.IMPL_VARIABLE, value).reason_missing()
        if reason:
            raise Unavailable(f"{dispatch.IMPL_VARIABLE}={value!r}: {op} can't run on it here: {reason}")
    for op in ("normal", "sampler_step"):
        reason = impl and dispatch.TABLES[op].find(impl).reason_missing()
        if reason:
            raise Unavailable(f"impl={impl!r}: {op} can't run on it here: {reason}")
