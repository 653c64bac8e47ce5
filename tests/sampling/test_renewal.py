"""Tests that samples and predictions use the current parameters, however these were changed."""

from __future__ import annotations

import copy

import pytest
import torch

from admfast.sampling.pipeline import Pipeline
from tests.small import PROCESS, cascade, pipeline, randn, unet

X = randn(2, 1, 8, 8)


def answers(pipe: Pipeline) -> list[torch.Tensor]:
    """Return images, guided if the pipeline has a classifier, and a prediction if it has no upsampler."""
    images = pipe.sample([0, 1], [5, 6], steps=3, output="float")
    return [images] if pipe.upsampler is not None else [images, pipe.predict(X, 500, [0, 1]).eps]


@pytest.mark.parametrize("part", ["net", "classifier", "upsampler"])
@pytest.mark.parametrize("way", ["data", "numpy", "one bias"])
def test_averaged_weights_are_swapped_in_and_out(part, way):
    pipe = cascade() if part == "upsampler" else pipeline()
    before = answers(pipe)
    wanted = copy.deepcopy(pipe)
    net, other = (p.upsampler.net if part == "upsampler" else getattr(p, part) for p in (pipe, wanted))
    own = {key: value.clone() for key, value in net.state_dict().items()}
    shadow = {key: value * 0.9 for key, value in own.items()}
    if way == "one bias":
        name = "input_blocks.1.0.emb_layers.1.bias"
        shadow = own | {name: own[name] + 1}
    other.load_state_dict(shadow)
    right = answers(wanted)

    def swap(values: dict[str, torch.Tensor]) -> None:
        for key, parameter in net.named_parameters():
            if way == "numpy":
                parameter.detach().numpy()[...] = values[key].numpy()
            else:
                parameter.data.copy_(values[key])

    swap(shadow)
    assert all(torch.equal(a, b) for a, b in zip(answers(pipe), right, strict=True))
    swap(own)
    after = answers(pipe)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not torch.equal(right[0], before[0])


def test_refresh_takes_up_what_nothing_shows():
    pipe = pipeline(classifier=None, guidance=0.0)
    before = answers(pipe)
    weight = pipe.net.input_blocks[1][0].in_layers[2].weight
    weight.data[0, 1, 0, 0] += 100.0  # one of 9216 elements, not among those compared
    wanted = Pipeline("wanted", unet(), PROCESS)
    wanted.net.load_state_dict(pipe.net.state_dict())
    assert torch.equal(answers(pipe)[0], before[0])
    pipe.refresh()
    assert torch.equal(answers(pipe)[0], answers(wanted)[0]) and not torch.equal(answers(pipe)[0], before[0])


def test_refresh_renews_the_classifier_and_the_upsampler_too():
    for pipe, net in ((p := pipeline(), p.classifier), (p := cascade(), p.upsampler.net)):
        before = answers(pipe)
        conv = net.input_blocks[1][0].in_layers[2]
        form = {t.data_ptr(): t.clone() for t in conv.folded.forms()}
        conv.weight.data[0, 1, 0, 0] += 100.0
        pipe.refresh()
        assert any(not torch.equal(t, form[t.data_ptr()]) for t in conv.folded.forms())
        assert not torch.equal(answers(pipe)[0], before[0])
