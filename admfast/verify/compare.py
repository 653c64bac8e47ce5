"""Sample the same seeds on the fast path and on the float32 reference, and measure the differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.engine.options import PLAIN
from admfast.errors import invalid
from admfast.models import UNet, Upsampler
from admfast.ops import dispatch
from admfast.sampling.auto import resolve
from admfast.sampling.functions import bind_conditions
from admfast.sampling.loop import Progress, run
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import Plan, plan
from admfast.sampling.request import AUTO, SampleRequest
from admfast.solvers import Solver, list_solvers, make_solver
from admfast.verify.budget import (
    Budget,
    Deviation,
    Verification,
    amplified_error,
    compare_images,
    default_budget,
    relative_error,
)
from admfast.verify.layers import compare_layers

IMAGES, STEPS = 4, 25  # defaults
# The engine's options that prepare a step; a reference uses none of them.
PREPARATION_OPTIONS = ("prepared", "fold", "graph", "branches", "compile")


def verify(
    pipe: Pipeline,
    reference: Pipeline,
    request: SampleRequest | None = None,
    *,
    budget: Budget | None = None,
    **settings: Any,
) -> Verification:
    """Compare `pipe` with `reference`: every layer at three of the steps, x after every step, and the images.

    Args:
        pipe: the pipeline to check.
        reference: another pipeline of the same model on the same device, with networks of its own, in float32
            and with `engine=PLAIN`; it uses the reference implementations.
        request: the request for the images, from `request_for`; None makes it from `settings`.
        budget: the allowed errors; None: those of the pipeline's precision.

    Step counts so low that rounding errors would exceed the budget are rejected. In the first rows, x_0
    has many times the rounding error of the network's output (`amplified_error`); with few steps, this error
    gets into the images. In bfloat16, DDPM needs at least 4 steps on the linear schedule and 25 on the cosine
    schedule; DDIM accepts any number of steps.

    Returns:
        The measured errors; `failures` is empty if all are within the budget.

    Raises: InvalidArgument as in `Pipeline.sample`, for an unsuitable reference, and for too few steps.
    """
    _check_pipelines(pipe, reference)
    verification = Verification(default_budget(pipe.policy) if budget is None else budget)
    request = replace(request_for(pipe, **settings) if request is None else request, output="float")
    request, _ = resolve(request, pipe)
    if request.callback is not None:
        raise invalid("request", "with a callback", "must have no callback: verify uses its own")
    base = plan(request, pipe)
    stages = [(base, pipe, reference)]
    if base.upsampler_plan is not None:
        assert pipe.upsampler is not None and reference.upsampler is not None
        stages.append((base.upsampler_plan, pipe.upsampler, reference.upsampler))
    for stage, part, _ in stages:
        _check_steps(stage, part, request, verification.budget)
    reference_steps, fast_steps = _StepRecorder(base.shape[0]), _StepRecorder(base.shape[0])
    with dispatch.override_impl("reference"):
        reference_images = run(plan(replace(request, callback=reference_steps), reference))
    fast_images = run(plan(replace(request, callback=fast_steps), pipe))
    verification.steps = _compare_steps(fast_steps, reference_steps, verification.budget)
    compare_images(verification, fast_images, reference_images)
    for stage, part, reference_part in stages:
        records = [reference_steps.rows[stage.stage, done] for done in range(1, len(stage.table) + 1)]
        verification.layers += _compare_layers(stage, part, reference_part, records, verification.budget)
    return verification


def request_for(pipe: Pipeline, **settings: Any) -> SampleRequest:
    """Return the request for the compared images, in one batch; settings are those of `Pipeline.sample`.

    Defaults: solver is "ddim"; steps is 25, if there is no respacing; upsampler_steps is steps; seeds are
    0, 1, ..., as many as `low_res` or `classes`, else 0..3. Raises: InvalidArgument.
    """
    solver = settings.get("solver") or ("ddim" if settings.get("quality") is None else AUTO)
    if solver != AUTO and make_solver(solver).starts_from == "image":
        raise invalid("solver", str(solver), f"must begin from noise: {', '.join(list_solvers('noise'))}")
    request = SampleRequest.from_arguments(**{**settings, "solver": solver})
    steps, seeds = request.steps, request.seeds
    if request.respacing is None and steps is None and request.quality is None:
        steps = STEPS
    per_image = request.low_res if request.low_res is not None else request.classes
    if seeds is None:
        seeds = range(IMAGES if per_image is None else len(per_image))  # type: ignore[arg-type]
    upsampler_steps = (
        steps if pipe.upsampler is not None and request.upsampler_steps is None else request.upsampler_steps
    )
    count = len(list(seeds))  # type: ignore[arg-type]
    return replace(
        request, steps=steps, seeds=seeds, upsampler_steps=upsampler_steps, output="float", batch_size=count
    )


def _check_pipelines(pipe: Pipeline, reference: Pipeline) -> None:
    """Reject two pipelines that are not of the same model, and a reference that is not plain float32."""
    for argument, value in (("pipe", pipe), ("reference", reference)):
        if not isinstance(value, Pipeline):
            raise invalid(argument, value, "a Pipeline, as admfast.load returns")
    if reference is pipe:
        allowed = "another pipeline than `pipe`, loaded with precision='fp32', engine=PLAIN"
        raise invalid("reference", reference.name, allowed)
    pairs = [("reference", pipe, reference)]
    if pipe.upsampler is not None or reference.upsampler is not None:
        if pipe.upsampler is None or reference.upsampler is None:
            raise invalid("reference.upsampler", reference.upsampler, f"as of {pipe.name}")
        pairs.append(("reference.upsampler", pipe.upsampler, reference.upsampler))
    for argument, fast, reference_pipe in pairs:
        _check_same_model(argument, fast, reference_pipe)
        _check_float32(argument, fast, reference_pipe)


def _check_same_model(argument: str, pipe: Pipeline, reference: Pipeline) -> None:
    """Reject pipelines whose networks, process or device differ."""
    for name in ("config", "diffusion", "device"):
        if getattr(pipe, name) != getattr(reference, name):
            raise invalid(argument, reference.name, f"of the same {name} as {pipe.name}")
    for name, described in (("classifier", "classifier"), ("weak", "weak network")):
        configs = [getattr(getattr(p, name), "config", None) for p in (pipe, reference)]
        if configs[0] != configs[1]:
            raise invalid(argument, reference.name, f"with the same {described} as {pipe.name}, or none")


def _check_float32(argument: str, pipe: Pipeline, reference: Pipeline) -> None:
    """Reject a reference that is not float32 throughout, is prepared, or shares networks with `pipe`."""
    policy = reference.policy
    is_float32 = (policy.torso, policy.classifier) == (torch.float32, torch.float32)
    if not is_float32 or policy.tf32 or policy.int8:
        raise invalid(argument, reference.name, f"in precision 'fp32'; this is in {policy.name!r}")
    options = reference.options
    differing_options = [
        name for name in PREPARATION_OPTIONS if getattr(options, name) != getattr(PLAIN, name)
    ]
    if differing_options:
        raise invalid(
            argument, reference.name, f"with engine=PLAIN; this differs in {', '.join(differing_options)}"
        )
    for part in ("net", "classifier", "weak"):
        net = getattr(reference, part)
        if net is None:
            continue
        if net is getattr(pipe, part):
            raise invalid(f"{argument}.{part}", "that of pipe", "a network of its own, loaded again")
        rounded_dtypes = {str(p.dtype) for p in net.parameters() if p.dtype != torch.float32}
        if rounded_dtypes:
            dtypes = ", ".join(sorted(rounded_dtypes)).replace("torch.", "")
            raise invalid(f"{argument}.{part}", dtypes, "parameters in float32")


def _check_steps(stage: Plan, pipe: Pipeline, request: SampleRequest, budget: Budget) -> None:
    """Reject step counts so low that rounding errors would exceed the budget."""
    if amplified_error(stage.table, budget.output) <= budget.step:
        return
    solver, steps = request.solver, len(stage.table)
    assert isinstance(solver, Solver)

    def stays_in_budget(count: int) -> bool:
        table = solver.table(pipe.diffusion.build(solver.respacing_for(count, request.spacing)), request.clip)
        return amplified_error(table, budget.output) <= budget.step

    larger_counts = (n for n in (*range(2, 26), 50, 100, 250, 500, 1000) if steps < n <= pipe.diffusion.steps)
    sufficient = next((n for n in larger_counts if stays_in_budget(n)), None)
    name = "steps" if stage.stage == "base" else "upsampler_steps"
    reason = "with so few, x_0 of the first rows amplifies rounding errors beyond the budget"
    allowed = (
        f"no number of steps of {solver}" if sufficient is None else f"{sufficient} or more for {solver}"
    )
    raise invalid(name, steps, f"{allowed} in this precision: {reason}")


class _StepRecorder:
    """A callback that copies x and x_0 after every row to the CPU, and joins the parts of halved batches.

    rows: by stage and number of rows done.
    """

    def __init__(self, count: int) -> None:
        self.rows: dict[tuple[str, int], _StepRecord] = {}
        self._count = count

    def __call__(self, progress: Progress) -> None:
        host = progress.x.new_empty((self._count, *progress.x.shape[1:]), device="cpu")
        key = (progress.stage, progress.done)
        record = self.rows.setdefault(key, _StepRecord(host, progress.t, torch.empty_like(host)))
        part = slice(progress.first, progress.first + len(progress.x))
        record.x[part], record.x0[part] = progress.x, progress.x0


@dataclass(frozen=True)
class _StepRecord:
    """x and the reported x_0 after a row, and the timestep t that the network saw."""

    x: Tensor
    t: float
    x0: Tensor


def _compare_steps(fast: _StepRecorder, reference: _StepRecorder, budget: Budget) -> list[Deviation]:
    """Return the relative error of x after every row."""
    deviations = []
    for (stage, done), record in reference.rows.items():
        prefix = "" if stage == "base" else f"{stage}: "
        error = relative_error(fast.rows[stage, done].x, record.x)
        deviations.append(Deviation(f"{prefix}x after step {done} (t = {record.t:g})", error, budget.step))
    return deviations


def _compare_layers(
    stage: Plan, pipe: Pipeline, reference: Pipeline, records: list[_StepRecord], budget: Budget
) -> list[Deviation]:
    """Return each layer's largest error at the inputs of three steps, for network and classifier."""
    prefix = "" if stage.stage == "base" else f"{stage.stage} "
    low_res = stage.low_res
    worst: dict[str, Deviation] = {}
    for i in sorted({0, len(records) // 2, max(len(records) - 2, 0)}):
        x, t = records[i].x.to(pipe.device), records[min(i + 1, len(records) - 1)].t
        if low_res is None and isinstance(pipe.net, Upsampler):
            size = pipe.low_res_size or x.shape[-1] // 4
            low_res = F.adaptive_avg_pool2d(records[i].x0, size).to(pipe.device)
        for name in ("net", "classifier", "weak"):
            fast, exact = getattr(pipe, name), getattr(reference, name)
            if fast is None or exact is None or (name == "classifier" and not stage.uses_classifier):
                continue
            ts = torch.full((len(x),), t, device=pipe.device)
            call = partial(_forward, x=x, t=ts, labels=stage.labels, low_res=low_res)
            for deviation in compare_layers(fast, exact, call, budget, prefix + name, pipe.policy.tf32):
                if deviation.name not in worst or deviation.error > worst[deviation.name].error:
                    worst[deviation.name] = deviation
    return list(worst.values())


def _forward(net: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, low_res: Tensor | None) -> Tensor:
    if not isinstance(net, UNet):
        return net(x, t)
    return bind_conditions(net, labels, low_res if isinstance(net, Upsampler) else None)(x, t)
