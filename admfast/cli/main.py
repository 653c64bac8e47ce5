"""The command line: `admfast COMMAND ...`; every user error is one line and exit status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from admfast import _interrupt
from admfast.cli.fetch import run_fetch
from admfast.cli.info import run_info
from admfast.cli.inspect import run_inspect
from admfast.cli.models import run_models
from admfast.cli.sample import run_sample
from admfast.cli.verify import run_verify
from admfast.errors import AdmfastError
from admfast.files.atomic import output_error

app = typer.Typer(
    name="admfast",
    help="ADM diffusion models: sample, verify, inspect, fetch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("sample")(run_sample)
app.command("inspect")(run_inspect)
app.command("models")(run_models)
app.command("fetch")(run_fetch)
app.command("info")(run_info)
app.command("verify")(run_verify)

USER_ERROR, INTERRUPTED = 2, _interrupt.INTERRUPTED
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What typer raises for bad usage. Newer versions carry their own copy of click, older ones import it; the
# common base is reached through a class that both export.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    _interrupt.end()
    command = typer.main.get_command(app)
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        result = command.main(args=args, prog_name="admfast", standalone_mode=False)
        print(end="", flush=True)
    except UsageProblem as error:
        context = getattr(error, "ctx", None)
        if error.format_message().startswith("Usage:"):  # type: ignore[attr-defined]
            print(error.format_message())  # type: ignore[attr-defined]
            return USER_ERROR
        outside = context is None or context.parent is None
        where = "admfast" if outside else f"admfast {context.info_name}"  # type: ignore[union-attr]
        print(f"{where}: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
        return USER_ERROR
    except AdmfastError as error:
        print(f"admfast: {_by_flag(str(error), command, args)}", file=sys.stderr)
        return USER_ERROR
    except (typer.Abort, KeyboardInterrupt):
        result = INTERRUPTED
    except (BrokenPipeError, SystemExit) as gone:
        if isinstance(gone, SystemExit) and not isinstance(gone.__context__, BrokenPipeError):
            raise
        # The reader has gone (as with `| head`), which typer turns into an exit: nothing is wrong. Keep
        # Python from saying so when it flushes at the end.
        _drop_output()
        return 0
    except OSError as error:
        # Everything else that is written goes through `files`, which raises OutputError.
        if error.errno not in OUTPUT_ERRORS:
            raise
        print(f"admfast: {output_error('standard output', error)}", file=sys.stderr)
        _drop_output()
        return USER_ERROR
    if result == INTERRUPTED:  # some versions of typer raise at Ctrl-C, others return this
        print("admfast: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _by_flag(message: str, command: Any, args: Sequence[str]) -> str:
    """An error of the form `name=value: ...` under the name of the command's option: `--name=value: ...`."""
    name, separator, _ = message.partition("=")
    flag = "--" + name.replace("_", "-")
    parameters = getattr(command.commands.get(args[0]) if args else None, "params", [])
    known = any(flag in parameter.opts for parameter in parameters)
    return "--" + message.replace(name, name.replace("_", "-"), 1) if separator and known else message


def _drop_output() -> None:
    """Keep Python from failing again on what is left for a standard output that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
