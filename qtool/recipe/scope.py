"""Where a rule applies: `blocks:` chooses decoder blocks, `when:` the models.

    blocks: first 4         the first four; last 4 the last four
    blocks: first 1/8       block i of n if i < n/8; last 1/8 if i >= 7n/8; divisions round down, as in llama.cpp
    blocks: every 3rd       every third of those that no entry before it chose
    blocks: 0-3             a range, both ends included; or one number
    blocks: [first 1/8, last 1/8, every 3rd]

The last one is llama.cpp's `use_more_bits`: i < n/8, or i >= 7n/8, or (i - n/8) % 3 == 2.
Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from qtool.problems import Keys, mistake, show
from qtool.recipe.strict import Strict

ENTRY = re.compile(r"(first|last) (\d{1,5})(?:/(\d{1,5}))?|every (\d{1,5})(?:st|nd|rd|th)|(\d{1,5})(?:-(\d{1,5}))?")
"""One entry of `blocks:`."""
COUNT = re.compile(r"(>=|<=|!=|>|<|)(\d{1,9})")
"""A condition on a number."""
COMPARE = {"": operator.eq, ">=": operator.ge, "<=": operator.le, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
CHOICES = "first 4, last 1/8, every 3rd, 0-3, 7, or a list of such"


@dataclass(frozen=True)
class ModelFacts:
    """What conditions can ask of a model and a recipe.

    Attributes:
        blocks: decoder blocks.
        gqa: query heads per key/value head.
        experts: per block; 0 in a dense model.
        tied: whether the output layer uses the token embedding's matrix.
        calibrated: whether a method of the recipe measures the inputs of layers.
    """

    blocks: int
    gqa: int
    experts: int
    tied: bool
    calibrated: bool


def _parse_blocks(value: Any) -> tuple[str, ...]:
    """Entries as text; a single one is a list of one."""
    entries = value if isinstance(value, list | tuple) else (value,)
    for entry in entries:
        found = ENTRY.fullmatch(str(entry)) if type(entry) in (int, str) else None
        end, number, parts, every, start, stop = found.groups("") if found else [""] * 6
        if end:
            possible = 0 < int(number) <= int(parts or number)
        else:
            possible = int(every) > 0 if every else bool(start) and int(start) <= int(stop or start)
        if not possible:
            raise mistake("no choice of blocks", wanted=CHOICES, found=show(entry))
    if not entries:
        raise mistake("no choice of blocks", wanted=CHOICES, found="an empty list")
    return tuple(map(str, entries))


def _parse_count(value: Any) -> str:
    if type(value) not in (int, str) or not COUNT.fullmatch(str(value)):
        raise mistake(
            "no condition on a number", wanted='a whole number, or a comparison such as ">=4"', found=show(value)
        )
    return str(value)


BLOCK_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["first 1/8", "every 3rd"]}]
}
Blocks = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_blocks),
    WithJsonSchema({"anyOf": [*BLOCK_SCHEMA["anyOf"], {"type": "array", "items": BLOCK_SCHEMA, "minItems": 1}]}),
]
Count = Annotated[
    str,
    BeforeValidator(_parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": [">=4", "!=8"]}]}),
]


def chosen(entries: Sequence[str], count: int) -> tuple[int, ...]:
    """The blocks that `blocks:` names, of `count`, in ascending order; those of a range that do not exist included."""
    found: set[int] = set()
    for entry in entries:
        match = ENTRY.fullmatch(entry)
        assert match is not None  # checked when the recipe was read
        end, number, parts, every, start, stop = match.groups()
        if every:
            found.update([i for i in range(count) if i not in found][int(every) - 1 :: int(every)])
        elif start:
            found.update(range(int(start), int(stop or start) + 1))
        else:
            whole, size = int(parts or 0), int(number)
            if end == "first":
                found.update(range(size * count // whole if whole else min(size, count)))
            else:
                found.update(range((whole - size) * count // whole if whole else max(0, count - size), count))
    return tuple(sorted(found))


class When(Strict):
    """Conditions on the model; the rule is left out unless all of them hold. Numbers are compared, as in ">=4".

    Attributes:
        blocks: decoder blocks of the model.
        gqa: query heads per key/value head.
        experts: experts per block; 0 in a dense model.
        tied: whether the output layer uses the token embedding's matrix.
        calibrated: whether a method of the recipe measures the inputs of layers.
    """

    blocks: Count | None = None
    gqa: Count | None = None
    experts: Count | None = None
    tied: bool | None = None
    calibrated: bool | None = None

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """No condition at all is a mistake."""
        return [] if value else [((), f"wanted a condition: {', '.join(cls.model_fields)}")]

    def holds(self, facts: ModelFacts) -> bool:
        """True if every condition does."""
        known = asdict(facts)
        return all(_compare(wanted, known[key]) for key, wanted in self if wanted is not None)


def _compare(wanted: str | bool, found: int) -> bool:
    if isinstance(wanted, bool):
        return wanted == found
    match = COUNT.fullmatch(wanted)
    assert match is not None  # checked when the recipe was read
    return bool(COMPARE[match[1]](found, int(match[2])))
