"""Make training steps: gradients of a batch, the optimiser, the averages. They can be used in any loop.

    learner = Learner(recipe, build_network(recipe))
    batch = make_batch(recipe, learner.sampler, sample_ids, images, labels)
    report = learner.update(batch)

A step whose gradient isn't finite is skipped and counted on the device. So a step reads nothing back from a
GPU, except with the sampler "loss-second-moment", which reads the losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admfast.diffusion import GaussianDiffusion
from admfast.distributed import World
from admfast.errors import CheckpointError, NonFiniteError, first_line
from admfast.models.dropout import keyed_dropout
from admfast.sampling.diagnose import first_nonfinite
from admfast.training.draws import TrainStream
from admfast.training.ema import Averages
from admfast.training.loss import Batch, loss_terms
from admfast.training.network import set_precision
from admfast.training.recipe import Recipe
from admfast.training.timesteps import timestep_sampler

# log2 of the first loss scale, which keeps float16 gradients from vanishing. The loss scale grows a little at
# every step and is halved by a step that overflows, as published, but does not fall below 1.
INITIAL_LOG2_LOSS_SCALE = {"diffusion": 20.0, "upsampler": 20.0, "classifier": 16.0}
SCALE_GROWTH = 1e-3

Loss = Callable[[nn.Module, Recipe, GaussianDiffusion, Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Report:
    """Report of a step. Its tensors are on the device: nothing has been read back from it.

    Attributes:
        terms: loss and its terms for every sample of this process, [N] each, before weighting.
        t: timesteps of the samples [N].
        grad_norm: norm of the whole gradient, before clipping.
        learning_rate: learning rate of the step.
    """

    terms: dict[str, Tensor]
    t: Tensor
    grad_norm: Tensor
    learning_rate: float


class Learner:
    """Network in training, with everything that its next step depends on.

    Args:
        recipe: the recipe. A precision of "auto" means fp32 here; `resolve_precision` replaces it.
        net: the network in training mode, on the device where it is trained; from `build_network`, or your
            own.
        world: the processes of the run; one process by default.
        loss: function that returns the terms of every sample. The mean of the term "loss", multiplied by the
            weights of the timestep sampler, is minimised.

    Attributes:
        step: number of steps made.
        averages: the averages of the weights, `Averages`.
        optimiser: torch's AdamW.
        sampler: the sampler of the timesteps.
        process: the diffusion process.
        skipped: number of skipped steps, float32 [] on the device.
        skipped_in_a_row: number of steps skipped since the last one that was not; float32 [] on the device.
        log2_scale: log2 of the loss scale, float32 [] on the device; None unless the precision is fp16.
    """

    def __init__(
        self, recipe: Recipe, net: nn.Module, world: World | None = None, loss: Loss = loss_terms
    ) -> None:
        self.recipe, self.net, self.loss = recipe, net, loss
        self.world = world or World(device=next(net.parameters()).device)
        self.process = recipe.process.build()
        precision = "fp32" if recipe.precision == "auto" else recipe.precision
        set_precision(net, precision)
        self.ddp_net = _wrap_in_ddp(net, self.world)
        self.averages = Averages(net, recipe.ema, recipe.ema_power, recipe.ema_warmup)
        self.sampler = timestep_sampler(recipe.sampler, self.process.num_timesteps)
        self.trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trainable, lr=recipe.learning_rate(0), weight_decay=recipe.weight_decay, fused=True
        )
        device = self.trainable[0].device
        self.skipped, self.skipped_in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
        self.log2_scale = None
        if precision == "fp16":
            self.log2_scale = torch.tensor(INITIAL_LOG2_LOSS_SCALE[recipe.kind], device=device)
        self.step = 0

    def update(self, batch: Batch) -> Report:
        """Make one step on this process's share of a batch, in microbatches.

        The gradient is that of the mean of loss * weight over the whole batch, for any microbatch and number
        of processes (with `published_sum`: that of the sum of the microbatches' means).
        """
        learning_rate = self.recipe.learning_rate(self.step)
        terms = self._gradients(batch)
        norm, finite = self._unscale_and_clip()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        # The fused optimiser reads these: if found_inf is 1, it changes nothing.
        self.optimiser.grad_scale, self.optimiser.found_inf = None, 1 - finite  # type: ignore[attr-defined]
        self.optimiser.step()
        # torch's fused step doesn't increment the version counters of the weights. Without this, values that
        # were derived from the old weights would stay in use.
        torch.autograd.graph.increment_version(self.trainable)
        self.averages.update(self.step, finite)
        self.skipped += 1 - finite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * (1 - finite)
        if self.log2_scale is not None:
            grown = self.log2_scale + SCALE_GROWTH * finite - (1 - finite)
            self.log2_scale = grown.clamp(min=0)
        if self.sampler.needs_losses:
            losses = self.world.all_gather(terms["loss"].float())
            self.sampler.learn(self.world.all_gather(batch.t).cpu(), losses.cpu())
        self.step += 1
        return Report(terms, batch.t, norm, learning_rate)

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of all microbatches; return the terms of every sample."""
        self.optimiser.zero_grad(set_to_none=True)
        parts = batch.split(self.recipe.microbatch or len(batch))
        microbatch_terms: list[dict[str, Tensor]] = []
        for part in parts:
            more_follow = part is not parts[-1]
            # The backward pass is inside too: blocks that it computes again need the same dropout masks.
            with (
                _skip_gradient_sync(self.ddp_net, more_follow),
                keyed_dropout(self.net, self.recipe.seed, part.sample_ids, TrainStream.DROPOUT),
            ):
                terms = self.loss(self.ddp_net, self.recipe, self.process, part)
                weighted = terms["loss"] * part.weights
                total = weighted.mean() if self.recipe.published_sum else weighted.sum() / len(batch)
                (total if self.log2_scale is None else total * self.log2_scale.exp2()).backward()
            microbatch_terms.append({name: value.detach() for name, value in terms.items()})
        return {name: torch.cat([terms[name] for terms in microbatch_terms]) for name in microbatch_terms[0]}

    def _unscale_and_clip(self) -> tuple[Tensor, Tensor]:
        """Divide the gradients by the loss scale and clip them; return their norm, and 1 if it is finite."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        factor = None
        if self.log2_scale is not None:
            factor = (-self.log2_scale).exp2()
            norm = norm * factor
        finite = norm.isfinite().to(torch.float32)
        if self.recipe.clip is not None:
            clipped = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
            factor = clipped if factor is None else factor * clipped
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        return norm, finite

    def check_finite(self, batch: Batch) -> None:
        """Raise NonFiniteError, which names the first bad layer, if too many steps in a row were skipped.

        batch: the last batch. Reads a number from the device.
        """
        count = int(self.skipped_in_a_row)
        if count <= self.recipe.max_skipped:
            return
        raise NonFiniteError(
            f"{count} steps in a row gave no finite gradient, the last was step {self.step - 1}: "
            f"{self._first_bad_layer(batch)}"
        )

    def _first_bad_layer(self, batch: Batch) -> str:
        part = batch.split(self.recipe.microbatch or len(batch))[-1]

        def call(x: Tensor, t: Tensor) -> Tensor:
            return self.loss(self.net, self.recipe, self.process, part)["loss"]

        diagnosis = first_nonfinite({"net": self.net}, {"the loss": call}, part.images, part.t)
        for name, parameter in self.net.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"{diagnosis}; the first gradient that is not finite is that of {name}"
        return diagnosis

    def parameter_norm(self) -> Tensor:
        """Return the norm of all parameters."""
        return nn.utils.get_total_norm([parameter.detach() for parameter in self.net.parameters()])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on; the tensors share memory with the learner."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "averages": self.averages.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "sampler": self.sampler.state_dict(),
            "counts": torch.stack([self.skipped, self.skipped_in_a_row]),
            "log2_scale": self.log2_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state in place. Raises CheckpointError if it doesn't fit this learner."""
        try:
            self.net.load_state_dict(state["net"])
            self.averages.load_state_dict(state["averages"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.sampler.load_state_dict(state["sampler"])
            self.skipped, self.skipped_in_a_row = (
                count.clone() for count in state["counts"].to(self.skipped.device)
            )
            if self.log2_scale is not None:
                self.log2_scale = state["log2_scale"].to(self.skipped.device)
            self.step = int(state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a state of this training: {first_line(error)}") from error


def _wrap_in_ddp(net: nn.Module, world: World) -> nn.Module:
    """Return a network that averages its gradients over the processes; with one process, `net` itself."""
    if world.size == 1:
        return net
    ids = [world.device.index] if world.device.type == "cuda" else None
    # DDP ignores frozen parameters; all others get a gradient at every step.
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)


def _skip_gradient_sync(net: nn.Module, skip: bool) -> AbstractContextManager[Any]:
    """Return a context in which a wrapped network doesn't exchange gradients, if `skip`."""
    if skip and isinstance(net, nn.parallel.DistributedDataParallel):
        return net.no_sync()
    return contextlib.nullcontext()
