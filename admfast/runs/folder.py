"""The folder of a run: what it holds, and how a finished set of samples takes an older one's place."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from admfast.errors import OutputError
from admfast.files.atomic import check_place, make_folder, output_error, write_bytes
from admfast.interrupts import held_back

# The names that a run gives its files, by folder; nothing else is ever removed or replaced.
OWN = {
    "images": re.compile(r"\d{6,}(_class\d+)?_seed\d+\.png"),
    "intermediates": re.compile(r"\d{6,}(_upsampler)?_step\d{4,}\.png"),
    ".": re.compile(r"grid\.png|samples_\d+x\d+x\d+x\d+\.npz"),
}
UNFINISHED = "unfinished"


class RunFolder:
    """Write a run to `place`: `out` itself or, while it holds older samples, a new folder in it.

    Older samples stay as they are until `publish` replaces them by the new set, which is complete by then. A
    run that ends before leaves what it has finished in `place`: OUT/unfinished, or unfinished-2 and so on
    where such a folder is there already.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = self.place = out
        self._overwrite = overwrite
        self._old: list[Path] = []

    def check(self) -> None:
        """Raise OutputError for a file, and for a folder of samples that may not be replaced."""
        check_place(self.out)
        self._old = samples_in(self.out)
        if self._old and not self._overwrite:
            held = f"holds {len(self._old)} files of samples already"
            raise OutputError(f"out={str(self.out)!r}: {held}; give another folder, or --overwrite")

    def open(self) -> None:
        """Make the folder. Raises OutputError for one that can't be written, or as `check`."""
        self.check()
        if self._old:
            self.place = self._free_place()
        make_folder(self.place / "images")
        write_bytes(self.place / ".writable", b"")
        (self.place / ".writable").unlink()

    def publish(self) -> None:
        """Put the finished set in the place of the older one. Not stopped halfway by a signal."""
        if self.place == self.out:
            return
        with held_back():
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
        """Remove the folders that stayed empty."""
        for folder in (self.place / "images", self.place / "intermediates", self.place):
            # Left alone where something is in it, or it was never made.
            with contextlib.suppress(OSError):
                if folder != self.out:
                    folder.rmdir()

    def _free_place(self) -> Path:
        """The first name for unfinished samples that nothing has yet."""
        place, number = self.out / UNFINISHED, 1
        while place.exists():
            number += 1
            place = self.out / f"{UNFINISHED}-{number}"
        return place


def samples_in(out: Path) -> list[Path]:
    """The files of a run in a folder, told by their names."""
    found = []
    for name, own in OWN.items():
        folder = out / name
        if folder.is_dir():
            found += [path for path in sorted(folder.iterdir()) if own.fullmatch(path.name)]
    return found
