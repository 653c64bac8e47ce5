"""Tests of sets of images: kinds of input, batches and parts, and what is refused."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from admfast.errors import AdmfastError, InvalidArgument
from admfast.evaluation import ArrayImages, open_images
from admfast.files.images import write_png

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(11) % 3


def write_folder(folder, images=IMAGES):
    folder.mkdir()
    for i, image in enumerate(images):
        write_png(folder / f"{LABELS[i]}_{i:02d}.png", image)
    return folder


def make(kind, tmp_path):
    path = tmp_path / f"set.{kind}"
    if kind == "array":
        return ArrayImages(IMAGES, LABELS)
    if kind == "npz":
        np.savez(path, arr_0=IMAGES, arr_1=LABELS)
    elif kind == "compressed.npz":
        np.savez_compressed(path, arr_0=IMAGES, arr_1=LABELS)
    elif kind == "fortran.npz":
        np.savez(path, arr_0=np.asfortranarray(IMAGES), arr_1=LABELS)
    elif kind == "folder":
        write_folder(path)
    else:
        folder = write_folder(tmp_path / "files")
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, f"inner/{file.name}")
    return open_images(path)


@pytest.mark.parametrize("kind", ["array", "npz", "compressed.npz", "fortran.npz", "folder", "zip"])
def test_every_kind_gives_the_same_images_in_any_part(kind, tmp_path):
    images = make(kind, tmp_path)
    assert len(images) == 11 and tuple(images.shape) == (8, 6, 3)
    order = np.lexsort((np.arange(11), LABELS)) if kind in ("folder", "zip") else np.arange(11)
    for first, stop in ((0, 11), (0, 4), (3, 9), (10, 11), (5, 5)):
        batches = list(images.batches(first, stop, 4))
        assert all(len(batch) == 4 for batch in batches[:-1])
        found = np.concatenate(batches) if batches else IMAGES[:0]
        assert np.array_equal(found, IMAGES[order][first:stop])
    if kind != "zip":  # whose classes are the one folder
        assert np.array_equal(images.labels, LABELS[order])


def test_a_batch_of_an_archive_holds_no_more_than_itself(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=IMAGES)
    monkeypatch.setattr(np, "load", None)  # it would read the whole array
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    sizes = []
    read = zipfile.ZipExtFile.read

    def recording(self, n=-1):
        sizes.append(n)
        return read(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", recording)
    from admfast.files.npz import iter_array

    assert len(list(iter_array(path, 2))) == 6
    assert max(sizes) < IMAGES.nbytes / 4 and min(sizes) >= 0


def test_grey_files_have_one_channel(tmp_path):
    assert open_images(write_folder(tmp_path / "grey", IMAGES[..., 0])).shape == (8, 6, 1)


def test_a_grey_file_among_coloured_ones_becomes_coloured(tmp_path):
    folder = write_folder(tmp_path / "both")
    write_png(folder / "0_00.png", IMAGES[0])
    write_png(folder / "2_99.png", IMAGES[1][..., 0])
    found = np.concatenate(list(open_images(folder).batches(0, 12, 5)))
    assert np.array_equal(found[-1], IMAGES[1][..., :1].repeat(3, axis=2))


def test_images_of_mixed_sizes_name_the_odd_one(tmp_path):
    folder = write_folder(tmp_path / "mixed")
    write_png(folder / "2_99.png", IMAGES[0][:5])
    with pytest.raises(InvalidArgument, match="^samples=.*2_99.png.*one size"):
        list(open_images(folder).batches(0, 12, 4))


def savez(path, **arrays):
    np.savez(path, **arrays)
    return path


BAD = {
    "no arr_0": lambda p: savez(p / "a.npz", images=IMAGES),
    "floats": lambda p: savez(p / "a.npz", arr_0=IMAGES / 255),
    "one image": lambda p: savez(p / "a.npz", arr_0=IMAGES[0]),
    "empty": lambda p: savez(p / "a.npz", arr_0=IMAGES[:0]),
    "pickled": lambda p: savez(p / "a.npz", arr_0=np.array([None, "x"], dtype=object)),
    "too few classes": lambda p: savez(p / "a.npz", arr_0=IMAGES, arr_1=LABELS[:5]),
    "missing": lambda p: p / "gone.npz",
    "not an npz": lambda p: (p / "a.npz").write_text("text") and p / "a.npz",
    "no images": lambda p: (p / "folder").mkdir() or p / "folder",
    "no folder": lambda p: p / "gone",
}


@pytest.mark.parametrize("write", BAD.values(), ids=BAD)
def test_what_is_no_set_of_images(write, tmp_path):
    with pytest.raises(InvalidArgument, match="^reference") as error:
        open_images(write(tmp_path), "reference")
    assert "\n" not in str(error.value)


def test_a_file_that_ends_early_names_itself(tmp_path):
    folder = write_folder(tmp_path / "damaged")
    (folder / "1_04.png").write_bytes((folder / "1_04.png").read_bytes()[:60])
    with pytest.raises(AdmfastError, match="1_04.png"):
        list(open_images(folder).batches(0, 11, 4))


CLASS_NAMES = {
    "of this program": (
        ["000000_class3_seed0.png", "000001_class7_seed1.png", "000002_class3_seed2.png"], [3, 7, 3], True
    ),
    "without classes": (["000000_seed5.png", "000001_seed6.png"], None, True),
    "numbers of folders": (["10/a.png", "2/a.png", "3/a.png", "3/b.png"], [10, 2, 3, 3], True),
    "names of folders": (["cat/a.png", "cat/b.png", "dog/a.png"], [0, 0, 1], False),
    "a prefix of all": (["img_1.png", "img_2.png"], None, True),
    "one class": (["207/a.png", "207/b.png"], [207, 207], True),
}  # fmt: skip


@pytest.mark.parametrize(("names", "labels", "are_numbers"), CLASS_NAMES.values(), ids=CLASS_NAMES)
def test_the_classes_of_files(names, labels, are_numbers, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, np.zeros((4, 4, 1), np.uint8))
    found = open_images(tmp_path)
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert found.labels_are_numbers is are_numbers


def test_a_grey_image_before_coloured_ones_is_named(tmp_path):
    for name, channels in (("a", 1), ("b", 3)):
        write_png(tmp_path / f"{name}.png", np.zeros((4, 4, channels), np.uint8))
    with pytest.raises(InvalidArgument, match="b.png.*grey"):
        list(open_images(tmp_path).batches(0, 2, 2))


def test_jpeg_files_are_noticed(tmp_path):
    from PIL import Image

    folder = tmp_path / "jpeg"
    folder.mkdir()
    Image.fromarray(IMAGES[0]).save(folder / "a.jpg")
    assert open_images(folder).is_jpeg
    assert not open_images(write_folder(tmp_path / "png")).is_jpeg
