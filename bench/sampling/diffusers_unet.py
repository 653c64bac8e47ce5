"""diffusers' `UNet2DModel` and `DDPMScheduler` on the same weights: a step without guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.models.config import NetConfig, UNetConfig, UpsamplerConfig
from bench.measure import Unavailable, first_line
from bench.sampling.contender import Contender, Entry, Trial
from bench.sampling.published import precision
from bench.sampling.subject import Inputs, Subject
from bench.sampling.weights import shared_state

NAME = "diffusers"
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def not_expressed(config: UNetConfig) -> str:
    """Why `UNet2DModel` can't be this network; "" where it can."""
    if not (config.use_scale_shift_norm and config.resblock_updown):
        return "residual blocks of another kind"
    if config.widths()[0] != config.model_channels:
        return "its timestep embedding is as wide as the first level"
    attended = [w for w, there in zip(config.widths(), config.levels_with_attention(), strict=True) if there]
    if config.num_head_channels == -1 and len({w // config.heads(w) for w in attended}) > 1:
        return "one width of a head for all levels"
    return ""


def arguments(config: UNetConfig) -> dict[str, Any]:
    """The constructor's arguments."""
    attended = config.levels_with_attention()
    width = config.num_head_channels
    if width == -1:
        width = config.widths()[-1] // config.heads(config.widths()[-1])
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels * (2 if isinstance(config, UpsamplerConfig) else 1),
        "out_channels": config.out_channels,
        "block_out_channels": config.widths(),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attended[::-1]],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": width,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": config.num_classes,
    }


def blocks(config: NetConfig) -> Iterator[tuple[str, str, str]]:
    """(our block, theirs, "res" or "attention") for every residual and attention block."""
    attended, index = config.levels_with_attention(), 1
    for level in range(len(attended)):
        for i in range(config.num_res_blocks):
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{i}", "res"
            if attended[level]:
                yield f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{i}", "attention"
            index += 1
        if level != len(attended) - 1:
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", "res"
            index += 1
    yield "middle_block.0", "mid_block.resnets.0", "res"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "res"
    index = 0
    for up, level in enumerate(reversed(range(len(attended)))):
        for i in range(config.num_res_blocks + 1):
            yield f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{i}", "res"
            if attended[level]:
                yield f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{i}", "attention"
            if level and i == config.num_res_blocks:
                last = 1 + attended[level]
                yield f"output_blocks.{index}.{last}", f"up_blocks.{up}.upsamplers.0", "res"
            index += 1


def converted(config: UNetConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under the names and in the shapes of `UNet2DModel`."""
    out: dict[str, Tensor] = {}

    def take(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            value = state.get(f"{ours}.{kind}")
            if value is not None:
                # Its attention projects by linear layers.
                out[f"{theirs}.{kind}"] = value[:, :, 0] if value.dim() == 3 else value

    for ours, theirs in ENDS.items():
        take(ours, theirs)
    for ours, theirs, kind in blocks(config):
        for part, name in (RES if kind == "res" else ATTENTION).items():
            take(f"{ours}.{part}", f"{theirs}.{name}")
        if kind == "attention":
            heads = config.heads(len(state[f"{ours}.norm.weight"]), up_path=ours.startswith("output"))
            for form in ("weight", "bias"):
                for name, rows in zip("qkv", _qkv(config, state[f"{ours}.qkv.{form}"], heads), strict=True):
                    out[f"{theirs}.to_{name}.{form}"] = rows
    return out


def _qkv(config: NetConfig, value: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of q, of k and of v; legacy rows are [h, 3, d]."""
    value = value.flatten(1) if value.dim() > 1 else value
    rest = value.shape[1:]
    if config.use_new_attention_order:
        q, k, v = value.view(3, -1, *rest)
    else:
        q, k, v = value.view(heads, 3, -1, *rest).transpose(0, 1).flatten(1, 2)
    return q, k, v


class Diffusers(Contender):
    """A step of diffusers, channels-last; float32 on a CPU, float16 on a GPU."""

    name = NAME

    def __init__(self, subject: Subject, inputs: Inputs):
        super().__init__(subject, inputs)
        self.dtype = precision(self.device)

    def prepare(self) -> None:
        try:
            from diffusers import DDPMScheduler, UNet2DModel  # type: ignore[import-not-found]
        except (ImportError, RuntimeError, OSError) as error:
            raise Unavailable(f"diffusers: {first_line(error)}") from error
        config = self.subject.net
        reason = not_expressed(config) or ("a guided step" if self.subject.classifier is not None else "")
        if reason:
            raise Unavailable(f"UNet2DModel can't be this network: {reason}")
        with torch.device("meta"):
            net = UNet2DModel(**arguments(config))
        net.load_state_dict(converted(config, shared_state(config, 0, self.device)), strict=True, assign=True)
        net.requires_grad_(False).eval()
        self.net = (net.half() if self.dtype == "fp16" else net).to(memory_format=torch.channels_last)
        self.scheduler_kind = DDPMScheduler
        self.scheduler = self._scheduler(self.subject.process(self.subject.steps).schedule.timestep_map)

    def _scheduler(self, kept: Any) -> Any:
        """Its scheduler for the timesteps that a respaced process keeps."""
        scheduler = self.scheduler_kind(
            num_train_timesteps=self.subject.settings.steps,
            beta_schedule=BETAS[self.subject.settings.noise_schedule],
            variance_type="learned_range",
            clip_sample=True,
        )
        scheduler.set_timesteps(timesteps=[int(t) for t in kept][::-1], device=self.device)
        return scheduler

    def _sample(self, scheduler: Any, x: Tensor, i: int) -> Any:
        t, inputs, given = scheduler.timesteps[i], self.inputs, x
        if inputs.low_res is not None:
            size = x.shape[2:]
            given = torch.cat([x, F.interpolate(inputs.low_res, size, mode="bilinear")], dim=1)
        labels = inputs.labels if self.subject.net.num_classes else None
        out = self.net(given.to(self.net.dtype), t, class_labels=labels).sample
        return scheduler.step(out.float(), t, x)

    def outcome(self, trial: Trial) -> tuple[Tensor, Tensor]:
        kept = trial.process.schedule.timestep_map
        noise = f"{self.scheduler_kind.__module__}.randn_tensor"
        with mock.patch(noise, lambda *_, **__: trial.noise):
            out = self._sample(self._scheduler(kept), self.inputs.x, len(kept) - 1 - trial.index)
        return out.prev_sample, out.pred_original_sample

    def begin(self) -> None:
        self.x = self.inputs.x

    def step(self, i: int) -> None:
        self.x = self._sample(self.scheduler, self.x, i).prev_sample


def entry(device: torch.device) -> Entry:
    """The step of diffusers."""
    return Entry(NAME, precision(device), Diffusers)
