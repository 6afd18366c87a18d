"""The recipes that ship: each is read, planned for models of every family, and as large as its header says."""

from __future__ import annotations

import re
from functools import cache

import pytest

from qtool import registry
from qtool.plan import make_plan
from qtool.recipe.load import find_recipe, list_recipes, load_recipe
from tests.recipe.shapes import SMOLLM2_135M, TINY, Shapes

ALL = list_recipes()
ENTRIES = [entry for entry in ALL if not entry.name.startswith("gguf-")]
"""Those that give one format to all blocks; tests/test_mixes.py is about the others."""
UNTIED = TINY | {"hidden_size": 256, "intermediate_size": 512}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
GROUPS = {"": 128, "-g64": 64, "-g32": 32}
W4A16 = {
    f"w4a16-{method}{group}{asymmetric}": (f"int4-g{columns}{asymmetric}", method)
    for method in ("rtn", "gptq")
    for group, columns in GROUPS.items()
    for asymmetric in ("", "-asym")
}
WANTED = W4A16 | {
    "w8a16": ("int8-channel", "rtn"),
    "w8a8-int8": ("int8-channel", "rtn"),
    "w3a16-gptq": ("int3-g64", "gptq"),
    "w2a16-gptq": ("int2-g64", "gptq"),
}
"""Name -> format and method of the decoder blocks' linear layers."""


def each(test, entries=ENTRIES):
    """Runs a test once for every one of `ENTRIES`."""
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])(test)


def every(test):
    """Runs a test once for every recipe that ships."""
    return each(test, ALL)


parsed = cache(load_recipe)


def planned(name, config):
    recipe = parsed(name)
    carriers = {export.to: registry.load("artifact", export.to)() for export in recipe.export}
    return make_plan(recipe, Shapes(config), carriers)


def test_all_of_them_ship():
    assert {entry.name for entry in ENTRIES} == set(WANTED)


@every
def test_names_agree_and_header_says_what_it_is_for(entry):
    recipe = load_recipe(entry.name)
    assert recipe.name == entry.name == find_recipe(entry.name).stem
    assert recipe.description == entry.description
    assert len(entry.description) <= 80
    text = entry.path.read_text()
    purpose, _, rest = text.partition("\n#\n")
    assert re.fullmatch(r"(# .+\n?)+", purpose)
    assert rest.startswith(f"#     qtool quantize MODEL --recipe {entry.name} -o OUT\n#\n# Size: ")
    assert "Needs no calibration data." in purpose or "Calibrates on 128 x 512 tokens" in purpose


@each
def test_blocks_get_the_format_and_method_of_the_name(entry):
    label, method = WANTED[entry.name]
    for p in planned(entry.name, UNTIED).layers:
        if p.module.block is not None:
            assert (p.format.label, p.method.name(), p.fallback) == (label, method, None)
            assert (p.activations and p.activations.label) == ("int8-token" if entry.name == "w8a8-int8" else None)


@each
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_outside_the_blocks(entry, tied):
    outside = {p.module.role: p.label for p in planned(entry.name, UNTIED | {"tie_word_embeddings": tied}).layers}
    assert outside["embedding"] == "kept"
    assert outside.get("head") == (None if tied else "kept")


@every
@pytest.mark.parametrize("family", registry.names("checkpoint/families"))
def test_no_family_needs_a_warning(entry, family):
    made = planned(entry.name, UNTIED | EXPERTS | {"model_type": family})
    assert made.warnings == ()
    assert made.artifacts == ("gguf" if entry.name.startswith("gguf") else "compressed-tensors",)


@every
def test_data_is_needed_where_the_header_says_so(entry):
    made = planned(entry.name, UNTIED)
    needs = any(p.method.needs for p in made.layers if p.method)
    assert needs == ("Calibrates on 128 x 512 tokens of built-in prose." in entry.path.read_text())
    calibration = made.recipe.calibration
    assert (calibration.data, calibration.samples, calibration.length) == ("builtin", 128, 512)


@each
def test_size_is_what_the_header_says(entry):
    stated = re.search(
        r"^# Size: ([\d.]+) bits per .*; tensors of SmolLM2-135M: ([\d.]+) MB of 269\.1 MB\.$",
        entry.path.read_text(),
        re.M,
    )
    made = planned(entry.name, SMOLLM2_135M)
    assert float(stated[2]) == pytest.approx(made.predicted_bytes / 1e6, abs=0.051)
    (up,) = (p for p in planned(entry.name, UNTIED).layers if p.module.name == "model.layers.1.mlp.up_proj")
    n, k = up.module.shape
    per_row = 16 if "and 16 per row" in stated[0] else 0
    assert up.bits == float(stated[1]) * n * k + per_row * n


def test_groups_of_128_fall_back_where_rows_are_not_divisible():
    for name in ("w4a16-rtn", "w4a16-gptq-asym"):
        made = planned(name, SMOLLM2_135M)
        labels = {p.module.role: p.format.label for p in made.layers if p.format}
        end = "-asym" if name.endswith("asym") else ""
        assert labels["down"] == f"int4-g128{end}"
        assert {labels[role] for role in ("q", "k", "v", "o", "gate", "up")} == {f"int4-g64{end}"}
