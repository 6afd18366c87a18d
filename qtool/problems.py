"""Mistakes in a recipe as lines for its author: every model explains its own, all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qtool.errors import QtoolError, suggestion

Keys = tuple[str | int, ...]
"""Keys and list indices from a model's top to a value inside of it."""

WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "mapping_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "at least {min_length} entry",
    "string_too_short": "at least {min_length} character",
    "finite_number": "a finite number",
}
"""Kinds of pydantic's errors in our words; braces name entries of the error's context."""


class Mistakes(ValueError):
    """What is wrong inside one mapping or value, each with the path from there."""

    def __init__(self, found: Sequence[tuple[Keys, str]]) -> None:
        super().__init__("; ".join(f"{dotted(path)}: {text}" if path else text for path, text in found))
        self.found = tuple(found)


def mistake(what: str, *, wanted: object = None, found: object = None, hint: str | None = None) -> Mistakes:
    """One mistake about the value itself, worded like every other error of qtool."""
    return Mistakes([((), str(QtoolError(what, wanted=wanted, found=found, hint=hint)))])


def checked(model: type[BaseModel], value: Any, validate: Callable[[Any], Any] | None = None) -> Any:
    """Validates strictly: types are not converted.

    Args:
        model: what the value should be.
        value: plain data from a recipe.
        validate: another way to `model.model_validate(value, strict=True)`.

    Raises:
        Mistakes: everything that is wrong in it.
    """
    try:
        return validate(value) if validate else model.model_validate(value, strict=True)
    except ValidationError as error:
        raise Mistakes(explain(error, model, value)) from None


def explain(error: ValidationError, model: type[BaseModel], value: Any) -> list[tuple[Keys, str]]:
    """Pydantic's errors about `value` as (path, text); alternatives of a union become one entry."""
    texts: list[tuple[Keys, str]] = []
    wants: dict[Keys, tuple[list[str], Any]] = {}
    for entry in error.errors(include_url=False):
        path, cause = _real(entry["loc"], value), entry.get("ctx", {}).get("error")
        if isinstance(cause, Mistakes):
            texts += [((*path, *inner), text) for inner, text in cause.found]
        elif entry["type"] == "extra_forbidden":
            texts.append((path, f"unknown key; {suggestion(str(path[-1]), list(model.model_fields))}"))
        elif entry["type"] == "missing":
            texts.append((path, f"the key {entry['loc'][-1]!r} is missing"))
        elif cause is not None:
            texts.append((path, str(cause)))
        elif entry["type"] != "too_short" or not entry["input"]:  # entries that are wrong themselves are not counted
            wanted = WANTED.get(entry["type"], entry["msg"]).format(**entry.get("ctx", {}))
            wants.setdefault(path, ([], entry["input"]))[0].append(wanted.replace("True", "true"))
    for path, (wanted_any, found) in wants.items():
        quote = "; put it in quotes" if wanted_any == ["a string"] and isinstance(found, bool | int | float) else ""
        texts.append((path, f"wanted {' or '.join(wanted_any)}, found {show(found)}{quote}"))
    return texts


def _real(loc: Sequence[str | int], value: Any) -> Keys:
    """The parts of pydantic's location that exist in the value; the others name alternatives of a union."""
    path: list[str | int] = []
    for key in loc:
        keys = (
            value.keys() if isinstance(value, Mapping) else range(len(value)) if isinstance(value, tuple | list) else ()
        )
        if key in keys:
            value = value[key]
            path.append(key)
    return tuple(path)


def show(value: Any) -> str:
    """A value as an author wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        text = "a mapping with " + ", ".join(map(str, value)) if value else "an empty mapping"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: Keys) -> str:
    """`("layers", 2, "weights")` -> `layers[2].weights`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")
