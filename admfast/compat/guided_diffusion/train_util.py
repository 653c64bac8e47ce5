"""The training loop under the names of the published `train_util.py`, with its files, order and arithmetic.

It is for existing programs. `admfast train` is faster, resumes exactly and checks its settings.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from admfast.compat.guided_diffusion import dist_util, logger
from admfast.compat.guided_diffusion.fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from admfast.compat.guided_diffusion.nn import update_ema
from admfast.compat.guided_diffusion.resample import LossAwareSampler, ScheduleSampler, UniformSampler
from admfast.files.atomic import atomic_open
from admfast.training.learner import SCALE_GROWTH

__all__ = ["INITIAL_LOG_LOSS_SCALE", "TrainLoop"]


class TrainLoop:
    """Train a network: sum the gradients of microbatches, step AdamW, average the weights, write files.

    model, diffusion: of this package, or objects with the same methods. data: yields (images [N, C, H, W],
    {name: [N] tensor}). microbatch: images of a backward pass; -1 for the whole batch. The gradients of the
    microbatches' mean losses are summed. ema_rate: a number, or several in comma-separated text.
    resume_checkpoint: a modelNNNNNN.pt; averages and the optimiser's state are read from the same folder if
    they exist. lr_anneal_steps: the learning rate falls linearly to 0 over these steps, and training then
    ends; 0 trains endlessly at a constant rate.

    Files modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt are written to `logger.get_dir()` at the first
    step, after every `save_interval` steps and at the end. Each is written whole or not at all.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: Iterator[Any],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = SCALE_GROWTH,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        rates = [ema_rate] if isinstance(ema_rate, float) else str(ema_rate).split(",")
        self.ema_rate = [float(rate) for rate in rates]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.step, self.resume_step = 0, 0
        self.global_batch = batch_size * _world_size()

        self._load_and_sync_parameters()
        self.mp_trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth
        )
        self.opt = AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay)
        self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        if self.resume_step:
            self._load_optimizer_state()
        self.ddp_model, self.use_ddp = model, _world_size() > 1
        if self.use_ddp:
            ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
            self.ddp_model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def _load_and_sync_parameters(self) -> None:
        path = find_resume_checkpoint() or self.resume_checkpoint
        if path:
            self.resume_step = parse_resume_step_from_filename(path)
            logger.log(f"loading model from checkpoint: {path}...")
            self.model.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        path = find_ema_checkpoint(find_resume_checkpoint() or self.resume_checkpoint, self.resume_step, rate)
        if not self.resume_step or path is None:
            return copy.deepcopy(self.mp_trainer.master_params)
        logger.log(f"loading EMA from checkpoint: {path}...")
        state = dist_util.load_state_dict(path, map_location=dist_util.dev())
        return self.mp_trainer.state_dict_to_master_params(state)

    def _load_optimizer_state(self) -> None:
        beside = Path(find_resume_checkpoint() or self.resume_checkpoint).parent
        path = beside / f"opt{self.resume_step:06}.pt"
        if path.exists():
            logger.log(f"loading optimizer state from checkpoint: {path}")
            self.opt.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))

    def run_loop(self) -> None:
        """Train until the learning rate has fallen to 0, or endlessly if it is constant."""
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            if self.step % self.save_interval == 0:
                self.save()
                # The published way to end endless training.
                if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.step > 0:
                    return
            self.step += 1
        if (self.step - 1) % self.save_interval != 0:
            self.save()

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Make one training step on a batch."""
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                update_ema(params, self.mp_trainer.master_params, rate=rate)
        self._anneal_lr()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Compute the gradients of a batch, summed over its microbatches."""
        self.mp_trainer.zero_grad()
        for first in range(0, len(batch), self.microbatch):
            part = slice(first, first + self.microbatch)
            images = batch[part].to(dist_util.dev())
            kwargs = {name: value[part].to(dist_util.dev()) for name, value in cond.items()}
            t, weights = self.schedule_sampler.sample(len(images), dist_util.dev())
            more_follow = first + self.microbatch < len(batch)
            compute_losses = partial(
                self.diffusion.training_losses, self.ddp_model, images, t, model_kwargs=kwargs
            )
            with self.ddp_model.no_sync() if self.use_ddp and more_follow else contextlib.nullcontext():  # type: ignore[operator]
                losses = compute_losses()
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            log_loss_dict(self.diffusion, t, {name: value * weights for name, value in losses.items()})
            self.mp_trainer.backward((losses["loss"] * weights).mean())

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            share_done = (self.step + self.resume_step) / self.lr_anneal_steps
            for group in self.opt.param_groups:
                group["lr"] = self.lr * (1 - share_done)

    def log_step(self) -> None:
        """Log the number of this step, and of the samples up to and including it."""
        step = self.step + self.resume_step
        logger.logkv("step", step)
        logger.logkv("samples", (step + 1) * self.global_batch)

    def save(self) -> None:
        """Write the network, its averages and the optimiser's state."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder, step = Path(get_blob_logdir() or "."), self.step + self.resume_step
            states = {f"model{step:06d}.pt": self.mp_trainer.master_params}
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                states[f"ema_{rate}_{step:06d}.pt"] = params
            for name, params in states.items():
                logger.log(f"saving {name}...")
                _write_state(folder / name, _detached(self.mp_trainer.master_params_to_state_dict(params)))
            _write_state(folder / f"opt{step:06d}.pt", self.opt.state_dict())
        if _world_size() > 1:
            dist.barrier()


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in state.items()}


def _write_state(path: Path, state: Any) -> None:
    with atomic_open(path) as file:
        torch.save(state, file)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def parse_resume_step_from_filename(filename: str) -> int:
    """Return the step in a name modelNNNNNN.pt, 0 in any other."""
    match = re.fullmatch(r"(\d+)(\..*)?", filename.rpartition("model")[2]) if "model" in filename else None
    return int(match[1]) if match else 0


def get_blob_logdir() -> str | None:
    """Return the folder that files go to."""
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """Return None; a program may replace this function by one that finds the checkpoint to resume."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float) -> str | None:
    """Return the path of an average in a checkpoint's folder, or None if there is none."""
    if not main_checkpoint:
        return None
    path = Path(main_checkpoint).parent / f"ema_{rate}_{step:06d}.pt"
    return str(path) if path.exists() else None


def log_loss_dict(diffusion: Any, ts: Tensor, losses: dict[str, Tensor]) -> None:
    """Log the mean of each loss [N], overall and for each quarter of the process (NAME_q0 to NAME_q3)."""
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for step, loss in zip(ts.tolist(), values.tolist(), strict=True):
            logger.logkv_mean(f"{key}_q{int(4 * step / diffusion.num_timesteps)}", loss)
