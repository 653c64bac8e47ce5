"""Read the weights of the FID Inception: the PyTorch port's state dict, or TensorFlow's graph file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from admfast.checkpoints.reading import read_weights
from admfast.errors import CheckpointError
from admfast.evaluation.graph_def import read_constants
from admfast.evaluation.inception_layers import graph_names
from admfast.files.paths import user_path

# What looks like the file in a folder of weights, the first that exists.
FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
    "classify_image_graph_def.pb",
)


def find_inception_weights(path: str | PathLike[str]) -> Path:
    """Return the file of Inception's weights: `path`, or a file of a known name in the folder `path`.

    Raises CheckpointError if there is none; the error says how to get it.
    """
    found = user_path("weights", path)
    if found.is_file():
        return found
    for name in FILES:
        if (found / name).is_file():
            return found / name
    names = " or ".join(FILES)
    raise CheckpointError(
        f"weights={str(path)!r}: no weights of Inception ({names}) there; `admfast fetch inception` "
        "downloads them (96 MB) into models/, or name a file that you have"
    )


def read_inception_weights(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of the FID port: NAME.conv.weight, NAME.bn.weight, ..., fc.weight, fc.bias.

    path: the PyTorch port's .pth (no code in it is run), a .safetensors with its keys, or TensorFlow's .pb.
    Raises CheckpointError for a file that is damaged or of another network.
    """
    file = Path(path)
    if file.suffix.lower() != ".pb":
        return read_weights(file).tensors
    constants = {name: torch.from_numpy(array) for name, array in read_constants(file).items()}
    try:
        tensors = {"fc.weight": constants["softmax/weights"].T.contiguous()}
        for name, place in graph_names().items():
            weight = constants[f"{place}/conv2d_params"]  # [height, width, inputs, outputs]
            tensors[f"{name}.conv.weight"] = weight.permute(3, 2, 0, 1).contiguous()
            for part, graph_part in _NORM_PARTS.items():
                tensors[f"{name}.bn.{part}"] = constants[f"{place}/batchnorm/{graph_part}"]
    except KeyError as error:
        raise CheckpointError(f"{file}: not the graph of Inception 2015-12-05: it lacks {error}") from None
    except RuntimeError:
        raise CheckpointError(f"{file}: not the graph of Inception 2015-12-05: other shapes") from None
    return tensors


_NORM_PARTS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
