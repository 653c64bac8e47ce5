"""The group of commands, `admfast COMMAND ...`; every user error prints one line and exits with status 2."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from admfast import __version__
from admfast.cli.main import INTERRUPTED
from admfast.cli.published_flags import translate_flags
from admfast.errors import AdmfastError, InvalidArgument, allowed_names, invalid

NAMES = (
    "sample", "run", "train", "evaluate", "app", "export", "inspect", "models", "fetch", "info", "verify",
)  # fmt: skip
USER_ERROR = 2
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# The base class of typer's usage errors. Newer versions of typer carry their own copy of click, older ones
# import it; this finds the class in both.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]


class Commands(typer.core.TyperGroup):
    """Commands that are imported when they are called: each is `run_NAME` in `admfast/cli/NAME.py`.

    A file with subcommands holds them in `commands`, a typer app.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(NAMES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return a command; None for an unknown name."""
        if cmd_name in NAMES and cmd_name not in self.commands:
            module = importlib.import_module(f"admfast.cli.{cmd_name}")
            typer_app = typer.Typer(
                add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
            )
            if hasattr(module, "commands"):
                typer_app = module.commands
            else:
                typer_app.command(cmd_name)(getattr(module, f"run_{cmd_name}"))
            self.add_command(typer.main.get_command(typer_app), cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names; the error for an unknown one lists all."""
        if args and args[0] not in NAMES and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. {allowed_names(args[0], NAMES)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with the first line of its docstring, which is read without an import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in NAMES])


def _summary(name: str) -> str:
    """Return the first line of the docstring of a command."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    [function] = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == f"run_{name}"]
    return (ast.get_docstring(function) or "").partition("\n")[0]


def _print_version(requested: bool) -> None:
    """Print the version and end the command, if `--version` was given."""
    if requested:
        print(f"admfast {__version__}")
        raise typer.Exit()


_group = typer.Typer(
    name="admfast",
    cls=Commands,
    help="ADM diffusion models: sample, app, run, train, export, verify, inspect, fetch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@_group.callback()
def _group_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Declare the options of `admfast` itself."""


app: Any = typer.main.get_command(_group)


def run(args: list[str]) -> int:
    """Run a command; return its exit status."""
    try:
        args = translate_flags(args) if args[:1] == ["sample"] else args
        result = app.main(args=args, prog_name="admfast", standalone_mode=False)
        print(end="", flush=True)
    except UsageProblem as error:
        if error.format_message().startswith("Usage:"):  # type: ignore[attr-defined]
            print(error.format_message())  # type: ignore[attr-defined]
            return USER_ERROR
        if (number_error := _number_error(error, args)) is not None:
            print(f"admfast: {number_error}", file=sys.stderr)
            return USER_ERROR
        name, _ = _find_command(args)
        print(f"{name}: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
        return USER_ERROR
    except AdmfastError as error:
        print(f"admfast: {_name_by_flag(str(error), args)}", file=sys.stderr)
        return USER_ERROR
    except typer.Abort:
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as closed:
        if isinstance(closed, SystemExit) and not isinstance(closed.__context__, BrokenPipeError):
            raise
        # The reader of our output is gone (as with `| head`), which typer turns into an exit. This is no
        # error: keep Python from reporting one when it flushes at the end.
        drop_output()
        return 0
    except OSError as error:
        # This can only be standard output: all files are written by `files`, which raises OutputError.
        if error.errno not in OUTPUT_ERRORS:
            raise
        from admfast.files.atomic import output_error

        print(f"admfast: {output_error('standard output', error)}", file=sys.stderr)
        drop_output()
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _find_command(args: Sequence[str]) -> tuple[str, Any]:
    """Return the full name of the innermost command that the words begin with, and that command."""
    name, command = "admfast", app
    no_context: Any = None
    for word in args:
        inner = command.get_command(no_context, word) if isinstance(command, typer.core.TyperGroup) else None
        if inner is None:
            break
        name, command = f"{name} {word}", inner
    return name, command


def _number_error(error: Exception, args: Sequence[str]) -> InvalidArgument | None:
    """Return the error `--name=value: allowed` for a value that isn't a number; typer's omits the value."""
    if not isinstance(error, typer.BadParameter):
        return None
    text = error.format_message()  # its wording depends on typer's version
    allowed = "a whole number" if "integer" in text else "a number"
    for flag in getattr(error.param, "opts", ()) if re.search("integer|number|float", text) else ():
        for position, word in reversed(list(enumerate(args))):  # the last one counts
            name, separator, value = word.partition("=")
            if name == flag and (separator or position + 1 < len(args)):
                return invalid(flag, value if separator else args[position + 1], allowed)
    return None


def _name_by_flag(message: str, args: Sequence[str]) -> str:
    """Return an error `name=value: ...` as `--name=value: ...` if the command has that option."""
    name, separator, _ = message.partition("=")
    flag = "--" + name.replace("_", "-")
    _, command = _find_command(args)
    has_flag = any(flag in parameter.opts for parameter in command.params)
    return "--" + message.replace(name, name.replace("_", "-"), 1) if separator and has_flag else message


def drop_output() -> None:
    """Send further standard output to the null device; standard error too if it is the same file."""
    null_device, stdout = os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    if os.path.sameopenfile(stdout, sys.stderr.fileno()):
        os.dup2(null_device, sys.stderr.fileno())
    os.dup2(null_device, stdout)
