"""Named policies for the precision of each part of a network, and the default policy of each device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from admfast.errors import Unavailable, invalid, nearest

# The two parts that no policy touches.
ALWAYS = {
    "norms, softmax": "accumulate in float32",
    "embeddings, last layer, update": "float32",
}


@dataclass(frozen=True)
class Policy:
    """The precision in which convolutions and matrix products in the networks' torsos compute.

    torso: dtype for the diffusion model and the upsampler. classifier: dtype for the classifier. tf32: on
    CUDA, factors of float32 products are rounded to TF32, a mantissa of 10 bits. Norms and softmax accumulate
    in float32; embeddings, the last layer, the guidance gradient at x_t and the update are float32.
    """

    name: str
    torso: torch.dtype = torch.float32
    classifier: torch.dtype = torch.float32
    tf32: bool = False

    def parts(self) -> dict[str, str]:
        """Return the precision of each part, in words."""
        float32 = "float32 products of TF32 factors" if self.tf32 else "float32"
        words = {torch.float32: float32}
        torso, classifier = (
            words.get(d, str(d).removeprefix("torch.")) for d in (self.torso, self.classifier)
        )
        return {"torso": torso, "classifier": classifier, **ALWAYS}

    def __str__(self) -> str:
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
}
# Not float16, in which some of the released models overflow. A classifier can run in half precision too,
# because its gradient is scaled before the backward pass.
AUTO_CUDA = Policy("auto", torch.bfloat16, torch.bfloat16)


def policy(name: str, device: torch.device) -> Policy:
    """Return the policy called `name` for a device; "auto" is the device's default.

    "auto" is bfloat16 on CUDA and on a CPU with AMX, else float32: without AMX, a CPU's bfloat16 products are
    half as fast as its float32 products (measured: `docs/speed.md`). The choices on CUDA and on a CPU with
    AMX follow from the range of the formats and the vendors' peak rates. No measurement has compared them
    with other precisions, in the speed of the networks or in the quality of the images.

    Raises: InvalidArgument for an unknown name, Unavailable for tf32 on a CPU.
    """
    if name == "auto":
        if device.type == "cuda":
            return AUTO_CUDA
        return POLICIES["bf16"] if has_amx() else FP32
    if not isinstance(name, str) or name not in POLICIES:
        raise invalid("precision", name, nearest(str(name), ["auto", *POLICIES]))
    if name == "tf32" and device.type != "cuda":
        raise Unavailable("precision='tf32': only on a CUDA device")
    return POLICIES[name]


def has_amx() -> bool:
    """Tell whether this CPU has AMX, which multiplies tiles of bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported())
