"""Tests of the features of DINOv2, on a small model with random weights that transformers saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from admfast.errors import AdmfastError, CheckpointError, InvalidArgument
from admfast.evaluation import DinoFeatures, open_features

transformers = pytest.importorskip("transformers", reason="the extra eval is not installed")
WIDTH = 24


def model(image_size):
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=image_size
    )
    torch.manual_seed(0)
    net = transformers.Dinov2Model(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def pixels(image):
    """Return the input of the network as dgm-eval makes it: Pillow's bicubic, / 255, ImageNet's mean."""
    resized = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    x = torch.from_numpy(resized.astype(np.float32) / 255).movedim(-1, 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x - mean[:, None, None]) / std[:, None, None])[None]


@pytest.mark.parametrize("side", [32, 300])
def test_features_are_the_class_token_of_resized_images(side, tmp_path):
    net = model(224)  # its position embeddings need no resizing
    net.save_pretrained(tmp_path)
    images = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
    found = DinoFeatures(tmp_path)(images).pooled
    assert found.shape == (3, WIDTH)
    with torch.no_grad():
        for row, image in zip(found, images, strict=True):
            expected = net(pixels(image.numpy())).last_hidden_state[0, 0]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_resized_as_the_published_model_does(tmp_path):
    net = model(518)
    net.save_pretrained(tmp_path)
    stored = net.embeddings.position_embeddings.detach()
    square = stored[:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    # The published model passes the factor (16 + 0.1) / 37, which also places the samples.
    resized = F.interpolate(square, scale_factor=16.1 / 37, mode="bicubic")
    assert resized.shape[-2:] == (16, 16)
    with torch.no_grad():
        small = model(224)
        small.load_state_dict(net.state_dict() | {"embeddings.position_embeddings": torch.cat(
            [stored[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)})  # fmt: skip
        image = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
        expected = small(pixels(image[0].numpy())).last_hidden_state[:, 0]
    torch.testing.assert_close(DinoFeatures(tmp_path)(image).pooled, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_is_found_by_name_and_grey_images_are_repeated(tmp_path):
    model(224).save_pretrained(tmp_path / "dinov2-large")
    net = open_features("dinov2", tmp_path)
    grey = torch.randint(0, 256, (2, 20, 20, 1), dtype=torch.uint8)
    torch.testing.assert_close(net(grey).pooled, net(grey.expand(-1, -1, -1, 3).contiguous()).pooled)
    assert net.neighbours.k == 5 and net.frechet_name == "FD-DINOv2"


def test_what_is_no_dinov2(tmp_path):
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        DinoFeatures(tmp_path / "gone")
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.ViTConfig(**small).save_pretrained(tmp_path)
    with pytest.raises(AdmfastError):  # no weights
        DinoFeatures(tmp_path)
    transformers.ViTModel(transformers.ViTConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a DINOv2"):
        DinoFeatures(tmp_path)
    net = model(224)
    del net.layernorm.weight
    net.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layernorm\.weight"):
        DinoFeatures(tmp_path)
    net = model(224)
    net.embeddings.register_tokens = torch.nn.Parameter(torch.zeros(1, 4, 8))
    net.save_pretrained(tmp_path / "registers")
    with pytest.raises(CheckpointError, match=r"register_tokens"):
        DinoFeatures(tmp_path / "registers")
    with pytest.raises(InvalidArgument, match="^images="):
        model(224).save_pretrained(tmp_path / "d")
        DinoFeatures(tmp_path / "d")(torch.zeros(1, 8, 8, 4, dtype=torch.uint8))
