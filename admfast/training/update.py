"""One step of training: gradients of a batch, the optimiser, the averages. For any loop, ours or a user's.

    learner = Learner(recipe, build_network(recipe))
    batch = batch_of(recipe, learner.sampler, ks, images, labels)
    report = learner.update(batch)

Nothing in a step is read back from a GPU: a step whose gradient isn't finite is skipped, and counted, there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from admfast.diffusion import GaussianDiffusion
from admfast.errors import CheckpointError, NonFiniteError, first_line
from admfast.models.dropout import keyed_dropout
from admfast.sampling.diagnose import first_nonfinite
from admfast.training.distributed import World, without_sync
from admfast.training.draws import TrainStream
from admfast.training.ema import Averages
from admfast.training.loss import Batch, loss
from admfast.training.network import set_precision
from admfast.training.recipe import Recipe
from admfast.training.timesteps import timestep_sampler

# log2 of the factor that keeps float16 gradients from vanishing; it grows by a little at every step and is
# halved by one that overflows, as published, but not below 1.
FIRST_SCALE = {"diffusion": 20.0, "upsampler": 20.0, "classifier": 16.0}
SCALE_GROWTH = 1e-3

Loss = Callable[[nn.Module, Recipe, GaussianDiffusion, Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Report:
    """Report of a step, on the device: nothing has been read from it.

    Attributes:
        terms: loss and its parts of every sample of this process, [N] each, before weighting.
        t: their timesteps [N].
        grad_norm: of the whole gradient, before clipping.
        rate: learning rate.
    """

    terms: dict[str, Tensor]
    t: Tensor
    grad_norm: Tensor
    rate: float


class Learner:
    """A network in training, with everything that its next step depends on.

    Args:
        recipe: with a precision that isn't "auto" (see `resolved_precision`; "auto" counts as fp32).
        net: in training mode, where it is to be trained; fresh from `build_network`, or one's own.
        world: the processes of the run; one by default.
        loss: what is minimised; the mean of its term "loss", weighted as the sampler of timesteps asks.

    Attributes:
        step: steps behind it. averages, optimiser, sampler: see there. process: the diffusion process.
        skipped: steps that were skipped, of them `in_a_row` just now; float32 [] on the device.
        log2_scale: of the loss, float32 [] on the device; None but for fp16.
    """

    def __init__(self, recipe: Recipe, net: nn.Module, world: World | None = None, loss: Loss = loss) -> None:
        self.recipe, self.net, self.loss = recipe, net, loss
        self.world = world or World(device=next(net.parameters()).device)
        self.process = recipe.process.build()
        precision = "fp32" if recipe.precision == "auto" else recipe.precision
        set_precision(net, precision)
        self.parallel = self.world.wrap(net)
        self.averages = Averages(net, recipe.ema, recipe.ema_power, recipe.ema_warmup)
        self.sampler = timestep_sampler(recipe.sampler, self.process.num_timesteps)
        self.trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=recipe.rate(0), weight_decay=recipe.weight_decay, fused=True
        )
        device = self.trained[0].device
        self.skipped, self.in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
        self.log2_scale = None
        if precision == "fp16":
            self.log2_scale = torch.tensor(FIRST_SCALE[recipe.kind], device=device)
        self.step = 0

    def update(self, batch: Batch) -> Report:
        """Make one step on this process's share of a batch, in microbatches.

        The gradient is that of the mean over the whole batch of loss * weight, whatever the microbatch and
        the number of processes (with `published_sum`: the sum of the microbatches' means).
        """
        rate = self.recipe.rate(self.step)
        terms = self._gradients(batch)
        norm, finite = self._finished_gradients()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # The fused step looks at these: where a gradient isn't finite it leaves everything as it is.
        self.optimiser.grad_scale, self.optimiser.found_inf = None, 1 - finite  # type: ignore[attr-defined]
        self.optimiser.step()
        # torch's fused step doesn't say that it wrote: what was derived from the old weights would stay.
        torch.autograd.graph.increment_version(self.trained)
        self.averages.update(self.step, finite)
        self.skipped += 1 - finite
        self.in_a_row = (self.in_a_row + 1) * (1 - finite)
        if self.log2_scale is not None:
            grown = self.log2_scale + SCALE_GROWTH * finite - (1 - finite)
            self.log2_scale = grown.clamp(min=0)
        if self.sampler.learns:
            losses = self.world.gathered(terms["loss"].float())
            self.sampler.learn(self.world.gathered(batch.t).cpu(), losses.cpu())
        self.step += 1
        return Report(terms, batch.t, norm, rate)

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of all microbatches; return the terms of every sample."""
        self.optimiser.zero_grad(set_to_none=True)
        parts = batch.split(self.recipe.microbatch or len(batch))
        found: list[dict[str, Tensor]] = []
        for part in parts:
            more = part is not parts[-1]
            # The dropout masks of a block that is computed again belong to the backward pass too.
            with (
                without_sync(self.parallel, more),
                keyed_dropout(self.net, self.recipe.seed, part.ks, TrainStream.DROPOUT),
            ):
                terms = self.loss(self.parallel, self.recipe, self.process, part)
                weighted = terms["loss"] * part.weights
                total = weighted.mean() if self.recipe.published_sum else weighted.sum() / len(batch)
                (total if self.log2_scale is None else total * self.log2_scale.exp2()).backward()
            found.append({name: value.detach() for name, value in terms.items()})
        return {name: torch.cat([terms[name] for terms in found]) for name in found[0]}

    def _finished_gradients(self) -> tuple[Tensor, Tensor]:
        """Take the loss scale out of the gradients, clip them; return their norm and 1 if it is finite."""
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
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

    def check(self, batch: Batch) -> None:
        """Raise NonFiniteError where too many steps in a row were skipped; names the first bad layer.

        batch: the last one. Reads a number from the device.
        """
        count = int(self.in_a_row)
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

        said = first_nonfinite({"net": self.net}, {"the loss": call}, part.images, part.t)
        for name, parameter in self.net.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"{said}; the first gradient that is not finite is that of {name}"
        return said

    def parameter_norm(self) -> Tensor:
        """Return the norm of all parameters."""
        return nn.utils.get_total_norm([parameter.detach() for parameter in self.net.parameters()])

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, sharing memory with it."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "averages": self.averages.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "sampler": self.sampler.state_dict(),
            "counts": torch.stack([self.skipped, self.in_a_row]),
            "log2_scale": self.log2_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state in place. Raises CheckpointError where it is another run's."""
        try:
            self.net.load_state_dict(state["net"])
            self.averages.load_state_dict(state["averages"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.sampler.load_state_dict(state["sampler"])
            self.skipped, self.in_a_row = (count.clone() for count in state["counts"].to(self.skipped.device))
            if self.log2_scale is not None:
                self.log2_scale = state["log2_scale"].to(self.skipped.device)
            self.step = int(state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a state of this training: {first_line(error)}") from error
