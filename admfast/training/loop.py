"""A plain training loop: AdamW, warm-up and linear cool-down, one EMA, exact resume."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from admfast.checks import real, whole
from admfast.errors import CheckpointError, NonFiniteError, first_line
from admfast.files.atomic import atomic_open, output_error

# What a file that is no state of this training raises when it is loaded.
_NO_STATE = (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step.
        lr: learning rate after `warmup` steps; falls linearly to zero over the last `cooldown` of all steps.
        weight_decay: of AdamW.
        ema_decay: share of the average kept at every step.
        warmup: steps over which the rate rises from zero.
        cooldown: share of the steps, 0..1.
        seed: of the weights, the order of the data, timesteps and noise.
        save_seconds: time between two saved states.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    warmup: int = 200
    cooldown: float = 0.3
    seed: int = 0
    save_seconds: float = 120.0

    def __post_init__(self) -> None:
        checked: dict[str, float] = {n: whole(n, getattr(self, n), 1) for n in ("steps", "batch_size")}
        checked["lr"] = real("lr", self.lr, above=0)
        for name in ("weight_decay", "warmup", "save_seconds"):
            checked[name] = real(name, getattr(self, name), least=0)
        checked["ema_decay"] = real("ema_decay", self.ema_decay, least=0, below=1)
        checked["cooldown"] = real("cooldown", self.cooldown, least=0, most=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rate(self, step: int) -> float:
        """Learning rate of step number `step` (from 0)."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.cooldown * self.steps, 1)
        return self.lr * warm * min(1.0, left)


@dataclass(frozen=True)
class Batch:
    """Images [N, C, H, W] in -1..1, classes [N], timesteps [N] and noise like the images."""

    images: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor


def train(
    net: nn.Module,
    loss: Callable[[Batch], dict[str, Tensor]],
    batches: Callable[[torch.Generator], Iterator[Batch]],
    config: TrainConfig,
    out: Path,
) -> nn.Module:
    """Train `net` in place, resuming from `out/state.pt`; return a copy with the averaged weights.

    The state holds everything that the next step depends on, so that a run that was killed and resumed ends
    with the weights of one that was not. `out/log.jsonl` gets a row every 100 steps: means over those of them
    that this run made.

    Args:
        net: in training mode, with the weights to begin from; a state that is there replaces them.
        loss: maps a batch to terms of [N] or [] each; the mean of "loss" is minimised, all are logged.
        batches: maps a generator to endless batches, drawn from it alone.
        config: see `TrainConfig`.
        out: folder for `state.pt` and `log.jsonl`; made where it is missing.

    Raises:
        NonFiniteError: for a loss or gradient that is NaN or infinite, before it touches the weights.
        CheckpointError: for a state that can't be read or is another network's.
        OutputError: if something can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(out / "state.pt", error) from None
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimiser = _adamw(net, config.weight_decay)
    state_path = out / "state.pt"
    step = 0
    if state_path.exists():
        step = _resume(state_path, net, ema, optimiser)
    # Those of the steps that are done are drawn again, so that the others are what they would have been.
    stream = itertools.islice(batches(torch.Generator().manual_seed(config.seed)), step, None)
    started, saved, first = time.time(), time.time(), step
    sums: dict[str, list[float]] = {}
    while step < config.steps:
        # Dropout draws from the global generator: seeding it by step makes a resumed run exact.
        torch.manual_seed(config.seed * 1_000_003 + step)
        terms = loss(next(stream))
        try:
            _update(net, ema, optimiser, terms["loss"].mean(), config, step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; the last saved state is {state_path}") from None
        step += 1
        for name, value in terms.items():
            sums.setdefault(name, []).append(value.detach().mean().item())
        if step % 100 == 0:
            rate = (step - first) * config.batch_size / (time.time() - started)
            row = {"step": step, "images_per_second": round(rate, 1)}
            row |= {name: round(sum(values) / len(values), 6) for name, values in sums.items()}
            sums.clear()
            _log(out / "log.jsonl", row)
        if time.time() - saved > config.save_seconds or step == config.steps:
            state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
            with atomic_open(state_path) as file:
                torch.save({**state, "step": step}, file)
            saved = time.time()
    return ema


def _adamw(net: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Return torch's fused AdamW for the parameters of `net`."""
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=weight_decay, fused=True)
    params = list(net.parameters())
    # torch's fused step doesn't say that it wrote: forms and graphs of the old weights would go unnoticed.
    optimiser.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(params))
    return optimiser


def _update(
    net: nn.Module,
    ema: nn.Module,
    optimiser: torch.optim.AdamW,
    total: Tensor,
    config: TrainConfig,
    step: int,
) -> None:
    """Step the optimiser and the average; nothing changes where loss or gradient is not finite."""
    if not torch.isfinite(total):
        raise NonFiniteError(f"the loss of step {step} is {total.item()}")
    optimiser.zero_grad()
    total.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise NonFiniteError(f"the gradient of step {step} has norm {norm.item()}")
    for group in optimiser.param_groups:
        group["lr"] = config.rate(step)
    optimiser.step()
    average = get_ema_multi_avg_fn(min(config.ema_decay, (1 + step) / (10 + step)))
    average(list(ema.parameters()), list(net.parameters()), None)  # type: ignore[arg-type]


def _resume(path: Path, net: nn.Module, ema: nn.Module, optimiser: torch.optim.AdamW) -> int:
    """Load a saved state in place and return the number of steps that it has behind it."""
    try:
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])
    except _NO_STATE as error:
        raise CheckpointError(f"{path}: not a state of this training: {first_line(error)}") from error


def _log(path: Path, row: dict[str, float]) -> None:
    """Print a row and append it to the log."""
    print(row, flush=True)
    try:
        with open(path, "a") as log:
            log.write(json.dumps(row) + "\n")
    except OSError as error:
        raise output_error(path, error) from error
