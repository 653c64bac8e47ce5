"""Tests of the manifest of a run: the seed and class of each image, and differences to other requests."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from admfast.errors import InvalidArgument, OutputError
from admfast.runs.manifest import (
    MANIFEST,
    RANDOM,
    Manifest,
    create_manifest,
    draw,
    format_ranges,
    parse_ranges,
    random_labels,
    read_manifest,
    require_manifest,
)

ONE = Manifest(
    files="npz", images=10, seeds="5-14", classes="balanced", num_classes=4, shape=[8, 8, 1], batch_size=2,
    shard_size=4, model="small", weights={"net": "aa"}, precision="float32", process={"net": {"steps": 100}},
    request={"steps": 3, "solver": "ddim:eta=0.0"},
)  # fmt: skip


@pytest.mark.parametrize(
    "numbers, text",
    [
        ([3], "3"),
        ([0, 1, 2, 3], "0-3"),
        ([0, 1, 5, 7, 8], "0-1,5,7-8"),
        ([4, 3, 3], "4,3,3"),
        ([2**64 - 2, 2**64 - 1], f"{2**64 - 2}-{2**64 - 1}"),
        (range(7, 50_007), "7-50006"),
        (range(6, 7), "6"),
    ],
    ids=str,
)
def test_seeds_as_text_and_back(numbers, text):
    assert format_ranges(numbers) == text
    assert [seed for part in parse_ranges(text) for seed in part] == list(numbers)


def test_a_million_seeds_of_a_list_are_found_by_index():
    manifest = replace(ONE, images=12, seeds="5-7,3,100-107")
    seeds = [5, 6, 7, 3, *range(100, 108)]
    for start in range(13):
        for stop in range(start, 13):
            assert manifest.seeds_of(range(start, stop)).tolist() == seeds[start:stop]
    highest = replace(ONE, images=2, seeds=f"{2**64 - 2}-{2**64 - 1}")
    assert highest.seeds_of(range(2)).tolist() == [2**64 - 2, 2**64 - 1]


def test_shards_and_batches_hold_every_image_once():
    for images, shard, batch in [(10, 4, 2), (8, 4, 4), (1, 4, 2), (11, 6, 3), (5, 100, 2)]:
        manifest = replace(ONE, images=images, seeds=f"0-{images - 1}", shard_size=shard, batch_size=batch)
        batches = [part for i in range(manifest.shards) for part in manifest.batches(i)]
        assert [i for part in batches for i in part] == list(range(images))
        assert all(len(part) <= batch for part in batches)


def test_classes_are_balanced_random_or_listed():
    images = range(2, 9)  # seeds 7..13
    assert ONE.labels_of(images).tolist() == [3, 0, 1, 2, 3, 0, 1]
    assert replace(ONE, classes=[2, 0, 1]).labels_of(images).tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert replace(ONE, classes=None, num_classes=None).labels_of(images) is None
    drawn = replace(ONE, classes=RANDOM).labels_of(images)
    assert drawn.dtype == np.int64 and drawn.tolist() == random_labels(range(7, 14), 4)


def test_random_classes_are_a_function_of_the_seed_and_near_uniform():
    # The first values of SplitMix64 from state 0, in its author's file
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert draw(states).tolist() == first
    labels = random_labels(range(50_000), 10)
    assert random_labels(range(40_000, 40_010), 10) == labels[40_000:40_010]
    counts = np.bincount(labels, minlength=10)
    # A binomial count of 50,000 tries; 6 standard deviations are 402.
    assert abs(counts - 5000).max() < 6 * (50_000 * 0.1 * 0.9) ** 0.5
    assert counts.max() > counts.min(), "random classes are not balanced"


def test_a_manifest_goes_through_its_file(tmp_path):
    assert read_manifest(tmp_path) is None
    assert create_manifest(tmp_path, ONE) == ONE == read_manifest(tmp_path)
    other = replace(ONE, images=11, seeds="0-10", request={**ONE.request, "steps": 4})
    assert create_manifest(tmp_path, other) == ONE, "the first request is kept"
    assert ONE.differences(other) == ["images=10, not 11", "seeds='5-14', not '0-10'", "steps=3, not 4"]
    with pytest.raises(OutputError, match=r"\(images=10, not 11; seeds=.*; steps=3, not 4\); go away$"):
        ONE.check_same(other, tmp_path, "go away")
    ONE.check_same(ONE, tmp_path, "")
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_many_differences_are_cut():
    other = replace(ONE, images=1, seeds="0", classes=None, num_classes=None, batch_size=1, shard_size=1)
    with pytest.raises(OutputError, match="and 2 more") as caught:
        ONE.check_same(other, ".", "")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("links", [True, False])
def test_of_requests_at_the_same_moment_one_is_first(tmp_path, monkeypatch, links):
    """Also on a file system without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        start, found = threading.Barrier(4), []

        def create(images, folder=folder, start=start, found=found):
            start.wait()
            try:
                found.append(create_manifest(folder, replace(ONE, images=images)).images)
            except OutputError:
                assert not links, "a manifest was read before it was whole"

        threads = [threading.Thread(target=create, args=(i + 1,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {read_manifest(folder).images}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a readable manifest"),
        ("[]", "format None"),
        ('{"format": 9}', "format 9; this version of admfast reads 1"),
        ('{"format": 1}', "not a readable manifest"),
        (replace(ONE, batch_size=0).to_json(), "not a readable manifest"),
        (replace(ONE, images=-3).to_json(), "not a readable manifest"),
        ("\xff", "not a readable manifest"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, text, message):
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_manifest_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InvalidArgument, match="^run=.*admfast sample"):
            require_manifest(folder)


def test_nothing_in_a_manifest_is_the_name_of_a_folder(tmp_path):
    create_manifest(tmp_path, ONE)
    assert "/" not in (tmp_path / MANIFEST).read_text()
    assert json.loads((tmp_path / MANIFEST).read_text())["seeds"] == "5-14"
