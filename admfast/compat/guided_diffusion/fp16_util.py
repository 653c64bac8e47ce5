"""Training with float16 convolutions, under the names of the published `fp16_util.py`.

The optimiser works on float32 copies of the parameters, called master parameters: one vector [n] of all
parameters with at most one dimension (biases, norms) and one matrix [1, n] of all others, as in the published
state files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from admfast.compat.guided_diffusion import logger
from admfast.models.body import convert_convolutions
from admfast.training.learner import INITIAL_LOG2_LOSS_SCALE, SCALE_GROWTH

INITIAL_LOG_LOSS_SCALE = INITIAL_LOG2_LOSS_SCALE["diffusion"]
Group = tuple[list[tuple[str, nn.Parameter]], Any]


def convert_module_to_f16(module: nn.Module) -> None:
    """Round a convolution's parameters to float16 in place; leave any other module as it is."""
    _convert(module, torch.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Make a convolution's parameters float32 in place; leave any other module as it is."""
    _convert(module, torch.float32)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convert_convolutions([module], dtype)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, nn.Parameter]]) -> list[Group]:
    """Return the parameters in two groups, vectors and all others, with the shape of their float32 copies."""
    named = list(named_model_params)
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    others = [(name, p) for name, p in named if p.ndim > 1]
    return [(vectors, (-1,)), (others, (1, -1))]


def make_master_params(param_groups_and_shapes: Sequence[Group]) -> list[nn.Parameter]:
    """Return one master parameter for each group: its parameters as float32, one after another."""
    return [
        nn.Parameter(torch.cat([p.detach().float().flatten() for _, p in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def unflatten_master_params(param_group: Sequence[tuple[str, Tensor]], master_param: Tensor) -> list[Tensor]:
    """Return views of a group's master parameter in the shapes of its parameters."""
    parts = master_param.view(-1).split([p.numel() for _, p in param_group])
    return [part.view(p.shape) for part, (_, p) in zip(parts, param_group, strict=True)]


def model_grads_to_master_grads(
    param_groups_and_shapes: Sequence[Group], master_params: Sequence[nn.Parameter]
) -> None:
    """Set the master parameters' gradients from those of the parameters; a missing one counts as zero."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for _, p in group]
        master.grad = torch.cat([g.float().flatten() for g in gradients]).view(shape)


@torch.no_grad()
def master_params_to_model_params(
    param_groups_and_shapes: Sequence[Group], master_params: Sequence[Tensor]
) -> None:
    """Copy the values of the master parameters to the parameters."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, parameter), value in zip(group, unflatten_master_params(group, master), strict=True):
            parameter.copy_(value)


def check_overflow(value: float) -> bool:
    """Tell whether a number is infinite or NaN."""
    return not abs(value) < float("inf")


class MixedPrecisionTrainer:
    """Backward passes and steps of a network, in float32 or with float16 convolutions and a loss scale.

    use_fp16: convert the network's torso to float16 and use a loss scale. fp16_scale_growth: added to log2 of
    the scale at each step; a step with a gradient that isn't finite is skipped and halves the scale.
    initial_lg_loss_scale: log2 of the first scale.

    Attributes: master_params, the parameters for the optimiser; lg_loss_scale, log2 of the scale.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = SCALE_GROWTH,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model, self.use_fp16, self.fp16_scale_growth = model, use_fp16, fp16_scale_growth
        self.model_params = list(model.parameters())
        self.master_params: list[Any] = self.model_params
        self.param_groups_and_shapes: list[Group] | None = None
        self.lg_loss_scale = initial_lg_loss_scale
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()  # type: ignore[operator]

    def zero_grad(self) -> None:
        """Drop the parameters' gradients."""
        for parameter in self.model_params:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, times the loss scale if `use_fp16`, to the parameters' gradients."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()  # type: ignore[no-untyped-call]

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Make a step of the optimiser; return False if it was skipped, as a gradient was not finite."""
        if not self.use_fp16:
            self._log_norms(*self._norms())
            opt.step()
            return True
        assert self.param_groups_and_shapes is not None
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        scale = 2**self.lg_loss_scale
        model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        grad_norm, param_norm = self._norms(scale)
        is_finite = not check_overflow(grad_norm)
        if is_finite:
            self._log_norms(grad_norm, param_norm)
            for parameter in self.master_params:
                parameter.grad.mul_(1.0 / scale)
            opt.step()
            master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
            self.lg_loss_scale += self.fp16_scale_growth
        else:
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
        for parameter in self.master_params:
            parameter.grad = None
        return is_finite

    def _norms(self, scale: float = 1.0) -> tuple[float, float]:
        """Return the norm of all gradients, divided by `scale`, and the norm of all parameters."""
        values = [parameter.detach() for parameter in self.master_params]
        gradients = [parameter.grad for parameter in self.master_params if parameter.grad is not None]
        grad_norm, param_norm = (nn.utils.get_total_norm(tensors) for tensors in (gradients, values))
        return float(grad_norm) / scale, float(param_norm)

    def _log_norms(self, grad_norm: float, param_norm: float) -> None:
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean("param_norm", param_norm)

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the network's state dict with the values of master parameters in place of its own."""
        state: dict[str, Tensor] = self.model.state_dict()
        if self.param_groups_and_shapes is None:
            names = [name for name, _ in self.model.named_parameters()]
            return state | dict(zip(names, master_params, strict=True))
        for master, (group, _) in zip(master_params, self.param_groups_and_shapes, strict=True):
            names = [name for name, _ in group]
            state |= dict(zip(names, unflatten_master_params(group, master), strict=True))
        return state

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Any]:
        """Return the parameters of a state dict as master parameters."""
        named = [(name, state_dict[name]) for name, _ in self.model.named_parameters()]
        if self.param_groups_and_shapes is None:
            return [value for _, value in named]
        return list(make_master_params(get_param_groups_and_shapes(named)))  # type: ignore[arg-type]
