"""Text that qtool did not write inside a Markdown page: names of folders, recipes, what a file says of itself."""

from __future__ import annotations

import re


def escape_markdown(text: object) -> str:
    """Text that Markdown shows as it is, also in a table cell."""
    return re.sub(r"([\\`*_\[\]<>|&~#])", r"\\\1", " ".join(str(text).split()))


def code_span(text: object) -> str:
    """Inline code, also in a table cell: a fence longer than any run of backticks inside."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall(r"`+", line)), default=0) + 1)
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fence(text: str, language: str) -> str:
    """A code block that its content cannot close."""
    ticks = "`" * max(3, max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
