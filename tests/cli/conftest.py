"""Shared weights files for the tests of the command line."""

from pathlib import Path

import pytest

from tests.small import classifier, unet, upsampler, write


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a folder with a class-conditional model, a classifier, and a model without classes."""
    folder = tmp_path_factory.mktemp("weights")
    write(folder / "faces.safetensors", unet())
    write(folder / "guide.safetensors", classifier(1))
    write(folder / "free.safetensors", unet(num_classes=None))
    write(folder / "up.safetensors", upsampler())
    return folder
