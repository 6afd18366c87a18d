"""Sizes of files as a recipe or a flag says them: 2G, 500M, or bytes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from qtool.recipe.problems import mistake, show

UNITS = {"": 1, "M": 10**6, "G": 10**9}
"""Decimal, as llama.cpp counts them."""


def parse_size(value: Any) -> int:
    """Bytes. Raises Mistakes: neither a size nor a positive number."""
    found = re.fullmatch(r"([1-9]\d{0,14})([MG]?)", str(value)) if type(value) in (int, str) else None
    if found is None:
        raise mistake("no size", wanted="a number of bytes, or one such as 2G or 500M", found=show(value))
    return int(found[1]) * UNITS[found[2]]


SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["2G", "500M"]}]}
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(SCHEMA)]
