"""`qtool inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli.console import Console, document, result, table
from qtool.errors import printable
from qtool.report.units import size

if TYPE_CHECKING:
    from qtool.pipeline.inspect import Contents, StoredTensor
    from qtool.pipeline.measured import Measurements

WIDTH = 160
"""Characters of a key-value that are shown."""


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint, artifact, or file of measurements: folder, file or hub id.",
            show_default=False,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what is in a checkpoint or an artifact: types, sizes, bits per weight by role, metadata.

    Of a file that `qtool calibrate` or llama-imatrix wrote, it shows what was measured on each input.

    Example: `qtool inspect ./SmolLM2-135M-w4`
    """
    from qtool.pipeline import inspect as stage
    from qtool.pipeline import measured

    with Console(quiet):
        found = measured.run(path) or stage.run(path)
    if json:
        document(found.model_dump(mode="json"))
    elif isinstance(found, measured.Measurements):
        result(show_measured(found))
    else:
        result(show(found, tensors))


def show_measured(found: Measurements) -> str:
    """What it was measured on, then a line per input."""
    lines = [f"{found.source}: {found.kind}", *(f"{key}: {listed(value)}" for key, value in found.about.items())]
    rows = [
        [
            printable(i.name),
            f"{i.channels:,}",
            f"{i.tokens:,}",
            f"{i.rms:.4g}",
            "-" if i.largest is None else f"{i.largest:.4g}",
        ]
        for i in found.inputs
    ]
    header = ["input", "channels", "tokens", "rms", "largest"]
    return "\n".join([*map(shortened, lines), "", table(header, rows, frozenset({1, 2, 3, 4}))])


def show(contents: Contents, tensors: bool) -> str:
    """Metadata, then a line per role and type, then one per tensor if wanted."""
    lines = [
        f"{contents.source}: {contents.kind}, {contents.family}",
        *(f"{key}: {value}" for key, value in (contents.header or contents.metadata).items()),
    ]
    lines = [shortened(line) for line in lines]
    if len(contents.parts) > 1:
        lines += [f"part: {name}, {size(nbytes)}" for name, nbytes in contents.parts.items()]
    lines += [f"files: {', '.join(contents.files) or 'none'}", ""]
    header = ["role", "type", "inputs", "blocks", "tensors", "parameters", "bits each", "size"]
    total = ["total", "", "", "", *sums(len(contents.tensors), contents.parameters, contents.bits)]
    lines.append(table(header, [*map(row, contents.roles), total], frozenset({4, 5, 6, 7})))
    if tensors:
        each = [[t.name, t.type, "x".join(map(str, t.shape)), size(t.bits / 8)] for t in contents.tensors]
        lines += ["", table(["tensor", "type", "shape", "size"], each, frozenset({3}))]
    return "\n".join(lines)


def listed(value: object) -> object:
    """Entries of a list with commas between them."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def shortened(line: str) -> str:
    """What a file says of itself, harmless and not too long."""
    line = printable(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def row(stored: StoredTensor) -> list[str]:
    """A line of the table."""
    where = [stored.name, stored.type, stored.activations or "-", ranges(stored.blocks) or "-"]
    return [*where, *sums(stored.tensors, stored.parameters, stored.bits)]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers: `0-3, 6, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def sums(tensors: int, parameters: int, bits: int) -> list[str]:
    """The columns that add up."""
    return [str(tensors), f"{parameters:,}", f"{bits / parameters:.3f}", size(bits / 8)]
