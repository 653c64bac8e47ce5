"""Named policies for the precision of each part of a network, and the default policy of each device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from admfast.errors import Unavailable, allowed_names, invalid
from admfast.models.fold import FoldOptions
from admfast.ops import native

INT8_ISAS = ("amx", "avx512_bf16")  # instruction sets with fast products of 8 bits
# The two parts that no policy touches.
FIXED_PARTS = {
    "norms, softmax": "accumulate in float32",
    "embeddings, last layer, update": "float32",
}


@dataclass(frozen=True)
class Policy:
    """The precision in which convolutions and matrix products in the networks' torsos compute.

    torso: dtype for the diffusion model and the upsampler. classifier: dtype for the classifier. tf32: on
    CUDA, factors of float32 products are rounded to TF32, a mantissa of 10 bits. int8: 3x3 convolutions of
    the torsos, and their gradients, have factors of 8 bits, except the first layer's. Norms and softmax
    accumulate in float32; embeddings, the last layer, the guidance gradient at x_t and the update are
    float32.
    """

    name: str
    torso: torch.dtype = torch.float32
    classifier: torch.dtype = torch.float32
    tf32: bool = False
    int8: bool = False

    def fold_options(self, options: FoldOptions | None) -> FoldOptions | None:
        """Return the options for folding networks in this precision.

        Raises InvalidArgument for int8 in another precision; in int8 for None, because its weights are
        derived forms, and for a named convolution.
        """
        if not self.int8:
            if options is not None and options.int8:
                raise invalid("int8", True, f"False: only precision='int8' sets it, this is {self.name!r}")
            return options
        if options is None:
            raise invalid("fold", None, "FoldOptions: precision='int8' runs on derived weights")
        if options.conv is not None:
            raise invalid("conv", options.conv, "None with precision='int8'")
        return replace(options, int8=True)

    def parts(self) -> dict[str, str]:
        """Return the precision of each part, in words."""
        float32 = "float32 products of TF32 factors" if self.tf32 else "float32"
        words = {torch.float32: float32}
        torso, classifier = (
            words.get(d, str(d).removeprefix("torch.")) for d in (self.torso, self.classifier)
        )
        if self.int8:
            torso, classifier = (f"{words}, 3x3 convolutions in int8" for words in (torso, classifier))
        return {"torso": torso, "classifier": classifier, **FIXED_PARTS}

    def __str__(self) -> str:
        if self.int8:
            return f"int8, {str(self.torso).removeprefix('torch.')}"
        if self.torso == self.classifier:
            return "tf32" if self.tf32 else str(self.torso).removeprefix("torch.")
        torso, classifier = (str(d).removeprefix("torch.") for d in (self.torso, self.classifier))
        return f"{torso}, classifier {classifier}"


FP32 = Policy("fp32")
POLICIES = {
    "fp32": FP32,
    "tf32": Policy("tf32", tf32=True),
    "bf16": Policy("bf16", torch.bfloat16, torch.bfloat16),
    "fp16": Policy("fp16", torch.float16, torch.float16),
    "int8": Policy("int8", torch.bfloat16, torch.bfloat16, int8=True),  # on a CPU with AMX
}
INT8_WITHOUT_AMX = Policy("int8", int8=True)  # other products are faster in float32 there
# Not float16, in which some of the released models overflow. A classifier can run in half precision too,
# because its gradient is scaled before the backward pass.
AUTO_CUDA = Policy("auto", torch.bfloat16, torch.bfloat16)


def policy(name: str, device: torch.device) -> Policy:
    """Return the policy called `name` for a device; "auto" is the device's default.

    "auto" is bfloat16 on CUDA and on a CPU with AMX, else float32: without AMX, a CPU's bfloat16 products are
    half as fast as its float32 products (measured: `docs/speed.md`). The choices on CUDA and on a CPU with
    AMX follow from the range of the formats and the vendors' peak rates; sampling has not been timed against
    float32 there. `docs/accuracy.md` has the errors of each. "int8" has
    8-bit 3x3 convolutions; the rest is bfloat16 if the compiled ops use AMX, else float32.

    Raises: InvalidArgument for an unknown name, Unavailable for tf32 on a CPU, and for int8 on anything but a
    CPU with products of 8 bits.
    """
    if name == "auto":
        if device.type == "cuda":
            return AUTO_CUDA
        return POLICIES["bf16"] if has_amx() else FP32
    if not isinstance(name, str) or name not in POLICIES:
        raise invalid("precision", name, allowed_names(name, ["auto", *POLICIES]))
    if name == "tf32" and device.type != "cuda":
        raise Unavailable("precision='tf32': only on a CUDA device")
    if name == "int8":
        if (reason := _reason_no_int8(device)) is not None:
            raise Unavailable(f"precision='int8': {reason}")
        return POLICIES["int8"] if native.uses_amx() else INT8_WITHOUT_AMX
    return POLICIES[name]


def _reason_no_int8(device: torch.device) -> str | None:
    """Return why a device has no fast products of 8 bits; None if it has."""
    if device.type != "cpu":
        return f"only on a CPU, not on {device.type}"
    if (reason := native.reason_missing()) is not None:
        return f"needs the compiled ops: {reason}"
    has_fast_int8 = native.instruction_set() in INT8_ISAS
    return (
        None
        if has_fast_int8
        else f"needs AVX-512 with VNNI and bfloat16; this uses {native.instruction_set()}"
    )


def has_amx() -> bool:
    """Tell whether this CPU has AMX, which multiplies tiles of bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported())
