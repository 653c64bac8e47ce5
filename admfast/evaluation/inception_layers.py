"""The layers of Inception v3 (2015) as the published evaluators use it: names, sizes, and both key
formats."""

from __future__ import annotations

from typing import NamedTuple

FEATURES, CLASSES = 2048, 1008


class Conv(NamedTuple):
    """A convolution without bias, followed by batch norm and ReLU.

    kernel, padding: height and width. Its keys are those of the FID port: NAME.conv.weight,
    NAME.bn.weight and so on.
    """

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


class Branch(NamedTuple):
    """Convolutions in a chain; `pool` is what comes before them, `split` the two last side by side.

    pool: "average" and "maximum" are 3x3 with stride 1; "reduce" is a 3x3 maximum with stride 2.
    """

    convs: tuple[Conv, ...] = ()
    pool: str = ""
    split: bool = False


def _square(name: str, channels: int, side: int, stride: int = 1) -> Conv:
    """Return a convolution with a square kernel, padded unless it has a stride."""
    return Conv(name, channels, (side, side), stride, (side // 2,) * 2 if stride == 1 else (0, 0))


def _row(name: str, channels: int, length: int) -> Conv:
    return Conv(name, channels, (1, length), 1, (0, length // 2))


def _column(name: str, channels: int, length: int) -> Conv:
    return Conv(name, channels, (length, 1), 1, (length // 2, 0))


def _at_35(pool_channels: int) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 64),)),
        Branch((Conv("branch5x5_1", 48), _square("branch5x5_2", 64, 5))),
        Branch(
            (
                Conv("branch3x3dbl_1", 64),
                _square("branch3x3dbl_2", 96, 3),
                _square("branch3x3dbl_3", 96, 3),
            )
        ),
        Branch((Conv("branch_pool", pool_channels),), "average"),
    )


def _at_17(channels: int) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 192),)),
        Branch(
            (
                Conv("branch7x7_1", channels),
                _row("branch7x7_2", channels, 7),
                _column("branch7x7_3", 192, 7),
            )
        ),
        Branch(
            (
                Conv("branch7x7dbl_1", channels),
                _column("branch7x7dbl_2", channels, 7),
                _row("branch7x7dbl_3", channels, 7),
                _column("branch7x7dbl_4", channels, 7),
                _row("branch7x7dbl_5", 192, 7),
            )
        ),
        Branch((Conv("branch_pool", 192),), "average"),
    )


def _at_8(pool: str) -> tuple[Branch, ...]:
    return (
        Branch((Conv("branch1x1", 320),)),
        Branch(
            (
                Conv("branch3x3_1", 384),
                _row("branch3x3_2a", 384, 3),
                _column("branch3x3_2b", 384, 3),
            ),
            split=True,
        ),
        Branch(
            (
                Conv("branch3x3dbl_1", 448),
                _square("branch3x3dbl_2", 384, 3),
                _row("branch3x3dbl_3a", 384, 3),
                _column("branch3x3dbl_3b", 384, 3),
            ),
            split=True,
        ),
        Branch((Conv("branch_pool", 192),), pool),
    )


# The stem is one chain; "" stands for a 3x3 maximum with stride 2.
STEM = (
    _square("Conv2d_1a_3x3", 32, 3, 2),
    Conv("Conv2d_2a_3x3", 32, (3, 3)),
    _square("Conv2d_2b_3x3", 64, 3),
    None,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3)),
    None,
)
BLOCKS = {
    "Mixed_5b": _at_35(32),
    "Mixed_5c": _at_35(64),
    "Mixed_5d": _at_35(64),
    "Mixed_6a": (
        Branch((_square("branch3x3", 384, 3, 2),)),
        Branch(
            (
                Conv("branch3x3dbl_1", 64),
                _square("branch3x3dbl_2", 96, 3),
                _square("branch3x3dbl_3", 96, 3, 2),
            )
        ),
        Branch(pool="reduce"),
    ),
    "Mixed_6b": _at_17(128),
    "Mixed_6c": _at_17(160),
    "Mixed_6d": _at_17(160),
    "Mixed_6e": _at_17(192),
    "Mixed_7a": (
        Branch((Conv("branch3x3_1", 192), _square("branch3x3_2", 320, 3, 2))),
        Branch(
            (
                Conv("branch7x7x3_1", 192),
                _row("branch7x7x3_2", 192, 7),
                _column("branch7x7x3_3", 192, 7),
                _square("branch7x7x3_4", 192, 3, 2),
            )
        ),
        Branch(pool="reduce"),
    ),
    "Mixed_7b": _at_8("average"),
    "Mixed_7c": _at_8("maximum"),
}
# sFID's features: the first channels of this convolution, 17x17, flattened with the channels last.
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7


def graph_names() -> dict[str, str]:
    """Return the name in TensorFlow's graph of every convolution, by the FID port's name.

    The graph numbers what it contains: conv, conv_1, ...; mixed, mixed_1, ...; in a block, its branches of
    several convolutions (or a pool) are tower, tower_1, ....
    """
    stem = [conv.name for conv in STEM if conv is not None]
    names = {name: _numbered("conv", i) for i, name in enumerate(stem)}
    for i, (block, branches) in enumerate(BLOCKS.items()):
        towers = 0
        for branch in branches:
            if len(branch.convs) == 1 and not branch.pool:
                names[f"{block}.{branch.convs[0].name}"] = f"{_numbered('mixed', i)}/conv"
                continue
            if not branch.convs:
                continue
            tower = f"{_numbered('mixed', i)}/{_numbered('tower', towers)}"
            towers += 1
            chain = len(branch.convs) - 2 * branch.split
            for j, conv in enumerate(branch.convs):
                place = _numbered("conv", j) if j < chain else f"mixed/{_numbered('conv', j - chain)}"
                names[f"{block}.{conv.name}"] = f"{tower}/{place}"
    return names


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"
