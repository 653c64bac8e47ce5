"""Open the images that a network is trained on: a set of files, or the digits."""

from __future__ import annotations

from os import PathLike

from admfast.errors import invalid
from admfast.files.sources import Source, open_source
from admfast.training.digit_images import digits_source


def training_source(data: str | PathLike[str], classes: str = "auto") -> Source:
    """Return the source for a folder, a .zip, a .npz (see `open_source`), or the word "digits".

    Args:
        data: path, or "digits".
        classes: where the classes of a folder or zip come from, see `open_source`.

    Raises:
        InvalidArgument: if there are no images, or they don't have such classes.
        AdmfastError: if the data can't be read, or scikit-learn, which contains the digits, is not installed.
    """
    return open_source(data, classes, named_sources={"digits": digits_source})


def check_classes(source: Source, classes: int | None) -> None:
    """Raise InvalidArgument unless a source has as many classes as a network.

    classes: number of the network's classes; None accepts any source.
    """
    if classes is None:
        return
    if source.labels is None:
        raise invalid("data", f"{len(source)} images without classes", f"the network has {classes} classes")
    if len(source.class_names) != classes:
        names = ", ".join(source.class_names[:3]) + (", ..." if len(source.class_names) > 3 else "")
        found = f"{len(source.class_names)} classes ({names})"
        raise invalid("data", found, f"as many classes as the network, which has {classes}")
