"""Choose the presets, batches, precisions and peers to measure, from the flags and the device."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from admfast.engine.options import EngineOptions
from admfast.engine.precision import policy
from admfast.errors import AdmfastError
from bench.measure import Case, Settings
from bench.sampling import openvino, ours, published
from bench.sampling.compare import Comparison
from bench.sampling.flags import PEERS
from bench.sampling.subject import TINY, Subject, subjects

# Defaults by device. `--all` adds the other presets, on a CPU at batch 1 only.
SYSTEMS = {"cuda": ("imagenet256", "imagenet64"), "cpu": ("digits32", "imagenet64")}
BATCHES = {"cuda": (8, 1), "cpu": (1, 4)}
ALL_BATCHES = {"cuda": (8, 1, 32), "cpu": (1,)}
PRECISIONS = {"cuda": ("auto", "bf16", "fp16"), "cpu": ("fp32", "bf16")}
SECONDS_OF_ALL_ROUNDS = {"cuda": 20.0, "cpu": 150.0}


@dataclass(frozen=True)
class Choice:
    """The presets with batches, in order, our precisions, and the names of the peers to measure.

    path: folder of the published code, "" for none. round_seconds: after which a comparison begins no further
    round; None for the device's default.
    """

    pairs: tuple[tuple[Subject, int], ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    path: str
    round_seconds: float | None = None

    @property
    def compiled(self) -> bool:
        """Tell whether our step is also measured compiled."""
        return "compiled" in self.peers

    def comparisons(self, settings: Settings) -> Iterator[Comparison]:
        """Yield the comparison of every pair, of a guided step if the preset has a classifier."""
        budget = self.round_seconds or SECONDS_OF_ALL_ROUNDS[settings.device.type]
        for subject, batch in self.pairs:
            entries = [ours.entry(name) for name in self.precisions]
            if self.compiled:
                options = EngineOptions(compile=True)
                entries.append(ours.entry(self.precisions[0], options, "admfast, compiled"))
            variants = [variant for name, variant in published.VARIANTS.items() if name in self.peers]
            entries += [published.entry(variant, self.path, settings.device) for variant in variants]
            if subject.also:
                note = {"also": f"also {', '.join(subject.also)}"}
                entries = [replace(entry, note=note) for entry in entries]
            kind = "step" if subject.classifier is None else "guided_step"
            yield Comparison(kind, subject, batch, entries, budget)
            if "openvino" in self.peers:
                yield self._openvino_comparison(subject, batch, budget, settings)

    def _openvino_comparison(
        self, subject: Subject, batch: int, budget: float, settings: Settings
    ) -> Comparison:
        """Return the comparison with OpenVINO, of a step without guidance."""
        entries = [ours.entry(name) for name in self.precisions]
        entries += [published.entry(published.EAGER, self.path, settings.device)] if self.path else []
        entries += [openvino.entry(name) for name in self.precisions if name in openvino.PRECISIONS]
        unguided = replace(subject, classifier=None, guidance=0.0)
        return Comparison("step", unguided, batch, entries, budget)

    def cases(self, settings: Settings) -> Iterator[Case]:
        """Yield the cases of all comparisons."""
        for comparison in self.comparisons(settings):
            yield from comparison.cases()


def choose(arguments: argparse.Namespace, settings: Settings) -> Choice:
    """Return what to measure; raise ValueError for a name or number that is not allowed."""
    kind, known = settings.device.type, subjects()
    batches = _numbers(arguments.batches) or BATCHES[kind]
    names = names_in("systems", arguments.systems, known) or SYSTEMS[kind]
    if settings.quick:
        pairs = [(TINY, 2)]
    elif arguments.systems:
        batches_of_each = ALL_BATCHES[kind] if arguments.all and not arguments.batches else batches
        pairs = [(known[name], batch) for name in names for batch in batches_of_each]
    else:
        pairs = [(known[name], batch) for name in names for batch in batches]
        further = [(subject, batch) for subject in known.values() for batch in ALL_BATCHES[kind]]
        pairs += [pair for pair in further if pair not in pairs] if arguments.all else []
    precisions = precisions_in(arguments.precisions, settings) or PRECISIONS[kind]
    path = arguments.guided_diffusion
    # By default, the peers that are available and need not be compiled for minutes.
    peers = names_in("peers", arguments.peers, PEERS) or (["eager", "channels-last"] if path else [])
    round_seconds = None
    if arguments.all:  # else the first comparisons would leave no time for the steps of large images
        round_seconds = min(SECONDS_OF_ALL_ROUNDS[kind], arguments.budget / (4 * len(pairs)))
    return Choice(tuple(pairs), precisions, tuple(peers), path, round_seconds)


def precisions_in(text: str | None, settings: Settings) -> tuple[str, ...]:
    """Return the precisions of a flag; raise ValueError for one that the device doesn't have."""
    names = tuple(texts_in(text))
    for name in names:
        try:
            policy(name, settings.device)
        except AdmfastError as error:
            raise ValueError(str(error)) from None
    return names


def texts_in(text: str | None) -> list[str]:
    """Return the parts of a comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def names_in(flag: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Return the names of a flag; raise ValueError for an unknown one."""
    names = texts_in(text)
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}={text!r}: no {name}; the names are {', '.join(known)}")
    return names


def _numbers(text: str | None) -> tuple[int, ...]:
    numbers = texts_in(text)
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"batches={text!r}: must be whole numbers of at least 1, separated by commas")
    return tuple(map(int, numbers))
