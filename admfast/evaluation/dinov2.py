"""Features of DINOv2 as dgm-eval defines them, which published FD-DINOv2 values use."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from admfast.errors import CheckpointError, Unavailable, first_line, invalid
from admfast.evaluation.features import FeatureNet, ImageFeatures, Neighbours
from admfast.files.paths import user_path

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_POSITION_OFFSET = 0.1  # what the published model adds to the side when it resizes its position embeddings


class DinoFeatures(FeatureNet):
    """The class token of DINOv2 after the last norm: [N, 1024] for ViT-L/14. In float32; not differentiable.

    Images are resized to 224x224 by Pillow's bicubic filter on uint8, with antialiasing and without a crop,
    then (x / 255 - mean) / std. Grey images are repeated three times. The position embeddings are resized as
    the published model does, by the factor (16 + 0.1) / 37, whatever transformers would do.

    Source: Oquab et al. 2023; Stein et al. 2023 (dgm-eval).

    Args:
        folder: a folder that transformers saved: config.json and model.safetensors of facebook/dinov2-large.
        device: where to compute.

    Raises:
        InvalidArgument: if the folder is missing or holds another model. Unavailable: without transformers.
    """

    frechet_name = "FD-DINOv2"
    neighbours = Neighbours(k=5, open_balls=True, most=10_000)

    def __init__(self, folder: str | PathLike[str], device: torch.device | str = "cpu") -> None:
        path = user_path("dinov2", folder)
        if not (path / "config.json").is_file():
            allowed = "a folder with config.json and model.safetensors of DINOv2"
            raise invalid("dinov2", str(folder), f"{allowed} (admfast fetch dinov2 --out models)")
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise Unavailable(f'DINOv2 needs transformers: pip install "admfast[eval]" ({error})') from None
        try:
            loaded: Any = Dinov2Model.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            model, report = loaded
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a DINOv2 model: {first_line(error)}") from None
        # transformers fills what a file lacks with random numbers.
        missing = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        if missing:
            raise CheckpointError(
                f"{path}: not a DINOv2 model: it lacks {missing[0]} and {len(missing) - 1} more"
            )
        if unknown := sorted(map(str, report["unexpected_keys"])):
            raise CheckpointError(f"{path}: not a DINOv2 model: it also has {unknown[0]}")
        self.device, self.name = torch.device(device), f"dinov2 ({path.name})"
        self._mean, self._std = (
            torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (MEAN, STD)
        )
        self._model = _resize_positions(model).to(self.device).float().eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Return the features of images, uint8 [N, H, W, C] with C of 1 or 3.

        Raises InvalidArgument for other images.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
            raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 [N, H, W, 1 or 3]")
        pictures = [
            Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for image in images.expand(-1, -1, -1, 3).cpu().numpy()
        ]
        x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(self.device)
        x = x.movedim(-1, 1).float() / 255
        tokens = self._model(pixel_values=(x - self._mean) / self._std).last_hidden_state
        return ImageFeatures(tokens[:, 0])


def _resize_positions(model: Any) -> Any:
    """Give a model the position embeddings of 224x224 images, so that it doesn't resize its own."""
    embeddings, patch = model.embeddings, model.config.patch_size
    positions, grid = embeddings.position_embeddings.detach(), SIDE // patch
    side = round((positions.shape[1] - 1) ** 0.5)
    square = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if side != grid:
        factor = (grid + _POSITION_OFFSET) / side
        square = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    resized = torch.cat([positions[:, :1], square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    embeddings.position_embeddings = torch.nn.Parameter(resized, requires_grad=False)
    return model
