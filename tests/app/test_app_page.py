"""Tests of the page in a headless browser: a person's whole visit, which talks to this machine only."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from admfast.app.uploads import MOST_BYTES
from admfast.cli.main import main
from admfast.files.npz import read_samples
from tests.tools.browser import require_chromium

pytest.importorskip("nicegui", reason="the page's packages aren't installed: pip install -e '.[app]'")
browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = require_chromium()

ROOT = Path(__file__).resolve().parents[2]
# Starts the command and writes every address that its Python code asks for or connects to. uvloop's
# connections would not be seen.
RECORDED = """
import sys
sys.modules["uvloop"] = None
log = open(sys.argv[1], "a", buffering=1)
def record(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(arguments[0], file=log)
    elif event in ("socket.connect", "socket.sendto"):
        print(arguments[1][0] if isinstance(arguments[1], tuple) else "a local socket", file=log)
sys.addaudithook(record)
from admfast.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
HOME = {"127.0.0.1", "a local socket"}
LONG = {"steps": "250", "seeds": "0-31"}  # a job that takes a minute


class Server:
    """The command `admfast app` in a process of its own. addresses: the file of what it connected to."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.addresses = f"http://127.0.0.1:{self.port}/", folder / "addresses"
        # The library behaves in another way under pytest, which this variable shows.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RECORDED, str(self.addresses), "app", "--no-open", "--device", "cpu",
             "--port", str(self.port)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"admfast app: http://127.0.0.1:{self.port} (Ctrl-C ends it)\n", line
        for _ in range(100):  # it prints its address just before it listens
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def requested() -> list[str]:
    """The addresses of all requests and websockets of the browser."""
    return []


@pytest.fixture(scope="module")
def open_page(server, requested) -> Iterator[Callable]:
    """Return a function that opens the page in a new window of the browser."""
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_one():
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            page.set_default_timeout(60_000)
            page.on("request", lambda request: requested.append(request.url))
            page.on("websocket", lambda channel: requested.append(channel.url))
            page.on("dialog", lambda dialog: pytest.fail("a script in a text ran"))
            page.on("pageerror", lambda error: pytest.fail(f"an error in the page: {error}"))
            page.goto(server.url)
            page.get_by_role("button", name="Sample", exact=True).wait_for()
            page.wait_for_function("window.did_handshake")  # events from before are lost
            return page

        yield open_one
        browser.close()


@pytest.fixture
def page(open_page) -> Iterator:
    opened = open_page()
    yield opened
    opened.context.close()


def fill(page, **fields: str) -> None:
    """Type into the fields that are shown."""
    for label, text in fields.items():
        page.locator(f'input[aria-label="{label}"]:visible').first.fill(text)


def press(page, name: str) -> None:
    page.locator("button:visible", has_text=re.compile(f"^{name}$")).first.click()


def status(gallery, text: str) -> None:
    """Wait until the status of a gallery says this."""
    gallery.locator(".status", has_text=re.compile(text)).wait_for()


def gallery_of(page, index: int = 0):
    return page.locator(".gallery:visible").nth(index)


def pixels(gallery) -> np.ndarray:
    """Return the images that a gallery shows."""
    sources = [image.get_attribute("src") for image in gallery.locator("img.tile").all()]
    files = [io.BytesIO(base64.b64decode(source.partition(",")[2])) for source in sources]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def code(gallery, index: int) -> str:
    return gallery.locator(".code").nth(index).text_content()


def png(pixels: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"name": "own.png", "mimeType": "image/png", "buffer": file.getvalue()}


def test_a_class_is_clicked_and_its_images_form_and_their_lines_make_them(page, tmp_path, monkeypatch):
    fill(page, steps="12", seeds="0-3")
    # The pictures of the first tile, as they come.
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => { const tile = document.querySelector(".gallery img.tile");
            if (tile) window.seen.add(tile.src); })
            .observe(document.body, {subtree: true, childList: true, attributes: true}); }"""
    )
    press(page, "3")
    gallery = gallery_of(page)
    status(gallery, "finished in")
    assert len(page.evaluate("[...window.seen]")) >= 4, "an empty tile, some predictions, the image"
    captions = [caption.inner_text() for caption in gallery.locator("figcaption").all()]
    assert [caption.split() for caption in captions] == [["seed", f"{i}", "class", "3"] for i in range(4)]
    rendering = gallery.locator("img.tile").first.evaluate("e => getComputedStyle(e).imageRendering")
    assert rendering == "pixelated"
    shown = pixels(gallery)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    gallery.get_by_role("button", name="Copy").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == code(gallery, 0) and "--classes 3 --seeds 0-3 --steps 12" in copied
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(copied)[1:]) == 0
    [path] = tmp_path.glob("out/*.npz")
    np.testing.assert_array_equal(read_samples(path).images[..., 0], shown)
    names: dict = {}
    exec(code(gallery, 1), names)
    np.testing.assert_array_equal(names["images"].numpy()[..., 0], shown)


def test_guidance_is_dragged_and_samples_again_when_it_is_let_go(page):
    fill(page, steps="8", seeds="4-5")
    press(page, "all")
    gallery = gallery_of(page)
    status(gallery, "finished in")
    before, line = pixels(gallery), code(gallery, 0)
    track = page.locator(".q-slider:visible").first.bounding_box()
    y = track["y"] + track["height"] / 2
    page.mouse.move(track["x"] + track["width"] * 0.2, y)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * 0.5, y, steps=4)
    page.mouse.move(track["x"] + track["width"] * 0.9, y, steps=4)
    page.wait_for_timeout(400)
    assert code(gallery, 0) == line, "nothing is sampled while it is dragged"
    page.mouse.up()
    page.wait_for_function("line => document.querySelector('.code').textContent !== line", arg=line)
    status(gallery, "finished in")
    scale = float(re.search(r"--guidance (\S+)", code(gallery, 0))[1])
    assert 8.5 < scale < 9.5 and "--seeds 4-5" in code(gallery, 0)
    assert (pixels(gallery) != before).any()


def test_two_settings_are_compared_on_the_same_seeds(page):
    page.get_by_text("Compare two settings").click()
    page.locator('input[aria-label="solver"]:visible').nth(1).fill("ddim:eta=0.5")
    fill(page, steps="10", seeds="1-2")
    press(page, "7")
    first, second = gallery_of(page), gallery_of(page, 1)
    status(first, "finished in")
    status(second, "finished in")
    tops = [gallery.bounding_box()["y"] for gallery in (first, second)]
    assert tops[0] == tops[1] and first.bounding_box()["x"] < second.bounding_box()["x"]
    assert first.locator("figcaption").all_inner_texts() == second.locator("figcaption").all_inner_texts()
    assert "--out out-a/" in code(first, 0) and "--out out-b/" in code(second, 0)
    assert "--solver auto" in code(first, 0) and "--solver ddim:eta=0.5" in code(second, 0)
    assert (pixels(first) != pixels(second)).any()


def test_jobs_wait_in_sight_and_are_cancelled(page, open_page):
    other = open_page()
    fill(page, **LONG)
    press(page, "Sample")
    status(gallery_of(page), "step")
    fill(other, **LONG)
    press(other, "Sample")
    status(gallery_of(other), "waiting, number 1 in the queue")
    rows = page.locator(".row-line")
    rows.nth(1).wait_for()
    assert rows.count() == 2 and rows.nth(1).inner_text().startswith("waits, number 1")
    rows.nth(1).get_by_role("button", name="Cancel").click()
    status(gallery_of(other), "^cancelled$")
    press(other, "Sample")
    gallery_of(page).get_by_role("button", name="Cancel").click()
    status(gallery_of(page), "^cancelled at step [0-9]+ of 250$")
    status(gallery_of(other), "step")  # its turn
    other.context.close()  # its job ends with it
    page.get_by_text("Queue: empty").wait_for()


def test_an_image_is_uploaded_and_enlarged(page):
    page.get_by_role("tab", name="Enlarge").click()
    digit = np.full((60, 90, 3), 255, np.uint8)
    digit[5:55, 40:50] = 0
    page.locator("input[type=file]").first.set_input_files(png(digit))
    page.get_by_text("90x60 pixels, cut to the middle square, resized to 8x8, made grey").wait_for()
    page.locator("label:visible, .q-toggle:visible", has_text="invert").first.click()
    page.get_by_text("made grey, inverted").wait_for()
    press(page, "1")
    fill(page, steps="6")
    press(page, "Enlarge")
    gallery = gallery_of(page)
    status(gallery, "finished in")
    assert pixels(gallery).shape == (1, 32, 32) and "--low-res small.png" in code(gallery, 0)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save small.png").click()
    assert np.asarray(Image.open(saved.value.path())).shape == (8, 8)


def test_a_part_of_an_image_is_hidden_and_filled_in(page):
    page.get_by_role("tab", name="Restore").click()
    digit = np.zeros((32, 32), np.uint8)
    digit[4:28, 14:18] = 255
    page.locator("input[type=file]").last.set_input_files(png(digit))
    page.get_by_text("32x32 pixels", exact=True).wait_for()
    box, image = (page.locator(f"{name}:visible").bounding_box() for name in (".hidden-box", ".preview img"))
    assert box["width"] / image["width"] == pytest.approx(12 / 32, abs=0.02)
    press(page, "1")
    fill(page, steps="5", seeds="0")
    press(page, "Restore")
    gallery = gallery_of(page)
    status(gallery, "finished in")
    visible = np.ones((32, 32), bool)
    visible[10:22, 10:22] = False
    np.testing.assert_array_equal(pixels(gallery)[0][visible], digit[visible])
    assert "restore(pipe, image, box=(10, 10, 22, 22)" in code(gallery, 0)


def test_a_sample_brings_its_class_to_the_other_tabs(page):
    fill(page, steps="3", seeds="0-1")
    press(page, "3")
    status(gallery_of(page), "finished in")
    for tab in ("Enlarge", "Restore"):
        page.get_by_role("tab", name=tab).click()
        chosen = page.locator("button[aria-pressed=true]:visible")
        chosen.get_by_text("each in turn").wait_for()
        press(page, "Take the first sample")
        page.locator("button[aria-pressed=true]:visible", has_text=re.compile("^3$")).wait_for()
        assert chosen.count() == 1
        page.locator(".note:visible", has_text=re.compile("^32x32 pixels")).wait_for()
        fill(page, steps="3")
        press(page, tab)
        status(gallery_of(page), "finished in")
        captions = gallery_of(page).locator("figcaption").all_inner_texts()
        assert captions and all(caption.split()[-1] == "3" for caption in captions)


def test_hostile_values_are_lines(page):
    alert = gallery_of(page).get_by_role("alert")
    script = "<img src=x onerror=alert(1)>"
    wrong = [("seeds", "0-1000000"), ("seeds", script), ("steps", "1000000000"), ("steps", "")]
    for field, text in wrong:
        fill(page, **{field: text})
        press(page, "Sample")
        alert.wait_for()
        assert alert.inner_text().startswith(f"{field}=") and "\n" not in alert.inner_text()
        assert alert.locator("img").count() == 0
        fill(page, steps="3", seeds="0")
        press(page, "Sample")
        alert.wait_for(state="hidden")
        status(gallery_of(page), "finished in")


def test_hostile_uploads_are_lines(page, tmp_path):
    page.get_by_role("tab", name="Restore").click()
    press(page, "Restore")
    alert = gallery_of(page).get_by_role("alert")
    alert.get_by_text("choose a file first").wait_for()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(MOST_BYTES + 1))
    no_image = {"name": "../../<b>x.png", "mimeType": "image/png", "buffer": b"no image"}
    for file, line in [(no_image, "not an image in a format"), (large, "an image of at most 10 MB")]:
        page.locator("input[type=file]").last.set_input_files(file)
        alert.get_by_text(line).wait_for()
        assert alert.locator("b").count() == 0


def answer(server: Server, method: str, path: str = "/", **headers: str) -> int:
    """Return the HTTP status of a request without a body, whatever its headers say."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    with contextlib.closing(connection):
        return connection.getresponse().status


def test_the_server_refuses_large_bodies_and_other_names(server):
    upload = "/_nicegui/client/x/upload/1"
    assert answer(server, "GET") == 200
    assert answer(server, "POST", upload, content_length=f"{MOST_BYTES * 10}") == 413
    assert answer(server, "POST", upload, transfer_encoding="chunked") == 413
    assert answer(server, "GET", host="elsewhere.example") == 400


def test_nothing_talks_to_another_machine(page, server, requested):
    """The tests above visited everything."""
    hosts = {urlparse(url).netloc for url in requested if not url.startswith(("data:", "blob:"))}
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert any(url.startswith("ws:") for url in requested)
    assert set(server.addresses.read_text().splitlines()) <= HOME


def test_ctrl_c_ends_the_server_while_a_job_runs(page, server):
    """The last test of this file: it ends the server that the others share."""
    fill(page, **LONG)
    press(page, "Sample")
    status(gallery_of(page), "step")
    server.process.send_signal(signal.SIGINT)
    _, errors = server.process.communicate(timeout=15)
    assert server.process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1:] == ["admfast: interrupted by SIGINT"]
