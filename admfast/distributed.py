"""Connect the processes of a run: a single one, or those that torchrun started.

torchrun gives each process its number in environment variables. A single process makes no process group and
exchanges nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from admfast.checks import integer_in_environment
from admfast.errors import AdmfastError, first_line, invalid
from admfast.host import resolve_device


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes: rank: its number, from 0. size: number of processes. device: device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Tell whether this is the process that writes files and prints messages."""
        return self.rank == 0

    def local_samples(self, count: int, name: str = "batch_size") -> range:
        """Return this process's part of `count` samples. Raises InvalidArgument if `size` doesn't divide it.

        name: argument that the error names.
        """
        if count % self.size:
            raise invalid(name, count, f"a multiple of the {self.size} processes")
        samples_per_process = count // self.size
        return range(self.rank * samples_per_process, (self.rank + 1) * samples_per_process)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes of a tensor on this device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the tensors [N, ...] of all processes, of equal shape, concatenated in order of rank."""
        if self.size == 1:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous())
        return torch.cat(gathered)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest `number` of all processes. It is exchanged on the CPU, so no GPU has to wait."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device="cpu")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


@contextlib.contextmanager
def join_processes(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, if any, and leave them at the end of the block.

    device: "cpu", "cuda" or "cuda:N"; None takes the GPU of this process (LOCAL_RANK) if there is one.
    Raises: AdmfastError if the other processes can't be reached; InvalidArgument; Unavailable if the GPU
    doesn't exist.
    """
    size, rank = integer_in_environment("WORLD_SIZE", 1), integer_in_environment("RANK", 0)
    local_rank = integer_in_environment("LOCAL_RANK", 0)
    own_device = resolve_device(device)
    if own_device.type == "cuda" and own_device.index is None:
        own_device = torch.device("cuda", local_rank if size > 1 else torch.cuda.current_device())
    if size == 1:
        yield World(device=own_device)
        return
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    # In both cases gloo exchanges tensors on the CPU.
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_rendezvous_store(size), rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise AdmfastError(f"the {size} processes don't find each other: {first_line(error)}") from error
    try:
        yield World(rank, size, own_device)
    finally:
        dist.destroy_process_group()


def _rendezvous_store(size: int) -> dist.Store:
    """Return the store where the processes find each other, with a prefix for every restart of torchrun.

    On one node, torchrun keeps its store when it restarts the workers, and they would find the addresses of
    dead ones. With several nodes it makes a new store, and the nodes may have different counts of restarts.
    """
    store, _, _ = next(iter(dist.rendezvous("env://")))
    if integer_in_environment("LOCAL_WORLD_SIZE", 0) != size:
        return store
    return dist.PrefixStore(f"restart-{integer_in_environment('TORCHELASTIC_RESTART_COUNT', 0)}", store)
