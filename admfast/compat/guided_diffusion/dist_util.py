"""The process group and weights files, under the names of the published `dist_util.py`; no MPI is needed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from admfast.errors import CheckpointError, first_line
from admfast.files.paths import user_path

__all__ = ["dev", "load_state_dict", "setup_dist", "sync_params"]


def setup_dist() -> None:
    """Initialise the process group of torchrun's processes, or of this process only; later calls do nothing.

    A single process needs a group because programs call collectives and ask for their rank in any case.
    """
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(backend, init_method="env://")
        return
    # A file store: no other process has to connect, and a port may be in use or forbidden.
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend, store=dist.FileStore(str(Path(folder) / "store"), 1), rank=0, world_size=1
        )


def dev() -> torch.device:
    """Return the device of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_state_dict(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Return the contents of a file of torch.save: tensors, numbers, text and containers of them.

    kwargs: for `torch.load`, always with `weights_only=True`, so that no code of the file runs. Raises:
    CheckpointError.
    """
    place = user_path("path", path)
    try:
        return torch.load(place, **{**kwargs, "weights_only": True})
    except FileNotFoundError:
        raise CheckpointError(f"{place}: no such file") from None
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{place}: {first_line(error)}") from error


def sync_params(params: Iterable[Tensor]) -> None:
    """Copy the values of the first process to all processes, in place."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in params:
        with torch.no_grad():
            dist.broadcast(parameter, 0)
