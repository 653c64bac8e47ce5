"""Conversion of whole networks in place; a converted network folds its weights when it is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admfast.accelerate import published_blocks
from admfast.accelerate.class_conversion import Converted, convert, original_class_of, restore
from admfast.accelerate.code_bases import CodeBase
from admfast.accelerate.code_inspection import CodeRecord, record_code
from admfast.accelerate.diffusers_blocks import DIFFUSERS
from admfast.accelerate.edm_blocks import EDM
from admfast.accelerate.equivalence import Conversion
from admfast.accelerate.forward_methods import ForwardMethod, recognise_forward
from admfast.accelerate.layer_conversion import is_conv
from admfast.accelerate.published_blocks import PUBLISHED
from admfast.engine.precision import Policy
from admfast.errors import invalid
from admfast.models import convolution, layers
from admfast.models.body import first_parameter_dtype
from admfast.models.fold import FoldableNet, FoldOptions, ProjectedEmbedding
from admfast.models.hooks import submodules
from admfast.models.layers import timestep_embedding
from admfast.models.unet import run_blocks
from admfast.ops.transforms import in_autocast, in_program_trace

CODE_BASES = (PUBLISHED, EDM, DIFFUSERS)


class AcceleratedNet(FoldableNet):
    """A network that was converted in place. It runs our forward pass, or its own forward block by block.

    accelerated_policy: precision of its torso; None keeps the dtype of its parameters. accelerated_forward:
    the program's method that our forward pass replaces, or the reason why the program's own forward runs.
    accelerated_unconverted: names of the modules that were not converted, with reasons. accelerated_code: the
    program's code that ours replaces; if the program changes any of it, the conversion is undone at the next
    call.
    """

    num_passes = 2  # many programs take the gradient in x
    accelerated_policy: Policy | None = None
    accelerated_forward: ForwardMethod | str
    accelerated_unconverted: Mapping[str, str] = MappingProxyType({})
    accelerated_code = CodeRecord()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or self.accelerated_code.is_unchanged()):
            restore_network(self)
            return self(*args, **kwargs)
        if not isinstance(self.accelerated_forward, ForwardMethod):
            self.fold_now()
        out = super().__call__(*args, **kwargs)
        # The program may call `randn_like` or `view` on the output, which depend on its usual layout.
        return out.contiguous() if isinstance(out, Tensor) else out

    def fold_now(self) -> None:
        """Fold the weights for this call, unless folded weights can't be used in it."""
        if self.training or torch.compiler.is_compiling() or in_program_trace():
            return
        # `parameters()` takes five times as long.
        parameter_dicts = (module._parameters.values() for module in (self, *submodules(self)))
        parameters = [p for values in parameter_dicts for p in values if p is not None]
        # A replica of DataParallel has no parameters, torch.func.functional_call replaces them by plain
        # tensors, and writes to parameters that were made in inference mode can't be detected.
        if not parameters or in_autocast(parameters[0].device):
            return
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return
        parameter_dtype = self._parameter_dtype()
        policy = self.accelerated_policy
        self.ensure_folded(FOLD, parameter_dtype if policy is None else policy.torso)

    def run_our_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the published forward pass on our blocks; takes the arguments of the program's own method."""
        assert isinstance(self.accelerated_forward, ForwardMethod)
        arguments = self.accelerated_forward.bind_arguments(args, kwargs)
        self.fold_now()
        x, timesteps, y = arguments["x"], arguments["timesteps"], arguments["y"]
        images = x
        if self.accelerated_forward.kind == "upsampler":
            low_res = F.interpolate(arguments["low_res"], x.shape[2:], mode="bilinear")
            images = torch.cat([x, low_res], dim=1)
        emb = self._embedding(timesteps, y, len(x))
        h = run_blocks(self, self.enter_torso(images), emb)
        return self.out(h.to(images.dtype)).contiguous()  # type: ignore[operator]

    def _embedding(self, timesteps: Tensor, y: Tensor | None, count: int) -> Tensor | ProjectedEmbedding:
        """Return the embedding of timesteps and classes; a single timestep is used for all images."""
        emb = timestep_embedding(timesteps, self.model_channels)  # type: ignore[arg-type]
        emb = self.time_embed(emb.to(first_parameter_dtype(self.time_embed, emb.dtype)))  # type: ignore[operator, arg-type]
        classes = getattr(self, "num_classes", None)
        forward: Any = self.accelerated_forward
        if (y is not None) != (classes is not None) and (forward.requires_labels or classes is None):
            raise AssertionError("y must be given if and only if the model is class-conditional")
        if y is not None:
            if forward.requires_labels and (
                y.shape[:1] != (count,) or (y.dim() > 1 and not y.is_floating_point())
            ):
                raise AssertionError(f"y.shape={tuple(y.shape)}: one for each of the {count} images")
            emb = emb + self.label_emb(y)  # type: ignore[operator]
        return self.project_embedding(emb.expand(count, -1) if len(emb) == 1 else emb)


FOLD = FoldOptions()


def find_code_base(module: nn.Module) -> CodeBase | None:
    """Return the code base of a network; None for any other module."""
    return next((code_base for code_base in CODE_BASES if code_base.matches(module)), None)


def find_refusal(net: nn.Module) -> str | None:
    """Say why a network stays as it is; None if it can be converted."""
    if any(parameter.is_meta for parameter in net.parameters()):
        return "its parameters are on the meta device, without memory"
    code_base = find_code_base(net)
    assert code_base is not None
    return code_base.find_refusal(net)


def convert_network(net: Any, policy: Policy | None) -> None:
    """Convert a network in place, after `find_refusal` and `check_policy` have found nothing against it."""
    code_base, plan, unconverted, forward = _plan_network(net)
    convertible = {id(module) for module, _ in plan}
    code = record_code(net)
    sequences = (
        [m for m in published_blocks.sequences(net) if _is_convertible_sequence(m, convertible)]
        if code_base is PUBLISHED
        else []
    )
    for block, conversion in plan:
        conversion(block)
    code_base.convert_other_layers(net, isinstance(forward, str))
    for module in sequences:
        # The program may insert a layer of its own later.
        takers = (layers.TimestepBlock, *published_blocks.bases_that_take_emb(type(module)))
        convert(module, layers.TimestepEmbedSequential, embedding_block_types=takers)
    ours = _class_with_our_forward(forward.method) if isinstance(forward, ForwardMethod) else AcceleratedNet
    convert(
        net, ours, accelerated_forward=forward, accelerated_unconverted=unconverted,
        accelerated_policy=policy, accelerated_code=code, torso=code_base.torso, projected_width=0,
        _module_types=(),
    )  # fmt: skip
    if isinstance(forward, ForwardMethod):
        if forward.kind != "classifier":
            _split_skips(net)
        net._assign_projection_columns()


def restore_network(net: Any) -> None:
    """Undo the conversion of a network."""
    net.unfold()
    for module in list(net.modules()):
        if isinstance(module, Converted):
            restore(module)


def check_policy(net: Any, policy: Policy | None) -> None:
    """Reject a policy whose torso isn't float32 for a network that runs, or would run, block by block."""
    if policy is None or policy.torso == torch.float32:
        return
    forward = net.accelerated_forward if isinstance(net, AcceleratedNet) else _plan_network(net)[-1]
    if isinstance(forward, str):
        allowed = f"None or fp32: {original_class_of(net).__name__} runs block by block; {forward}"
        raise invalid("precision", policy.name, allowed)


def _plan_network(
    net: Any,
) -> tuple[CodeBase, list[tuple[nn.Module, Conversion]], dict[str, str], ForwardMethod | str]:
    """Return a network's code base, the planned conversions, the reasons of other modules, its forward."""
    code_base = find_code_base(net)
    assert code_base is not None
    plan, unconverted = code_base.plan_conversions(net)
    forward: ForwardMethod | str = (
        f"its own forward runs, as in every network of the {code_base.name} code base"
    )
    if code_base is PUBLISHED:
        forward = _find_forward(net, {id(module) for module, _ in plan}, unconverted)
    return code_base, plan, unconverted, forward


def _find_forward(net: Any, convertible: set[int], unconverted: dict[str, str]) -> ForwardMethod | str:
    """Return the method that our forward may replace, or the reason why the network's own forward runs."""
    forward = recognise_forward(net)
    if (
        isinstance(forward, ForwardMethod)
        and forward.kind == "classifier"
        and net.pool not in ("adaptive", "attention")
    ):
        forward = f"pool={net.pool!r} looks at every block"
    if isinstance(forward, ForwardMethod) and (
        unconverted
        or not all(_is_convertible_sequence(m, convertible) for m in published_blocks.sequences(net))
    ):
        forward = f"some blocks run as they are: {', '.join([*unconverted][:3])}"
    return forward


def _is_convertible_sequence(sequence: nn.Module, convertible: set[int]) -> bool:
    """Tell whether a sequence passes images and embedding on as published, and all its layers are known."""
    return published_blocks.is_published_sequence(sequence) and all(
        id(layer) in convertible or is_conv(layer) or not [*layer.parameters()]
        for layer in sequence.children()
    )


def _split_skips(net: Any) -> None:
    """Set on the output blocks' skip convolutions how many input channels come from the block before.

    The other channels come from the input block. A convolution whose channels don't add up is left as it is.
    """
    outputs = [_out_channels(block, None) for block in net.input_blocks]
    channels = _out_channels(net.middle_block, outputs[-1])
    for block in net.output_blocks:
        skip, skip_channels = getattr(block[0], "skip_connection", None), outputs.pop()
        if isinstance(skip, convolution.FoldableConv) and channels is not None and skip_channels is not None:
            if channels + skip_channels == skip.in_channels:  # type: ignore[operator]
                vars(skip).update(split=channels, _added_attributes=("split",))
        channels = _out_channels(block, channels)


def _out_channels(block: Any, channels: int | None) -> int | None:
    """Return the number of output channels of a block; channels: that of the block before."""
    for layer in block.children():
        conv = layer
        if isinstance(layer, layers.ResBlock):
            conv = layer.out_layers[3]
        elif isinstance(layer, layers.Upsample | layers.Downsample):
            conv = next(layer.children(), None)
        channels = getattr(conv, "out_channels", channels)
    return channels


@functools.cache
def _class_with_our_forward(method: str) -> type[AcceleratedNet]:
    """Return the subclass of AcceleratedNet whose method of that name runs our forward pass."""
    return type("NetWithOurForward", (AcceleratedNet,), {method: AcceleratedNet.run_our_forward})
