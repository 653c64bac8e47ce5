"""AdamW and the average of the weights, kept between steps and in files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.ops import adamw_ema_step_


class AdamWEma:
    """The moments that `adamw_ema_step_` needs for `params`, with one average, `averages`.

    Its state is that of torch.optim.AdamW, which reads what this one wrote and the other way round.
    """

    def __init__(self, params: Iterable[nn.Parameter], averages: Iterable[Tensor], weight_decay: float):
        self.params, self.averages = list(params), list(averages)
        self.form = torch.optim.AdamW(self.params, weight_decay=weight_decay)
        self.steps = torch.zeros((), device=self.params[0].device)
        for p in self.params:
            self.form.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.form.zero_grad(set_to_none=True)

    def step(self, lr: float, decay: float) -> None:
        """One step with rate `lr`, then keep the share `decay` of the average.

        A parameter without a gradient stays, and so does its average.
        """
        (group,) = self.form.param_groups
        group["lr"] = lr
        moved = [i for i, p in enumerate(self.params) if p.grad is not None]
        params = [self.params[i] for i in moved]
        adamw_ema_step_(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.form.state[p]["exp_avg"] for p in params],
            [self.form.state[p]["exp_avg_sq"] for p in params],
            [([self.averages[i] for i in moved], decay)],
            self.steps,
            lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of torch.optim.AdamW, which counts the steps of every parameter apart."""
        for p in self.params:
            self.form.state[p]["step"] = self.steps.clone()
        return self.form.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; raises ValueError or KeyError for that of other parameters."""
        self.form.load_state_dict(state)
        for i, p in enumerate(self.params):
            kept = self.form.state[p]
            for name in ("exp_avg", "exp_avg_sq"):
                if kept[name].shape != p.shape:
                    raise ValueError(
                        f"{name} of parameter {i} is {tuple(kept[name].shape)}, not {tuple(p.shape)}"
                    )
        self.steps.copy_(self.form.state[self.params[0]]["step"])
