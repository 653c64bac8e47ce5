"""`python -m tests.training.recorded_run FOLDER train ...`: run the command and save all its batches."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from admfast.cli.main import main
from admfast.training import loop


def file_of(folder: Path, rank: int) -> Path:
    """Return the path of the file with the batches of a process."""
    return folder / f"batches-{rank}.pt"


def record(arguments: list[str]) -> int:
    """Run the command, write the batches of its steps, and return its status."""
    batches, make_batch = list[dict[str, Any]](), loop.make_batch

    def make_and_record(*arguments: Any) -> Any:
        batches.append(dataclasses.asdict(batch := make_batch(*arguments)))
        return batch

    loop.make_batch = make_and_record
    status = main(arguments[1:])
    torch.save(batches, file_of(Path(arguments[0]), int(os.environ.get("RANK", "0"))))
    return status


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
