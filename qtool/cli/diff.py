"""`qtool diff`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import options
from qtool.cli.console import Console, document, result, table
from qtool.errors import printable
from qtool.report.units import size

if TYPE_CHECKING:
    from qtool.pipeline.diff import Diff, TensorDiff

WIDTH = 60
"""Characters of a metadata value that are shown."""


def command(
    first: Annotated[
        str,
        typer.Argument(metavar="A", help="A checkpoint or artifact; errors are relative to it.", show_default=False),
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor that differs.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what differs between two models: types, sizes, values of tensors in decibels, metadata.

    Example: `qtool diff ./SmolLM2-135M ./SmolLM2-135M-w4`
    """
    with Console(quiet) as console:
        from qtool.pipeline import diff as stage

        found = stage.run(first, second, console)
    if json:
        document(found.model_dump(mode="json"))
    else:
        result(show(found, tensors))


def show(diff: Diff, tensors: bool) -> str:
    """Sizes, then a line per pair of types (or per tensor), then metadata."""
    from qtool.pipeline.diff import groups

    found = groups(diff)
    a, b = (size(n) for n in diff.nbytes)
    lines = [f"A  {diff.sources[0]}: {diff.kinds[0]}, {a}", f"B  {diff.sources[1]}: {diff.kinds[1]}, {b}"]
    same = len(diff.tensors) - sum(map(len, found.values()))
    lines.append(f"{same} of {len(diff.tensors)} tensors are the same")
    if found:
        rows = [row(group, f"{len(group)} tensors") for group in found.values()]
        if tensors:
            rows = [row([t], printable(t.name)) for group in found.values() for t in group]
        lines.append(table(["", "A", "B", "size A", "size B", "median dB", "worst dB"], rows, frozenset({3, 4, 5, 6})))
    for letter, names in zip("AB", diff.only, strict=True):
        lines += [f"only in {letter}: {', '.join(map(printable, names))}"] if names else []
    lines += [f"{printable(key)}: {shown(x)} | {shown(y)}" for key, (x, y) in diff.metadata.items()]
    return "\n".join(lines)


def row(group: Sequence[TensorDiff], name: str) -> list[str]:
    """Tensors of one pair of types."""
    from statistics import median  # it takes long to import

    errors = [t.error_db for t in group]
    sizes = [size(sum(t.bits[side] for t in group) / 8) for side in (0, 1)]
    return [name, *group[0].types, *sizes, f"{median(errors):.1f}", f"{min(errors):.1f}"]


def shown(value: object) -> str:
    """A metadata value, shortened; "-" for nothing."""
    text = "-" if value is None else printable(str(value))
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
