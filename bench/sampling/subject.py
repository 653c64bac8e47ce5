"""Subjects of a comparison: a preset's networks, the operations of a step, and its input images."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admfast.checkpoints.describe import count_forward_work, count_guidance_flops
from admfast.diffusion import DiffusionConfig, GaussianDiffusion
from admfast.models.config import ClassifierConfig, UNetConfig, UpsamplerConfig
from admfast.models.preset_types import ModelPreset, SystemPreset
from admfast.models.presets import SYSTEMS
from admfast.ops.update import as_seeds
from bench.sampling.weights import network


@dataclass(frozen=True)
class Subject:
    """A preset's diffusion network, with its classifier if it has one.

    name: of the preset; a cascade's name stands for its upsampler, because its first stage is a preset too.
    steps, guidance: those of the preset. low_res_size: side of the image that an upsampler enlarges. also:
    names of other presets with the same step.
    """

    name: str
    net: UNetConfig
    settings: DiffusionConfig
    classifier: ClassifierConfig | None = None
    guidance: float = 0.0
    steps: int = 250
    low_res_size: int | None = None
    also: tuple[str, ...] = ()

    def process(self, steps: int) -> GaussianDiffusion:
        """Return the process respaced to this number of steps."""
        return self.settings.build(str(steps))

    def networks(self, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
        """Return the network and the classifier, or None, with their random weights."""
        second = None if self.classifier is None else network(self.classifier, 1, device)
        return network(self.net, 0, device), second


@functools.cache
def subjects() -> dict[str, Subject]:
    """Return the distinct steps of all presets, by the name of the first preset that has the step."""
    found: dict[Any, Subject] = {}
    for system in SYSTEMS.values():
        for subject in _of_system(system):
            key = (dataclasses.replace(subject.net, dropout=0.0), subject.classifier)
            if key not in found:
                found[key] = subject
            elif subject.name != found[key].name:
                also = (*found[key].also, subject.name)
                found[key] = dataclasses.replace(found[key], also=also)
    return {subject.name: subject for subject in found.values()}


def _of_system(system: SystemPreset) -> list[Subject]:
    """Return the subjects of one preset; for a cascade only the upsampler, as its base is another preset."""
    if system.upsampler is not None:
        model, steps = system.upsampler, system.upsampler_steps
        return [_subject(system.name, model, steps, low_res_size=model.low_res_size)]
    classifier = None if system.classifier is None else system.classifier.config
    return [
        _subject(system.name, system.diffusion, system.steps, classifier=classifier, guidance=system.guidance)
    ]


def _subject(name: str, model: ModelPreset, steps: int, **more: Any) -> Subject:
    config, settings = model.config, model.diffusion
    assert isinstance(config, UNetConfig) and settings is not None
    return Subject(name, config, settings, steps=steps, **more)


# A network that takes seconds even without fast convolutions, to test the bench itself.
_TINY: dict[str, Any] = dict(
    image_size=16,
    model_channels=32,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_head_channels=32,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
TINY = Subject(
    "tiny",
    UNetConfig(**_TINY, out_channels=6, num_classes=5),
    DiffusionConfig(noise_schedule="linear", steps=1000, learn_sigma=True),
    ClassifierConfig(**_TINY, out_channels=5, pool="attention"),
    guidance=2.0,
    steps=50,
)


def find_subject(name: str) -> Subject:
    """Return a subject by its name."""
    return TINY if name == TINY.name else subjects()[name]


@dataclass(frozen=True)
class Inputs:
    """A batch before its first step, on the device: x [N, C, H, W] float32, seeds and labels [N] int64."""

    x: Tensor
    seeds: Tensor
    labels: Tensor | None
    low_res: Tensor | None

    @classmethod
    def of(cls, subject: Subject, batch: int, device: torch.device) -> Inputs:
        """Return the batch of a subject; it has the same values at every call and on every device."""
        generator = torch.Generator().manual_seed(2)
        config = subject.net
        x = torch.randn(batch, config.in_channels, config.image_size, config.image_size, generator=generator)
        classes = config.num_classes or (subject.classifier and subject.classifier.out_channels)
        labels, low_res = None, None
        if classes:
            labels = (torch.arange(batch) * 7 % classes).to(device)
        if isinstance(config, UpsamplerConfig):
            side = subject.low_res_size or config.image_size // 4
            levels = torch.rand(batch, config.in_channels, side, side, generator=generator)
            low_res = (levels * 2 - 1).to(device)
        return cls(x.to(device), as_seeds(range(batch)).to(device), labels, low_res)

    def part(self, images: list[int]) -> Inputs:
        """Return the inputs of some of the images."""
        whole = (self.x, self.seeds, self.labels, self.low_res)
        return Inputs(*(None if t is None else t[images] for t in whole))  # type: ignore[arg-type]


@functools.cache
def step_flop(subject: Subject) -> int:
    """Return the operations of one step for one image: the network, the classifier and its gradient in x.

    Convolutions and matrix products of the published networks are counted, each once, a multiply-add as two
    operations. An implementation that needs fewer operations gets the same count.
    """
    total = count_forward_work(subject.net).flops
    return total if subject.classifier is None else total + count_guidance_flops(subject.classifier)
