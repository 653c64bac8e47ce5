"""The processes of a run: one, or those that torchrun began.

torchrun says by environment variables who is who; one process starts nothing and exchanges nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from admfast.errors import AdmfastError, first_line, invalid
from admfast.sampling.load import chosen_device


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes: rank: its number. size: how many there are. device: where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Tell whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int, name: str = "batch_size") -> range:
        """Return this process's part of `count` samples. Raises InvalidArgument where they don't divide."""
        if count % self.size:
            raise invalid(name, count, f"a multiple of the {self.size} processes")
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the network that averages its gradients over the processes; itself for one process."""
        if self.size == 1:
            return net
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Frozen parameters are none of its business; all others get a gradient at every step.
        return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes of a tensor on this device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """Return the [N, ...] tensors of all processes, equally long, joined in their order."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def most(self, number: int) -> int:
        """Return the largest of the processes' numbers; through the host, so that no GPU waits."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device="cpu")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


def without_sync(net: nn.Module, skip: bool) -> AbstractContextManager[Any]:
    """Return the context in which a wrapped network leaves gradients where they are, if `skip`."""
    if skip and isinstance(net, nn.parallel.DistributedDataParallel):
        return net.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun began, if any, and leave them at the end.

    device: "cpu", "cuda" or "cuda:N"; None takes the GPU of this process (LOCAL_RANK) where there is one.
    Raises: AdmfastError where the others can't be reached; InvalidArgument; Unavailable without such a GPU.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local = _number("LOCAL_RANK", 0)
    chosen = chosen_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local if size > 1 else torch.cuda.current_device())
    if size == 1:
        yield World(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # Numbers of the host go by gloo in both.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_store(size), rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise AdmfastError(f"the {size} processes don't find each other: {first_line(error)}") from error
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()


def _store(size: int) -> dist.Store:
    """Return where the processes find each other, with a place of its own for every restart of torchrun.

    On one node torchrun keeps its store when it begins workers again: they would call those that died. With
    several nodes it makes a new one, and the nodes may have counted other numbers of restarts.
    """
    store, _, _ = next(iter(dist.rendezvous("env://")))
    if _number("LOCAL_WORLD_SIZE", 0) != size:
        return store
    return dist.PrefixStore(f"restart-{_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _number(name: str, default: int) -> int:
    """Return a whole number of the environment."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise invalid(name, text, "a whole number, as torchrun sets it")
    return int(text)
