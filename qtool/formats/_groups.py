"""Which weights share a scale: groups of columns, whole rows, whole matrices, and blocks of rows and columns.

Shape letters: N rows, C columns of a slice, R rows and B columns of a block, T rows of blocks (N / R, rounded up),
G blocks side by side (C / B).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from qtool.formats._base import Format

Group = Annotated[int, Field(gt=0)] | Literal["channel", "token", "head", "tensor"]
"""Columns per scale, or "tensor": one for all, or "channel" (of a weight), "token" (of an input) and "head" (of a KV
cache): one a row."""
Scales = Literal["minmax", "search"] | Annotated[float, Field(gt=50, lt=100)]
"""How scales are chosen; a number is the percentage of `Format.ranges`."""
PATTERN = r"(?:g(?P<group>\d+)|b(?P<rows>\d+)x(?P<columns>\d+)|(?P<name>channel|token|head|tensor|block))"
BLOCK = 128
"""Rows and columns of the blocks that are called `block` without numbers, as DeepSeek-V3 has them."""


class Grouped(Format):
    """What follows from the fields `group`, `rows`, `scales` and `scale_dtype`, which subclasses have among theirs."""

    if TYPE_CHECKING:  # declared here in earnest, they would come before a subclass's own in schemas and documentation
        group: Group
        rows: int
        scales: Scales

    @property
    def group_columns(self) -> int | None:
        """See `Format.group_columns`."""
        return self.group if isinstance(self.group, int) else None

    @property
    def group_rows(self) -> int | None:
        """See `Format.group_rows`."""
        return None if self.group == "tensor" else self.rows

    @property
    def granularity(self) -> str | None:
        """See `Format.granularity`."""
        return self.group if isinstance(self.group, str) else None

    @property
    def ranges(self) -> str | float:
        """See `Format.ranges`."""
        return self.scales

    def at_run_time(self) -> Self:
        """See `Format.at_run_time`."""
        return self.model_copy(update={"scales": "minmax", "scale_dtype": "fp32"})


def spell(group: int | str, rows: int) -> str:
    """How shorthands call it: g128, channel, b16x16, block."""
    if isinstance(group, str):
        return group
    if rows == 1:
        return f"g{group}"
    return "block" if rows == group == BLOCK else f"b{rows}x{group}"


def parse(match: re.Match[str]) -> dict[str, int | str]:
    """The fields `group` and `rows` that a match of PATTERN spells."""
    if match["name"] == "block":
        return {"group": BLOCK, "rows": BLOCK}
    if match["name"]:
        return {"group": match["name"]}
    if match["group"]:
        return {"group": int(match["group"])}
    return {"group": int(match["columns"]), "rows": int(match["rows"])}


def check(group: int | str, rows: int) -> None:
    """Raises ValueError: blocks of several rows without a number of columns."""
    if rows > 1 and not isinstance(group, int):
        raise ValueError(f"blocks of {rows} rows need a number of columns as group, not {group}")


def count(group: int | str, rows: int, n: int, k: int) -> int:
    """How many scales a matrix of n rows and k columns has."""
    if group == "tensor":
        return 1
    return -(-n // rows) * (k // group if isinstance(group, int) else 1)


def tile(w: Tensor, importance: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Makes a row of each row of blocks, so that a block is a group of R * B columns.

    Args:
        w: [N, C]; rows of zeros fill up the last blocks.
        importance: [C] or None.
        rows: R.
        columns: B, divides C.

    Returns:
        ([T, G * R * B], [G * R * B] or None).
    """
    if rows == 1:
        return w, importance
    n, c = w.shape
    filled = pad(w, (0, 0, 0, -n % rows)) if n % rows else w
    blocks = filled.reshape(-1, rows, c // columns, columns).transpose(1, 2)
    if importance is not None:
        importance = importance.view(-1, 1, columns).expand(-1, rows, -1).reshape(-1)
    return blocks.reshape(blocks.shape[0], -1), importance


def untile(p: Tensor, rows: int, n: int) -> Tensor:
    """Gives every row its block's parameters: [T, G] -> [N, G]."""
    return p if rows == 1 else p.repeat_interleave(rows, dim=0)[:n]
