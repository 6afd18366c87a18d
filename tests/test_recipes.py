"""The recipes that ship: each is read, planned for models of every family, and as large as its header says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from qtool import registry
from qtool.errors import PlanError
from qtool.plan import make_plan
from qtool.recipe.load import find_recipe, load_recipe
from tests.recipe.shapes import QWEN3_600M, SHIPPED, SMOLLM2_135M, TINY, Shapes, carriers

ALL = SHIPPED
LIMITED = {"gguf-fit", "w4-mixed", "nvfp4-fp8-mixed"}
"""Those that leave formats open and want a limit; tests/pipeline/test_allocate.py is about them."""
MIXES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")
SIBLINGS = {"fast-2bit-fit": "fast-2bit", "mixllm-fit": "mixllm"} | {f"gguf-{mix}-fit": f"gguf-{mix}" for mix in MIXES}
"""Those that may be as large as another."""
ENTRIES = [entry for entry in ALL if not entry.name.startswith("gguf-") and entry.name not in LIMITED]
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
    "w4a16-hqq": ("biased4-g64", "hqq"),
    "w2a16-decoupleq": ("biased2-g64", "gptq"),
    "nf4": ("nf4-g64", "rtn"),
    "ptqtp": ("ternary-g64", "rtn"),
    "fairy2i": ("codeless", "rtn"),
    "fast-2bit-fit": ("bilevel2-g32", "gptq"),
    "spqr": ("bilevel3-g64", "gptq"),
    "svdquant": ("int4-g64", "gptq", "int4-g64"),
    "nvfp4-arc": ("nvfp4", "gptq", "nvfp4+64"),
    "w6a6-qllm": ("int6-channel", "gptq", "int6-token"),
    "w4a8-affinequant": ("int4-g64", "learned", "int8-token"),
    "w4a4-flatquant": ("int4-channel", "gptq", "int4-token"),
    "mxfp4-batquant": ("mxfp4", "gptq", "mxfp4"),
    "w4a8-eaquant": ("int4-g64", "gptq", "int8-token"),
    "hif4": ("hif4", "gptq"),
    "abq-2": ("balanced2-g64", "gptq"),
    "zeroquant-fp": ("fp4-g64", "gptq", "fp8-token"),
    "mixllm": ("int4-g64-asym", "gptq", "int8-token"),
    "mixllm-fit": ("int4-g64-asym", "gptq", "int8-token"),
    "fast-2bit": ("bilevel2-g32", "gptq"),
    "double-rounding": ("int4-g64", "gptq"),
    "gwq": ("int3-g64", "rtn"),
    "db-llm": ("binary-g64", "rtn"),
    "w4a16-smoothquant-plus": ("int4-g64-asym", "rtn"),
    "w8a8-outliertune": ("int8-channel", "rtn", "int8-tensor"),
    "w8a8-repquant": ("int8-channel", "rtn", "int8-tensor"),
    "w4a4-mergequant": ("int4-channel", "gptq", "int4-tensor"),
    "w4a4-llm-fp4": ("fp4-channel", "rtn", "fp4-tensor"),
    "w4a4-comet": ("int4-g64", "rtn", "int4-g64"),
    "w4a8kv4-qoq": ("qoq-g128", "gptq", "int8-token"),
    "w8a16": ("int8-channel", "rtn"),
    "w8a16k4-ksort": ("int8-channel", "rtn"),
    "w8a8-int8": ("int8-channel", "rtn", "int8-token"),
    "w4a16-awq": ("int4-g64", "rtn"),
    "w8a8-int8-smooth": ("int8-channel", "rtn", "int8-token"),
    "mxfp4-hadamard": ("mxfp4", "gptq", "mxfp4"),
    "w8a8-int8-static": ("int8-channel", "rtn", "int8-tensor"),
    "fp8-static": ("fp8-tensor", "rtn", "fp8-tensor"),
    "w4a8": ("int4-g128", "gptq", "int8-token"),
    "w4a8-int8": ("int4-g128", "gptq", "int8-token"),
    "fp8-static-kv": ("fp8-tensor", "rtn", "fp8-tensor"),
    "w4a8kv4": ("int4-g128", "gptq", "int8-token"),
    "w4a8-fp8": ("int4-g128", "gptq", "fp8-token"),
    "w4a16-gptq-layout": ("int4-g128", "gptq"),
    "w4a16-awq-layout": ("int4-g64", "gptq"),
    "w3a16-gptq": ("int3-g64", "gptq"),
    "w3a16-gptq-lowrank": ("int3-g64", "gptq"),
    "w4a16-best": ("int4-g64", "learned"),
    "w3a16-best": ("int3-g64", "learned"),
    "w2a16-best": ("int2-g64", "learned"),
    "w4a16-signround": ("int4-g64", "learned"),
    "w4a16-guidedquant": ("int4-g64", "gptq"),
    "w2a16-efficientqat": ("int2-g64", "learned"),
    "w2a16-gsq": ("int2-g64", "learned"),
    "w4a16-adaround": ("int4-g64", "learned"),
    "w4a16-flexround": ("int4-g64", "learned"),
    "w4a16-lrq": ("int4-g64", "learned"),
    "w4a16-omniquant": ("int4-g64", "learned"),
    "nvfp4-best": ("nvfp4", "learned"),
    "mxfp4-best": ("mxfp4", "learned"),
    "w2a16-gptq": ("int2-g64", "gptq"),
    "fp8-dynamic": ("fp8-channel", "rtn", "fp8-token"),
    "fp8-block": ("fp8-block", "rtn", "fp8-g128"),
    "fp6": ("fp6-channel", "rtn"),
    "mxfp8": ("mxfp8", "rtn", "mxfp8"),
    "mxfp4": ("mxfp4", "gptq"),
    "nvfp4": ("nvfp4", "gptq"),
    "nvfp4-w4a4": ("nvfp4", "gptq", "nvfp4"),
    "nvint4": ("nvint4", "gptq"),
    "mixed-fp8-int4": ("int4-g128", "gptq", "fp8-token"),
}
"""Name -> formats of weights and, where these are rounded, inputs, and method, of the decoder blocks' linear layers."""
ATTENTION = {"mixed-fp8-int4": ("fp8-channel", "rtn", "fp8-token")}
"""The same of q, k, v and o, where they are treated in another way."""
LAYOUTS = {
    "w8a16k4-ksort": "qtool",
    "w4a8kv4-qoq": "qtool",
    "w4a4-comet": "qtool",
    "w4a4-llm-fp4": "qtool",
    "w4a4-mergequant": "qtool",
    "w4a16-hqq": "mlx",
    "w2a16-decoupleq": "mlx",
    "nf4": "qtool",
    "ptqtp": "qtool",
    "db-llm": "qtool",
    "spqr": "qtool",
    "svdquant": "qtool",
    "nvfp4-arc": "qtool",
    "w6a6-qllm": "qtool",
    "w4a4-flatquant": "qtool",
    "mxfp4-batquant": "qtool",
    "hif4": "qtool",
    "abq-2": "qtool",
    "zeroquant-fp": "qtool",
    "mixllm": "qtool",
    "mixllm-fit": "qtool",
    "fast-2bit": "qtool",
    "fast-2bit-fit": "qtool",
    "fairy2i": "qtool",
    "double-rounding": "qtool",
    "gwq": "qtool",
    "fp6": "qtool",
    "w4a8kv4": "qtool",
    "nvint4": "qtool",
    "w3a16-gptq-lowrank": "qtool",
    "w4a16-gptq-layout": "gptq",
    "w4a16-awq-layout": "awq",
}
"""Recipes that do not write compressed-tensors."""
UNTURNED = "hidden states of .* models cannot be turned", "models have none of the places that it works on"
REFUSED = {
    ("w4a8kv4-qoq", "gemma2"): UNTURNED[0],
    ("w4a8kv4-qoq", "gemma3_text"): UNTURNED[0],
    ("w4a8kv4-qoq", "qwen3"): UNTURNED[1],
    ("w4a8kv4-qoq", "qwen3_moe"): UNTURNED[1],
    **{("w8a16k4-ksort", family): UNTURNED[1] for family in ("gemma3_text", "qwen3", "qwen3_moe")},
}
"""Recipe and family -> why a rewrite of the one cannot work on the other."""
MODELS = {"SmolLM2-135M": SMOLLM2_135M, "Qwen3-0.6B": QWEN3_600M}


def each(test, entries=ENTRIES):
    """Runs a test once for every one of `ENTRIES`."""
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])(test)


def every(test):
    """Runs a test once for every recipe that ships."""
    return each(test, ALL)


parsed = cache(load_recipe)


def planned(name, config):
    recipe = parsed(name)
    return make_plan(recipe, Shapes(config), carriers(recipe))


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
    limit = r" --(fit|bits) \S+" if entry.name in LIMITED else ""
    assert re.match(rf"#     qtool quantize MODEL --recipe {entry.name}{limit} -o OUT\n#\n# Size: ", rest)
    assert "Needs no calibration data." in purpose or "Calibrates on 128 x 512 tokens" in purpose


@each
def test_blocks_get_the_format_and_method_of_the_name(entry):
    for p in planned(entry.name, UNTIED).layers:
        if p.module.block is not None:
            attends = entry.name in ATTENTION and p.module.role in "qkvo"
            label, method, *inputs = (ATTENTION if attends else WANTED)[entry.name]
            assert (p.format.label, p.method.name(), p.fallback) == (label, method, None)
            assert (p.activations and p.activations.label) == (inputs[0] if inputs else None)


@each
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_outside_the_blocks(entry, tied):
    outside = {p.module.role: p.label for p in planned(entry.name, UNTIED | {"tie_word_embeddings": tied}).layers}
    assert outside["embedding"] == "kept"
    assert outside.get("head") == (None if tied else "kept")


@every
def test_no_family_needs_a_warning(entry):
    layout = "gguf" if entry.name.startswith("gguf") else LAYOUTS.get(entry.name, "compressed-tensors")
    for family in registry.names("checkpoint/families"):
        config, refusal = UNTIED | EXPERTS | {"model_type": family}, REFUSED.get((entry.name, family))
        if entry.name == "mxfp4-hadamard" and registry.load("checkpoint/families", family).mixture:
            refusal = "its runtimes cannot be told to do hadamard-32 to inputs; qtool can"
        if refusal:
            with pytest.raises(PlanError, match=refusal):
                planned(entry.name, config)
            continue
        made = planned(entry.name, config)
        assert (family, made.warnings, made.artifacts) == (family, (), (layout,))


@every
def test_data_is_needed_where_the_header_says_so(entry):
    made = planned(entry.name, UNTIED)
    needs = any(p.needs for p in made.layers) or any(transform.needs for transform in made.recipe.transforms)
    calibration, text = made.recipe.calibration, " ".join(entry.path.read_text().split())
    assert (calibration.samples, calibration.length) == (128, 512)
    recipe = made.recipe
    asked = " ".join(map(repr, (recipe.method, recipe.transforms, recipe.finish))).lower()
    if "learned" in asked or "distill" in asked:
        assert "Calibrates on 128 x 512 tokens, three quarters built-in prose, the others source code." in text
        assert [(source.data, source.weight) for source in calibration.data] == [("builtin", 3), ("code", 1)]
    else:
        assert needs == ("Calibrates on 128 x 512 tokens of built-in prose." in text)
        assert calibration.data == "builtin"


def test_budgets_are_those_of_recipes_that_leave_formats_open():
    assert {entry.name for entry in ALL if parsed(entry.name).budget} == LIMITED | SIBLINGS.keys()
    assert all((b := parsed(name).budget).size is b.bits is b.kld is b.like is None for name in LIMITED)
    for name, mix in SIBLINGS.items():
        budget, formats = parsed(name).budget, {p.format for p in planned(mix, UNTIED).layers if p.format}
        assert (budget.like, budget.against) == (mix, (mix,))
        assert formats <= {candidate.weights for candidate in budget.formats}  # so that the mix itself is a choice


@each
def test_size_is_what_the_header_says(entry):
    stated = re.search(
        r"^# Size: ([\d.]+) bits per .*; tensors of ([-.\w]+): ([\d.]+) MB of ([\d.]+) MB\.$",
        entry.path.read_text(),
        re.M,
    )
    model = Shapes(MODELS[stated[2]])
    made = planned(entry.name, MODELS[stated[2]])
    assert float(stated[3]) == pytest.approx(made.predicted_bytes / 1e6, abs=0.051)
    assert float(stated[4]) == pytest.approx(sum(model.info(n).nbytes for n in model.names()) / 1e6, abs=0.1)
    (up,) = (p for p in planned(entry.name, UNTIED).layers if p.module.name == "model.layers.1.mlp.up_proj")
    n, k = up.module.shape
    per_row = 16 if "and 16 per row" in stated[0] else 0
    codes = up.bits - sum(residual.storage_bits(n, k) for residual in up.residuals)
    assert codes == pytest.approx(float(stated[1]) * n * k + per_row * n, rel=2e-4)


BEST = {entry.name: entry for entry in ALL if entry.name.endswith("-best")}


@pytest.mark.parametrize("name", BEST)
def test_quality_and_time_are_those_of_the_table_of_what_learns(name):
    """Read from docs/learning.md, where a test compares the table with what was measured."""
    lines = (Path(__file__).parents[1] / "docs" / "learning.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    text, stem = BEST[name].path.read_text(), name.removesuffix("-best")
    numbers = re.search(
        r"(?m)^# Quality: KL divergence ([\d.]+) on .*, ([\d.]+) on .*; GPTQ ([\d.]+), ([\d.]+) \(", text
    )
    seconds = re.search(
        r"(?m)^# Time: (\d+) s for .* and (\d+) s for distillation, on an H200 beside other runs \(", text
    )
    distill = yaml.safe_load(text)["finish"][0]["distill"]
    way = f"`epochs={distill['epochs']} rate={distill['rate']}`"
    (own,) = (row for row in rows if row[0] == name)
    (behind,) = (row for row in rows if row[:2] == [f"{name}, distilled", way])
    (before,) = (row for row in rows if row[0] in (f"{stem}-base", f"{stem.removesuffix('a16')}-gptq"))
    wanted = [float(cell) for cell in (*behind[2:4], *before[2:4])]
    assert [float(number) for number in numbers.groups()] == pytest.approx(wanted, abs=0.00051)
    assert seconds.groups() == (own[-1], behind[-1])


def test_groups_of_128_fall_back_where_rows_are_not_divisible():
    for name in ("w4a16-rtn", "w4a16-gptq-asym"):
        made = planned(name, SMOLLM2_135M)
        labels = {p.module.role: p.format.label for p in made.layers if p.format}
        end = "-asym" if name.endswith("asym") else ""
        assert labels["down"] == f"int4-g128{end}"
        assert {labels[role] for role in ("q", "k", "v", "o", "gate", "up")} == {f"int4-g64{end}"}
