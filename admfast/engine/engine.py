"""Networks ready to run steps: folded in their precision, with the prepared steps that were used lately."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

from admfast.engine.capture import capture
from admfast.engine.compiled import compile_step
from admfast.engine.options import EngineOptions
from admfast.engine.precision import FP32, Policy
from admfast.engine.step import PreparedStep, StepKey
from admfast.models.fold import FoldableNet

LOG = logging.getLogger("admfast")


class Engine:
    """A network and its classifier as steps are made of them.

    net, classifier: frozen. policy: what they compute in. options: what is prepared.
    """

    def __init__(
        self,
        net: FoldableNet,
        classifier: FoldableNet | None = None,
        policy: Policy = FP32,
        options: EngineOptions | None = None,
    ):
        self.net, self.classifier, self.policy = net, classifier, policy
        self.options = options or EngineOptions()
        self._steps: OrderedDict[tuple[StepKey, str | None], PreparedStep] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def ready(self) -> None:
        """Fold the networks where that is wanted and not done, or where their parameters have changed.

        New values go into the same memory; what can't is made anew, and prepared steps of it are dropped.
        """
        if self.options.fold is None:
            return
        for net, dtype in ((self.net, self.policy.torso), (self.classifier, self.policy.classifier)):
            if net is None:
                continue
            before, own = net.fold_generation, next(net.parameters()).dtype
            # A policy rounds float32; a network of float64 stays one.
            net.ensure_folded(self.options.fold, own if own == torch.float64 else dtype)
            if net.fold_generation != before:
                self.release()

    def step(self, key: StepKey, impl: str | None = None) -> PreparedStep:
        """The prepared step for a key, made where it isn't kept; the one used longest ago makes room."""
        found = self._steps.pop((key, impl), None)
        if found is None:
            while len(self._steps) >= self.options.kept_steps:
                self._steps.popitem(last=False)
            found = self._made(key, impl)
        self._steps[key, impl] = found
        return found

    def _made(self, key: StepKey, impl: str | None) -> PreparedStep:
        made = PreparedStep(self.net, self.classifier, key, self.device, self.options, impl)
        if self.options.compile:
            compile_step(made)
        if self.options.graph and self.device.type == "cuda":
            capture(made)
        return made

    def release(self) -> None:
        """Drop all prepared steps and their memory."""
        self._steps.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(
        error
    )
