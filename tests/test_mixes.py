"""The GGUF mixes give every matrix the type that llama-quantize gives it.

`llama_type` says again, as one function, what the recipes say as rules. Its source is `llama_tensor_get_type_impl` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp (October 2026); published sizes are from the
README of tools/quantize there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import gguf
import pytest

from qtool.artifact.gguf._options import FILE_TYPES
from qtool.checkpoint.families.llama import Llama
from qtool.formats._spelling import parse_format
from qtool.plan import make_plan
from qtool.recipe.load import load_recipe
from tests.recipe.shapes import SHIPPED, SMOLLM2_135M, Shapes, carriers

BASE = {
    "q2_k_s": "q2_k",
    **{f"q3_k_{size}": "q3_k" for size in "sml"},
    **{f"q4_k_{size}": "q4_k" for size in "sm"},
    **{f"q5_k_{size}": "q5_k" for size in "sm"},
    "iq2_s": "iq2_xs",
    "iq2_m": "iq2_s",
    "iq3_xs": "iq3_s",
    "iq3_m": "iq3_s",
    "mxfp4_moe": "q8_0",
}
"""Mix -> the type that most matrices get, where the two differ in name."""
PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0")
MIXES = (*BASE, *PLAIN, "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq3_xxs", "iq3_s")
LEARNED = ("q4_k_m", "q3_k_m", "q2_k")
"""Those that have a recipe `gguf-MIX-best` as well, with learned codes."""
FITTED = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")
"""Those that have a sibling of equal size; tests/test_recipes.py is about it."""
LOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"), "f16"),
    "mxfp4": None,
}


@dataclass(frozen=True)
class Model:
    """What the choice depends on."""

    name: str
    blocks: int = 32
    gqa: int = 1
    experts: int = 0
    tied: bool = False
    family: str = "llama"

    def __str__(self):
        return self.name


MODELS = [
    Model("mha"),
    Model("gqa-2", gqa=2),
    Model("gqa-4", gqa=4),
    Model("gqa-8", gqa=8, blocks=28),
    Model("tied", tied=True, blocks=30),
    Model("tied-gqa-4", tied=True, gqa=4),
    Model("one-block", blocks=1),
    Model("seven-blocks", blocks=7),
    Model("eight-blocks", blocks=8),
    Model("70B", blocks=80, gqa=8),
    Model("65B", blocks=80),
    Model("8-experts", experts=8, gqa=4),
    Model("8-experts-mha", experts=8, blocks=12),
    Model("60-experts", experts=60, blocks=24),
    Model("128-experts", experts=128, gqa=8, blocks=16),
    Model("phi3", family="phi3"),
]


def use_more_bits(i, n):
    return i < n // 8 or i >= 7 * n // 8 or (i >= n // 8 and (i - n // 8) % 3 == 2)


def llama_type(mix, role, i, model, imatrix):
    """The type of a matrix by its role, its block and the model, before shapes are looked at."""
    base, n, gqa, experts = BASE.get(mix, mix), model.blocks, model.gqa, model.experts
    if mix in ("q8_0", "mxfp4_moe"):
        return "mxfp4" if mix == "mxfp4_moe" and experts and role in ("gate", "up", "down") else "q8_0"
    if role == "head" or (role == "embedding" and model.tied):
        return "q5_k" if mix == "iq3_xxs" or mix in LOW else "q6_k"
    if role == "embedding":
        if mix in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"):
            return "q2_k"
        if mix in ("iq2_s", "iq2_m", "iq3_xxs"):
            return "iq3_s"
        return "q4_k" if mix in ("tq1_0", "tq2_0") else base
    if mix in LOW:
        return low_type(mix, role, i, model, base)
    kinds = {"v": v_type, "qkv": v_type, "k": k_type, "q": k_type, "down": down_type, "o": o_type}
    return kinds.get(role, gate_up_type)(mix, i, n, gqa, experts if role != "q" else 0, imatrix, base)


def low_type(mix, role, i, model, base):
    better = "iq3_s" if mix in ("iq2_s", "iq2_m") else "q2_k"
    if role in ("v", "qkv"):
        return "q4_k" if model.gqa >= 4 or model.experts >= 4 else better
    if role == "k" and model.experts == 8:
        return "q4_k"
    if role == "down":
        return better if i < model.blocks // 8 else base
    if role == "o" and model.experts == 8:
        return "q5_k"
    if role == "o":
        return {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s", "iq2_m": "iq3_s"}.get(mix, base)
    return base


def v_type(mix, i, n, gqa, experts, imatrix, base):
    many = gqa >= 4
    chosen = {
        "q2_k": "q4_k" if many else "q3_k",
        "q2_k_s": "q4_k" if many else base,
        "iq3_xxs": "q4_k" if many else "iq3_xxs" if imatrix else "iq3_s",
        "iq3_xs": "q4_k" if many else base,
        "iq3_s": "q4_k" if many else base,
        "iq3_m": "q4_k",
        "q3_k_m": "q5_k" if i < 2 else "q4_k",
        "q3_k_l": "q5_k",
        "iq4_nl": "q5_k" if many else base,
        "iq4_xs": "q5_k" if many else base,
        "q4_k_m": "q6_k" if use_more_bits(i, n) else base,
        "q5_k_m": "q6_k" if use_more_bits(i, n) else base,
        "q4_k_s": "q5_k" if i < 4 else base,
    }.get(mix, base)
    if n == 80 and gqa > 1 and chosen in ("q3_k", "q4_k"):  # LLM_TYPE_70B
        chosen = "q5_k"
    return "q8_0" if experts == 8 else chosen


def k_type(mix, i, n, gqa, experts, imatrix, base):
    return "q8_0" if experts == 8 else {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(mix, base)


def down_type(mix, i, n, gqa, experts, imatrix, base):
    first = i < n // 8
    if mix in ("iq4_nl", "iq4_xs"):
        return "q5_k" if first and not imatrix else base
    if mix in ("q4_0", "q5_0"):
        return base.replace("_0", "_1") if first and imatrix else base
    return {
        "q2_k": "q3_k",
        "q2_k_s": "q4_k" if first else base,
        "iq3_xxs": base if imatrix else "q4_k" if first else "q3_k",
        "q3_k_m": "q5_k" if i < n // 16 else "q4_k",
        "iq3_m": "q4_k" if first or (experts == 8 and use_more_bits(i, n)) else base,
        "q3_k_l": "q5_k",
        "q4_k_m": "q6_k" if use_more_bits(i, n) else base,
        "q5_k_m": "q6_k" if use_more_bits(i, n) else base,
        "q4_k_s": "q5_k" if first else base,
    }.get(mix, base)


def o_type(mix, i, n, gqa, experts, imatrix, base):
    if experts == 8:
        five = (
            "q2_k",
            "iq3_xs",
            "iq3_xxs",
            "q3_k_s",
            "q3_k_m",
            "iq4_nl",
            "q4_k_s",
            "q4_k_m",
            "iq3_s",
            "iq3_m",
            "iq4_xs",
        )
        return "q5_k" if mix in five else base
    better = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
    return better.get(mix, base)


def gate_up_type(mix, i, n, gqa, experts, imatrix, base):
    return "iq3_xxs" if mix == "iq3_xs" and n // 8 <= i < 7 * n // 8 else base


class Mixture(Llama):
    """Llama with experts, two of them as modules."""

    def __init__(self, experts):
        self.count = experts
        attention, mlp = Llama.linears[:4], Llama.linears[4:]
        parts = [replace(part, path=part.path.replace("mlp.", f"mlp.experts.{e}.")) for e in range(2) for part in mlp]
        self.linears = (*attention, *parts)

    def experts(self, config):
        return self.count


def shapes(model, hidden=256):
    config = {"model_type": model.family, "vocab_size": 320, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    config |= {"num_hidden_layers": model.blocks, "num_attention_heads": 8, "num_key_value_heads": 8 // model.gqa}
    made = Shapes(config | {"tie_word_embeddings": model.tied})
    if model.experts:
        made.family = Mixture(model.experts)
        made.shapes = made.family.shapes(made.config)
    return made


@cache
def recipe(mix, imatrix):
    quick = mix in ("q8_0", "tq1_0", "tq2_0")
    return load_recipe(f"gguf-{mix}", () if imatrix or quick else ["method=rtn"])


def planned(mix, checkpoint, imatrix=True):
    made = recipe(mix, imatrix)
    return make_plan(made, checkpoint, carriers(made))


def test_all_of_them_ship():
    assert {entry.name for entry in SHIPPED if entry.name.startswith("gguf-")} == {
        *(f"gguf-{mix}" for mix in MIXES),
        *(f"gguf-{mix}-best" for mix in LEARNED),
        "gguf-fit",
        *(f"gguf-{mix}-fit" for mix in FITTED),
    }


@pytest.mark.parametrize("mix", MIXES)
def test_the_file_says_which_mix_it_is(mix):
    (export,) = recipe(mix, True).export
    assert FILE_TYPES[export.options["file_type"]] == gguf.LlamaFileType[f"MOSTLY_{mix.upper()}"]


CHECKPOINTS = {model: shapes(model) for model in MODELS}


@pytest.mark.parametrize("imatrix", [True, False], ids=["calibrated", "data-free"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_types_are_llama_quantizes(mix, model, imatrix):
    made = planned(mix, CHECKPOINTS[model], imatrix)
    assert made.warnings == ()
    found = {p.module.name: p.format.label.removesuffix("-ggml") for p in made.layers}
    wanted = {
        p.module.name: llama_type(mix, p.module.role, p.module.block, model, imatrix and mix not in ("tq1_0", "tq2_0"))
        for p in made.layers
    }
    assert found == wanted


@pytest.mark.parametrize("hidden", [576, 80])
@pytest.mark.parametrize("mix", MIXES)
def test_rows_that_do_not_divide_fall_back(mix, hidden):
    model = Model("tied", tied=True, blocks=8)
    for p in planned(mix, shapes(model, hidden)).layers:
        named = wanted = llama_type(mix, p.module.role, p.module.block, model, True)
        k = p.module.shape[1]
        if wanted == "q5_k" and p.module.role == "embedding" and k % 256:
            wanted = "q8_0"  # llama.cpp looks at the rows of the output before it chooses its type
        while wanted != "f16" and k % (32 if FALLBACK[wanted] == "f16" else 256):
            wanted = FALLBACK[wanted]
        assert (p.format.label.removesuffix("-ggml") if p.format else p.keep) == wanted
        assert (p.fallback or "").partition(" ")[0] == ("" if wanted == named else wanted)


@pytest.mark.parametrize("name", FALLBACK)
def test_chain_of_each_type(name):
    assert parse_format(name).fallback == FALLBACK[name]


LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
PUBLISHED = {
    "q8_0": 8.50,
    "q6_k": 6.56,
    "q5_k_m": 5.70,
    "q5_k_s": 5.57,
    "q4_k_m": 4.89,
    "q4_k_s": 4.67,
    "q3_k_l": 4.30,
    "q3_k_m": 4.00,
    "q3_k_s": 3.64,
    "q2_k": 3.16,
    "iq4_nl": 4.68,
    "iq4_xs": 4.46,
    "iq3_m": 3.76,
    "iq3_xxs": 3.25,
    "iq2_m": 2.93,
    "iq2_xxs": 2.38,
    "iq1_s": 2.00,
}
"""Bits per weight of Llama 3.1 8B, from llama.cpp's own table; those of IQ4 were made without an importance matrix."""
SMOL = {"q8_0": 8.51, "q6_k": 8.12, "q5_k_m": 6.56, "q4_k_m": 6.17, "q2_k": 5.14, "iq2_m": 4.98, "q3_k_m": 5.46}
SMOL |= {"iq4_xs": 5.30}
"""Bits per weight that llama-quantize printed for SmolLM2-135M, whose rows of 576 columns fall back."""


def bits(mix, config, imatrix=True):
    """Bits per number of the file's tensors; norms are F32 there."""
    made = planned(mix, Shapes(config), imatrix)
    weights = sum(n * k for n, k in (p.module.shape for p in made.layers))
    return (sum(p.bits for p in made.layers) + made.other_bytes * 16) / (weights + made.other_bytes / 2)


@pytest.mark.parametrize("mix", PUBLISHED)
def test_llama_3_1_8b_is_as_large_as_published(mix):
    assert round(bits(mix, LLAMA_3_1_8B, imatrix=mix not in ("iq4_nl", "iq4_xs")), 2) == PUBLISHED[mix]


@pytest.mark.parametrize("mix", SMOL)
def test_smollm2_is_as_large_as_llama_quantize_made_it(mix):
    assert round(bits(mix, SMOLLM2_135M), 2) == SMOL[mix]


@pytest.mark.parametrize("mix", MIXES)
def test_header_says_how_large(mix):
    (entry,) = (entry for entry in SHIPPED if entry.name == f"gguf-{mix}")
    stated = re.search(
        r"^# Size: ([\d.]+) bits per weight in Llama 3\.1 8B, ([\d.]+) in Smol", entry.path.read_text(), re.M
    )
    assert [float(size) for size in stated.groups()] == [
        round(bits(mix, LLAMA_3_1_8B), 2),
        round(bits(mix, SMOLLM2_135M), 2),
    ]


@pytest.mark.parametrize("mix", LEARNED)
def test_a_mix_with_learned_codes_has_the_same_types(mix):
    plain, learned = (
        make_plan(recipe, Shapes(LLAMA_3_1_8B), carriers(recipe))
        for recipe in (load_recipe(f"gguf-{mix}"), load_recipe(f"gguf-{mix}-best"))
    )
    assert [p.format for p in learned.layers] == [p.format for p in plain.layers]
    inside = [p for p in learned.layers if p.module.block is not None]
    assert {p.method.name() for p in inside} == {"learned"}
    texts = [entry.path.read_text() for entry in SHIPPED if entry.name in (f"gguf-{mix}", f"gguf-{mix}-best")]
    assert len({re.search("^# Size: .*$", text, re.M)[0] for text in texts}) == 1
