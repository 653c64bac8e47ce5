"""Choose the presets, batches, precisions and peers of a run, from its flags and its device."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.errors import AdmfastError
from bench.measure import Case, Settings
from bench.sampling import ours, published
from bench.sampling.compare import Comparison
from bench.sampling.flags import PEERS
from bench.sampling.subject import TINY, Subject, subjects

# By device: presets, batches, precisions; `--all` adds the other presets, on a CPU at batch 1.
SYSTEMS = {"cuda": ("imagenet256", "imagenet64"), "cpu": ("digits32", "imagenet64")}
BATCHES = {"cuda": (8, 1), "cpu": (1, 4)}
ALL_BATCHES = {"cuda": (8, 1, 32), "cpu": (1,)}
PRECISIONS = {"cuda": ("auto", "bf16", "fp16"), "cpu": ("fp32", "bf16")}
ROUNDS_SECONDS = {"cuda": 20.0, "cpu": 150.0}


@dataclass(frozen=True)
class Choice:
    """The choice of a run: (preset, batch) in order, our precisions, peers by name.

    path: of the published code, "" for none.
    """

    pairs: tuple[tuple[Subject, int], ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    path: str

    @property
    def compiled(self) -> bool:
        """Tell whether our step is measured compiled too."""
        return "compiled" in self.peers

    def comparisons(self, settings: Settings) -> Iterator[Comparison]:
        """Return the steps of every pair, guided where the preset is."""
        budget = ROUNDS_SECONDS[settings.device.type]
        for subject, batch in self.pairs:
            entries = [ours.entry(name) for name in self.precisions]
            if self.compiled:
                options = EngineOptions(compile=True)
                entries.append(ours.entry(self.precisions[0], options, "admfast, compiled"))
            forms = [form for name, form in published.FORMS.items() if name in self.peers]
            entries += [published.entry(form, self.path, settings.device) for form in forms]
            if subject.also:
                note = {"also": f"also {', '.join(subject.also)}"}
                entries = [replace(entry, note=note) for entry in entries]
            kind = "step" if subject.classifier is None else "guided_step"
            yield Comparison(kind, subject, batch, entries, budget)

    def cases(self, settings: Settings) -> Iterator[Case]:
        """The rows of all comparisons."""
        for one in self.comparisons(settings):
            yield from one.cases()


def choose(arguments: argparse.Namespace, settings: Settings) -> Choice:
    """Return what a run measures; raises ValueError for a name or number that is not allowed."""
    kind, known = settings.device.type, subjects()
    batches = _numbers(arguments.batches) or BATCHES[kind]
    names = names_in("systems", arguments.systems, known) or SYSTEMS[kind]
    if settings.quick:
        pairs = [(TINY, 2)]
    elif arguments.systems:
        every = ALL_BATCHES[kind] if arguments.all and not arguments.batches else batches
        pairs = [(known[name], batch) for name in names for batch in every]
    else:
        pairs = [(known[name], batch) for name in names for batch in batches]
        more = [(subject, batch) for subject in known.values() for batch in ALL_BATCHES[kind]]
        pairs += [pair for pair in more if pair not in pairs] if arguments.all else []
    precisions = precisions_in(arguments.precisions, settings) or PRECISIONS[kind]
    path = arguments.guided_diffusion
    # Those that are there and need no minutes of compilation.
    peers = names_in("peers", arguments.peers, PEERS) or (["eager", "channels-last"] if path else [])
    return Choice(tuple(pairs), precisions, tuple(peers), path)


def precisions_in(text: str | None, settings: Settings) -> tuple[str, ...]:
    """Return the precisions of a flag; raises ValueError for one that the device hasn't."""
    names = tuple(texts_in(text))
    for name in names:
        try:
            policy(name, settings.device)
        except AdmfastError as error:
            raise ValueError(str(error)) from None
    return names


def texts_in(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def names_in(flag: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Return the names of a flag; raises ValueError for one that isn't known."""
    names = texts_in(text)
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}={text!r}: no {name}; the names are {', '.join(known)}")
    return names


def _numbers(text: str | None) -> tuple[int, ...]:
    numbers = texts_in(text)
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"batches={text!r}: whole numbers from 1 on, with commas")
    return tuple(map(int, numbers))
