"""Networks that derive faster forms of their own parameters, and detect when the parameters change.

A folded network has the parameters, the state dict and the architecture of the published one. In addition,
its convolutions hold a faster form of their weights, and the embedding's projections to all blocks are joined
into one product. The derived forms are not saved. They are not used in training mode, or if other parameters
replace those they were derived from (`torch.func.functional_call`). Trainable parameters still get gradients.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from admfast import host
from admfast.errors import Unavailable, invalid
from admfast.models.fold.options import FoldOptions
from admfast.models.fold.projections import JoinedProjections, ProjectedEmbedding
from admfast.models.fold.values import ValueSnapshot
from admfast.models.hooks import (
    ModuleSurvey,
    count_hooks_made,
    has_hooks,
    hook_checks_skipped,
    submodules,
    survey_modules,
)
from admfast.ops.layout import to_torch_channels_last
from admfast.ops.transforms import in_program_trace, plain_eager_mode

# Pipelines on several threads may share a network.
FOLD_LOCK = threading.RLock()
WINOGRAD_BYTES = 16  # per weight, and for each of `num_passes`
TORSO = ("input_blocks", "middle_block", "output_blocks")


class _Snapshot(NamedTuple):
    """Snapshot of a network, to detect changes. `ValueSnapshot` detects the writes that torch doesn't count.

    places: identity, address, dtype and device of parameters and buffers, and the convolutions' forms.
    versions: torch's count of writes to each parameter. modes: which modules are in training mode. trained:
    which parameters require gradients.
    """

    places: list[object]
    versions: list[int]
    modes: list[bool]
    trained: list[bool]


class FoldableNet(nn.Module):
    """A network that can be folded; the base class of `UNet` and `Classifier`.

    `fold_generation` increases whenever prepared steps of the network become invalid: if something that a
    step reads was moved to other memory, was dropped, or is used in another way.
    """

    num_passes: int = 1  # passes through its convolutions while sampling: 1 forward, 2 forward and backward
    torso: tuple[str, ...] = TORSO  # attributes that hold its blocks, the input blocks first
    fold_options: FoldOptions | None = None
    fold_dtype: torch.dtype | None = None
    training_dtype: torch.dtype | None = None  # of the torso while it isn't folded; None: its parameters'
    fold_generation: int = 0
    fold_count: int = (
        0  # number of calls of `fold`, which may drop forms; a recorded row may still use a dropped form
    )
    _fold_snapshot: _Snapshot | None = None
    _fold_values: ValueSnapshot | None = None
    _fold_by_layer: bool = False
    _fold_survey: ModuleSurvey | None = None
    fold_hooks_made: int | None = None  # `count_hooks_made()` at the last check; None if it was `is_altered`
    _fold_convolutions: tuple[Any, ...] = ()  # of the torso
    _module_types: tuple[type, ...] = ()  # classes of all modules as built
    _fold_event: torch.cuda.Event | None = None
    _projections: JoinedProjections | None = None
    projected_width: int  # columns of all projections joined

    def _assign_projection_columns(self) -> None:
        """Assign columns of the joined projections to every residual block; call this once all are built."""
        total = 0
        for block in self._projecting_blocks():
            width = block.emb_layers[1].out_features
            block.projection = slice(total, total + width)
            total += width
        self.projected_width = total
        self._module_types = tuple(map(type, [self, *submodules(self)]))

    def _projecting_blocks(self) -> list[Any]:
        """Return the residual blocks, in order."""
        return [module for module in self.modules() if hasattr(module, "emb_layers")]

    def _convolutions(self) -> list[tuple[str, Any]]:
        """Return the convolutions that can be folded, with their names."""
        return [(name, m) for name, m in self.named_modules() if hasattr(type(m), "fold_weights")]

    def fold(self, options: FoldOptions | None = None, dtype: torch.dtype | None = None) -> None:
        """Derive the faster forms, with the torso's convolutions in `dtype` (None: the parameters' dtype).

        If options and dtype are the same as before, folding again updates the values in the same memory, so
        that captured graphs stay valid.

        Raises: InvalidArgument for parameters that were made in inference mode, Unavailable for `int8` if no
        convolution can be computed from 8-bit numbers.
        """
        options, dtype = options or FoldOptions(), dtype or self._parameter_dtype()
        check_not_inference_mode("parameters", self)
        int8_convolutions = self._find_int8_convolutions() if options.int8 else set()
        with FOLD_LOCK, plain_eager_mode():
            if self.fold_options is not None and (options, dtype) != (self.fold_options, self.fold_dtype):
                self.unfold()
            self.fold_options, self.fold_dtype = options, dtype
            self.fold_count += 1
            # Recorded before anything is derived, so that a write in the meantime counts as a change.
            self._fold_values = ValueSnapshot(self.parameters())
            without_winograd = self._convolutions_without_winograd()
            for name, module in self._convolutions():
                conv_dtype = dtype if self._in_torso(name) else module.weight.dtype
                module.fold_weights(options, conv_dtype, name in without_winograd, name in int8_convolutions)
            if options.has("embeddings"):
                self._update_joined_projections()
            self._fold_convolutions = tuple(m for name, m in self._convolutions() if self._in_torso(name))
            self._record_snapshot(self._take_snapshot())
            device = next(self.parameters()).device
            if device.type == "cuda":
                # Forms that were derived at the first call would come after the event that streams wait for.
                for _, module in self._convolutions():
                    if module.folded is not None:
                        module.folded.derive_forms()
                self._fold_event = torch.cuda.current_stream(device).record_event()

    def _update_joined_projections(self) -> None:
        """Join the projections of all blocks, if they are all still linear layers with a bias."""
        layers: list[Any] = [getattr(block.emb_layers, "1", None) for block in self._projecting_blocks()]
        if not layers or any(type(layer) is not nn.Linear or layer.bias is None for layer in layers):
            self._projections = None
        elif self._projections is None or not self._projections.refold(layers):
            self._projections = JoinedProjections(layers)

    def _find_int8_convolutions(self) -> set[str]:
        """Return the names of the torso's convolutions that fit `conv_int8`, without the first layer."""
        torso = ((n, m) for n, m in self._convolutions() if self._in_torso(n))
        names = {n for n, m in torso if not n.startswith(f"{self.torso[0]}.0.") and m.fits_int8()}
        if not names:
            raise Unavailable(
                "precision='int8': the network has no 3x3 convolution of stride 1 in two dimensions"
            )
        return names

    def _convolutions_without_winograd(self) -> set[str]:
        """Return the names of the convolutions that get no Winograd form, to save memory.

        The Winograd forms of a network take at most a sixth of the memory that the process may use, so that
        the three networks of a guided cascade leave half of it free. The smallest convolutions get a form
        first, because they run at the highest resolutions.
        """
        size = WINOGRAD_BYTES * self.num_passes
        sizes = sorted((size * module.weight.numel(), name) for name, module in self._convolutions())
        memory_left, without_winograd = host.memory_limit() // 6, set()
        for size, name in sizes:
            memory_left -= size
            if memory_left < 0:
                without_winograd.add(name)
        return without_winograd

    def refold(self) -> None:
        """Derive the forms again, in place, even if no change is detected; see `Pipeline.refresh`."""
        if self.fold_options is not None:
            self.fold(self.fold_options, self.fold_dtype)

    def ensure_folded(self, options: FoldOptions | None, dtype: torch.dtype) -> None:
        """Fold the network, unless it is folded already and its parameters haven't changed since.

        Changes are moved, replaced and written parameters. Writes that torch doesn't count are detected by
        comparing values (see `ValueSnapshot`), but not during a CUDA graph capture or a torch.compile trace,
        where values can't be read. If `options` is None, unfold the network.
        """
        with FOLD_LOCK:
            if self._fold_event is not None and not torch.cuda.is_current_stream_capturing():
                # The stream of another thread may still be writing the forms that this stream will read.
                torch.cuda.current_stream(next(self.parameters()).device).wait_event(self._fold_event)
            num_hooks = count_hooks_made()
            module_survey = survey_modules(self)
            self._record_survey(module_survey)
            self.fold_hooks_made = None if self.is_altered else num_hooks
            snapshot = self._take_snapshot(module_survey.modules)
            previous = self._fold_snapshot
            if options is None:
                if self.fold_options is not None:
                    self.unfold()
                    snapshot = self._take_snapshot()
                self._record_snapshot(snapshot)
            elif (options, dtype) != (self.fold_options, self.fold_dtype) or previous is None:
                self.fold(options, dtype)
            elif snapshot[:2] != previous[:2] or not self._values_are_unchanged():  # places and versions
                self.fold(options, dtype)
            else:
                self._record_snapshot(snapshot)

    def unfold(self) -> None:
        """Drop the derived forms."""
        with FOLD_LOCK:
            if self.fold_options is not None:
                self.fold_generation += 1
            for _, module in self._convolutions():
                module.unfold()
            self.fold_options, self.fold_dtype, self._fold_event = None, None, None
            self._projections, self._fold_snapshot, self._fold_values = None, None, None
            self._fold_convolutions = ()

    def _values_are_unchanged(self) -> bool:
        """Tell whether the parameters still hold the folded values; True if values can't be read now."""
        return self._fold_values is None or not _can_read_values() or self._fold_values.are_unchanged()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; first update its derived forms, if torch counted a write to its parameters.

        In training mode the forms are dropped instead: each training step would derive them again, but use
        none. The rows of a prepared step skip this check, which `ensure_folded` makes before the first row.
        """
        # A trace would add guards on the values read here, or contain the derivation.
        if not (torch.compiler.is_compiling() or in_program_trace() or hook_checks_skipped()):
            values = self._fold_values
            if values is not None and values.were_written() and _can_read_values():
                with FOLD_LOCK:
                    if self._fold_values is values and values.were_written():  # unless another thread did it
                        if self.training:
                            self.unfold()
                        else:
                            self.refold()
        return super().__call__(*args, **kwargs)

    def _take_snapshot(self, modules: Sequence[nn.Module] | None = None) -> _Snapshot:
        """Return a snapshot of the network; must be fast. modules: all its modules, if they are known."""
        places: list[object] = []
        modes: list[bool] = []
        tensors: list[Tensor] = []
        buffers: list[Tensor] = []
        for module in [self, *submodules(self)] if modules is None else modules:
            attributes = module.__dict__
            for parameter in attributes["_parameters"].values():
                if parameter is not None:
                    tensors.append(parameter)
            if attributes["_buffers"]:
                buffers.extend(buffer for buffer in attributes["_buffers"].values() if buffer is not None)
            # A module that was moved by itself, or that replaced another, has no derived form.
            places.append(attributes.get("_folded"))
            modes.append(attributes["training"])
        places += [(id(t), t.data_ptr(), t.dtype, t.device) for t in tensors + buffers]
        versions = [t._version for t in tensors]
        return _Snapshot(places, versions, modes, [t.requires_grad for t in tensors])

    def _record_survey(self, module_survey: ModuleSurvey) -> None:
        """Record hooks and replaced modules; if they changed, earlier prepared steps become invalid."""
        if module_survey != self._fold_survey:
            self.fold_generation += 1
        self._fold_survey = module_survey

    @property
    def has_hooks(self) -> bool:
        """Tell whether the network or one of its modules had a hook at the last `ensure_folded`."""
        return self._fold_survey is not None and self._fold_survey.has_hooks

    @property
    def is_altered(self) -> bool:
        """Tell whether the network had hooks or replaced modules at the last `ensure_folded`."""
        module_survey = self._fold_survey
        return module_survey is not None and (
            module_survey.has_hooks or module_survey.types != self._module_types
        )

    def _record_snapshot(self, snapshot: _Snapshot) -> None:
        """Record the present state; increase `fold_generation` if earlier prepared steps become invalid."""
        previous = self._fold_snapshot
        if previous is None or (previous.places, *previous[2:]) != (snapshot.places, *snapshot[2:]):
            self.fold_generation += 1
        self._fold_snapshot = snapshot

    def _in_torso(self, name: str) -> bool:
        return name.partition(".")[0] in self.torso

    def _parameter_dtype(self) -> torch.dtype:
        blocks = self._modules[self.torso[0]]
        assert blocks is not None
        parameter: Tensor | None = next(blocks.parameters(), None)
        if parameter is None:  # in a replica of DataParallel, parameters are plain attributes
            weights = (getattr(module, "weight", None) for module in blocks.modules())
            parameter = next(weight for weight in weights if isinstance(weight, Tensor))
        return parameter.dtype

    def _replicate_for_data_parallel(self) -> Any:
        """Return a copy that shares neither modules nor derived forms with this network."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.fold_options, replica._projections, replica._fold_convolutions = None, None, ()
        return replica

    @property
    def is_folded(self) -> bool:
        """Tell whether forwards use the derived forms of convolutions; the first one usually decides."""
        return self.fold_options is not None and any(
            module.folded is not None for module in self._fold_convolutions
        )

    @property
    def torso_dtype(self) -> torch.dtype:
        """The dtype in which the input, middle and output blocks run."""
        if self.is_folded and self.fold_dtype is not None:
            return self.fold_dtype
        return self.training_dtype or self._parameter_dtype()

    @property
    def joins_projections(self) -> bool:
        """Tell whether the embedding is projected to all blocks by one product."""
        joined = self._projections
        return joined is not None and not self._fold_by_layer and self.is_folded and joined.is_usable

    def project_embedding(self, emb: Tensor) -> Tensor | ProjectedEmbedding:
        """Return the embedding [N, E] projected to all blocks, or unchanged if the blocks project it."""
        # `has_hooks(())` finds global hooks.
        if self._projections is None or has_hooks(()) or not self.joins_projections:
            return emb
        return self._projections(emb)

    def join_projections(self, emb: Tensor | ProjectedEmbedding) -> Tensor:
        """Return the projections [N, projected_width] of a result of `embed_conditions`.

        Call it only if `joins_projections` is True.
        """
        if isinstance(emb, Tensor):  # a global hook was registered during sampling
            assert self._projections is not None
            emb = self._projections(emb)
        return emb.values

    def enter_torso(self, x: Tensor) -> Tensor:
        """Return images for the torso: in its dtype and, unless folded without it, channels-last.

        Convolutions keep that layout, regardless of the layout of their weights. A training step of the
        digits model takes 640 ms with it and 700 without (batch 32, one thread, EPYC), under autocast 448 and
        521.
        """
        # The output gets the dtype of x; an integer dtype would round it to whole numbers.
        if not x.is_floating_point():
            raise invalid("x.dtype", x.dtype, "a floating dtype")
        options = self.fold_options if self.is_folded else None
        channels_last = x.dim() == 4 if options is None else x.dim() > 3 and options.has("channels_last")
        return to_torch_channels_last(x, self.torso_dtype) if channels_last else x.to(self.torso_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Derived forms are not moved or converted with the network.
        self.unfold()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        if self.fold_options is not None:
            self.refold()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith(("fold_", "_fold_", "_project"))}


def check_not_inference_mode(name: str, net: nn.Module) -> None:
    """Reject parameters made in inference mode: they block gradients and hide changes."""
    if any(parameter.is_inference() for parameter in net.parameters()):
        raise invalid(name, "made in inference mode", "build it outside of torch.inference_mode()")


def _can_read_values() -> bool:
    """Tell whether values may be read now: not during a trace or the capture of a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def project_layer_by_layer(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Let every block project the embedding itself within the context, so that hooks see its layer."""
    foldable = [net for net in networks if isinstance(net, FoldableNet)]
    for net in foldable:
        net._fold_by_layer = True
    try:
        yield
    finally:
        for net in foldable:
            net._fold_by_layer = False
