"""`Pipeline`: the networks of a model, ready to sample and predict; `admfast.load` makes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from admfast import checks
from admfast.diffusion import DiffusionConfig, GaussianDiffusion, Respacing
from admfast.engine.engine import Engine
from admfast.engine.numerics import fixed_numerics
from admfast.engine.options import EngineOptions
from admfast.engine.precision import FP32, Policy
from admfast.errors import invalid
from admfast.models import NetConfig, UNetConfig
from admfast.models.fold import check_not_inference_mode
from admfast.sampling.functions import bind_conditions
from admfast.sampling.guides import LARGEST
from admfast.sampling.last_run import RunReport, make_report
from admfast.sampling.loop import run
from admfast.sampling.plan import check_image_network, check_low_res, default_batch_size, plan
from admfast.sampling.predict import Prediction, Predictor
from admfast.sampling.request import SampleRequest

P = ParamSpec("P")
R = TypeVar("R")


def _accept_request_fields(
    _record: Callable[P, SampleRequest],
) -> Callable[[Callable[[Pipeline, SampleRequest], R]], Callable[Concatenate[Pipeline, P], R]]:
    """Make a method that takes a request accept the request's fields as arguments, with their types."""

    def decorate(method: Callable[[Pipeline, SampleRequest], R]) -> Callable[Concatenate[Pipeline, P], R]:
        @functools.wraps(method)
        def with_settings(self: Pipeline, *images: P.args, **settings: P.kwargs) -> R:
            return method(self, SampleRequest.from_arguments(*images, **settings))

        self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.signature(SampleRequest)
        signature = signature.replace(parameters=[self_parameter, *signature.parameters.values()])
        with_settings.__signature__ = signature.replace(return_annotation=Tensor)  # type: ignore[attr-defined]
        return with_settings

    return decorate


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Networks with their diffusion process, ready to sample; made by `admfast.load`.

    Several threads may use the same pipeline at the same time, and so may callbacks. It is immutable:
    `dataclasses.replace(pipe, net=other)` returns a new one with another part, and checks it again.

    Attributes:
        name: of the system or file.
        net: a `UNet` or `Upsampler`, frozen.
        diffusion: the process it was trained for.
        classifier: a `Classifier` for guidance, frozen, or None.
        weak: a smaller or less trained network for `guides.by_weak_network`, frozen, or None.
        guidance, steps: defaults of `sample`.
        low_res_size: side of the images that an upsampler was trained to enlarge.
        null_class: the last class stands for "no class", as a model learns it that is trained with
            `drop_classes`; it is sampled only if it is asked for.
        upsampler: a pipeline that enlarges this one's samples, or None.
        policy: precision in which the networks compute; their parameters are not changed.
        options: how steps are prepared.
        engine, predictor: made from the other parts, for `sample` and `predict`.
    """

    name: str
    net: nn.Module
    diffusion: DiffusionConfig
    classifier: nn.Module | None = None
    weak: nn.Module | None = None
    guidance: float = 0.0
    steps: int = 250
    low_res_size: int | None = None
    null_class: bool = False
    upsampler: Pipeline | None = None
    policy: Policy = FP32
    options: EngineOptions = field(default_factory=EngineOptions)
    engine: Engine = field(init=False, compare=False)
    predictor: Predictor = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self._check_parts()
        for net in (self.net, self.classifier, self.weak):
            if net is not None:
                net.requires_grad_(False).eval()
        parts: dict[str, Any] = {"net": self.net, "classifier": self.classifier, "weak": self.weak}
        engine = Engine(**parts, policy=self.policy, options=self.options)
        engine.ensure_folded()
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "predictor", Predictor(self.diffusion))

    def __repr__(self) -> str:
        """Return one line that names the parts, without their layers."""
        config, parts = self.config, [f"{self.config.kind} of {self.config.image_size} pixels"]
        if config.num_classes is not None:
            parts.append(f"{config.num_classes} classes")
        if self.classifier is not None:
            parts.append(f"classifier, guidance {self.guidance:g}")
        if self.weak is not None:
            parts.append("a weak network")
        if self.upsampler is not None:
            parts.append(f"upsampler to {self.upsampler.config.image_size} pixels")
        return f"Pipeline({self.name!r}: {', '.join(parts)}; {self.precision} on {self.device})"

    @functools.cached_property
    def config(self) -> UNetConfig:
        """The network's configuration."""
        return self.net.config  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.net.parameters()).device

    @property
    def precision(self) -> str:
        """Precision in which the networks compute, such as "bfloat16, classifier float32"."""
        return str(self.policy)

    @functools.cached_property
    def num_classes(self) -> int | None:
        """Number of classes of the network, or else of its classifier; None without classes."""
        if self.config.num_classes is not None:
            return self.config.num_classes
        return None if self.classifier is None else self.classifier.config.out_channels  # type: ignore[union-attr, return-value]

    @functools.cached_property
    def default_classes(self) -> int | None:
        """Number of classes that are sampled by default: all but a null class; None without classes."""
        return None if self.num_classes is None else self.num_classes - self.null_class

    @_accept_request_fields(SampleRequest)
    def sample(self, request: SampleRequest) -> Tensor:
        """Sample images: image i has seed `seeds[i]` and class `classes[i % len(classes)]`.

        An image depends only on its seed, class and these settings, not on its batch or its place in it.

        Args: the fields of `SampleRequest`, which describes them; classes and seeds also by position.

        Returns:
            uint8 [N, H, W, C] on the CPU, or float32 [N, C, H, W] on the device. Floats are in [-1, 1],
            except where guidance or `clip=False` takes them beyond; uint8 clips them.

        Raises:
            InvalidArgument: for any value that is not allowed.
            NonFiniteError: naming the first layer that produced NaN or infinity.

        Not differentiable; see `predict`. Inference mode and autocast around the call have no effect.
        """
        return run(plan(request, self))

    @_accept_request_fields(SampleRequest)
    def check(self, request: SampleRequest) -> dict[str, int]:
        """Check arguments of `sample` without sampling; return the steps by stage ("base", "upsampler").

        Raises: InvalidArgument as `sample` would, Unavailable for an implementation that this machine lacks.
        """
        return plan(request, self).steps

    def predict(
        self,
        x_t: Tensor,
        t: Tensor | float | Sequence[float],
        classes: Tensor | Sequence[int] | int | None = None,
        low_res: Tensor | None = None,
    ) -> Prediction:
        """Return the network's prediction for noisy images: `Prediction(eps, x0, log_var)`, not clipped.

        Differentiable: gradients flow from the three fields to x_t (and low_res), any number of times in
        reverse mode, but only once under vmap; forward mode needs ADMFAST_IMPL=reference.
        Autocast around the call has no effect; the backward pass runs under the caller's own TF32 settings.

        Args:
            x_t: [N, C, H, W], float32.
            t: timestep of the original process, 0..length-1: a number (or [1]) for all images, or [N];
                fractions interpolate the log-SNR linearly.
            classes: class indices of a class-conditional network: a number (or [1]) for all images, or [N].
            low_res: [N, C, h, w] for an upsampler.

        Returns:
            eps, x0, log_var like x_t; log_var is that of p(x_{t-1} | x_t) in the process with all its steps.

        Raises:
            InvalidArgument: for a value that is not allowed (of tensors on a GPU only the shape is checked).
        """
        with fixed_numerics(self.device, self.policy.tf32):
            check_image_network(self)
            x_t = checks.image_tensor("x_t", x_t)
            low_res = None if low_res is None else checks.image_tensor("low_res", low_res)
            check_low_res(self, low_res, len(x_t), "image")
            if low_res is not None and low_res.device.type == "cpu":
                checks.image_range("low_res", low_res)
            labels = self._labels(classes, x_t)
            self.engine.ensure_folded(guided=False)
            return self.predictor(bind_conditions(self.net, labels, low_res), x_t, t)

    def _labels(self, classes: Tensor | Sequence[int] | int | None, x_t: Tensor) -> Tensor | None:
        """Return the class of every image as the network takes it, or None for a network without classes."""
        num_classes = self.config.num_classes
        if num_classes is None:
            if classes is not None:
                raise invalid("classes", checks.to_python(classes), f"{self.name} is not class-conditional")
            return None
        if classes is None:
            raise invalid("classes", None, f"this network needs one of 0 to {num_classes - 1} for each image")
        if not isinstance(classes, Tensor) or classes.device.type == "cpu":
            classes = torch.tensor(
                checks.whole_number_or_tuple("classes", classes, 0, num_classes - 1), device="cpu"
            )
        labels = classes.to(x_t.device)
        if labels.numel() == 1 and labels.dim() < 2:
            labels = labels.expand(len(x_t))
        if labels.shape != x_t.shape[:1]:
            allowed = f"one class, or one for each of the {len(x_t)} images"
            raise invalid("classes", labels.tolist(), allowed)
        return labels

    @property
    def last_run(self) -> RunReport | None:
        """Report on the last call of `sample` (of several threads, the call that ended last); None before.

        `print(pipe.last_run)` shows what was prepared, or why not, which implementation each op used, and
        the seconds of each part. A call that raised an error does not change it.
        """
        record = self.engine.last_run
        return None if record is None else make_report(record, self)

    def refresh(self) -> None:
        """Derive again everything that is derived from the networks' parameters, including the upsampler's.

        Needed only after a change that is not detected. `sample` and `predict` detect parameters that were
        replaced or moved, every write that torch counts, and other writes (through `.data` or NumPy) by
        comparing values: all of a parameter with up to 4096 elements, and of a larger one at least one for
        every output and every input channel. `pipe.net(x, t)`, called directly, compares no values. A call
        that you compiled with torch.compile or captured in a CUDA graph detects nothing when it runs again.
        """
        for net in (self.net, self.classifier, self.weak):
            if net is not None:
                net.refold()  # type: ignore[operator]
        if self.upsampler is not None:
            self.upsampler.refresh()

    def process(self, respacing: Respacing | None = None) -> GaussianDiffusion:
        """Return the diffusion process, with all its steps or respaced."""
        return self.diffusion.build(respacing)

    @functools.cached_property
    def spatial(self) -> tuple[int, ...]:
        """Sides of the images that the network was trained for."""
        return (self.config.image_size,) * self.config.dims

    @property
    def default_batch_size(self) -> int:
        """Default batch size of `sample`."""
        return default_batch_size(self, self.spatial)

    def _check_parts(self) -> None:
        """Check that the networks agree in images and classes; normalize numbers."""
        config, up = self.config, self.upsampler
        numbers = {
            "guidance": checks.finite_float("guidance", self.guidance, least=-LARGEST, most=LARGEST),
            "steps": checks.whole_number("steps", self.steps, 1),
        }
        if self.low_res_size is not None:
            numbers["low_res_size"] = checks.whole_number("low_res_size", self.low_res_size, 1)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        check_not_inference_mode("net", self.net)
        for name, net in (("classifier", self.classifier), ("weak", self.weak)):
            if net is not None:
                check_not_inference_mode(name, net)
        if self.null_class and config.num_classes is None:
            raise invalid("null_class", True, "False: this network has no classes")
        if self.diffusion.types[1].learned != config.learn_sigma:
            allowed = f"a process with{'' if config.learn_sigma else 'out'} learned variance, as the network"
            raise invalid("diffusion", self.diffusion.types[1].name, allowed)
        others = {
            "classifier": self.classifier,
            "weak": self.weak,
            "upsampler": None if up is None else up.net,
        }
        for name, net in others.items():
            if net is None:
                continue
            other: NetConfig | None = getattr(net, "config", None)
            if not isinstance(other, NetConfig):
                raise invalid(name, type(net).__name__, "a network of admfast, such as `load_network` makes")
            if (other.in_channels, other.dims) != (config.in_channels, config.dims):
                channels_text = f"{other.in_channels} channels, {other.dims}-D"
                raise invalid(
                    name, channels_text, f"as the network: {config.in_channels} channels, {config.dims}-D"
                )
            # A classifier also serves a network without classes; an upsampler with classes must get them.
            count = other.num_classes if isinstance(other, UNetConfig) else other.out_channels
            if count is not None and self.num_classes != count:
                raise invalid(name, f"{count} classes", f"as the network: {self.num_classes or 'no'} classes")
        if self.weak is not None:
            weak: UNetConfig = self.weak.config  # type: ignore[assignment]
            kind, outputs = f"{weak.kind} of {weak.out_channels} outputs", config.out_channels
            if kind != f"{config.kind} of {outputs} outputs":
                raise invalid("weak", kind, f"as the network: {config.kind} of {outputs} outputs")
            if weak.num_classes is not None and config.num_classes is None:
                raise invalid("weak", f"{weak.num_classes} classes", "as the network: no classes")
