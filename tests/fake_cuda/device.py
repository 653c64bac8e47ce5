"""Let a process of torch's CPU build take "cuda" for an H100 without kernels; `load` it before torch.

Under FakeTensorMode tensors have device, dtype, shape and strides, and no values: the CUDA branch of the
product runs whole, forward and backward, and each operation can be looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("device.cpp")
CAPABILITY = (9, 0)


def load() -> None:
    """Compile and load the device; a C++ compiler is needed, as for the package's own extension."""
    assert "torch" not in sys.modules, "torch asks for its CUDA hooks when it is imported"
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        links = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            *includes,
            str(SOURCE),
            "-o",
            str(library),
            *links,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


class Stream:
    """A stream of a device that does nothing."""

    def __init__(self, device: torch.device | None = None, priority: int = 0):
        self.device, self.priority = device, priority

    def wait_stream(self, other: Stream) -> None:
        """Wait for nothing."""

    def wait_event(self, event: object) -> None:
        """Wait for nothing."""

    def record_event(self) -> object:
        return object()


def answering(attention: str) -> Any:
    """Return a mode that answers what torch's CPU build would ask a real device.

    An index by a list is copied to the device, and scaled_dot_product_attention asks it for its kernel.
    """
    import torch
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    from admfast.ops.attention import kernels
    from admfast.ops.attention.heads import split_heads

    kernel = getattr(kernels, attention.upper())  # that of sdpa

    class Answering(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
                return args[0].index_select(0, args[0].new_empty(len(args[1]), dtype=torch.int64))
            if function is F.scaled_dot_product_attention:
                assert not kwargs
                q = args[0]
                n, h, s, d = q.shape
                # q, k and v are views of one projection, which begins with q.
                qkv = q.as_strided((n, s, 3 * h * d), (q.stride(0), q.stride(2), 1), q.storage_offset())
                return split_heads(kernel.infer(qkv, h, q.stride(1) == 3 * d), h)
            return function(*args, **(kwargs or {}))

    return Answering()


@contextlib.contextmanager
def h100(attention: str) -> Iterator[None]:
    """Answer torch.cuda's questions as an H100 would; `attention`: the kernel that torch's own choice takes.

    Only what the engine asks is answered. A dispatch mode that looks on makes our ops show torch's operations
    in their place; here it must see what a user's process runs, so that it goes unnoticed.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.nn.attention import SDPBackend

    from admfast.ops import transforms

    home, has_kernel = Stream(), torch._C._dispatch_has_kernel_for_dispatch_key

    def compiled(op: str, key: str) -> bool:  # our extension, as if it had its CUDA part
        return (op, key) == ("admfast::sampler_step_", "CUDA") or has_kernel(op, key)

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: CAPABILITY,
        "current_stream": lambda device=None: home,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_reserved": lambda device=None: 0,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        if attention == "xformers":
            stack.enter_context(xformers())
            attention = "flash"  # which nothing may take
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        for place, name, value in (
            (torch._C, "_len_torch_dispatch_stack", lambda: 0),
            (transforms, "Tensor", FakeTensor),
            (
                torch,
                "_fused_sdp_choice",
                lambda *_: SDPBackend.__members__[f"{attention.upper()}_ATTENTION"].value,
            ),
            (torch._C, "_dispatch_has_kernel_for_dispatch_key", compiled),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        # The engine runs a backward on the calling thread; a device's own thread would need the device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(answering(attention))
        yield


@contextlib.contextmanager
def xformers() -> Iterator[None]:
    """Stand in for xformers' attention, with its signature and its layout [N, S, h, d]."""
    import torch
    from torch import Tensor

    from admfast.ops.attention import kernels

    def checked(*tensors: Tensor) -> None:
        for t in tensors:
            assert (
                t.dim() == 4
                and t.stride(-1) == 1
                and t.dtype in (torch.float16, torch.bfloat16, torch.float32)
            )
            assert all(step * t.element_size() % 16 == 0 for step in t.stride()[:3])

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        checked(query, key, value)
        assert query.shape[2:] == key.shape[2:] == value.shape[2:]
        return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])

    def forward_requires_grad(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        n, s, h, _ = query.shape
        return forward(query, key, value), query.new_empty((n, h, s), dtype=torch.float32)

    def backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        checked(grad, output, query, key, value)
        assert grad.shape == output.shape and lse.dtype == torch.float32
        return tuple(torch.empty_like(t) for t in (query, key, value))  # type: ignore[return-value]

    fmha = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward = forward  # type: ignore[attr-defined]
    fmha.memory_efficient_attention_forward_requires_grad = forward_requires_grad  # type: ignore[attr-defined]
    fmha.memory_efficient_attention_backward = backward  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, {"xformers.ops.fmha": fmha}),
        mock.patch.object(kernels, "_xformers_not_installed", lambda: None),
        mock.patch.object(kernels, "_xformers_trial", lambda *_: None),
    ):
        yield
