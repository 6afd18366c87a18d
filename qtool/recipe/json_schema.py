"""The grammar of recipes as JSON Schema, so that editors complete and check them while they are written.

It follows from the models and the registries: whatever format, method or artifact exists is in it, with its options.
https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import re
import sys
from inspect import cleandoc
from typing import Any

from pydantic import BaseModel

from qtool import registry
from qtool.recipe.schema import Recipe

ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", re.MULTILINE)
"""One entry of a docstring's "Attributes:" section."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, `extends` included."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions |= {
        "Format": _formats(),
        "Method": _named("methods", "How codes are chosen: a method's"),
        "Residual": _named("residuals", "What is kept beside the codes: a residual's"),
        "Transform": _named("transforms", "A rewrite of the model: a transform's"),
        "Spec": _named("stages", "What is done behind the last block: a stage's"),
    }
    for part in (schema, *definitions.values()):
        _describe(part, part["description"])
    for name in registry.names("artifact"):
        definitions["Export"]["properties"] |= _options(registry.load("artifact", name).Options)["properties"]
    definitions["Export"]["additionalProperties"] = False
    definitions["Export"]["properties"]["to"]["enum"] = registry.names("artifact")
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Begins with another recipe, by path or by the name of one that ships; what is said here wins.",
    }
    del definitions["Budget"]["required"]  # a recipe that extends another says what differs
    schema["required"] = ["recipe", "name"]
    schema["anyOf"] = [{"required": ["layers"]}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _formats() -> dict[str, Any]:
    """Any registered format: a shorthand, or a mapping with `type`."""
    words: list[str] = []
    mappings = []
    for name in registry.names("formats"):
        family = registry.load("formats", name)
        options = _options(family)
        words += family.examples if options.get("required") else [name, *family.examples]
        options["properties"] = {"type": {"const": name}, **options["properties"]}
        options["required"] = ["type", *options.get("required", [])]
        mappings.append(options)
    return {
        "description": "A format: a shorthand such as int4-g128 or q4_0, or a mapping with type and its options.",
        "anyOf": [{"type": "string", "examples": words}, *mappings],
    }


def _named(room: str, what: str) -> dict[str, Any]:
    """Any registered thing of a room: its name, or a mapping from its name to its options."""
    names = registry.names(room)
    mappings = []
    for name in names:
        options = _options(registry.load(room, name))
        mappings.append(
            {
                "type": "object",
                "description": options["description"],
                "properties": {name: options},
                "required": [name],
                "additionalProperties": False,
            }
        )
    description = f"{what} name, or a mapping from its name to its options."
    return {"description": description, "anyOf": [{"enum": names}, *mappings]}


def _options(model: type[BaseModel]) -> dict[str, Any]:
    """The options of one registered class, described by its module's first line and its bases' docstrings."""
    schema = model.model_json_schema()
    schema.pop("$defs", None)  # of the method that a method of blocks starts from: the recipe's own is meant
    for base in model.__mro__:
        _describe(schema, base.__doc__ or "")
    if (listed := getattr(model, "shorthand", None)) is not None:
        schema |= {"type": ["object", "array"], "items": schema["properties"][listed]["items"]}
    schema["description"] = (sys.modules[model.__module__].__doc__ or "").partition("\n")[0]
    return schema


def _describe(schema: dict[str, Any], docstring: str) -> None:
    """Hands what a docstring's "Attributes:" section says to the properties that it is about."""
    text, _, attributes = cleandoc(docstring).partition("Attributes:")
    schema["description"] = text.strip()
    for names, description in ATTRIBUTE.findall(attributes):
        for name in names.split(", "):
            if name in schema.get("properties", {}):
                schema["properties"][name].setdefault("description", re.sub(r"\s+", " ", description))
