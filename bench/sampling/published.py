"""The published code's guided step, imported from a checkout that the user names; no code is copied here."""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from admfast.models.config import NetConfig, UpsamplerConfig
from bench.measure import Unavailable, first_line
from bench.results import Row
from bench.sampling.contender import Contender, Entry, Trial
from bench.sampling.subject import Inputs, Subject
from bench.sampling.weights import shared_state

PACKAGE = "guided_diffusion"
PARTS = ("unet", "script_util", "respace")
TRAINING = ("fp16_util", "nn")
# Without this factor, the gradient of a classifier in float16 underflows. A power of two is exact.
LOSS_SCALE = 2.0**10
# The flags of PyTorch's study of fast diffusion on a GPU (pytorch-labs, "diffusion-fast"), except that cuDNN
# runs the convolutions, because tuning a hundred shapes in Triton takes longer than a bench may.
INDUCTOR = {
    "max_autotune": True,
    "triton.cudagraphs": True,
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
    "max_autotune_conv_backends": "ATEN",
}


@dataclass(frozen=True)
class NetworkVariant:
    """A variant of the published networks.

    frozen: False leaves them as published: parameters require gradients, attention is computed twice for a
    gradient, and the classifier is in float32. True freezes the parameters, computes attention once, puts the
    classifier in the network's dtype, and makes images channels-last.
    """

    name: str
    frozen: bool = False
    compiled: bool = False


EAGER = NetworkVariant("published")
CHANNELS_LAST = NetworkVariant("published, channels-last", frozen=True)
COMPILED = NetworkVariant("published, compiled", frozen=True, compiled=True)
VARIANTS = {"eager": EAGER, "channels-last": CHANNELS_LAST, "compiled": COMPILED}


@functools.cache
def modules(path: str, parts: tuple[str, ...] = PARTS) -> SimpleNamespace:
    """Return the published package's modules of these names, from the folder with the package.

    Raises: Unavailable.
    """
    if not path:
        raise Unavailable("no published code: name its checkout by --guided-diffusion")
    folder = Path(path).resolve()
    if not (folder / PACKAGE / "unet.py").is_file():
        raise Unavailable(f"{folder}: no {PACKAGE}/unet.py there")
    sys.path.insert(0, str(folder))
    try:
        found = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in parts}
    except ImportError as error:
        raise Unavailable(f"{folder}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(folder))
    if not Path(str(found["unet"].__file__)).is_relative_to(folder):
        raise Unavailable(f"{folder}: another {PACKAGE} is imported already, {found['unet'].__file__}")
    return SimpleNamespace(**found)


class Published(Contender):
    """The published `p_sample` with the published networks; float32 on a CPU, its float16 on a GPU."""

    def __init__(self, subject: Subject, inputs: Inputs, variant: NetworkVariant, path: str):
        super().__init__(subject, inputs)
        self.variant, self.path, self.name = variant, path, variant.name
        self.half = self.device.type == "cuda"
        self.dtype = precision_on(self.device)

    def prepare(self) -> None:
        code = modules(self.path)
        config = self.subject.net
        kind = code.unet.SuperResModel if isinstance(config, UpsamplerConfig) else code.unet.UNetModel
        self.net = self._network(kind, config, 0, self.half)
        self.classifier = None
        if self.subject.classifier is not None:
            half = self.half and self.variant.frozen
            self.classifier = self._network(code.unet.EncoderUNetModel, self.subject.classifier, 1, half)
        self.loss_scale = LOSS_SCALE if self.half and self.variant.frozen else 1.0
        settings = self.subject.settings.to_dict()
        self.process = functools.partial(code.script_util.create_gaussian_diffusion, **settings)
        self.diffusion = self.process(timestep_respacing=str(self.subject.steps))

    def _network(self, kind: Any, config: NetConfig, seed: int, half: bool) -> Any:
        """Return a published network, from its own constructor, with the shared weights."""
        arguments = {key: value for key, value in config.to_dict().items() if key != "kind"}
        with torch.device("meta"):
            net = kind(**arguments, use_fp16=half)
        net.load_state_dict(shared_state(config, seed, self.device), strict=True, assign=True)
        for parameter in net.parameters():
            parameter.requires_grad_(not self.variant.frozen)
        if half:
            net.convert_to_fp16()
        net.eval()
        if self.variant.frozen:
            net.to(memory_format=torch.channels_last)
            without_checkpoints(net)
        if not self.variant.compiled:
            return net
        import torch._inductor as inductor

        known = set(inductor.list_options())
        options = {key: value for key, value in INDUCTOR.items() if key in known}
        return torch.compile(net, fullgraph=True, options=options if self.device.type == "cuda" else {})

    def _condition(self, x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        """Return the scaled gradient of the classifier's log-probability at x, as in the published script."""
        assert self.classifier is not None and y is not None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_probability = torch.log_softmax(self.classifier(leaf, t).float(), dim=-1)
            if self.variant.frozen:
                chosen = log_probability.gather(1, y[:, None])
            else:
                chosen = log_probability[range(len(y)), y]  # as published: copies indices to the device
            (gradient,) = torch.autograd.grad(chosen.sum() * self.loss_scale, leaf)
        return gradient.float() * (self.guidance_scale / self.loss_scale)

    def _model(self, x: Tensor, t: Tensor, y: Tensor | None = None, **more: Any) -> Tensor:
        return self.net(x, t, y=y if self.subject.net.num_classes else None, **more)

    def _sample(self, diffusion: Any, x: Tensor, index: int) -> dict[str, Tensor]:
        """Run one `p_sample`, with the tensors that the published loop makes for it."""
        inputs = self.inputs
        conditions = {"y": inputs.labels, "low_res": inputs.low_res}
        t = torch.tensor([index] * len(x), device=self.device)
        return diffusion.p_sample(
            self._model,
            x,
            t,
            cond_fn=None if self.classifier is None else self._condition,
            model_kwargs={key: value for key, value in conditions.items() if value is not None},
        )

    def run_trial(self, trial: Trial) -> tuple[Tensor, Tensor]:
        diffusion = self.process(timestep_respacing=str(trial.process.num_timesteps))
        self.guidance_scale = trial.guidance_scale
        with mock.patch.object(torch, "randn_like", lambda like: trial.noise.to(like.dtype)):
            out = self._sample(diffusion, self.inputs.x, trial.index)
        self.begin()
        return out["sample"].float(), out["pred_xstart"].float()

    def begin(self) -> None:
        self.x, self.guidance_scale = self.inputs.x, self.subject.guidance

    def step(self, i: int) -> None:
        if self.variant.compiled and self.half:
            torch.compiler.cudagraph_mark_step_begin()
        self.x = self._sample(self.diffusion, self.x, self.subject.steps - 1 - i)["sample"]

    def note(self) -> Row:
        if not self.half:
            return {}
        return {"implementation": f"classifier {'fp16' if self.variant.frozen else 'fp32'}"}


def without_checkpoints(net: nn.Module) -> None:
    """Let attention keep what its gradient needs instead of computing it twice.

    The published checkpoint function works neither with frozen parameters nor with torch.compile.
    """
    for module in net.modules():
        if type(module).__name__ == "AttentionBlock":
            module.forward = module._forward  # type: ignore[method-assign, assignment]


def precision_on(device: torch.device) -> str:
    """Return the precision in which the published code runs."""
    return "fp16" if device.type == "cuda" else "fp32"


def entry(variant: NetworkVariant, path: str, device: torch.device) -> Entry:
    """Return the entry of a variant of the published step."""
    make = functools.partial(Published, variant=variant, path=path)
    return Entry(variant.name, precision_on(device), make, compiles=variant.compiled)
