"""Tests that the benches' shape lists are read correctly and cover most of the models' work."""

import pytest

from bench import shapes
from bench.shapes import attention_shapes, conv_shapes, distinct_convs, norm_shapes

# GFLOP per image of each network's forward pass. Shares are percentages of these.
TOTALS = {
    "unet64": 219.356,
    "unet128": 613.856,
    "unet256": 2239.666,
    "unet512": 3964.670,
    "up64_256": 1263.285,
    "up128_512": 5009.570,
    "clf64": 38.158,
    "clf128": 42.081,
    "clf256": 146.697,
    "clf512": 225.534,
}


def test_shares_are_parts_of_the_model() -> None:
    first = conv_shapes()[0]
    assert (first.model, *first.size) == ("unet64", 3, 192, 192, 64)
    assert first.flop == 2 * 192 * 192 * 3 * 3 * 64 * 64
    for shape in conv_shapes():
        percent = shape.flop / TOTALS[shape.model] / 1e7  # of one convolution of this shape
        count = round(shape.share / percent)
        assert count >= 1 and shape.share == pytest.approx(count * percent, abs=0.0051), shape


def test_every_model_is_there_with_its_dearest_shapes_first() -> None:
    assert {s.model for s in conv_shapes()} == set(TOTALS)
    for model in TOTALS:
        threes = [s.share for s in conv_shapes() if s.model == model and s.kernel == 3]
        assert threes == sorted(threes, reverse=True)
        # Several hundred smaller shapes make up the rest, so the listed ones must be most of the work.
        assert sum(s.share for s in conv_shapes() if s.model == model) > 55


def test_no_shape_is_listed_twice_for_a_model() -> None:
    seen = [(s.model, *s.size) for s in conv_shapes()]
    assert len(seen) == len(set(seen))


def test_distinct_convs_merge_models_and_begin_with_the_largest_share() -> None:
    pairs = distinct_convs()
    assert len({shape.size for shape, _ in pairs}) == len(pairs) == len({s.size for s in conv_shapes()})
    assert [shape.share for shape, _ in pairs] == sorted((shape.share for shape, _ in pairs), reverse=True)
    shared = dict((shape.size, text) for shape, text in pairs)[(3, 256, 256, 256)]
    assert shared == "unet256 31.07 %, unet512 15.6 %"


def test_norms_divide_into_groups_and_precede_a_listed_or_smaller_convolution() -> None:
    for shape in norm_shapes():
        assert shape.channels % shapes.GROUPS == 0
        assert shape.model in TOTALS
    assert len(set(norm_shapes())) == len(norm_shapes())


@pytest.mark.parametrize(
    "shape", attention_shapes(), ids=lambda s: f"{s.model}-{s.tokens}-{s.heads}x{s.head_dim}"
)
def test_attention_widths(shape: shapes.AttentionShape) -> None:
    assert shape.tokens in (64, 256, 1024)
    assert shape.flop == 2 * (2 * shape.heads * shape.tokens * shape.tokens * shape.head_dim)
    if shape.model in ("unet128", "up64_256"):
        assert shape.heads == 4
    elif shape.model != "small":
        assert shape.head_dim == 64
    # For some models the list has a level's 1x1 projection from C to 3C channels: its C must agree.
    listed = {
        s.cin
        for s in conv_shapes()
        if s.model == shape.model and s.cout == 3 * s.cin and s.side**2 == shape.tokens
    }
    assert listed in (set(), {shape.heads * shape.head_dim})
