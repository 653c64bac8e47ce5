"""The folder of a sampling run, in which a finished set of samples replaces an older one."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from admfast.errors import OutputError
from admfast.files.atomic import check_folder_path, make_folder, output_error, write_bytes
from admfast.interrupts import delay_signals

# Names of the files that a run writes, by folder. No other file is ever removed or replaced.
OWN = {
    "images": re.compile(r"\d{6,}(_class\d+)?_seed\d+\.png"),
    "intermediates": re.compile(r"\d{6,}(_upsampler)?_step\d{4,}\.png"),
    ".": re.compile(r"grid\.png|samples_\d+x\d+x\d+x\d+\.npz"),
}
UNFINISHED = "unfinished"


class RunFolder:
    """Folder of a run, which writes to `place`: `out` or, if that holds older samples, a new folder in it.

    Older samples are not touched until `publish` replaces them with the complete new set. If a run ends
    before that, its finished images stay in `place`: OUT/unfinished, or OUT/unfinished-2 and so on if that
    folder exists already.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = self.place = out
        self._overwrite = overwrite
        self._old: list[Path] = []

    def check(self) -> None:
        """Raise OutputError if `out` is a file, or holds samples that must not be overwritten."""
        check_folder_path(self.out)
        self._old = samples_in(self.out)
        if self._old and not self._overwrite:
            held = f"holds {len(self._old)} files of samples already"
            raise OutputError(f"out={str(self.out)!r}: {held}; give another folder, or --overwrite")

    def open(self) -> None:
        """Make the folder. Raises OutputError if it can't be written, or as `check`."""
        self.check()
        if self._old:
            self.place = self._free_place()
        make_folder(self.place / "images")
        write_bytes(self.place / ".writable", b"")
        (self.place / ".writable").unlink()

    def publish(self) -> None:
        """Replace the older set with the finished one. Signals wait until this is done."""
        if self.place == self.out:
            return
        with delay_signals():
            new = set()
            for path in samples_in(self.place):
                target = self.out / path.relative_to(self.place)
                make_folder(target.parent)
                try:
                    os.replace(path, target)
                except OSError as error:
                    raise output_error(target, error) from None
                new.add(target)
            for path in self._old:
                if path not in new:
                    path.unlink(missing_ok=True)
            self.close()
            self.place = self.out

    def close(self) -> None:
        """Remove the folders that are still empty."""
        for folder in (self.place / "images", self.place / "intermediates", self.place):
            # rmdir fails where the folder isn't empty or was never made.
            with contextlib.suppress(OSError):
                if folder != self.out:
                    folder.rmdir()

    def _free_place(self) -> Path:
        """Return the first name for unfinished samples that is free."""
        place, number = self.out / UNFINISHED, 1
        while place.exists():
            number += 1
            place = self.out / f"{UNFINISHED}-{number}"
        return place


def samples_in(out: Path) -> list[Path]:
    """Return the files of a run in a folder, recognized by their names."""
    found = []
    for name, own in OWN.items():
        folder = out / name
        if folder.is_dir():
            found += [path for path in sorted(folder.iterdir()) if own.fullmatch(path.name)]
    return found
