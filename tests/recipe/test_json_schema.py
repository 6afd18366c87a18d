"""The published JSON Schema says what the loader does, as far as JSON Schema can say it."""

from __future__ import annotations

import re

import pytest
import yaml

from qtool import registry
from qtool.errors import RecipeError
from qtool.recipe.json_schema import json_schema
from qtool.recipe.load import load_recipe
from tests.recipe.shapes import SHIPPED

SCHEMA = json_schema()
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
KNOWN = {"$schema", "$ref", "$defs", "title", "description", "default", "examples", "type", "const", "enum", "anyOf"}
KNOWN |= {
    "oneOf",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
}
KNOWN |= {"maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


def is_a(value, kind):
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def accepts(schema, value):
    """A validator for the words of JSON Schema that ours uses; a word that it does not know fails the test."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema and not accepts(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value):
        return False
    limits = {
        "type": lambda kind: any(is_a(value, one) for one in ([kind] if isinstance(kind, str) else kind)),
        "const": lambda only: type(value) is type(only) and value == only,
        "enum": lambda all_: any(type(value) is type(one) and value == one for one in all_),
        "anyOf": lambda parts: any(accepts(part, value) for part in parts),
        "oneOf": lambda parts: sum(accepts(part, value) for part in parts) == 1,
    }
    if isinstance(value, dict):
        rest = value.keys() - schema.get("properties", {}).keys()
        limits["required"] = lambda keys: value.keys() >= set(keys)
        limits["properties"] = lambda parts: all(accepts(parts[key], value[key]) for key in value if key in parts)
        limits["additionalProperties"] = lambda part: (
            not rest if part is False else all(accepts(part, value[k]) for k in rest)
        )
    elif isinstance(value, list):
        limits["items"] = lambda part: all(accepts(part, item) for item in value)
        limits["minItems"] = lambda count: len(value) >= count
    elif isinstance(value, str):
        limits["minLength"] = lambda count: len(value) >= count
        limits["pattern"] = lambda pattern: re.search(pattern, value) is not None
    elif is_a(value, "number"):
        limits |= {"minimum": lambda b: value >= b, "maximum": lambda b: value <= b}
        limits["multipleOf"] = lambda b: value % b == 0
        limits |= {"exclusiveMinimum": lambda b: value > b, "exclusiveMaximum": lambda b: value < b}
    return all(limit(schema[word]) for word, limit in limits.items() if word in schema)


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: entry.name)
def test_shipped_recipes_are_accepted(entry):
    assert accepts(SCHEMA, yaml.safe_load(entry.path.read_text()))


HEAD = {"recipe": 1, "name": "x"}
RULE = {"match": "*", "weights": "int4-g64"}


@pytest.mark.parametrize(
    "recipe",
    [
        HEAD | {"layers": [RULE]},
        HEAD | {"extends": "w4a16-rtn"},
        HEAD,
        HEAD | {"layers": []},
        HEAD | {"layers": [RULE], "export": [{"to": "qtool"}]},
        HEAD | {"layers": [RULE], "export": [{"to": "qtol"}]},
        HEAD | {"layers": [RULE], "kv_caches": "fp8-tensor"},
        HEAD | {"layers": [RULE], "kv_cache": "fp8-head"},
        HEAD | {"layers": [RULE], "kv_cache": {"type": "int", "bits": 4, "group": "channel"}},
        HEAD | {"layers": [RULE], "kv_cache": {"keys": "int4-channel", "values": "int4-token"}},
        HEAD | {"layers": [RULE], "kv_cache": {"keys": "int4-channel"}},
        HEAD | {"layers": [RULE], "kv_cache": {"keys": "int4-channel", "values": "int4-token", "queries": "fp8-head"}},
        HEAD | {"layers": [RULE | {"activations": {"type": "int", "bits": 8, "group": "tensor", "scales": 99.9}}]},
        HEAD | {"layers": [RULE | {"activations": {"type": "int", "bits": 8, "group": "tensor", "scales": 100}}]},
        HEAD | {"layers": [{"match": "*", "keep": True}]},
        HEAD | {"layers": [{"match": "*", "keep": "f64"}]},
        HEAD | {"layers": [{"match": "*", "weights": {"type": "int", "bits": 4, "group": 32, "symmetric": False}}]},
        HEAD | {"layers": [{"match": "*", "weights": {"type": "int", "bits": 9, "group": 32}}]},
        HEAD | {"layers": [{"match": "*", "weights": {"type": "int", "bits": 4, "group": 0}}]},
        HEAD | {"layers": [{"match": "*", "weights": {"type": "int", "bits": 4}}]},
        HEAD | {"layers": [{"match": "*", "weights": {"bits": 4, "group": 32}}]},
        HEAD | {"layers": [{"match": "*", "weights": {"type": "q4_0"}}]},
        HEAD | {"layers": [RULE | {"fallback": "error"}]},
        HEAD | {"layers": [RULE | {"method": "gptq"}]},
        HEAD | {"layers": [RULE | {"method": "gtpq"}]},
        HEAD | {"layers": [RULE | {"method": {"gptq": {"damp": 0.5}}}]},
        HEAD | {"layers": [RULE | {"method": {"gptq": {"damp": 0}}}]},
        HEAD | {"layers": [RULE | {"method": {"gptq": {"dmap": 0.5}}}]},
        HEAD | {"layers": [RULE], "calibration": {"data": [{"data": "builtin", "weight": 1}], "samples": 3}},
        HEAD | {"layers": [RULE], "calibration": {"data": []}},
        HEAD | {"layers": [RULE], "calibration": {"samples": "3"}},
        HEAD | {"layers": [RULE], "eval": {"text": "a.txt", "gates": {"kld": 1}}},
        HEAD | {"layers": [RULE], "eval": {"text": "a.txt", "gates": {"kld": "x"}}},
        HEAD | {"layers": [RULE], "eval": {"text": "a.txt", "gates": {"kdl": 1}}},
        HEAD | {"layers": [RULE], "method": {"rtn": {"importance": True}}},
        HEAD | {"layers": [RULE], "method": "gtpq"},
        HEAD | {"layers": [RULE], "fallback": "error"},
        HEAD | {"layers": [RULE], "fallback": 7},
        HEAD | {"layers": [RULE | {"blocks": "first 1/8"}]},
        HEAD | {"layers": [RULE | {"blocks": 3}]},
        HEAD | {"layers": [RULE | {"blocks": [0, "last 2", "every 3rd"]}]},
        HEAD | {"layers": [RULE | {"blocks": -1}]},
        HEAD | {"layers": [RULE | {"blocks": []}]},
        HEAD | {"layers": [RULE | {"blocks": True}]},
        HEAD | {"layers": [RULE | {"when": {"gqa": ">=4", "experts": 8, "tied": False}}]},
        HEAD | {"layers": [RULE | {"when": {"expert": 8}}]},
        HEAD | {"layers": [RULE | {"when": {"tied": "yes"}}]},
        HEAD | {"layers": [RULE], "export": [{"to": "gguf", "split_max_size": "2G"}]},
        HEAD | {"layers": [RULE], "export": [{"to": "gguf", "split_max_size": 0}]},
        {"recipe": 2, "name": "x", "layers": [RULE]},
    ],
    ids=str,
)
def test_schema_and_loader_agree(recipe, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    try:
        load_recipe(str(path))
        loads = True
    except RecipeError:
        loads = False
    assert accepts(SCHEMA, recipe) is loads


def test_every_registered_thing_is_offered():
    words, *formats = SCHEMA["$defs"]["Format"]["anyOf"]
    assert [f["properties"]["type"]["const"] for f in formats] == registry.names("formats")
    assert {"q4_0", "int4-g64", "int8-token"} <= set(words["examples"])
    names, *methods = SCHEMA["$defs"]["Method"]["anyOf"]
    assert names["enum"] == [name for m in methods for name in m["properties"]] == registry.names("methods")
    assert SCHEMA["$defs"]["Export"]["properties"]["to"]["enum"] == registry.names("artifact")


def test_every_key_is_described():
    bare = []

    def visit(schema, path):
        for key, part in schema.get("properties", {}).items():
            if not part.get("description") and "const" not in part:
                bare.append(f"{path}.{key}")
        for word in ("anyOf", "oneOf"):
            for part in schema.get(word, ()):
                visit(part, path)

    visit(SCHEMA, "")
    for name, part in SCHEMA["$defs"].items():
        assert part["description"], name
        assert "Attributes:" not in part["description"]
        visit(part, name)
    assert not bare
    assert re.search(r"first rule that\s+matches", SCHEMA["$defs"]["Rule"]["description"])
    kinds = {kind["properties"]["type"]["const"]: kind for kind in SCHEMA["$defs"]["Format"]["anyOf"][1:]}
    assert kinds["int"]["properties"]["symmetric"]["description"] == "no zero point."
