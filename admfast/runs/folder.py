"""The folder of a sampling run, in which a finished set of samples replaces an older one."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from admfast.checkpoints.snapshots import RUN_FILE, is_run_folder
from admfast.errors import OutputError
from admfast.files.atomic import check_folder_path, make_folder, output_error, write_bytes, write_text
from admfast.files.image_files import SAMPLE_NAME
from admfast.interrupts import delay_signals
from admfast.runs.manifest import MANIFEST, Manifest, create_manifest, read_manifest

# Names of the files that a run writes, by folder. No other file is ever removed or replaced.
FILE_PATTERNS = {
    "images": SAMPLE_NAME,
    "intermediates": re.compile(r"\d{6,}(_upsampler)?_step\d{4,}\.png"),
    "shards": re.compile(r"shard-\d{6,}\.npz"),
    ".": re.compile(r"grid\.png|samples_\d+x\d+x\d+x\d+\.npz"),
}
UNFINISHED = "unfinished"
_ADVICE = "give another folder, or --overwrite"


class SampleFolder:
    """Folder of samples. A run writes to `write_folder`: `out`, or a folder in `out` if it replaces samples.

    Without `overwrite`, a run goes on with the samples in `out` if they are of the same manifest. With it,
    older samples are not touched until `publish` replaces them with the complete new set. If a run ends
    before that, its finished images stay in `write_folder`: OUT/unfinished, or OUT/unfinished-2 and so on if
    that folder exists already.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = self.write_folder = out
        self._overwrite = overwrite
        self._old_files: list[Path] = []

    def check(self, manifest: Manifest) -> None:
        """Raise OutputError if `out` can't take the samples of this manifest.

        That is so if it is a file, or holds a training run, a run in shards, or samples of another or no
        manifest, unless these are to be overwritten.
        """
        check_no_training_run(self.out)
        self._old_files, found = find_sample_files(self.out), read_manifest(self.out)
        if found is not None:
            self._check_kind(found, manifest)
        if self._old_files and not self._overwrite:
            if found is None:
                contents = f"holds {len(self._old_files)} files of samples already"
                raise OutputError(f"out={str(self.out)!r}: {contents}; {_ADVICE}")
            found.check_same(manifest, self.out, _ADVICE)

    def _check_kind(self, found: Manifest, manifest: Manifest) -> None:
        """Raise OutputError if the manifest in the folder is of a run in shards."""
        if found.files != manifest.files:
            contents = f"holds a run of {found.images} images in shards"
            raise OutputError(f"out={str(self.out)!r}: {contents}; give another folder")

    def open(self, manifest: Manifest) -> None:
        """Make the folder with its manifest. Raises OutputError if it can't be written, or as `check`."""
        self.check(manifest)
        if self._old_files and self._overwrite:
            self.write_folder = self._unused_folder()
        make_folder(self.write_folder / "images")
        write_bytes(self.write_folder / ".writable", b"")
        (self.write_folder / ".writable").unlink()
        try:
            # A run in shards may have begun here since the check.
            found = create_manifest(self.write_folder, manifest)
            self._check_kind(found, manifest)
            if found.differences(manifest):  # it has no images
                write_text(self.write_folder / MANIFEST, manifest.to_json())
        except OutputError:
            self.close(keeps_manifest=True)
            raise

    def publish(self) -> None:
        """Replace the older set with the finished one. Signals wait until this is done."""
        if self.write_folder == self.out:
            return
        with delay_signals():
            new_files = set()
            # Until the new manifest is there, the folder has none: no run goes on with a mixture.
            (self.out / MANIFEST).unlink(missing_ok=True)
            for path in [*find_sample_files(self.write_folder), self.write_folder / MANIFEST]:
                target = self.out / path.relative_to(self.write_folder)
                make_folder(target.parent)
                try:
                    os.replace(path, target)
                except OSError as error:
                    raise output_error(target, error) from None
                new_files.add(target)
            for path in self._old_files:
                if path not in new_files:
                    path.unlink(missing_ok=True)
            self.close(keeps_manifest=True)
            self.write_folder = self.out

    def remove_older_archives(self, newest: Path) -> None:
        """Remove the npz of fewer images that an interrupted run of this folder left."""
        for path in find_sample_files(self.write_folder):
            if path.suffix == ".npz" and path.parent == newest.parent and path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self, keeps_manifest: bool) -> None:
        """Remove the folders that are still empty, and before that the manifest unless it is kept."""
        if not keeps_manifest:
            with contextlib.suppress(OSError):
                (self.write_folder / MANIFEST).unlink(missing_ok=True)
        for folder in (self.write_folder / "images", self.write_folder / "intermediates", self.write_folder):
            # rmdir fails where the folder isn't empty or was never made.
            with contextlib.suppress(OSError):
                if folder != self.out:
                    folder.rmdir()

    def _unused_folder(self) -> Path:
        """Return the first name for unfinished samples that is free."""
        folder, number = self.out / UNFINISHED, 1
        while folder.exists():
            number += 1
            folder = self.out / f"{UNFINISHED}-{number}"
        return folder


def check_no_training_run(out: Path) -> None:
    """Raise OutputError if `out` is a file, or holds a training run."""
    check_folder_path(out)
    if is_run_folder(out):
        contents = f"holds a training run ({RUN_FILE}, from `admfast train`)"
        raise OutputError(f"out={str(out)!r}: {contents}; give another folder for the samples")


def find_sample_files(out: Path) -> list[Path]:
    """Return the files of a run in a folder, recognized by their names."""
    paths = []
    for name, pattern in FILE_PATTERNS.items():
        folder = out / name
        if folder.is_dir():
            paths += [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]
    return paths
