"""A local server of files that misbehaves on request, for tests of downloads."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """A server of `files`, by name. Each word of `plan` is the fault of one of the next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
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
        name = self.path.removeprefix("/files/").partition("?")[0]
        if plan == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{self.path}?signed")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if name not in server.files or plan == "404":
            return self.send_error(404)
        if plan.isdigit():
            return self.send_error(int(plan))
        if plan == "silent":
            time.sleep(1.5)
            return None
        data, start, status = server.files[name], 0, 200
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


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server for a block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
