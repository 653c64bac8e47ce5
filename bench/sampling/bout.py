"""Contenders on one batch: each passes its trial, then their steps are timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.case import Case, Settings, first_line
from bench.results import Row
from bench.sampling.contender import Contender, Entry, Trial, trial_of
from bench.sampling.subject import Subject, step_flop
from bench.sampling.weights import shared_state
from bench.timing import Spell, in_turns, summarise
from bench.trace import Trace, traced

# Seconds of one sample, and the samples of each contender.
SAMPLE_SECONDS = {"cuda": 0.1, "cpu": 0.4}
ROUNDS = 9
# Steps whose embeddings the engine makes at a time: a sample that comes near holds a whole number of them.
TOGETHER = 25
TRACED_STEPS = 5


@dataclass
class Bout:
    """A group of contenders on the same weights and the same batch, measured in one go when first asked for.

    budget: seconds after which no further round begins; a round takes a sample of each.
    """

    kind: str
    subject: Subject
    batch: int
    entries: Sequence[Entry]
    budget: float = 60.0
    found: dict[tuple[str, str], Row | Exception] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        """A case for each contender."""
        shape = {"system": self.subject.name, "batch": self.batch}
        return [
            Case(
                self.kind,
                entry.dtype,
                entry.name,
                shape,
                self._row_of(entry),
                dict(entry.note),
                measured=lambda: bool(self.found),
            )
            for entry in self.entries
        ]

    def _row_of(self, entry: Entry) -> Callable[[Settings], Row]:
        def measure(settings: Settings) -> Row:
            if not self.found:
                try:
                    self.found = run(self, settings)
                except Exception as error:  # the trial itself: no contender's row can be had
                    one = error.with_traceback(None)
                    self.found = {(other.name, other.dtype): one for other in self.entries}
            found = self.found[entry.name, entry.dtype]
            if isinstance(found, Exception):
                raise found
            return found

        return measure


def run(bout: Bout, settings: Settings) -> dict[tuple[str, str], Row | Exception]:
    """A row for each contender, or what went wrong with it."""
    trial = trial_of(bout.subject, bout.batch, settings.device)
    found: dict[tuple[str, str], Any] = {}
    ready: dict[tuple[str, str], Contender] = {}
    for entry in bout.entries:
        key = entry.name, entry.dtype
        try:
            ready[key], found[key] = _prepared(bout, entry, trial)
        except Exception as error:
            # Without its frames, which hold the contender's memory.
            found[key] = error.with_traceback(None)
        _tidy(settings)
    spells = _spells(ready, bout, settings)
    for key, contender in ready.items():
        found[key] |= times_of(bout, spells[key])
        if settings.cuda:
            host = summarise([spell.host_ms for spell in spells[key]]).ms
            found[key] |= {"host_ms": _short(host)} | _launches(contender)
        else:
            found[key]["cpu_ms"] = _short(summarise([spell.cpu_ms for spell in spells[key]]).ms)
    _compare(found, ready)
    ready.clear()
    _tidy(settings)
    return found


def _prepared(bout: Bout, entry: Entry, trial: Trial) -> tuple[Contender, Row]:
    """A contender that has passed its trial, and the row that this begins."""
    contender = entry.make(bout.subject, trial.inputs)
    cuda = trial.inputs.x.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with contender.running():
        contender.ready()
        error = trial.check(contender.outcome(trial), entry.dtype)
    row: Row = {"rel_err": float(f"{error:.2e}"), "steps": bout.subject.steps} | contender.note()
    if cuda:
        torch.cuda.synchronize()
        # What it allocated itself, and the float32 weights that all share.
        own = torch.cuda.max_memory_allocated() - before + _shared_bytes(bout.subject, trial.inputs.x.device)
        row["peak_mb"] = round(own / 1e6, 1)
    return contender, row


def _shared_bytes(subject: Subject, device: torch.device) -> int:
    configs = [(subject.net, 0)] + ([(subject.classifier, 1)] if subject.classifier else [])
    return sum(v.nbytes for config, seed in configs for v in shared_state(config, seed, device).values())


def _spells(
    ready: dict[tuple[str, str], Contender], bout: Bout, settings: Settings
) -> dict[tuple[str, str], list[Spell]]:
    """Samples of all contenders, in turns."""
    kind = settings.device.type
    takers = {"|".join(key): contender.take for key, contender in ready.items()}
    found = in_turns(
        takers,
        0.005 if settings.quick else SAMPLE_SECONDS[kind],
        2 if settings.quick else ROUNDS,
        together=TOGETHER,
        longest=bout.subject.steps,
        budget=bout.budget,
    )
    return {key: found["|".join(key)] for key in ready}


def times_of(bout: Bout, spells: list[Spell]) -> Row:
    """The fields that follow from the samples: the median sample's time a step, and what it comes to."""
    timing = summarise([spell.ms for spell in spells])
    flop = step_flop(bout.subject) * bout.batch
    return {
        "ms": _short(timing.ms),
        "ms_q20": _short(timing.ms_q20),
        "ms_q80": _short(timing.ms_q80),
        "samples": timing.samples,
        "rounds_ms": [_short(spell.ms) for spell in spells],
        "waited": round(sum(spell.waited for spell in spells) / len(spells), 3),
        "flop": flop,
        "tflops": _short(flop / timing.ms / 1e9),
        "images_per_s": _short(1e3 * bout.batch / (timing.ms * bout.subject.steps)),
    }


def _compare(found: dict[tuple[str, str], Any], ready: dict[tuple[str, str], Contender]) -> None:
    """Give each row how many times faster it is than every other, sample against sample of the same round."""
    for key in ready:
        others = {f"{o[0]} {o[1]}": paired_ratio(found[o], found[key]) for o in ready if o != key}
        found[key]["faster_than"] = {name: _short(ratio) for name, ratio in others.items()}


def paired_ratio(slower: Row, faster: Row) -> float:
    """Median over the rounds of the ratio of two contenders' times."""
    pairs = zip(slower["rounds_ms"], faster["rounds_ms"], strict=True)
    return summarise([a / b for a, b in pairs]).ms


def _launches(contender: Contender) -> Row:
    """What the host launches for a step, and how many kernels run."""

    def some() -> None:
        for i in range(TRACED_STEPS):
            contender.step(i)

    with contender.running():
        contender.begin()
        try:
            trace: Trace = traced(some, contender.device, TRACED_STEPS)
        except RuntimeError as error:  # a host may refuse to be profiled
            return {"trace": first_line(error)}
    return {"launches": round(trace.launches, 1), "kernels": round(trace.kernels, 1)}


def _tidy(settings: Settings) -> None:
    gc.collect()
    if settings.cuda:
        torch.cuda.empty_cache()


def _short(value: float) -> float:
    return float(f"{value:.5g}")
