"""Start the page's server: on this machine only by default, with bounds on what it accepts."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping

import nicegui
from nicegui import ui
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from admfast.app.jobs import JobQueue
from admfast.app.models import AppModel
from admfast.app.page import show_page
from admfast.app.uploads import MOST_BYTES
from admfast.errors import invalid

MOST_BODY = MOST_BYTES + 100_000  # the file, and what a browser writes around it
RECONNECT_SECONDS = 20.0  # a page that lost its connection for less finds its images and jobs again
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" rx="1.5" '
    'fill="#3d5a80"/><path d="M2 6 4 2 6 6M2.8 4.6h2.4" stroke="#fff" fill="none"/></svg>'
)


class BodyLimit:
    """Middleware that refuses a request with a larger body before it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
            if not length.isdecimal() or int(length) > MOST_BODY:
                refusal = PlainTextResponse(f"at most {MOST_BODY} bytes, with their number", 413)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def serve(models: Mapping[str, AppModel], host: str, port: int, opens_browser: bool) -> None:
    """Serve the page until the process is interrupted.

    host, port: as `check_address` allows. opens_browser: open the page in the browser of this machine.
    """
    queue = JobQueue()
    app = nicegui.app
    app.add_middleware(BodyLimit)
    if is_local(host):  # a site elsewhere that gives itself this machine's address is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    app.on_shutdown(queue.close)
    shown_host = f"[{host}]" if ":" in host else host
    print(f"admfast app: http://{shown_host}:{port} (Ctrl-C ends it)", flush=True)
    ui.run(
        lambda: show_page(models, queue),
        host=host,
        port=port,
        title="admfast",
        favicon=ICON,
        dark=None,
        tailwind=False,
        show=opens_browser,
        reload=False,
        reconnect_timeout=RECONNECT_SECONDS,
        show_welcome_message=False,
    )


def check_address(host: str, port: int) -> None:
    """Raise InvalidArgument if no server can listen at this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            allowed = "a free port; another program has this one, or it is reserved"
            raise invalid("port", port, allowed) from None
        allowed = "127.0.0.1, 0.0.0.0 for all networks, or another address of this machine"
        raise invalid("host", host, allowed) from None


def is_local(host: str) -> bool:
    """Tell whether only this machine reaches this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
