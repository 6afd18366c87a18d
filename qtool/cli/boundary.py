"""The one error boundary: whatever a command raises becomes one line on stderr and a documented exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperArgument, TyperCommand, TyperOption

from qtool.cli.options import filled
from qtool.errors import QtoolError, cannot_write

INTERRUPTED = 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only writing can fail with."""


class Command(TyperCommand):
    """A command whose failures end here. Pass it as `cls` to `app.command`; its function has a `debug` parameter."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help, with the names that registries hold; see `TyperCommand.format_help`."""
        for parameter in self.params:
            if isinstance(parameter, TyperArgument | TyperOption) and parameter.help:
                parameter.help = filled(parameter.help)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; see `TyperCommand.invoke`."""
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except BrokenPipeError as error:
            _silence_stdout()
            raise typer.Exit(0) from error
        except (KeyboardInterrupt, Exception) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            code, line = verdict(error)
            _complain(line)
            raise typer.Exit(code) from error


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and message for what a command raised."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        error = cannot_write("the output", error)
    if isinstance(error, QtoolError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; run the same command again to continue"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for CUDA
        return 1, "out of memory; lower calibration.samples or calibration.length, or use --device cpu"
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return 1, f"unexpected {type(error).__name__}: {first_line}; run again with --debug for the traceback"


def _complain(line: str) -> None:
    if sys.stderr is not None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(line)}")


def _silence_stdout() -> None:
    """The reader of our output has gone; without this the interpreter complains while it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
