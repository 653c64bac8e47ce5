"""Settings of the engine; each of its optimisations can be switched off alone."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from admfast.checks import switches, whole
from admfast.errors import invalid
from admfast.models.fold import FoldOptions


@dataclass(frozen=True)
class EngineOptions:
    """Settings that say how steps are prepared.

    Attributes:
        prepared: run rows on static buffers with the embeddings of many rows made at once; without, every
            row calls the networks as `predict` does.
        fold: what layers derive from their parameters; None: nothing.
        rows_at_a_time: rows whose embeddings are made in one product.
        graph: on CUDA, capture the step and replay it.
        branches: on CUDA, the classifier's gradient beside the network on a stream of its own.
        compile: torch.compile around the step.
        compile_cache: folder in which torch keeps what it compiles, for other processes; None: where it does
            anyway (`TORCHINDUCTOR_CACHE_DIR`). It holds code: take it only from where you trust.
        kept_steps, kept_bytes: how many prepared steps are kept (of other batch sizes, shapes or kinds of
            table), and how much memory beside the networks' they may hold; the latest is always kept. Of
            threads that sample at the same time each has a step of its own.
        threads: on a CPU, threads that a step computes on; None: by the size of its work, or as
            OMP_NUM_THREADS or `torch.set_num_threads` says (see `admfast.engine.threads`).
    """

    prepared: bool = True
    fold: FoldOptions | None = FoldOptions()
    rows_at_a_time: int = 25
    graph: bool = True
    branches: bool = True
    compile: bool = False
    compile_cache: str | PathLike[str] | None = None
    kept_steps: int = 4
    kept_bytes: int = 8 << 30
    threads: int | None = None

    def __post_init__(self) -> None:
        switches(self, "prepared", "graph", "branches", "compile")
        if self.fold is not None and not isinstance(self.fold, FoldOptions):
            raise invalid("fold", self.fold, "FoldOptions, or None for nothing")
        if self.compile_cache is not None and not isinstance(self.compile_cache, str | PathLike):
            raise invalid("compile_cache", self.compile_cache, "the path of a folder, or None")
        for name, least in (("rows_at_a_time", 1), ("kept_steps", 1), ("kept_bytes", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if self.threads is not None:
            object.__setattr__(self, "threads", whole("threads", self.threads, 1))
        if self.compile_cache is not None and not self.compile:
            raise invalid("compile_cache", str(self.compile_cache), "only together with compile=True")


PLAIN = EngineOptions(prepared=False, fold=None, graph=False, branches=False)
