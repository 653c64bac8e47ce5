"""Which presets, batches, precisions and peers a run measures, from its flags and its device."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.errors import AdmfastError
from bench.case import Case, Settings
from bench.sampling import diffusers_unet, ours, published
from bench.sampling.bout import Bout
from bench.sampling.contender import Entry
from bench.sampling.subject import TINY, Subject, subjects

# By device: presets, batches, precisions; `--all` adds the other presets, on a CPU at batch 1.
SYSTEMS = {"cuda": ("imagenet256", "imagenet64"), "cpu": ("digits32", "imagenet64")}
BATCHES = {"cuda": (8, 1), "cpu": (1, 4)}
ALL_BATCHES = {"cuda": (8, 1, 32), "cpu": (1,)}
PRECISIONS = {"cuda": ("auto", "bf16", "fp16"), "cpu": ("fp32", "bf16")}
BOUT_SECONDS = {"cuda": 20.0, "cpu": 150.0}
PEERS = (*published.FORMS, "diffusers")
PUBLISHED_PATH = "GUIDED_DIFFUSION"
PUBLISHED_FOLDER = Path(".guided-diffusion")


@dataclass(frozen=True)
class Choice:
    """What is measured: (preset, batch) in order, our precisions, peers by name.

    path: of the published code, "" for none. compiled: ours compiled is measured too.
    """

    pairs: tuple[tuple[Subject, int], ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    path: str
    compiled: bool = False

    def bouts(self, settings: Settings) -> Iterator[Bout]:
        """The comparisons: guided steps, and steps without guidance where that is all a peer has."""
        budget = BOUT_SECONDS[settings.device.type]
        for subject, batch in self.pairs:
            also = f"also {', '.join(subject.also)}" if subject.also else ""
            mine = [ours.entry(name) for name in self.precisions]
            if self.compiled:
                mine.append(ours.entry(mine[0].dtype, EngineOptions(compile=True), "admfast, compiled"))
            theirs = self._published(settings.device)
            other = [diffusers_unet.entry(settings.device)] if "diffusers" in self.peers else []
            if subject.classifier is None:
                yield Bout("step", subject, batch, _noted(mine + theirs + other, also), budget)
                continue
            yield Bout("guided_step", subject, batch, _noted(mine + theirs, also), budget)
            if other:
                few = mine[:1] + theirs[:1] + other
                yield Bout("step", subject.alone(), batch, _noted(few, also), budget)

    def cases(self, settings: Settings) -> Iterator[Case]:
        """The rows of all comparisons."""
        for bout in self.bouts(settings):
            yield from bout.cases()

    def _published(self, device: torch.device) -> list[Entry]:
        forms = [form for name, form in published.FORMS.items() if name in self.peers]
        return [published.entry(form, self.path, device) for form in forms]


def _noted(entries: Sequence[Entry], also: str) -> list[Entry]:
    note = {"also": also} if also else {}
    return [replace(entry, note=note) for entry in entries]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `choose` reads."""
    parser.add_argument(
        "--systems", metavar="NAME,...", help=f"presets, of {','.join(subjects())} (default: by device)"
    )
    parser.add_argument(
        "--batches", metavar="N,...", help="images at a time (default: 1,8 on a GPU, 1,4 on a CPU)"
    )
    parser.add_argument("--precisions", metavar="NAME,...", help="of our steps (default: by device)")
    parser.add_argument(
        "--all", action="store_true", help="every preset; batches 1,8,32 on a GPU, also batch 1 on a CPU"
    )
    parser.add_argument(
        "--guided-diffusion",
        metavar="PATH",
        default=published_path(),
        help="a checkout of the published code, to compare with "
        f"(default: {PUBLISHED_PATH}, or {PUBLISHED_FOLDER} where it exists)",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,...",
        help=f"of {','.join(PEERS)} (default: those that are there, but compiled)",
    )


def published_path() -> str:
    """Where the published code is, as far as nobody says it: "" for nowhere."""
    return os.environ.get(PUBLISHED_PATH) or (str(PUBLISHED_FOLDER) if PUBLISHED_FOLDER.is_dir() else "")


def choose(arguments: argparse.Namespace, settings: Settings) -> Choice:
    """What a run measures; raises ValueError for a name or number that is not allowed."""
    kind = settings.device.type
    batches = _numbers(arguments.batches) or BATCHES[kind]
    known = subjects()
    if settings.quick:
        pairs = [(TINY, 2)]
    elif arguments.systems:
        names = _names("systems", arguments.systems, known)
        every = ALL_BATCHES[kind] if arguments.all and not arguments.batches else batches
        pairs = [(known[name], batch) for name in names for batch in every]
    else:
        pairs = [(known[name], batch) for name in SYSTEMS[kind] for batch in batches]
        if arguments.all:
            more = [(subject, batch) for subject in known.values() for batch in ALL_BATCHES[kind]]
            pairs += [pair for pair in more if pair not in pairs]
    precisions = tuple(_texts(arguments.precisions)) or PRECISIONS[kind]
    for name in precisions:
        try:
            policy(name, settings.device)
        except AdmfastError as error:
            raise ValueError(str(error)) from None
    path = arguments.guided_diffusion
    peers = _names("peers", arguments.peers, PEERS) if arguments.peers else present(path)
    return Choice(tuple(pairs), precisions, tuple(peers), path, "compiled" in peers)


def present(path: str) -> list[str]:
    """The peers that are there and need no minutes of compilation."""
    found = ["eager", "channels-last"] if path else []
    return found + (["diffusers"] if importlib.util.find_spec("diffusers") else [])


def _texts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _names(flag: str, text: str, known: Sequence[str] | dict[str, Subject]) -> list[str]:
    names = _texts(text)
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}={text!r}: no {name}; there are {', '.join(known)}")
    return names


def _numbers(text: str | None) -> tuple[int, ...]:
    numbers = _texts(text)
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"batches={text!r}: whole numbers from 1 on, with commas")
    return tuple(map(int, numbers))
