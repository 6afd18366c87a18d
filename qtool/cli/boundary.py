"""The one error boundary: whatever a command raises becomes one line on stderr and a documented exit code."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperArgument, TyperCommand, TyperOption

from qtool import limits
from qtool.cli import ranks
from qtool.cli.options import filled
from qtool.errors import QtoolError, UsageError, cannot_write, is_utf8
from qtool.numerics import private_folder

if TYPE_CHECKING:
    from qtool.numerics.threads.ranks import Ranks

INTERRUPTED = 128 + signal.SIGINT
ENDING = (signal.SIGHUP, signal.SIGTERM)
"""Signals that end a run as an interruption by the user does."""
AGAIN = "run the same command again to continue"
HEARD = threading.Event()
"""Set when a signal that ends the run has reached the interpreter."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only writing can fail with."""


class Ended(KeyboardInterrupt):
    """A signal of `ENDING` came; it goes the way of an interruption, so all that was begun is tidied up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


class Steady:
    """A text stream whose reader may go away: what nobody reads is dropped, for no run should end of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or does not."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what waits, or does not."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_process() -> None:
    """Has signals end commands in an orderly way, and keeps a broken stderr from ending them at all."""
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores hangups, and is to be obeyed
            signal.signal(number, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if sys.stderr is not None:
        sys.stderr = Steady(sys.stderr)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where triton would keep kernels
        os.environ.setdefault("TRITON_CACHE_DIR", str(private_folder() / "triton"))


def _end(number: int, _: FrameType | None) -> None:
    HEARD.set()
    raise Ended(number)


def _interrupt(_: int, __: FrameType | None) -> None:
    HEARD.set()
    raise KeyboardInterrupt


class Command(TyperCommand):
    """A command whose failures end here. Pass it as `cls` to `app.command`; its function has a `debug` parameter."""

    together = False
    """Whether several processes may run it together; their `Ranks` are in its context then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help, with the names that registries hold; see `TyperCommand.format_help`."""
        for parameter in self.params:
            if isinstance(parameter, TyperArgument | TyperOption) and parameter.help:
                parameter.help = filled(parameter.help)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; see `TyperCommand.invoke`."""
        if ranks.launched() > 1:
            return self.invoke_together(ctx)
        if (jobs := ctx.params.get("jobs") or 1) > 1:
            with ranks.started(jobs):
                return self.invoke_together(ctx)
        if limits.quota() < math.inf:  # torch takes the machine's cores, and they would wait for each other
            os.environ.setdefault("OMP_NUM_THREADS", str(limits.cores()))
        try:
            refuse_other_encodings(ctx.params)
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

    def invoke_together(self, ctx: Any) -> Any:
        """Runs the command in one of several processes; the first to fail says why, and all end."""
        try:
            with ranks.joined() as ctx.obj, ranks.watched(HEARD, partial(end_unheard, ctx.obj)):
                if not self.together:
                    raise UsageError(f"qtool {ctx.info_name}", wanted="one process", found="torchrun; run it without")
                refuse_other_encodings(ctx.params)
                result = super().invoke(ctx)
                ctx.obj.close()
                return result
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except (KeyboardInterrupt, Exception) as error:
            code, line = verdict(error)
            if isinstance(error, Ended):
                line = of_another(error.signal)
            if ctx.obj is None or ctx.obj.ended():
                if ctx.params.get("debug"):
                    traceback.print_exc()
                _complain(line)
            ranks.end(code)
            raise typer.Exit(code) from error


class ParallelCommand(Command):
    """A command that several processes may run together."""

    together = True


def of_another(number: signal.Signals) -> str:
    """What one of several processes says of a signal."""
    return f"ended by {number.name}, as by torchrun when another process has ended; {AGAIN}"


def end_unheard(of: Ranks, number: signal.Signals) -> None:
    """Ends a process of several at once whose interpreter does not hear of a signal."""
    if of.ended():
        _complain(of_another(number))
    ranks.end(128 + number)


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and message for what a command raised."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        error = cannot_write("the output", error)
    if isinstance(error, QtoolError):
        return error.exit_code, str(error)
    if isinstance(error, Ended):
        return 128 + error.signal, f"ended by {error.signal.name}; {AGAIN}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {AGAIN}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for CUDA
        return 1, "out of memory; lower calibration.samples or calibration.length, or use --device cpu"
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return 1, f"unexpected {type(error).__name__}: {first_line}; run again with --debug for the traceback"


def refuse_other_encodings(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that are not UTF-8, which no file that is written can name. Raises UsageError."""
    for name, value in arguments.items():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, str | Path) and not is_utf8(str(part)):
                raise UsageError(name.replace("_", " "), wanted="UTF-8", found=ascii(str(part)))


def _complain(line: str) -> None:
    if sys.stderr is not None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(line)}")


def _silence_stdout() -> None:
    """The reader of our output has gone; without this the interpreter complains while it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
