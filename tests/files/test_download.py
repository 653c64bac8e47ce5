"""Tests of downloading, from a local server that misbehaves on request."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from admfast.errors import CheckpointError, InvalidArgument, OutputError
from admfast.files import download as downloading
from admfast.files.download import RemoteFile, download
from tests.tools.file_server import serving

NAME, PART = "weights.bin", "weights.bin.part"
DATA = random.Random(0).randbytes(3_073_000)  # the client gets it in several reads
SERVER_S = "the server's own length"


@pytest.fixture
def server():
    with serving() as server:
        server.files[NAME] = DATA
        yield server


@pytest.fixture
def get(server, tmp_path):
    facts: dict[str, object] = {}

    def run(check=lambda path: (), url=f"{server.url}/{NAME}", **options):
        options = {"wait": 0.0, "timeout": 5.0, "progress": False, **options}
        return download(RemoteFile(url, **facts), tmp_path / NAME, check, **options)

    run.facts = facts
    return run


@pytest.fixture
def published(get):
    """Return a function that sets the size and hashes that are known of the file."""

    def give(**facts):
        get.facts.clear()
        get.facts.update(facts)

    return give


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_fetches_a_file(get, server, tmp_path, system):
    done = get()
    assert done.path == tmp_path / NAME and done.path.read_bytes() == DATA
    assert done.url == f"{server.url}/{NAME}" and done.size == len(DATA)
    assert done.checked == (SERVER_S,)
    assert names(tmp_path) == [NAME]
    assert "Range" not in server.requests[0] and server.requests[0]["Accept-Encoding"] == "identity"


def test_what_is_there_is_replaced_only_when_asked_for(get, server, tmp_path):
    target = tmp_path / NAME
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
    assert names(tmp_path) == [NAME]


def test_a_later_fetch_goes_on_from_the_part(get, server, tmp_path, system):
    server.plan = ["cut"] * 3
    with pytest.raises(
        CheckpointError, match=f"ended early; .* of {len(DATA):,} bytes are kept in .*part: fetch again"
    ):
        get(retries=2)
    part = tmp_path / PART
    kept = part.stat().st_size
    assert 0 < kept < len(DATA) and part.read_bytes() == DATA[:kept]
    assert not (tmp_path / NAME).exists()
    assert get().path.read_bytes() == DATA
    assert server.requests[-1]["Range"] == f"bytes={kept}-"
    assert names(tmp_path) == [NAME]


def test_a_part_that_is_complete_already(get, server, tmp_path):
    (tmp_path / PART).write_bytes(DATA)
    assert get().path.read_bytes() == DATA
    assert len(server.requests) == 1


def test_a_part_that_is_longer_than_the_file_begins_anew(get, server, tmp_path):
    (tmp_path / PART).write_bytes(DATA + b"more")
    assert get().path.read_bytes() == DATA


def test_a_server_without_ranges_begins_anew(get, server, tmp_path):
    server.ranges = False
    (tmp_path / PART).write_bytes(b"?" * 1000)
    assert get().path.read_bytes() == DATA
    assert server.requests[0]["Range"] == "bytes=1000-"


def test_a_file_that_changed_on_the_server_begins_anew(get, server, tmp_path):
    server.plan = ["cut"]
    with pytest.raises(CheckpointError):
        get(retries=0)
    server.files[NAME], server.etag = DATA[::-1], '"two"'
    assert get().path.read_bytes() == server.files[NAME]


def test_a_server_without_names_for_versions(get, server, tmp_path):
    server.etag = None
    server.plan = ["cut"]
    assert get().path.read_bytes() == DATA
    assert "Range" in server.requests[1] and "If-Range" not in server.requests[1]
    assert names(tmp_path) == [NAME]


def test_a_redirected_download_is_resumed(get, server, tmp_path):
    (tmp_path / PART).write_bytes(DATA[:1000])
    server.plan = ["redirect"]
    assert get().path.read_bytes() == DATA
    assert [request["Range"] for request in server.requests] == ["bytes=1000-"] * 2


def test_a_wrong_range_is_not_spliced_in(get, server, tmp_path):
    (tmp_path / PART).write_bytes(DATA[:1000])
    server.plan = ["wrong range"]
    with pytest.raises(CheckpointError, match="asked for byte 1,000 on, the server sent 1005"):
        get()


def test_hashes_are_compared(get, published, tmp_path, system):
    published(size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest(), md5="0" * 32)
    assert get().checked == ("size", "sha256")
    published(md5=hashlib.md5(DATA).hexdigest())
    assert get(overwrite=True).checked == (SERVER_S, "md5")
    for facts in ({"sha256": "0" * 64}, {"md5": "0" * 32}):
        published(**facts)
        with pytest.raises(CheckpointError, match="not the published file: its (sha256|md5) is .*, not 0000"):
            get(overwrite=True)
        assert names(tmp_path) == [NAME], "only the old file should be left"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_positive(get, timeout):
    with pytest.raises(InvalidArgument, match="timeout=.*: seconds, more than 0"):
        get(timeout=timeout)


def test_a_spoiled_part_is_found_by_the_hash(get, published, tmp_path):
    published(sha256=hashlib.sha256(DATA).hexdigest())
    (tmp_path / PART).write_bytes(b"?" * 1000)
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
    assert get().checked == (SERVER_S, "md5")
    server.headers = {header: base64.b64encode(hashlib.md5(b"other").digest()).decode()}
    with pytest.raises(CheckpointError, match="its md5 is"):
        get(overwrite=True)
    server.headers = {header: "not base64!"}
    assert get(overwrite=True).checked == (SERVER_S,)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["404"], r"weights\.bin: the server has no such file \(404\)"),
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
    assert kept == ([PART] if plan[0] == "stall" else [])


def test_nobody_listens(get):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(CheckpointError, match="not reached: .*refused"):
        get(url=f"http://127.0.0.1:{port}/{NAME}")


def test_too_little_room_is_known_before_the_first_byte(get, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=f"{len(DATA):,} bytes are still to come, the disk has 1,000"):
        get()
    assert not (tmp_path / NAME).exists()


def test_a_disk_that_fills_keeps_the_part(get, server, tmp_path):
    program = f"""
        from pathlib import Path
        from admfast.errors import OutputError
        from admfast.files.download import RemoteFile, download
        try:
            download(RemoteFile("{server.url}/{NAME}"), Path("{NAME}"), progress=False)
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
    expected = f"{NAME}.part: not written: the file would exceed the largest size allowed here\n"
    assert done.stdout == expected, done.stderr
    part = (tmp_path / PART).read_bytes()
    assert part == DATA[: len(part)] and len(part) > 1_000_000
    assert get().path.read_bytes() == DATA
    assert server.requests[-1]["Range"] == f"bytes={len(part)}-"


def test_two_fetches_of_one_file_do_not_mix(get, tmp_path, system):
    with downloading._locked(tmp_path / PART) as file:
        file.write(b"x")
        file.flush()
        with pytest.raises(OutputError, match="another fetch is writing it"):
            get()
    assert (tmp_path / PART).read_bytes() == b"x"


def test_a_part_that_nobody_can_lock_is_not_called_another_fetch_s(get, tmp_path, monkeypatch):
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OutputError, match=f"{NAME}.part: not written") as caught:
        get()
    assert "another fetch" not in str(caught.value) and names(tmp_path) == []


@pytest.mark.parametrize(
    ("base", "url"),
    [
        (None, "http://x/a/weights.bin"),
        ("https://y/b", "https://y/b/weights.bin"),
        ("http://y/", "http://y/weights.bin"),
    ],
)
def test_a_mirror_replaces_the_folder_of_the_url(monkeypatch, base, url):
    monkeypatch.delenv("ADMFAST_MIRROR", raising=False)
    remote = RemoteFile("http://x/a/weights.bin", 3, "00", "11")
    assert remote.mirrored(base) == RemoteFile(url, 3, "00", "11")


def test_a_check_of_the_content_can_refuse_the_file(get, tmp_path, system):
    def refuse(path):
        assert path.read_bytes() == DATA
        raise CheckpointError(f"{path}: not a network")

    with pytest.raises(CheckpointError, match=f"^http.*/{NAME}: not a network; discarded$"):
        get(refuse)
    assert names(tmp_path) == []
    assert get(lambda path: ("content",)).checked == (SERVER_S, "content")
