"""`qtool`: the Typer app. A command parses, calls one stage of `qtool.pipeline`, and prints its result.

Nothing that is imported here imports torch: each command imports its stage inside its body, so `--help` stays quick.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import re
import sys
from contextlib import suppress
from typing import Annotated

import typer

from qtool import __version__, errors
from qtool.cli import calibrate, compare, diff, evaluate, export, inspect, plan, quantize, recipes
from qtool.cli.boundary import ENDING, INTERRUPTED, Command, ParallelCommand, prepare_process

M_ARENA_MAX = -8
"""What glibc's malloc.h calls the number of heaps."""


def exit_codes() -> str:
    """The codes and what they mean, as a Markdown list, from the tree in the docstring of `qtool.errors`."""
    tree = re.findall(r"(\w+) +(\d+)  (.+)", errors.__doc__ or "")
    meanings = ["0 done", *(f"{code} {meaning}" for _, code, meaning in tree), f"{INTERRUPTED} interrupted"]
    meanings += [f"{128 + number} ended by {number.name}" for number in ENDING]
    return "Exit codes:\n\n" + "\n".join(f"* {line}" for line in meanings)


app = typer.Typer(
    name="qtool",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog=exit_codes(),
)
app.command("quantize", cls=ParallelCommand)(quantize.command)
app.command("calibrate", cls=ParallelCommand)(calibrate.command)
app.command("export", cls=Command)(export.command)
app.command("eval", cls=ParallelCommand)(evaluate.command)
app.command("plan", cls=Command)(plan.command)
app.command("inspect", cls=Command)(inspect.command)
app.command("compare", cls=Command)(compare.command)
app.command("diff", cls=Command)(diff.command)
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn model checkpoints into quantized artifacts, and prove what that cost.

    Start with `qtool recipes list`, look ahead with `qtool plan`, then run `qtool quantize`.
    """


def main() -> None:
    """Runs the command line."""
    # Threads of torch that wait for work should sleep: spinning, they take the cores from compiled kernels and from
    # other processes. Measured on two cores: 11 % of a GPTQ run alone, a factor of 5 beside another one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imports make a million objects that live as long as the process; looking for garbage among them, again and again
    # while they are made and once more at the end, took a quarter of a short run.
    gc.set_threshold(100_000, 20, 20)
    # Threads that come back from torch should not wait 5 ms for another's Python: 2 to 7 % of a GPTQ run.
    sys.setswitchinterval(1e-4)
    # One heap for all threads. With one for each, what one thread gives back others cannot have: 50 MB of a GPTQ run.
    with suppress(AttributeError, OSError, TypeError):  # glibc has the call, other C libraries do not
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    atexit.register(gc.freeze)
    prepare_process()
    app(prog_name="qtool")
