"""The engine: networks folded in their precision, and a cache of the prepared steps last used."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from admfast import host
from admfast.engine.capture import capture
from admfast.engine.compiled import check_compiler, compile_step
from admfast.engine.numerics import choose_threads, on_threads
from admfast.engine.options import EngineOptions
from admfast.engine.precision import FP32, Policy
from admfast.engine.replay import Replay
from admfast.engine.step import Batch, PreparedStep, StepKey, check_fold_generations, fold_generations
from admfast.engine.threads import convolution_operations, threads_for
from admfast.models.fold import FOLD_LOCK, FoldableNet
from admfast.models.hooks import FusedBlock
from admfast.ops.dispatch import impl_setting

LOG = logging.getLogger("admfast")


class Engine:
    """A network and its classifier, with prepared steps for them; several threads may use it at once.

    net, classifier, weak: with frozen parameters; weak is a second network, for autoguidance. policy:
    precision of all. options: settings of prepared steps.
    """

    def __init__(
        self,
        net: FoldableNet,
        classifier: FoldableNet | None = None,
        policy: Policy = FP32,
        options: EngineOptions | None = None,
        weak: FoldableNet | None = None,
    ):
        self.net, self.classifier, self.weak, self.policy = net, classifier, weak, policy
        self.options = options or EngineOptions()
        self._fold_options = policy.fold_options(self.options.fold)
        if self.options.compile:
            check_compiler(self.device)
        # By kind of step and by the implementations named by `impl` and by ADMFAST_IMPL.
        self._steps: OrderedDict[tuple[StepKey, tuple[str | None, str]], PreparedStep] = OrderedDict()
        self.last_run: Any = None  # the sampling loop's record of the last finished run
        # Held while networks are folded and steps are made or handed out, but never while rows run: a user's
        # function called by a row may use another engine, or wait for a thread that uses this one.
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the engine without its prepared steps."""
        return Engine, (self.net, self.classifier, self.policy, self.options, self.weak)

    def _networks(self) -> list[FoldableNet]:
        return [net for net in (self.net, self.classifier, self.weak) if net is not None]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def ensure_folded(self, guided: bool = True) -> None:
        """Fold the networks if the options require it, unless their forms are up to date.

        New values are written into the same memory. If they don't fit there, the forms are made again and the
        cached steps that used the old ones are dropped.
        guided: fold the classifier and the weak network too; otherwise they are not changed.
        """
        policy = self.policy
        with self.lock, FOLD_LOCK:
            dtypes = [
                (self.net, policy.torso),
                (self.classifier, policy.classifier),
                (self.weak, policy.torso),
            ]
            for net, dtype in dtypes if guided else dtypes[:1]:
                if net is None:
                    continue
                if self.options.fold is None and net.fold_options is None and not self.options.prepared:
                    continue  # no form and no prepared step depends on the network
                dtype_now = next(net.parameters()).dtype
                # Policies apply to float32 networks only; float64 networks keep their dtype. If `fold` is
                # None, this unfolds the network, which another pipeline may have folded.
                if dtype_now == torch.float64:
                    net.ensure_folded(self.options.fold, dtype_now)
                else:
                    net.ensure_folded(self._fold_options, dtype)
            self._drop_outdated()

    def _drop_outdated(self) -> None:
        """Drop the cached steps whose networks have changed since."""
        for key, step in list(self._steps.items()):
            if step.generations != fold_generations(step.networks):
                del self._steps[key]

    def guard_model(self, model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `model` run on a step's number of threads; it raises once a network is folded again."""
        networks = self._networks()
        generations = fold_generations(networks)

        def guarded(x: Tensor, t: Tensor) -> Tensor:
            check_fold_generations(networks, generations)
            if x.device.type != "cpu":
                return model(x, t)
            with on_threads(self._threads(x.shape)):
                return model(x, t)

        return guarded

    def _threads(self, shape: Sequence[int]) -> int:
        """Return the number of CPU threads for a row by Python functions; shape: (N, C, *spatial)."""
        default = threads_for(convolution_operations(self.net.config, shape), host.usable_cpus())  # type: ignore[arg-type]
        return choose_threads(self.options.threads, default)

    def describe(self, step: PreparedStep | None, shape: Sequence[int], guided: bool) -> dict[str, Any]:
        """Return how a batch ran, and why it was not captured or compiled.

        step: the prepared step, or None for Python functions. shape: (N, C, *spatial) of the images. guided:
        whether any guidance by networks took part. The result keeps neither step nor network alive.
        """
        options, on_cpu = self.options, self.device.type == "cpu"
        networks = {"net": self.net} | ({"classifier": self.classifier, "weak": self.weak} if guided else {})
        default = "its step is compiled" if options.graph else "EngineOptions(graph=False)"
        not_replayed_reason = _failure_reason(step, "captured", default)
        if step is not None and step.replays:
            reasons = (step.replays[kind].reason_not_replayed for kind in set(step.kinds))
            not_replayed_reason = next(filter(None, reasons), None)
        if step is not None:
            threads = step.threads
        else:
            threads = self._threads(shape) if on_cpu else None
        return {
            "not_replayed_reason": not_replayed_reason,
            "not_compiled_reason": _failure_reason(step, "compiled") if options.compile else "not requested",
            # Without prepared steps, `ensure_folded` may not look for hooks, so `is_altered` may be stale.
            "layerwise_networks": tuple(
                name
                for name, net in networks.items()
                if net is not None and (net.is_altered or not options.prepared) and _runs_layer_by_layer(net)
            ),
            "folded": self.net.is_folded,
            "threads": threads,
        }

    @contextlib.contextmanager
    def borrow_step(self, batch: Batch) -> Iterator[PreparedStep]:
        """Yield a prepared step for a batch, for exclusive use within the block; make one if none is free.

        Call `ensure_folded` before.
        """
        step_key = StepKey.of(batch, self.net.config.num_classes is not None)  # type: ignore[union-attr]
        cache_key = step_key, (batch.impl, impl_setting())
        with self.lock:
            step = self._steps.pop(cache_key, None)
            if step is None:
                self._evict_steps(self.options.max_cached_steps - 1)
                step = self._make_step(step_key, batch.impl)
        try:
            yield step
        finally:
            step.mark_last_use()
            with self.lock:
                # Another thread or a callback may have used the engine and left a step with this key.
                self._steps.pop(cache_key, None)
                self._steps[cache_key] = step
                self._evict_steps(self.options.max_cached_steps)

    def step(self, batch: Batch) -> PreparedStep:
        """Return the prepared step for a batch; only for a caller that is the engine's only user."""
        with self.borrow_step(batch) as step:
            return step

    def _evict_steps(self, max_count: int) -> None:
        """Drop the oldest steps until one is left, or at most `max_count` that fit `max_cached_bytes`."""
        while len(self._steps) > max_count or (
            len(self._steps) > 1
            and sum(s.memory for s in self._steps.values()) > self.options.max_cached_bytes
        ):
            self._steps.popitem(last=False)

    def _make_step(self, key: StepKey, impl: str | None) -> PreparedStep:
        reserved_before = self._reserved_memory()
        step = PreparedStep(self.net, self.classifier, self.weak, key, self.device, self.options, impl)
        use_cuda_graph = self.options.graph and self.device.type == "cuda"
        if any(net.has_hooks for net in self._networks()):
            # A compiled, captured or replayed step would call a hook once, when it is made, and never again.
            step.refusal = "a network has a hook"
            if self.options.compile or use_cuda_graph:
                LOG.warning("steps are not compiled or captured: %s", step.refusal)
        else:
            if self.options.compile:
                # Compiled code is valid for one number of threads.
                with on_threads(step.threads) if step.threads else contextlib.nullcontext():
                    compile_step(step, self.options.compile_cache)
            if use_cuda_graph:
                capture(step)
            if self.options.graph and self.device.type == "cpu" and not self.options.compile:
                step.replays = {kind: Replay(body) for kind, body in step.bodies.items()}
                step.bodies = dict(step.replays)
        # A graph keeps all memory that its operations use.
        step.memory = max(step.nbytes, self._reserved_memory() - reserved_before)
        step.mark_last_use()
        return step

    def _reserved_memory(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def release(self) -> None:
        """Drop all prepared steps and free their memory."""
        with self.lock:
            self._steps.clear()
        if self.device.type == "cuda":
            gc.collect()  # a step whose capture failed is part of a reference cycle, as is a caught error
            torch.cuda.empty_cache()


def _failure_reason(step: PreparedStep | None, attribute: str, default: str | None = None) -> str | None:
    """Return why a step was not captured or compiled; None if it was."""
    if step is None:
        return "no step was prepared"
    return None if getattr(step, attribute) else step.refusal or default


def _runs_layer_by_layer(net: FoldableNet) -> bool:
    """Tell whether any block runs layer by layer, not fused."""
    return any(
        isinstance(module, FusedBlock) and module.must_run_layer_by_layer() for module in net.modules()
    )


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error means that a device or the host ran out of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(
        error
    )
