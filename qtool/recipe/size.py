"""Sizes of files as a recipe or a flag says them: 4.2GB, 500M, 3.9GiB, or bytes."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from qtool.problems import mistake, show

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS["k"] = UNITS["K"]
UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)}
"""Decimal, as llama.cpp counts them, unless an i says otherwise."""

PATTERN = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(?:((?:k|[KMGT]i?)?)B?)")


def parse_size(value: Any) -> int:
    """Bytes. Raises Mistakes: neither a size nor a positive number."""
    found = PATTERN.fullmatch(str(value)) if type(value) in (int, str) else None
    size = int(Decimal(found[1]) * UNITS[found[2] or ""]) if found else 0
    if not 0 < size < 10**16:
        raise mistake("no size", wanted="a number of bytes, or one such as 2G, 500M or 4.2GB", found=show(value))
    return size


SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["2G", "500M"]}]}
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(SCHEMA)]
