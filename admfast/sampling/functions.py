"""Run solver rows by calling the networks and the user's Python functions, without a prepared step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from admfast import checks
from admfast.engine.guidance import classifier_guidance, view_if_hooked
from admfast.engine.step import Batch
from admfast.errors import invalid
from admfast.ops.dispatch import Choice, record_choices
from admfast.ops.update import Clip, Row, SamplerState, pack, sampler_step
from admfast.sampling.guides import Guide
from admfast.sampling.predict import Model, Prediction

if TYPE_CHECKING:
    from admfast.sampling.plan import Plan

LOG = logging.getLogger("admfast")
X0_IS_IGNORED = "not for a network that predicts the previous x: its update ignores x_0"
GuideRows = Sequence[tuple[Guide, Sequence[bool]]]


class FunctionStep:
    """A step that calls the networks and the user's functions; `advance(i)` runs row i of a batch.

    batch: the rows, their guidance and the images; its labels are not used. model: model(x, t) returns the
    network's output [N, C or 2C, *spatial]; t is [N], int64 or float32. x: input of the first row, float32
    (float64 only with the reference update). guides: each guide with one flag per row that says whether it
    applies. denoised_fn: maps x_0 before it is clipped. dynamic_threshold: as in `SampleRequest`.
    read_prediction: read_prediction(out, x_t, i) returns the `Prediction` at row i, for guides that use it.
    classifier_gradient, null_model, weak_model: for rows that the classifier guides, and for those that
    evaluate the network for the null class or the weak network.
    """

    def __init__(
        self,
        batch: Batch,
        model: Model,
        x: Tensor,
        guides: GuideRows = (),
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        read_prediction: Callable[[Tensor, Tensor, int], Prediction] | None = None,
        dynamic_threshold: float | None = None,
        classifier_gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
        null_model: Model | None = None,
        weak_model: Model | None = None,
    ):
        table, noise = batch.table, batch.step_noise
        if isinstance(noise, Tensor) and noise.shape != (len(table), *x.shape):
            raise invalid("step_noise.shape", tuple(noise.shape), f"{(len(table), *tuple(x.shape))}")
        rows = table.rows
        if denoised_fn is not None:
            rows = tuple(_row_taking_x0(row) for row in rows)
        self.unlimited_rows = rows
        if dynamic_threshold is not None:
            rows = tuple(replace(_row_taking_x0(row), k_pre=0.0, clip=Clip.NONE) for row in rows)
        self.batch, self.model, self.guides = batch, model, guides
        self.denoised_fn, self.read_prediction = denoised_fn, read_prediction
        self.dynamic_threshold = dynamic_threshold
        self.classifier_gradient, self.null_model, self.weak_model = (
            classifier_gradient,
            null_model,
            weak_model,
        )
        self.guidance = batch.row_guidance
        self.kept_gradient: Tensor | None = None  # of the classifier, without its factor
        self.state = SamplerState.start(x, rows)
        self.packed = pack(rows, device=x.device, dtype=x.dtype)
        self.t_net, self.t_clf = table.timesteps_for(x)
        self.guides_of_row = [(*(rows[i] for _, rows in guides), kind) for i, kind in enumerate(batch.kinds)]
        self.choices: dict[tuple[Any, ...], list[Choice]] = {}  # of one row, by which guides apply

    def advance(self, i: int) -> None:
        """Run row i. Call it with i = 0, 1, 2, ... in order."""
        active_guides = self.guides_of_row[i]
        if active_guides in self.choices:
            self._advance(i)
            return
        with record_choices() as choices:
            self._advance(i)
        self.choices[active_guides] = choices

    def implementation_choices(self) -> list[Choice]:
        """Return the implementations used in one row, for the kind of row that used the most."""
        return max(self.choices.values(), key=len, default=[])

    def _advance(self, i: int) -> None:
        batch, x = self.batch, self.state.x
        out, gradient = self.evaluate(x, i)
        if self.denoised_fn is not None:
            out = apply_denoised_fn(self.denoised_fn, batch.table.rows[i], x, out)
        if self.dynamic_threshold is not None:
            row, quantile = self.unlimited_rows[i], self.dynamic_threshold
            guidance = 0.0 if gradient is None else row.k_pre * gradient.to(x.dtype)
            out = apply_denoised_fn(lambda x0: limit_dynamically(x0 + guidance, quantile), row, x, out)
        sampler_step(
            self.state,
            out,
            self.packed,
            i,
            grad=gradient,
            seeds=batch.seeds,
            noise=None if batch.step_noise is None else batch.step_noise[i],
            noise_row=batch.noise_row + i,
            stream=batch.stream,
            impl=batch.impl,
        )

    def evaluate(self, x: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """Return the network's output at x, evaluated once, and the guides' summed gradient or None.

        The output is already mixed with the second one, if the row has one.
        """
        guides = [guide for guide, rows in self.guides if rows[i]]
        num_seeing = sum(guide.sees_prediction for guide in guides)
        with torch.set_grad_enabled(num_seeing > 0):
            x_net = x.detach().clone().requires_grad_(True) if num_seeing else x
            out = self._guided_output(x_net, i)
        detached_out = (
            out.detach().clone() if num_seeing else out.detach()
        )  # a guide may write to it in place
        gradient = None
        for guide in guides:
            x_t, prediction = x, None
            with torch.set_grad_enabled(guide.sees_prediction):
                if guide.sees_prediction:
                    assert self.read_prediction is not None
                    x_t, branch_out = (x_net, out) if num_seeing == 1 else _branch(x, x_net, out)
                    prediction = self.read_prediction(branch_out, x_t, i)
                g = guide(x_t, self.t_clf[i], prediction).detach()
            gradient = g if gradient is None else gradient + g
        if scale := self.guidance[i].scale:
            if self.kept_gradient is None or not self.guidance[i].keeps:
                assert self.classifier_gradient is not None
                self.kept_gradient = self.classifier_gradient(x.detach(), self.t_clf[i])
            g = self.kept_gradient * scale
            gradient = g if gradient is None else gradient + g
        return detached_out, gradient

    def _guided_output(self, x: Tensor, i: int) -> Tensor:
        """Return out + null (out - out_null) + weak (out - out_weak); its variance is that of out."""
        row, channels = self.guidance[i], x.shape[1]
        out = self.model(x, self.t_net[i])
        mean_part = out[:, :channels]
        for weight, model in ((row.null, self.null_model), (row.weak, self.weak_model)):
            if weight:
                assert model is not None
                second = model(x, self.t_net[i])[:, :channels]
                mean_part = mean_part + weight * (out[:, :channels] - second)
        if not row.null and not row.weak:
            return out
        return torch.cat([mean_part, out[:, channels:]], dim=1)


class _Branch(torch.autograd.Function):
    """Copy the network's output for one of several guides; backward goes through the one shared graph."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        ctx.x_net, ctx.out = shared
        return ctx.out.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.autograd.grad(ctx.out, ctx.x_net, dout, retain_graph=True)[0], None


def _branch(x: Tensor, x_net: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return a new leaf equal to x, and the network's output as a function of that leaf."""
    x_t = x.detach().clone().requires_grad_(True)
    return x_t, _Branch.apply(x_t, (x_net, out))


def bind_conditions(net: nn.Module, labels: Tensor | None, low_res: Tensor | None) -> Model:
    """Return model(x, t), which calls `net` with labels (if it is conditional) and low_res (if given)."""
    conditions: dict[str, Tensor] = {}
    if labels is not None and net.config.num_classes is not None:  # type: ignore[union-attr]
        conditions["y"] = labels
    if low_res is not None:
        conditions["low_res"] = low_res
    return lambda x, t: net(view_if_hooked(x), t, **conditions)


def make_function_step(plan: Plan, x: Tensor) -> FunctionStep:
    """Return the `FunctionStep` that runs the rows of a plan, beginning at `x`."""
    for name, reason in plan.unprepared.items():
        LOG.info("rows run one by one, without a prepared step: %s needs %s", name, reason)
    engine, labels = plan.engine, plan.labels
    models: dict[str, Model] = {}
    if plan.uses_classifier:
        assert engine.classifier is not None and labels is not None
        models["classifier_gradient"] = classifier_guidance(engine.classifier, labels, 1.0)
    if any(row.null for row in plan.guidance):
        config: Any = engine.net.config
        null_labels = torch.full((len(x),), config.num_classes - 1, dtype=torch.int64, device=x.device)
        models["null_model"] = bind_conditions(engine.net, null_labels, plan.low_res)
    if any(row.weak for row in plan.guidance):
        assert engine.weak is not None
        models["weak_model"] = bind_conditions(engine.weak, labels, plan.low_res)
    guarded: dict[str, Any] = {name: engine.guard_model(model) for name, model in models.items()}
    model = engine.guard_model(bind_conditions(engine.net, labels, plan.low_res))

    def read_prediction(out: Tensor, x_t: Tensor, i: int) -> Prediction:
        t = torch.full((len(x_t),), plan.timesteps[i], device=x_t.device)
        return replace(plan.predictor.read_output(out, x_t, t), first=plan.first)

    functions = plan.denoised_fn, read_prediction, plan.dynamic_threshold
    return FunctionStep(plan, model, x, plan.guides, *functions, **guarded)


def _row_taking_x0(row: Row) -> Row:
    """Return the row for an `out` whose mean part is x_0 itself."""
    if row.clip == Clip.REPORTED:
        raise invalid("denoised_fn", "given", X0_IS_IGNORED)
    return replace(row, k_x=0.0, k_out=1.0)


def apply_denoised_fn(denoised_fn: Callable[[Tensor], Tensor], row: Row, x: Tensor, out: Tensor) -> Tensor:
    """Return `out` with its mean part replaced by denoised_fn(x_0)."""
    channels = x.shape[1]
    out = out.to(x.dtype)
    x0 = denoised_fn(row.k_x * x + row.k_out * out[:, :channels])
    checks.image_tensor("denoised_fn(x_0)", x0, tuple(x.shape))
    return torch.cat([x0, out[:, channels:]], dim=1)


def limit_dynamically(x0: Tensor, quantile: float) -> Tensor:
    """Return x_0 limited in each image to [-s, s] and divided by s, the quantile of |x_0|, at least 1.

    Source: Saharia et al. 2022, "dynamic thresholding".
    """
    limits = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1)
    limits = limits.view(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-limits, limits) / limits
