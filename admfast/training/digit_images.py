"""Load the 1,797 handwritten digits of scikit-learn's `load_digits`, enlarged to images of 32x32.

The originals have 8x8 pixels with levels 0..16 (UCI, Alpaydin & Kaynak 1998).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import AdmfastError
from admfast.files.sources import ArraySource

MAX_GREY_LEVEL = 16  # the digits' grey levels are 0 to 16
NUM_CLASSES = 10


def digits_source() -> ArraySource:
    """Return the enlarged digits as grey images of 32x32, levels rounded to 0..255, classes 0..9."""
    digits, labels = load_digits()
    levels = (enlarge(digits) * (255 / MAX_GREY_LEVEL)).round().to(torch.uint8)
    return ArraySource(levels.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy(), "digits", "digits")


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the digits [1797, 1, 8, 8] (float32, levels 0..16) and their classes [1797] (int64).

    Raises AdmfastError if scikit-learn, which contains them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise AdmfastError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = sklearn_digits()
    return torch.from_numpy(data.images).float()[:, None], torch.from_numpy(data.target).long()


def enlarge(digits: Tensor, iterations: int = 20) -> Tensor:
    """Enlarge 8x8 digits to smooth 32x32 images whose 4x4 block means are close to the digits.

    u = up(d), then `iterations` times u = clip(u + up(d - area_mean(u)), 0, 16), with up = bicubic by four.

    Args:
        digits: [N, 1, 8, 8], levels 0..16.

    Returns:
        [N, 1, 32, 32] in 0..16, float32.
    """
    digits = digits.float()
    images = _bicubic(digits)
    for _ in range(iterations):
        images = (images + _bicubic(digits - block_means(images))).clamp(0, MAX_GREY_LEVEL)
    return images


def block_means(images: Tensor) -> Tensor:
    """Return the means over 4x4 blocks: [N, 1, 32, 32] -> [N, 1, 8, 8]."""
    return F.avg_pool2d(images, 4)


def _bicubic(digits: Tensor) -> Tensor:
    """Enlarge [N, 1, 8, 8] to [N, 1, 32, 32] with Pillow's cubic (a = -1/2), which `antialias` selects."""
    return F.interpolate(digits, scale_factor=4, mode="bicubic", align_corners=False, antialias=True)
