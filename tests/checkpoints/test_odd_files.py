"""Tests of rare or malicious files: early pickle protocols, unusual kinds of tensors, false lengths."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

from admfast.checkpoints import load_network, read_weights
from admfast.errors import CheckpointError
from tests.small import SMALL_UNET
from tests.tools.random_checkpoint import random_state

GOOD = random_state(SMALL_UNET)
ANSWERS = {"image_size": 16, "num_head_channels": 32, "use_new_attention_order": False}
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.25])}


class Runs:
    """An object whose unpickling would call os.system."""

    def __reduce__(self):
        return os.system, ("false",)


def saved(tmp_path, content, **how):
    torch.save(content, tmp_path / "x.pt", **how)
    return tmp_path / "x.pt"


def refused(path, said, **how):
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weights(path, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [0, 1])
def test_early_protocols_of_pickle_are_read(tmp_path, protocol, zipped):
    """torch.load does not read protocol 0, in which the id of a storage is the text of a tuple."""
    beside = {
        "step": 3,
        "lr": 1e-4,
        "big": 2**80,
        "name": "h\u00e9\n'x",
        "tags": {1, 2},
        "on": True,
        "no": None,
    }
    content = {"model": STATE, "half": {"h": torch.ones(3).half()}, **beside}
    path = saved(tmp_path, content, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    tensors = read_weights(path, entry="model").tensors
    assert list(tensors) == list(STATE)
    assert all(torch.equal(tensors[key], value) for key, value in STATE.items())
    assert read_weights(path, entry="half").tensors["h"].dtype == torch.float16
    refused(saved(tmp_path, {"x": Runs(), **STATE}, pickle_protocol=protocol), "would call")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "held",
    [{"a": 1}, [1, 2], STATE, collections.OrderedDict(STATE), torch.nn.Linear(2, 3), {"a": np.ones(2)}],
    ids=["dict", "list", "state dict", "ordered", "module", "numpy"],
)
def test_bare_pickles_are_called_pickles(tmp_path, held, protocol):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(held, protocol))
    refused(tmp_path / "x.pt", "a bare pickle")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Runs(), protocol))
    refused(tmp_path / "x.pt", "would call")


@pytest.mark.parametrize(
    "text",
    [
        "config\nmodel\nquality: 3\n",
        "config\nmodel\n(see below)\n",
        "config\nmodel\np1\n",
        "config: 3\n",
        "(dp0\nabc",
    ],
)
def test_a_text_that_begins_as_a_pickle_may_is_called_a_text(tmp_path, text):
    (tmp_path / "x.pt").write_text(text)
    refused(tmp_path / "x.pt", f"text, .*{re.escape(repr(text.splitlines()[0]))}")


def test_a_pickle_that_is_text_too_is_no_text(tmp_path):
    (tmp_path / "x.pt").write_text("cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path / "x.pt", "would call os.system")


def test_what_is_wrong_in_a_pickle_is_said(tmp_path):
    def changes(name, content):
        return content.replace(b"FloatStorage", b"FloatStirage")

    path = saved(tmp_path, STATE)
    changed_archive(path, changes)
    refused(path, "pickle.*FloatStirage")


def odd(form):
    values = torch.tensor([[0.5, -0.5], [0.25, 1.0]])
    if form == "per channel":
        return torch.quantize_per_channel(
            values, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
        )
    if form == "packed":
        return (odd("quantized"), torch.zeros(2))
    made = {
        "quantized": lambda: torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        "quint8": lambda: torch.quantize_per_tensor(values, 0.1, 3, torch.quint8),
        "sparse": values.to_sparse,
        "csr": values.to_sparse_csr,
        "meta": lambda: values.to("meta"),
        "negated": lambda: torch.complex(values, values).conj().imag,
        "conjugated": lambda: torch.complex(values, values).conj(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that sparse csr and quantization may change
        return made[form]()


@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "memory"])
@pytest.mark.parametrize(
    "form",
    ["quantized", "quint8", "per channel", "packed", "sparse", "csr", "meta", "negated", "conjugated"],
)
def test_tensors_of_another_form_are_called_what_they_are(tmp_path, form, zipped):
    kind = {"csr": "sparse", "per channel": "quantized", "packed": "quantized", "quint8": "quantized"}
    for key, state in (("out.2.bias", GOOD), ("a.weight", STATE)):
        content = dict(state) | {key: odd(form)}
        how = {"_use_new_zipfile_serialization": zipped}
        source = content if zipped is None else saved(tmp_path, content, **how)
        if zipped is None and form in ("negated", "conjugated"):
            assert torch.equal(read_weights(source).tensors[key], content[key])  # torch reads them itself
            continue
        with pytest.raises(CheckpointError, match=f"{kind.get(form, form)}.*{key}"):
            read_weights(source)
    # Outside the network's state dict such a tensor is ignored.
    content = {"model": GOOD, "other": odd(form)}
    assert read_weights(saved(tmp_path, content, **how) if zipped is not None else content).entry == "model"


class OfADevice:
    """An object pickled like an XLA tensor, which torch stores as a CPU tensor."""

    def __reduce__(self):
        arguments = (torch.ones(6), torch.float32, "xla:0", False)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments


def test_a_tensor_of_a_device_is_told_what_brings_it_here(tmp_path):
    refused(saved(tmp_path, GOOD | {"out.2.bias": OfADevice()}), r"device tensors \(out.2.bias\).*cpu\(\)")


def test_a_dtype_of_another_torch_is_named(tmp_path):
    path = saved(tmp_path, {"model": dict(STATE, **{"a.scale": torch.ones(3).to(torch.float8_e4m3fn)})})
    changed_archive(path, lambda _, content: content.replace(b"float8_e4m3fn", b"float8_e9m9fn"))
    refused(path, "torch.float8_e9m9fn.*a.scale", entry="model")


def changed_archive(path, changes, again=()):
    """Rewrite the members of an archive through `changes`, then append the members `again`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names
        for name, content in members.items():
            archive.writestr(name, changes(name, content))
        for name, content in again:
            archive.writestr(name, content)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("count", [2**31 - 1, 2**40, 2**62, 2**200, 5, 7])
def test_a_storage_of_a_false_length_is_refused_before_memory_is_taken(tmp_path, count, values):
    """The file has six values; the pickle gives another number, for both the storage and the shape."""
    path = saved(tmp_path, {"w": torch.arange(6.0), "v": torch.ones(2)}, pickle_protocol=0)

    def changes(name, content):
        if not name.endswith("data.pkl"):
            return content
        assert b"'0', 'cpu', 6)" in content and b"I6\n" in content
        return content.replace(b"'0', 'cpu', 6)", b"'0', 'cpu', %d)" % count).replace(
            b"I6\n", b"I%d\n" % count
        )

    changed_archive(path, changes)
    refused(path, "damaged", values=values)


@pytest.mark.parametrize("shape", [(2**61, 2**61), (0, 2**70), (2**40,)], ids=str)
def test_a_shape_that_no_memory_holds_is_refused(tmp_path, shape):
    """The file has one value, expanded by strides of 0."""
    path = saved(tmp_path, {"w": torch.ones(1).expand(2, 3)}, pickle_protocol=0)
    texts = {
        b"(I2\nI3\nt": b"(" + b"".join(b"I%d\n" % side for side in shape) + b"t",
        b"(I0\nI0\nt": b"(" + b"I0\n" * len(shape) + b"t",
    }

    def changes(name, content):
        for old, new in texts.items() if name.endswith("data.pkl") else ():
            assert content.count(old) == 1
            content = content.replace(old, new)
        return content

    changed_archive(path, changes)
    refused(path, "damaged")


def test_one_storage_of_two_lengths_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.arange(6.0), "v": torch.arange(6.0)}, pickle_protocol=0)

    def changes(name, content):
        return content.replace(b"'1', 'cpu', 6)", b"'0', 'cpu', 9)")

    changed_archive(path, changes)
    refused(path, "damaged")


@pytest.mark.parametrize("name", ["x/data/0", "x/data.pkl"])
def test_two_members_of_one_name_are_refused(tmp_path, name):
    path = saved(tmp_path, STATE)
    changed_archive(path, lambda _, content: content, again=[(name, b"other")])
    refused(path, name)


def test_a_packed_member_is_no_longer_than_packing_makes_it(tmp_path):
    """Deflate compresses at most 1032 bytes into one, so a directory that claims more is wrong."""
    path = saved(tmp_path, {"w": torch.zeros(2**20)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert torch.equal(read_weights(path).tensors["w"], torch.zeros(2**20))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")  # the directory; its first member is the pickle
    data[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    refused(path, "damaged")


def test_legacy_lengths_are_compared_with_the_file(tmp_path):
    path = saved(tmp_path, {"w": torch.arange(6.0)}, _use_new_zipfile_serialization=False, pickle_protocol=0)
    whole = path.read_bytes()
    for count in (7, 2**40, 2**62):
        data = whole.replace(b"'cpu', 6, None)", b"'cpu', %d, None)" % count)
        assert data.count(struct.pack("<q", 6)) == 1
        path.write_bytes(data.replace(struct.pack("<q", 6), struct.pack("<q", count)))
        refused(path, "truncated")
    # A string that claims a length of 2^40 bytes.
    stream = io.BytesIO()
    torch.save(STATE, stream, _use_new_zipfile_serialization=False, pickle_protocol=4)
    data = stream.getvalue()
    path.write_bytes(data[: data.rindex(b"\x80\x04")] + b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.")
    refused(path, "damaged")


def test_a_network_of_an_early_protocol_loads(tmp_path):
    net, _ = load_network(saved(tmp_path, GOOD, pickle_protocol=0), **ANSWERS)
    assert all(torch.equal(value, GOOD[key]) for key, value in net.state_dict().items())
