"""Settings of the engine; each optimisation can be switched off separately."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from admfast.checks import store_booleans, whole_number
from admfast.errors import invalid
from admfast.models.fold import FoldOptions


@dataclass(frozen=True)
class EngineOptions:
    """Settings for preparing steps.

    Attributes:
        prepared: run rows on static buffers, with the embeddings of many rows computed at once; otherwise
            every row calls the networks as `predict` does.
        fold: options for the forms that layers derive from their parameters; None: derive nothing.
        rows_at_a_time: number of rows whose embeddings are computed by one product.
        graph: on CUDA, capture the step as a CUDA graph and replay it; on a CPU, record its operations and
            repeat them without Python.
        branches: on CUDA, compute the classifier's gradient on a second stream, at the same time as the
            network; no effect with `compile`.
        compile: compile the step by torch.compile.
        compile_cache: folder for torch's compiled code, which later processes reuse; None: torch's default
            folder (`TORCHINDUCTOR_CACHE_DIR`). It contains code that is executed: use only a trusted folder.
        max_cached_steps, max_cached_bytes: number of prepared steps to cache (for different batch sizes,
            shapes or kinds of table), and bytes of memory that they may hold in addition to the networks'.
            The latest is always cached. Each of several threads that sample at the same time has its own.
        threads: number of threads of a step on a CPU; None: OMP_NUM_THREADS or `torch.set_num_threads` if
            set, else chosen by the size of the step's work (see `admfast.engine.threads`).
    """

    prepared: bool = True
    fold: FoldOptions | None = FoldOptions()
    rows_at_a_time: int = 25
    graph: bool = True
    branches: bool = True
    compile: bool = False
    compile_cache: str | PathLike[str] | None = None
    max_cached_steps: int = 4
    max_cached_bytes: int = 8 << 30
    threads: int | None = None

    def __post_init__(self) -> None:
        store_booleans(self, "prepared", "graph", "branches", "compile")
        if self.fold is not None and not isinstance(self.fold, FoldOptions):
            raise invalid("fold", self.fold, "FoldOptions, or None for nothing")
        if self.compile_cache is not None and not isinstance(self.compile_cache, str | PathLike):
            raise invalid("compile_cache", self.compile_cache, "the path of a folder, or None")
        for name, minimum in (("rows_at_a_time", 1), ("max_cached_steps", 1), ("max_cached_bytes", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), minimum))
        if self.threads is not None:
            object.__setattr__(self, "threads", whole_number("threads", self.threads, 1))
        if self.compile_cache is not None and not self.compile:
            raise invalid("compile_cache", str(self.compile_cache), "only together with compile=True")


PLAIN = EngineOptions(prepared=False, fold=None, graph=False, branches=False)
