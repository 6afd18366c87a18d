"""`qtool inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli.console import document, result, size, table

if TYPE_CHECKING:
    from qtool.pipeline.inspect import Contents, Stored


def command(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A checkpoint or artifact: folder, file or hub id.", show_default=False),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what is in a checkpoint or an artifact: types, sizes, bits per weight by role, metadata.

    Example: `qtool inspect ./SmolLM2-135M-w4`
    """
    from qtool.pipeline import inspect as stage

    contents = stage.run(path)
    if json:
        document(contents.model_dump(mode="json"))
    else:
        result(show(contents, tensors))


def show(contents: Contents, tensors: bool) -> str:
    """Metadata, then a line per role and type, then one per tensor if wanted."""
    lines = [
        f"{contents.source}: {contents.kind}, {contents.family}",
        *(f"{key}: {value}" for key, value in contents.metadata.items()),
        f"files: {', '.join(contents.files) or 'none'}",
        "",
    ]
    header = ["role", "type", "inputs", "tensors", "parameters", "bits each", "size"]
    total = ["total", "", "", *sums(len(contents.tensors), contents.parameters, contents.bits)]
    lines.append(table(header, [*map(row, contents.roles), total], frozenset({3, 4, 5, 6})))
    if tensors:
        each = [[t.name, t.type, "x".join(map(str, t.shape)), size(t.bits / 8)] for t in contents.tensors]
        lines += ["", table(["tensor", "type", "shape", "size"], each, frozenset({3}))]
    return "\n".join(lines)


def row(stored: Stored) -> list[str]:
    """A line of the table."""
    inputs = stored.activations or "-"
    return [stored.name, stored.type, inputs, *sums(stored.tensors, stored.parameters, stored.bits)]


def sums(tensors: int, parameters: int, bits: int) -> list[str]:
    """The columns that add up."""
    return [str(tensors), f"{parameters:,}", f"{bits / parameters:.3f}", size(bits / 8)]
