"""Tests of the sources of images: files, their order, classes, pixels and errors."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from admfast.errors import AdmfastError, InvalidArgument
from admfast.files.npz import write_streamed
from admfast.files.sources import BrokenImage, Source, open_source

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8)
NAMES = ["a/2/x.png", "a/B.JPG", "a/b.webp", "a-b/y.png", "b/1_2.gif", "b/z.jpeg"]  # "-" sorts before "/"
HIDDEN = ["._b.png", ".hidden/a.png", "a/.DS_Store", "a/notes.txt", "__MACOSX/a/b.png", "b/Thumbs.db"]


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(COLOURS))


def in_folder(place: Path, files: dict[str, bytes]) -> Path:
    place.mkdir(exist_ok=True)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def in_zip(place: Path, files: dict[str, bytes]) -> Path:
    place = place.with_suffix(".zip")
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return place


@pytest.fixture(params=[in_folder, in_zip], ids=["folder", "zip"])
def put(request, tmp_path) -> Callable[..., Path]:
    return lambda files: request.param(tmp_path / "data", files)


def pixels(source: Source, index: int) -> np.ndarray:
    return np.atleast_3d(np.asarray(source.decode(index)))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


# Which files


def test_images_in_all_folders_in_the_order_of_their_names_without_hidden_ones(put):
    place = put(dict.fromkeys([*HIDDEN, *reversed(NAMES)], PNG))
    assert names(open_source(place)) == [f"{place}/{name}" for name in NAMES]


def test_folder_and_zip_have_the_same_images_and_pickles_have_them_too(tmp_path):
    files = {name: encoded(Image.fromarray(COLOURS + i)) for i, name in enumerate(NAMES)}
    folder, packed = open_source(in_folder(tmp_path / "d", files)), open_source(in_zip(tmp_path / "d", files))
    assert (folder.labels, folder.class_names) == (packed.labels, packed.class_names)
    for source in (folder, packed, pickle.loads(pickle.dumps(folder)), pickle.loads(pickle.dumps(packed))):
        for i in range(len(NAMES)):
            assert np.array_equal(pixels(source, i), COLOURS + i)


def test_processes_read_one_zip_at_once(tmp_path):
    """A forked child shares its parent's open file and therefore the position in it."""
    files = {f"{i}.png": encoded(Image.fromarray(COLOURS + i)) for i in range(20)}
    source = open_source(in_zip(tmp_path / "d", files))

    def read() -> None:
        for i in list(range(20)) * 20:
            assert np.array_equal(pixels(source, i), COLOURS + int(Path(source.name(i)).stem))

    children = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for child in children:
        child.start()
    read()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_a_name_that_is_no_text_is_found(tmp_path):
    place = in_folder(tmp_path, {})
    (place / os.fsdecode(b"\xff\xfe.png")).write_bytes(PNG)
    assert np.array_equal(pixels(open_source(place), 0), COLOURS)


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    in_folder(tmp_path / "there", {"x.png": PNG})
    place = in_folder(tmp_path / "data", {"y.png": PNG})
    (place / "link").symlink_to(tmp_path / "there")
    assert len(open_source(place)) == 2
    (place / "again").symlink_to(place)
    with pytest.raises(InvalidArgument, match="data=.*again"):
        open_source(place)
    (place / "again").unlink()
    (place / ".hidden").symlink_to(place / ".hidden")
    assert len(open_source(place)) == 2
    (place / "itself").symlink_to(place / "itself")
    with pytest.raises(AdmfastError, match="itself: not readable"):
        open_source(place)


def test_what_is_not_there_is_an_error_not_a_broken_image(tmp_path):
    place = in_folder(tmp_path, {"x.png": PNG})
    (place / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_source(place)
    with pytest.raises(AdmfastError, match="gone.png") as caught:
        source.decode(0)
    assert not isinstance(caught.value, BrokenImage)
    with pytest.raises(AdmfastError, match="gone.png"):
        source.identity()


def test_a_pipe_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidArgument, match="data="):
        open_source(tmp_path)


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"none"}, {".png": PNG}, {"png": PNG}], ids=str)
def test_a_place_without_images_is_refused(put, files):
    with pytest.raises(InvalidArgument, match="data="):
        open_source(put(files))


def test_a_place_that_is_no_source_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "x.zip").write_bytes(PNG)
    (tmp_path / "x.npz").write_bytes(b"")
    for name in ("x.png", "x.zip", "x.npz", "missing"):
        with pytest.raises(InvalidArgument, match=name):
            open_source(tmp_path / name)


def test_errors_name_the_callers_argument(put, tmp_path):
    arrays = np.zeros((2, 4, 4, 2), np.uint8)
    write_streamed(tmp_path / "x.npz", arrays.shape, arrays)
    (tmp_path / "x.png").write_bytes(PNG)
    place = put({"notes.txt": b"none"})
    files = (tmp_path / name for name in ("x.npz", "x.png", "missing"))
    for path in (place, *files, "https://x.org/x.zip", ""):
        with pytest.raises(InvalidArgument, match="^reference="):
            open_source(path, argument="reference")


def test_a_named_source_is_opened_by_its_name(tmp_path):
    source = open_source(in_folder(tmp_path / "data", {"x.png": PNG}))
    assert open_source("one", named_sources={"one": lambda: source}) is source
    with pytest.raises(InvalidArgument, match=r"""data='two': no such .*file \(or the word "one"\)$"""):
        open_source("two", named_sources={"one": lambda: source})
    with pytest.raises(InvalidArgument, match="data='two': no such folder or file$"):
        open_source("two")


def test_the_identity_is_another_one_when_images_are(put):
    place = put({"a.png": PNG, "b.png": PNG})
    before = open_source(place).identity()
    assert open_source(place).identity() == before
    assert open_source(put({"a.png": PNG + b" ", "b.png": PNG})).identity() != before


# Classes


@pytest.mark.parametrize(
    ("files", "rule", "labels", "class_names"),
    [
        (["b/x.png", "a/y.png", "a/sub/z.png"], "auto", (0, 0, 1), ("a", "b")),
        (["only/x.png", "only/y.png"], "auto", (0, 0), ("only",)),
        (["n2_1.png", "n1_7.png", "n2_0.png"], "auto", (0, 1, 1), ("n1", "n2")),
        (["a/n2_1.png", "n1_7.png"], "auto", (1, 0), ("n1", "n2")),
        (["n2_1.png", "seven.png"], "auto", None, ()),
        (["a/n2_1.png", "b/n2_7.png"], "prefixes", (0, 0), ("n2",)),
        (["10_a.png", "9_b.png"], "prefixes", (0, 1), ("10", "9")),
        (["a/x.png", "b/y.png"], "none", None, ()),
    ],
)
def test_classes(put, files, rule, labels, class_names):
    source = open_source(put(dict.fromkeys(files, PNG)), rule)
    assert (source.labels, source.class_names) == (labels, class_names)


@pytest.mark.parametrize(
    ("rule", "named"), [("folders", "x_1.png"), ("prefixes", "y.png"), ("foldres", "foldres")]
)
def test_classes_that_the_images_dont_have_are_refused(put, rule, named):
    place = put(dict.fromkeys(["x_1.png", "a/y.png"], PNG))
    with pytest.raises(InvalidArgument, match=f"classes=.*{named}"):
        open_source(place, rule)


# npz


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_npz(tmp_path, channels):
    images = RNG.integers(0, 256, (5, 4, 6, channels)).astype(np.uint8)
    write_streamed(tmp_path / "x.npz", images.shape, images, [2, 0, 2, 1, 0])
    source = open_source(tmp_path / "x.npz")
    assert (source.labels, source.class_names) == ((2, 0, 2, 1, 0), ("0", "1", "2"))
    assert all(np.array_equal(pixels(source, i), images[i, ..., :3]) for i in range(5))
    write_streamed(tmp_path / "y.npz", images.shape, images)
    assert open_source(tmp_path / "y.npz").labels is None
    assert open_source(tmp_path / "y.npz").identity() != source.identity()


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((0, 4, 4, 3), None), ((2, 4, 4, 2), None), ((2, 0, 4, 3), None), ((2, 4, 4, 3), [0, -1])],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, shape, labels):
    write_streamed(tmp_path / "x.npz", shape, np.zeros(shape, np.uint8), labels)
    with pytest.raises(InvalidArgument, match="data=.*x.npz"):
        open_source(tmp_path / "x.npz")


# Kinds of files


def as_published(content: bytes) -> np.ndarray:
    """Return the pixels that the published loader reads."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


PICTURE = Image.fromarray(np.asarray(Image.fromarray(COLOURS[:3, :3]).resize((40, 30))))
ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.fromarray(RNG.integers(0, 256, (30, 40)).astype(np.uint8)))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a quarter turn
KINDS = {
    "png": encoded(PICTURE),
    "interlaced": encoded(PICTURE, interlace=1),
    "palette": encoded(PICTURE.quantize(7)),
    "transparent palette": encoded(PICTURE.quantize(7), transparency=2),
    "transparent colour": encoded(PICTURE, transparency=(1, 2, 3)),
    "alpha": encoded(ALPHA),
    "grey": encoded(PICTURE.convert("L")),
    "grey and alpha": encoded(ALPHA.convert("LA")),
    "bilevel": encoded(PICTURE.convert("1")),
    "jpeg": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "turned by exif": encoded(PICTURE, "JPEG", exif=TURNED),
    "grey jpeg": encoded(PICTURE.convert("L"), "JPEG"),
    "cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "gif": encoded(PICTURE, "GIF"),
    "moving gif": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    "webp": encoded(PICTURE, "WEBP"),
    "webp and alpha": encoded(ALPHA, "WEBP", lossless=True),
    "bmp": encoded(PICTURE, "BMP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_the_published_pixels(tmp_path, kind):
    image = pixels(open_source(in_folder(tmp_path, {"x.png": KINDS[kind]})), 0)
    assert image.dtype == np.uint8 and image.shape[2] in (1, 3)
    expected = as_published(KINDS[kind])
    assert expected.shape == (30, 40, 3) and np.array_equal(np.broadcast_to(image, expected.shape), expected)


DEEP = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
BROKEN = {
    "text": b"this is no picture",
    "empty": b"",
    "cut jpeg": KINDS["jpeg"][: len(KINDS["jpeg"]) // 2],
    "cut png": PNG[: len(PNG) // 2],
    "cut header": PNG[:20],
    "16 bits": encoded(DEEP),
    "float": encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    "strip": encoded(Image.new("L", (1, 1200))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(put, kind):
    source = open_source(put({"a/good.png": PNG, "b/bad.png": BROKEN[kind]}))
    with pytest.raises(BrokenImage, match="bad.png") as caught:
        source.decode(1)
    assert "\n" not in str(caught.value)
    assert np.array_equal(pixels(source, 0), COLOURS)


def test_a_damaged_part_of_a_zip_is_a_broken_image(tmp_path):
    place = in_zip(tmp_path / "data", {"a.png": PNG, "b.png": PNG})
    content = place.read_bytes()
    place.write_bytes(content.replace(PNG[50:60], bytes(10), 1))
    source = open_source(place)
    good = [i for i in range(2) if not _is_broken(source, i)]
    assert len(good) == 1


def _is_broken(source: Source, index: int) -> bool:
    try:
        source.decode(index)
    except BrokenImage as error:
        assert source.name(index) in str(error)
        return True
    return False
