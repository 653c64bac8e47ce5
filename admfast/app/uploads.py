"""Turn an uploaded file into the image that a network takes, and say what was changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from admfast.errors import InvalidArgument, invalid
from admfast.files.images import MODES, open_image, turn_upright

MOST_BYTES = 10_000_000
MOST_PIXELS = 20_000_000
LONGEST_NAME = 60


@dataclass(frozen=True)
class Upload:
    """An image as a network takes it: uint8 [side, side, C], and a note on what was changed for it."""

    image: NDArray[np.uint8]
    note: str


def convert_upload(name: str, content: bytes, side: int, channels: int, inverted: bool = False) -> Upload:
    """Cut the middle square out of an image file, resize it to `side`, and convert its channels.

    What is transparent is blended on white, unless the network takes an alpha channel.

    name: of the file, only for texts. inverted: exchange dark and light.
    Raises: InvalidArgument for a file that is too large, damaged, or not an image.
    """
    name = name[-LONGEST_NAME:]
    if len(content) > MOST_BYTES:
        raise invalid("upload", name, f"a file of at most {MOST_BYTES / 1e6:g} MB")
    try:
        picture = open_image(name, content, MOST_PIXELS)
    except InvalidArgument as error:
        raise InvalidArgument(f"upload{str(error).removeprefix('path')}") from None
    picture = turn_upright(picture)
    changes = [f"{picture.width}x{picture.height} pixels"]
    if channels != 4 and picture.has_transparency_data:
        picture, had_any = _blended_on_white(picture)
        changes += ["blended on white"] * had_any
    if picture.width != picture.height:
        changes.append("cut to the middle square")
    if picture.size != (side, side):
        changes.append(f"resized to {side}x{side}")
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    if picture.mode != MODES[channels]:
        changes.append({1: "made grey", 3: "made RGB", 4: "given an alpha channel"}[channels])
        picture = picture.convert(MODES[channels])
    array = np.asarray(picture).reshape(side, side, channels)
    if inverted:
        changes.append("inverted")
        array = 255 - array
    return Upload(array, ", ".join(changes))


def _blended_on_white(picture: Image.Image) -> tuple[Image.Image, bool]:
    """Return an RGB image with white behind it, and whether any of it was transparent."""
    picture = picture.convert("RGBA")
    blended = Image.new("RGB", picture.size, "white")
    blended.paste(picture, mask=picture)
    return blended, picture.getchannel("A").getextrema() != (255, 255)
