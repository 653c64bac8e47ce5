"""Floor 1: files on disk: atomic writes; PNG and labelled grids; the published sample archives."""

from admfast.files.atomic import atomic_open, atomic_path, output_error, write_bytes, write_text
from admfast.files.images import labelled_grid, read_image, write_grid, write_png
from admfast.files.npz import (
    Samples,
    iter_array,
    read_arrays,
    read_samples,
    write_arrays,
    write_samples,
    write_streamed,
)
from admfast.files.sets import read_set

__all__ = [
    "Samples",
    "atomic_open",
    "atomic_path",
    "iter_array",
    "labelled_grid",
    "output_error",
    "read_arrays",
    "read_image",
    "read_samples",
    "read_set",
    "write_arrays",
    "write_bytes",
    "write_grid",
    "write_png",
    "write_samples",
    "write_streamed",
    "write_text",
]
