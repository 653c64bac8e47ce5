"""`admfast app`: start the local web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admfast import checks
from admfast.app.models import load_models
from admfast.errors import Unavailable

LARGEST_PORT = 65535


def run_app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A system or a weights file to offer too; can be repeated (default: only those that ship)."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the released files of these systems (default: none).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if there is one).")
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to serve: this machine's own, or 0.0.0.0 to let other machines in."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve, 1 to 65535.")] = 8400,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Do not open a browser (default: open one).")
    ] = False,
) -> None:
    """Sample, compare, enlarge and restore images on a local web page."""
    checks.whole_number("port", port, 1, LARGEST_PORT)
    try:
        from admfast.app.server import check_address, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "admfast":
            raise
        raise Unavailable(f'{error.name} is not installed: pip install "admfast[app]"') from None
    check_address(host, port)
    serve(load_models(model or (), weights, device), host, port, not no_open)
