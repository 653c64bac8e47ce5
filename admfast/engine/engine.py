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
        """The prepared step for a key, made where it isn't kept; those used longest ago make room."""
        found = self._steps.pop((key, impl), None)
        if found is None:
            self._make_room(self.options.kept_steps - 1)
            found = self._made(key, impl)
        self._steps[key, impl] = found
        self._make_room(self.options.kept_steps)
        return found

    def _make_room(self, count: int) -> None:
        """Keep at most `count` steps, within the memory allowed but for the latest."""
        while len(self._steps) > count or (
            len(self._steps) > 1 and sum(s.held for s in self._steps.values()) > self.options.kept_bytes
        ):
            self._steps.popitem(last=False)

    def _made(self, key: StepKey, impl: str | None) -> PreparedStep:
        before = self._reserved()
        made = PreparedStep(self.net, self.classifier, key, self.device, self.options, impl)
        if self.options.compile:
            compile_step(made, self.options.compile_cache)
        if self.options.graph and self.device.type == "cuda":
            capture(made)
        # A graph keeps the memory of everything between its first and its last operation.
        made.held = max(made.nbytes, self._reserved() - before)
        return made

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

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
