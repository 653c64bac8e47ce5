"""Tests of downloading, from a local server that misbehaves on request."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import importlib
import io
import os
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from admfast.checkpoints import fetch, fingerprint, shapes_of
from admfast.errors import CheckpointError, InvalidArgument, OutputError
from admfast.models.presets import MODELS, preset

fetching = importlib.import_module("admfast.checkpoints.fetch")  # in the package this name is the function
NAME = "64x64_classifier"
STATE = {"w": torch.arange(768_000.0).reshape(768, 1000)}


def saved(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


DATA = saved(STATE)  # about 3,073,000 bytes, which the client gets in several reads
FINGERPRINT = fingerprint(shapes_of(STATE))
SERVER_S, CONTENT = "the server's own length", ("zip checksums", "keys and shapes")


@pytest.fixture(autouse=True)
def model_of_the_data(monkeypatch):
    """Make the server's file the released one."""
    model = dataclasses.replace(preset(NAME), fingerprint=FINGERPRINT)
    monkeypatch.setitem(MODELS, NAME, model)


class Server(http.server.ThreadingHTTPServer):
    """A server of DATA as NAME.pt. Each word of `plan` is the fault of one of the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = DATA
        self.plan: list[str] = []
        self.requests: list[dict[str, str]] = []
        self.etag: str | None = '"one"'
        self.headers: dict[str, str] = {}
        self.ranges = True

    def handle_error(self, request, client_address):
        """Ignore errors: in these tests clients hang up on purpose."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        plan = server.plan.pop(0) if server.plan else ""
        if self.path != f"/files/{NAME}.pt" or plan == "404":
            return self.send_error(404)
        if plan.isdigit():
            return self.send_error(int(plan))
        if plan == "silent":
            time.sleep(1.5)
            return None
        data, start, status = server.data, 0, 200
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        if status == 206:
            first = start + 5 if plan == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        for key, value in server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        body = data[start:]
        if plan in ("cut", "reset", "stall"):
            body = body[: max(1, len(body) // 3)]
        self.wfile.write(body)
        self.wfile.flush()
        if plan == "stall":
            time.sleep(1.5)
        if plan == "reset":
            # With a linger time of 0, close() sends a reset, so the client sees an error and not an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.close()
        self.close_connection = True
        return None


@pytest.fixture
def server():
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()


@pytest.fixture
def get(server, tmp_path):
    def run(name=NAME, **options):
        options = {"base_url": server.url, "wait": 0.0, "timeout": 5.0, "progress": False, **options}
        return fetch(name, tmp_path, **options)

    return run


@pytest.fixture
def published(monkeypatch):
    """Return a function that gives the preset a size and hashes."""

    def give(**facts):
        model = dataclasses.replace(preset(NAME), **facts)
        monkeypatch.setattr(fetching, "preset", lambda name: model)

    return give


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_fetches_a_file(get, server, tmp_path, system):
    done = get()
    assert done.path == tmp_path / f"{NAME}.pt" and done.path.read_bytes() == DATA
    assert done.url == f"{server.url}/{NAME}.pt" and done.size == len(DATA)
    assert done.checked == (SERVER_S, *CONTENT)
    assert names(tmp_path) == [f"{NAME}.pt"]
    assert "Range" not in server.requests[0] and server.requests[0]["Accept-Encoding"] == "identity"


def test_takes_a_file_name_and_a_base_url_with_a_slash(get, server):
    assert get(f"{NAME}.pt", base_url=server.url + "/").size == len(DATA)


def test_the_mirror_of_the_environment(get, server, monkeypatch):
    monkeypatch.setenv("ADMFAST_MIRROR", server.url)
    assert get(base_url=None).url.startswith(server.url)
    monkeypatch.setenv("ADMFAST_MIRROR", "ftp://example.org")
    with pytest.raises(InvalidArgument, match="ADMFAST_MIRROR='ftp://example.org'"):
        get(base_url=None, overwrite=True)


def test_without_a_mirror_the_published_place_is_meant(monkeypatch):
    monkeypatch.delenv("ADMFAST_MIRROR", raising=False)
    assert fetching._url_of(preset(NAME), None) == preset(NAME).url
    assert preset(NAME).url.endswith(f"/diffusion/jul-2021/{NAME}.pt")


def test_what_is_there_is_replaced_only_when_asked_for(get, server, tmp_path):
    target = tmp_path / f"{NAME}.pt"
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        get()
    assert target.read_bytes() == b"mine" and server.requests == []
    server.plan = ["cut"]
    with pytest.raises(CheckpointError):
        get(overwrite=True, retries=0)
    assert target.read_bytes() == b"mine", "the old file was replaced before the new one was complete"
    get(overwrite=True)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("breaks", [["cut"], ["reset"], ["cut", "reset", "cut"], ["503", "cut"], ["429"]])
def test_a_broken_connection_is_taken_up_where_it_broke(get, server, tmp_path, breaks):
    server.plan = list(breaks)
    assert get().path.read_bytes() == DATA
    assert len(server.requests) == len(breaks) + 1
    if "cut" in breaks:
        resumed = server.requests[-1]
        assert int(resumed["Range"].removeprefix("bytes=").rstrip("-")) > 0
        assert resumed["If-Range"] == '"one"'
    assert names(tmp_path) == [f"{NAME}.pt"]


def test_a_later_fetch_goes_on_from_the_part(get, server, tmp_path, system):
    server.plan = ["cut"] * 3
    with pytest.raises(
        CheckpointError, match=f"ended early; .* of {len(DATA):,} bytes are kept in .*part: fetch again"
    ):
        get(retries=2)
    part = tmp_path / f"{NAME}.pt.part"
    kept = part.stat().st_size
    assert 0 < kept < len(DATA) and part.read_bytes() == DATA[:kept]
    assert not (tmp_path / f"{NAME}.pt").exists()
    assert get().path.read_bytes() == DATA
    assert server.requests[-1]["Range"] == f"bytes={kept}-"
    assert names(tmp_path) == [f"{NAME}.pt"]


def test_a_part_that_is_complete_already(get, server, tmp_path):
    (tmp_path / f"{NAME}.pt.part").write_bytes(DATA)
    assert get().path.read_bytes() == DATA
    assert len(server.requests) == 1


def test_a_part_that_is_longer_than_the_file_begins_anew(get, server, tmp_path):
    (tmp_path / f"{NAME}.pt.part").write_bytes(DATA + b"more")
    assert get().path.read_bytes() == DATA


def test_a_server_without_ranges_begins_anew(get, server, tmp_path):
    server.ranges = False
    (tmp_path / f"{NAME}.pt.part").write_bytes(b"?" * 1000)
    assert get().path.read_bytes() == DATA
    assert server.requests[0]["Range"] == "bytes=1000-"


def test_a_file_that_changed_on_the_server_begins_anew(get, server, tmp_path):
    server.plan = ["cut"]
    with pytest.raises(CheckpointError):
        get(retries=0)
    server.data, server.etag = saved({"w": STATE["w"] + 1}), '"two"'
    assert get().path.read_bytes() == server.data


def test_a_server_without_names_for_versions(get, server, tmp_path):
    server.etag = None
    server.plan = ["cut"]
    assert get().path.read_bytes() == DATA
    assert "Range" in server.requests[1] and "If-Range" not in server.requests[1]
    assert names(tmp_path) == [f"{NAME}.pt"]


def test_a_wrong_range_is_not_spliced_in(get, server, tmp_path):
    (tmp_path / f"{NAME}.pt.part").write_bytes(DATA[:1000])
    server.plan = ["wrong range"]
    with pytest.raises(CheckpointError, match="asked for byte 1,000 on, the server sent 1005"):
        get()


def test_hashes_are_compared(get, published, tmp_path, system):
    published(size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest(), md5="0" * 32)
    assert get().checked == ("size", "sha256", *CONTENT)
    published(md5=hashlib.md5(DATA).hexdigest())
    assert get(overwrite=True).checked == (SERVER_S, "md5", *CONTENT)
    for facts in ({"sha256": "0" * 64}, {"md5": "0" * 32}):
        published(**facts)
        with pytest.raises(CheckpointError, match="not the published file: its (sha256|md5) is .*, not 0000"):
            get(overwrite=True)
        assert names(tmp_path) == [f"{NAME}.pt"], "only the old file should be left"


@pytest.mark.parametrize(
    "data, said",
    [
        (b"not a zip" * 1000, "text, not a weights file"),
        (DATA[:-100], "truncated"),
        (DATA.replace(struct.pack("<f", 7.0), struct.pack("<f", 9.0), 1), "damaged: .* fails its checksum"),
        (saved({"w": torch.zeros(3)}), f"not {NAME}: .* keys missing .*1 key unexpected"),
    ],
    ids=["text", "cut", "a flipped value", "another model"],
)
def test_what_is_not_the_model_is_discarded(get, server, tmp_path, data, said, system):
    server.data = data
    with pytest.raises(CheckpointError, match=f"{said}.*; discarded") as caught:
        get()
    assert "\n" not in str(caught.value) and names(tmp_path) == []


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_positive(get, timeout):
    with pytest.raises(InvalidArgument, match="timeout=.*: seconds, more than 0"):
        get(timeout=timeout)


def test_a_spoiled_part_is_found_by_the_hash(get, published, tmp_path):
    published(sha256=hashlib.sha256(DATA).hexdigest())
    (tmp_path / f"{NAME}.pt.part").write_bytes(b"?" * 1000)
    with pytest.raises(CheckpointError, match="not the published file"):
        get()
    assert get().path.read_bytes() == DATA


def test_a_server_whose_file_has_another_size_is_refused_at_once(get, published, tmp_path):
    published(size=len(DATA) + 1)
    with pytest.raises(
        CheckpointError, match=f"server's file has {len(DATA):,} bytes, {len(DATA) + 1:,} are due"
    ):
        get()
    assert names(tmp_path) == []


@pytest.mark.parametrize("header", ["x-ms-blob-content-md5", "Content-MD5"])
def test_the_servers_own_hash_is_compared(get, server, header, tmp_path):
    server.headers = {header: base64.b64encode(hashlib.md5(DATA).digest()).decode()}
    assert get().checked == (SERVER_S, "md5", *CONTENT)
    server.headers = {header: base64.b64encode(hashlib.md5(b"other").digest()).decode()}
    with pytest.raises(CheckpointError, match="its md5 is"):
        get(overwrite=True)
    server.headers = {header: "not base64!"}
    assert get(overwrite=True).checked == (SERVER_S, *CONTENT)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["404"], r"64x64_classifier\.pt: the server has no such file \(404\)"),
        (["403"], "the server answered 403"),
        (["503"] * 2, "the server answered 503"),
        (["silent"] * 2, "no answer within 0.3 s"),
        (["stall"] * 2, "no byte came for 0.3 s"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_server_that_fails(get, server, tmp_path, plan, said, system):
    server.plan = list(plan)
    with pytest.raises(CheckpointError, match=said) as caught:
        get(retries=1, timeout=0.3)
    assert "\n" not in str(caught.value)
    kept = [name for name in names(tmp_path) if not name.endswith(".etag")]
    assert kept == ([f"{NAME}.pt.part"] if plan[0] == "stall" else [])


def test_nobody_listens(get):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(CheckpointError, match="not reached: .*refused"):
        get(base_url=f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("64x64_clasifier", {}, "nearest: 64x64_classifier"),
        ("digits32_diffusion", {}, "ships with the package"),
        (NAME, {"base_url": "file:///tmp"}, "http:// or https://"),
        (NAME, {"base_url": "C:\\models"}, "http:// or https://"),
    ],
)
def test_what_cant_be_fetched(get, server, name, options, said):
    with pytest.raises(InvalidArgument, match=said):
        get(name, **options)
    assert server.requests == []


def test_a_folder_that_is_missing(server, tmp_path):
    with pytest.raises(OutputError, match="the folder .* does not exist"):
        fetch(NAME, tmp_path / "no", base_url=server.url)


def test_too_little_room_is_known_before_the_first_byte(get, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=f"{len(DATA):,} bytes are still to come, the disk has 1,000"):
        get()
    assert not (tmp_path / f"{NAME}.pt").exists()


def test_a_disk_that_fills_keeps_the_part(server, tmp_path):
    program = f"""
        from admfast.checkpoints import fetch, fingerprint, shapes_of
        from admfast.errors import OutputError
        try:
            fetch("{NAME}", ".", base_url="{server.url}", progress=False)
        except OutputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)),
    )
    expected = f"{NAME}.pt.part: not written: the file would exceed the largest size allowed here\n"
    assert done.stdout == expected, done.stderr
    part = (tmp_path / f"{NAME}.pt.part").read_bytes()
    assert part == DATA[: len(part)] and len(part) > 1_000_000
    assert fetch(NAME, tmp_path, base_url=server.url, progress=False).path.read_bytes() == DATA
    assert server.requests[-1]["Range"] == f"bytes={len(part)}-"


def test_two_fetches_of_one_file_do_not_mix(get, tmp_path, system):
    with fetching._locked(tmp_path / f"{NAME}.pt.part") as file:
        file.write(b"x")
        file.flush()
        with pytest.raises(OutputError, match="another fetch is writing it"):
            get()
    assert (tmp_path / f"{NAME}.pt.part").read_bytes() == b"x"


def test_a_part_that_nobody_can_lock_is_not_called_another_fetch_s(get, tmp_path, monkeypatch):
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OutputError, match=f"{NAME}.pt.part: not written") as caught:
        get()
    assert "another fetch" not in str(caught.value) and names(tmp_path) == []
