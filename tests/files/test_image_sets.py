"""Tests of sets of images from archives, folders and single files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from admfast.errors import InvalidArgument
from admfast.files.image_sets import read_image_set
from admfast.files.images import write_png
from admfast.files.npz import write_streamed

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)


def test_the_same_images_from_every_place(tmp_path):
    write_streamed(tmp_path / "a.npz", IMAGES.shape, IMAGES, [2, 1, 0])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for i, image in enumerate(IMAGES):
        write_png(folder / f"{i}.png", image)
    assert np.array_equal(read_image_set(tmp_path / "a.npz").images, IMAGES)
    assert read_image_set(tmp_path / "a.npz").labels.tolist() == [2, 1, 0]
    assert np.array_equal(read_image_set(folder).images, IMAGES) and read_image_set(folder).labels is None
    assert np.array_equal(read_image_set(folder / "1.png").images, IMAGES[1:2])


def test_gif_images_are_read_as_the_published_loader_reads_them(tmp_path):
    """An animated GIF gives its first image; palette colours become RGB."""
    picture = Image.fromarray(IMAGES[0])
    picture.save(tmp_path / "a.gif", save_all=True, append_images=[picture.rotate(180)])
    picture.quantize(8).save(tmp_path / "b.GIF", transparency=0)
    picture.save(tmp_path / "c.png")
    found = read_image_set(tmp_path, 3).images
    for image, name in zip(found, ("a.gif", "b.GIF", "c.png"), strict=True):
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_what_is_no_set_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="a folder with image files"):
        read_image_set(tmp_path)
    write_png(tmp_path / "a.png", IMAGES[0])
    write_png(tmp_path / "b.png", IMAGES[0, :2])
    with pytest.raises(
        InvalidArgument, match=r"b.png.*images of one size; this has \(2, 6, 3\), .*a.png has"
    ):
        read_image_set(tmp_path)
    with pytest.raises(InvalidArgument, match="no such file"):
        read_image_set(tmp_path / "gone.png")


def saved_as(folder, mode: str) -> None:
    """Save `IMAGES[0]` as a file of another colour mode."""
    picture, kind = Image.fromarray(IMAGES[0]), "jpg" if mode == "CMYK" else "png"
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        picture.putalpha(100)
    picture.save(folder / f"{mode}.{kind}", **({"transparency": 0} if mode == "P" else {}))


@pytest.mark.parametrize("channels, wanted", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_mode_is_converted_as_the_published_loader_does(tmp_path, channels, wanted):
    for mode in ("1", "CMYK", "L", "LA", "P", "RGB", "RGBA"):
        saved_as(tmp_path, mode)
    found = read_image_set(tmp_path, channels).images
    files = sorted(tmp_path.iterdir())
    assert found.shape == (len(files), 4, 6, channels)
    for image, file in zip(found, files, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(file).convert(wanted)).reshape(image.shape))
    if channels == 3:
        assert np.array_equal(found[-1], IMAGES[0]), "alpha should be dropped, not blended"


def test_what_would_be_clipped_or_turned_is_refused(tmp_path):
    write_png(tmp_path / "a.png", IMAGES[0])
    deep = Image.fromarray(IMAGES[0, ..., 0].astype(np.uint16) * 256)
    deep.save(tmp_path / "deep.png")
    with pytest.raises(InvalidArgument, match="deep.png.*8 bits a channel"):
        read_image_set(tmp_path, 3)
    (tmp_path / "deep.png").unlink()
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        Image.fromarray(IMAGES[0]).save(tmp_path / f"b{orientation}.jpg", exif=exif)
    with pytest.raises(InvalidArgument, match="b6.jpg.*orientation"):
        read_image_set(tmp_path, 3)
    (tmp_path / "b6.jpg").unlink()
    assert len(read_image_set(tmp_path, 3).images) == 2


def test_hidden_files_are_left_out_and_folders_below_are_read(tmp_path):
    names = ["b.png", "c/a.png", "c/d.PNG"]
    for name, image in zip(names, IMAGES, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, image)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "._b.png").write_bytes(b"\0")
    (tmp_path / ".hidden").mkdir()
    write_png(tmp_path / ".hidden" / "a.png", IMAGES[0, :2])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    write_png(tmp_path / "__MACOSX" / "b.png", IMAGES[0, :2])
    assert np.array_equal(read_image_set(tmp_path).images, IMAGES)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InvalidArgument, match="gone.png.*no such file"):
        read_image_set(tmp_path)


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    (folder := tmp_path / "folder").mkdir()
    (there := tmp_path / "there").mkdir()
    write_png(folder / "b.png", IMAGES[1])
    write_png(there / "x.png", IMAGES[0])
    (folder / "a").symlink_to(there)
    assert np.array_equal(read_image_set(folder).images, IMAGES[:2])
    (there / "again").symlink_to(folder)
    with pytest.raises(InvalidArgument, match="path=.*again"):
        read_image_set(folder)


def test_an_archive_must_have_the_channels(tmp_path):
    write_streamed(tmp_path / "a.npz", IMAGES.shape, IMAGES)
    assert np.array_equal(read_image_set(tmp_path / "a.npz", 3).images, IMAGES)
    with pytest.raises(InvalidArgument, match="a.npz.*1 channels"):
        read_image_set(tmp_path / "a.npz", 1)
