"""What no implementation could compute is refused in one line, the same whatever was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.ops import TABLES, attention

QKV = torch.ones(1, 4, 12)


@pytest.mark.parametrize("impl", [*TABLES["attention"].names(), None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=2.0), "num_heads=2.0: a whole number of at least 1"),
        (dict(num_heads=None), "num_heads=None: a whole number"),
        (dict(num_heads=0), "num_heads=0: a whole number"),
        (dict(num_heads=3), "num_heads=3: "),
        (dict(qkv=QKV.to(torch.float8_e5m2)), "qkv.dtype=torch.float8_e5m2: a floating dtype"),
        (dict(qkv=QKV.long()), "qkv.dtype=torch.int64: a floating dtype"),
        (dict(qkv=None), "qkv=None: a tensor"),
        (dict(qkv=QKV[..., :0]), "qkv.shape=(1, 4, 0): "),
        (dict(qkv=QKV[0]), "qkv.shape=(4, 12): "),
        (dict(impl=3), "impl=3: the name of an implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention(changes: dict[str, Any], message, impl):
    with pytest.raises(InvalidArgument) as caught:
        attention(**(dict(qkv=QKV, num_heads=2, impl=impl) | changes))
    assert str(caught.value).startswith(message), caught.value
