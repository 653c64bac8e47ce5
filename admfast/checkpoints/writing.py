"""Write weights as safetensors, as the published plain state dict, or as the files of a folder.

The description (network, diffusion process, training facts) is written next to the file as a `.json` with the
same name, which can be edited by hand. A safetensors header holds a copy, in case the file is passed on
without its `.json`. Readers prefer the `.json`. Both files get temporary names first and are renamed at the
end.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from admfast.checkpoints.differences import compare, network_shapes, shapes_of
from admfast.checkpoints.reading import METADATA_KEY, WEIGHTS_SUFFIXES
from admfast.errors import OutputError, invalid
from admfast.files.atomic import (
    atomic_folder,
    atomic_open,
    atomic_path,
    make_folder,
    output_error,
    write_text,
)
from admfast.files.paths import user_path
from admfast.models.description import Description

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def write_weights(
    path: str | PathLike[str],
    state: Mapping[str, Tensor],
    description: Description | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a state dict to a file atomically.

    Args:
        path: its ending chooses the format: .safetensors, or .pt / .pth (a plain state dict as published).
        state: names to tensors, on any device.
        description: written as JSON next to the file; None writes none, and keeps an existing one.
        dtype: float32, float16 or bfloat16 on disk; None keeps each tensor's own. float16 overflows to
            infinity beyond 65504.

    Raises:
        InvalidArgument: for another ending or dtype, or a description that doesn't fit the weights.
        OutputError: if a file can't be written; existing files are unchanged.
    """
    path = user_path("path", path, WEIGHTS_SUFFIXES)
    if dtype is not None and dtype not in DTYPES:
        raise invalid("dtype", dtype, "float32, float16 or bfloat16")
    if description is not None:
        differences = compare(shapes_of(state), network_shapes(description.network))
        if differences:
            raise invalid(
                "description", description.network.kind, f"the weights differ: {differences.summary()}"
            )
    # Give every tensor a storage of its own; otherwise the whole base of a view would be saved.
    tensors = {key: _prepare_for_file(value, dtype) for key, value in state.items()}
    text = description.to_json() if description is not None else None
    with contextlib.ExitStack() as stack:
        if path.suffix == ".safetensors":
            temporary = stack.enter_context(atomic_path(path))
        else:
            file = stack.enter_context(atomic_open(path))
        if text is not None:
            stack.enter_context(atomic_open(path.with_suffix(".json"))).write(text.encode())
        if path.suffix == ".safetensors":
            _save_safetensors(path, temporary, tensors, {METADATA_KEY: text} if text is not None else None)
        else:
            torch.save(tensors, file)


def write_folder(folder: Path, files: Mapping[str, str | Mapping[str, Tensor]]) -> None:
    """Write texts and safetensors files into a folder, all of them or none.

    folder: see `atomic_folder`. files: path in the folder to text or state dict (names to tensors, on any
    device; dtypes are kept).
    Raises: OutputError.
    """
    with atomic_folder(folder) as directory:
        for name, content in files.items():
            path = directory / name
            make_folder(path.parent)
            if isinstance(content, str):
                write_text(path, content)
                continue
            tensors = {key: _prepare_for_file(value, None) for key, value in content.items()}
            with atomic_path(path) as temporary:
                _save_safetensors(path, temporary, tensors, {"format": "pt"})


def _prepare_for_file(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous CPU tensor with a storage of its own, in the dtype of the file."""
    value = value.detach().to("cpu", dtype or value.dtype).contiguous()
    owns_storage = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if owns_storage else value.clone()


def _save_safetensors(
    path: Path, temporary: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    """Save under the temporary name; turn a SafetensorError, whose text has the errno, into OutputError."""
    try:
        save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            code = int(number[1])
            raise output_error(path, OSError(code, errno.errorcode.get(code, str(error)))) from error
        raise OutputError(f"{path}: not written: {error}") from error
