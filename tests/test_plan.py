"""What is decided for every layer, what it costs, and what is refused, from names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from qtool import registry
from qtool.checkpoint._base import Layer, Module
from qtool.checkpoint.modules import modules
from qtool.errors import PlanError, UsageError
from qtool.formats._spelling import parse_format
from qtool.methods._base import Method
from qtool.plan import layers as decided
from qtool.plan import make_plan
from qtool.plan.fallback import choose
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Recipe
from tests.recipe.shapes import SMOLLM2_135M, TINY, Shapes

TIED = TINY | {"tie_word_embeddings": True}
EXPERTS = TINY | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}


@dataclass
class Verdict:
    possible: bool
    reason: str = ""


@dataclass
class Carrier:
    """An artifact that holds everything but one format."""

    fuses: bool = False
    language: bool = False
    refuses: str = ""
    uniform: bool = False
    stranger: bool = False

    def supports(self, model) -> Verdict:
        return Verdict(not self.stranger, f"it knows no {model.config['model_type']}")

    def caches(self, fmt):
        return Verdict(True, "")

    def agree(self, layers):
        labels = sorted({layer.format.label for layer in layers})
        return Verdict(not self.uniform or len(labels) == 1, f"it has one format, not {' and '.join(labels)}")

    def one_format(self, module: Module) -> str | None:
        return module.fused if self.fuses else module.stack

    def carries(self, model, module: Module, layer: Layer | None, keep: str) -> Verdict:
        label = layer.format.label if layer else keep
        return Verdict(label != self.refuses, f"it has no {label}")


def recipe(*rules, export=("qtool",), **fields):
    return Recipe.model_validate(
        {"recipe": 1, "name": "test", "layers": rules, "export": [{"to": name} for name in export], **fields}
    )


def plan(*rules, model=TINY, carrier=None, limit=None, **fields):
    return make_plan(recipe(*rules, **fields), Shapes(model), {"qtool": carrier or Carrier()}, limit)


def refusals(*rules, **arguments):
    with pytest.raises(PlanError) as caught:
        plan(*rules, **arguments)
    return list(caught.value.problems)


KEEP_HEAD = {"match": "lm_head", "keep": True}
REST = {"match": "*", "weights": "int4-g32"}


def fallback_of(name):
    return registry.load("formats", name).fallback


def by_name(made):
    return {p.module.name: p for p in made.layers}


class TestDecisions:
    def test_every_module_in_the_models_order(self):
        made = plan(REST)
        assert [p.module for p in made.layers] == list(modules(Shapes(TINY)))
        assert len(made.layers) == 1 + 2 * 7 + 1

    def test_the_first_rule_that_matches_decides(self):
        rules = {"match": "*.0.mlp.*", "weights": "q8_0"}, {"match": "*_proj", "keep": "f16"}, REST
        decided = by_name(plan(*rules))
        assert decided["model.layers.0.mlp.up_proj"].format == parse_format("q8_0")
        assert decided["model.layers.0.mlp.up_proj"].rule == 0
        assert (decided["model.layers.1.mlp.up_proj"].keep, decided["model.layers.1.mlp.up_proj"].rule) == ("f16", 1)
        assert (decided["lm_head"].format, decided["lm_head"].rule) == (parse_format("int4-g32"), 2)

    @pytest.mark.parametrize("model", [TINY, TIED], ids=["untied", "tied"])
    def test_a_star_leaves_the_embedding_as_it_is(self, model):
        embedding = by_name(plan(REST, model=model))["model.embed_tokens"]
        assert (embedding.format, embedding.method, embedding.keep, embedding.rule) == (None, None, "source", -1)
        assert embedding.bits == 100 * 64 * 16

    def test_a_star_leaves_routers_as_they_are(self):
        made = plan(REST, model=EXPERTS)
        kept = {p.module.name for p in made.layers if p.format is None}
        assert kept == {"model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
        named = by_name(plan({"match": "*.mlp.gate", "weights": "q8_0"}, REST, model=EXPERTS))
        assert named["model.layers.1.mlp.gate"].format == parse_format("q8_0")

    def test_a_summary_is_by_role_however_many_experts_there_are(self):
        many = EXPERTS | {"num_hidden_layers": 12, "num_experts": 64}
        shares = plan(REST, model=many).summary()
        assert [(s.role, s.layers) for s in shares] == [
            ("embedding", 1),
            *((role, 12) for role in ("q", "k", "v", "o", "router")),
            *((role, 12 * 64) for role in ("gate", "up", "down")),
            ("head", 1),
        ]

    def test_a_rule_for_the_head_reaches_a_tied_embedding(self):
        embedding = by_name(plan({"match": "lm_head", "weights": "q8_0"}, REST, model=TIED))["model.embed_tokens"]
        assert (embedding.format, embedding.rule) == (parse_format("q8_0"), 0)

    def test_method_is_rtn_unless_said(self):
        rules = {"match": "*.q_proj", "weights": "int4-g32", "method": {"gptq": {"damp": 0.5}}}, REST
        decided = by_name(plan(*rules))
        assert decided["model.layers.0.self_attn.q_proj"].method == Method.of({"gptq": {"damp": 0.5}})
        assert decided["model.layers.0.self_attn.k_proj"].method == Method.of("rtn")

    def test_activations_and_keep_are_passed_on(self):
        rule = {"match": "*", "weights": "int8-channel", "activations": "int8-token"}
        decided = by_name(plan({"match": "lm_head", "keep": "f32"}, rule))
        layer = Layer(parse_format("int8-channel"), parse_format("int8-token"))
        assert decided["model.layers.1.mlp.down_proj"].layer == layer
        assert decided["model.layers.1.mlp.down_proj"].label == "int8-channel with int8-token inputs"
        assert (decided["lm_head"].layer, decided["lm_head"].label) == (None, "kept as f32")

    def test_artifacts_are_those_of_the_recipe(self):
        parsed = recipe(REST, export=())
        assert make_plan(parsed, Shapes(TINY), {}).artifacts == ()
        assert plan(REST).artifacts == ("qtool",)


class TestSizes:
    def test_bits_of_each_kind(self):
        rules = [
            {"match": "*.q_proj", "weights": "int3-g32-asym"},
            {"match": "*.k_proj", "weights": "int8-channel"},
            {"match": "*.v_proj", "weights": "q4_1"},
            {"match": "*.o_proj", "keep": "f32"},
            {"match": "*.up_proj", "keep": "bf16"},
            {"match": "*", "keep": True},
        ]
        made = make_plan(recipe(*rules), Shapes(TINY, torch.float32), {"qtool": Carrier()})
        bits = {p.module.role: p.bits for p in made.layers if p.module.block == 1}
        assert bits == {
            "q": 64 * 64 * 3 + 64 * 2 * (16 + 3),
            "k": 32 * 64 * 8 + 32 * 16,
            "v": 32 * 64 * 5,
            "o": 64 * 64 * 32,
            "gate": 96 * 64 * 32,
            "up": 96 * 64 * 16,
            "down": 64 * 96 * 32,
        }

    def test_total_is_what_the_tensors_take(self):
        made = plan({"match": "re:.*", "weights": "q8_0"})
        weights = 2 * 100 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
        norms = 5 * 64 * 2
        assert made.other_bytes == norms
        assert made.predicted_bytes == weights * 34 // 32 + norms
        assert made.bits_per_weight == 8.5

    def test_every_tensor_takes_whole_bytes(self):
        made = plan({"match": "*.q_proj", "weights": "int3-tensor-asym"}, {"match": "*", "keep": True})
        rest = 2 * 2 * (2 * 100 * 64 + 2 * (64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)) // 2 + 5 * 64 * 2
        assert made.predicted_bytes == rest + 2 * -(-(64 * 64 * 3 + 16 + 3) // 8)

    def test_of_a_real_model(self):
        made = plan({"match": "*", "weights": "int4-g64"}, model=SMOLLM2_135M)
        embedding, linear = 49152 * 576, 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
        assert embedding + linear + 61 * 576 == 134_515_008
        assert made.predicted_bytes == 2 * embedding + linear * 17 // 32 + 2 * 61 * 576
        assert made.bits_per_weight == pytest.approx((16 * embedding + 4.25 * linear) / (embedding + linear))

    def test_biases_are_copied(self):
        qwen = Shapes(TINY | {"model_type": "qwen2"})
        made = make_plan(recipe(REST), qwen, {"qtool": Carrier()})
        assert made.other_bytes == (5 * 64 + 2 * (64 + 32 + 32)) * 2

    def test_summary_adds_up(self):
        made = plan({"match": "*.0.*.down_proj", "weights": "q8_0"}, {"match": "lm_head", "keep": "f16"}, REST)
        shares = {(s.role, s.label): s for s in made.summary()}
        assert list(shares)[:2] == [("embedding", "kept"), ("q", "int4-g32")]
        assert shares["down", "q8_0"].layers == shares["down", "int4-g32"].layers == 1
        assert shares["k", "int4-g32"].layers == 2
        assert shares["k", "int4-g32"].bits == 2 * 32 * 64 * 4.5
        assert (shares["k", "int4-g32"].method, shares["head", "kept as f16"].method) == ("rtn", None)
        assert shares["head", "kept as f16"].bits == 100 * 64 * 16
        assert sum(s.bits for s in shares.values()) // 8 + made.other_bytes == made.predicted_bytes
        assert sum(s.weights for s in shares.values()) == sum(n * k for n, k in (p.module.shape for p in made.layers))


class TestRowsThatDoNotDivide:
    def test_error_is_not_repeated_by_artifacts(self):
        lines = refusals({"match": "*", "weights": "int4-g40"}, carrier=Carrier(refuses="int4-g40"))
        assert len(lines) == 2  # rows of 64 and of 96 columns
        assert all("are not divisible by 40" in line for line in lines)

    def test_error_names_groups_that_do(self):
        assert refusals({"match": "*", "weights": "int4-g48"}) == [
            'layers[0] (match "*"): model.layers.0.self_attn.q_proj and 12 more: int4-g48: rows of 64 columns are not '
            "divisible by 48; groups that divide: 32, 64, 16; or name a second choice, fallback: FORMAT",
        ]

    def test_fallback_is_used_counted_and_told(self):
        made = plan({"match": "*", "weights": "int4-g64", "fallback": "int4-g32"})
        down, up = (by_name(made)[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "up"))
        assert (up.format, up.fallback) == (parse_format("int4-g64"), None)
        assert down.format == parse_format("int4-g32")
        assert {s.role: s.fallback for s in made.summary()}["down"] == down.fallback
        assert down.fallback == "int4-g32 instead of int4-g64: rows of 96 columns are not divisible by 64"
        assert (up.bits, down.bits) == (96 * 64 * 4 + 96 * 16, 64 * 96 * 4 + 64 * 3 * 16)

    def test_a_fallback_that_does_not_fit_either(self):
        assert refusals({"match": "*", "weights": "int4-g64", "fallback": "int4-g128"}) == [
            'layers[0] (match "*"): model.layers.0.mlp.down_proj and 1 more: int4-g64: rows of 96 columns are not '
            "divisible by 64; groups that divide: 32, 96, 16; nor does fallback int4-g128: rows of 96 columns are not "
            "divisible by 128; groups that divide: 96, 32, 16",
        ]

    def test_block_types_fall_back_as_in_llama_cpp(self):
        made = plan({"match": "*", "weights": "q4_0"}, model=TINY | {"hidden_size": 48})
        up, down = (by_name(made)[f"model.layers.0.mlp.{name}_proj"] for name in ("up", "down"))
        assert (down.format, down.fallback) == (parse_format("q4_0"), None)
        assert (up.format, up.method, up.keep, up.bits) == (None, None, "f16", 96 * 48 * 16)
        assert up.fallback == "f16 instead of q4_0: rows of 48 columns are not divisible by 32"
        assert {s.role: s.label for s in made.summary()}["up"] == "kept as f16"

    @pytest.mark.parametrize("name", [n for n in registry.names("formats") if fallback_of(n) not in (None, "f16")])
    def test_a_block_types_fallback_is_searched_as_hard(self, name):
        cls = registry.load("formats", name)
        for search in get_args(cls.model_fields["search"].annotation):
            found = choose(cls(search=search), None, 32)
            assert found.format == registry.load("formats", cls.fallback)(search=search)
            assert found.fallback.startswith(f"{found.format.label} instead of {cls(search=search).label}: ")

    def test_unless_the_rule_says_otherwise(self):
        model = TINY | {"hidden_size": 48}
        (line,) = refusals({"match": "*", "weights": "q4_0", "fallback": "error"}, model=model)
        assert line.endswith(
            "q_proj and 12 more: q4_0: rows of 48 columns are not divisible by 32; name a second choice, fallback: f16"
        )
        assert refusals({"match": "*", "weights": "q4_0"}, model=model, fallback="error") == [line]
        made = plan({"match": "*", "weights": "q4_0", "fallback": "int4-g16"}, model=model, fallback="error")
        assert by_name(made)["model.layers.0.mlp.up_proj"].format == parse_format("int4-g16")


class TestMethod:
    def test_a_rules_own_comes_first_then_the_recipes(self):
        rules = {"match": "*.q_proj", "weights": "int4-g32", "method": "rtn"}, REST
        decided = by_name(plan(*rules, method={"gptq": {"damp": 0.5}}))
        assert decided["model.layers.0.self_attn.q_proj"].method == Method.of("rtn")
        assert decided["lm_head"].method == Method.of({"gptq": {"damp": 0.5}})

    def test_a_recipes_own_that_no_rule_leaves_room_for(self):
        [line] = refusals({"match": "*", "weights": "int4-g32", "method": "rtn"}, method="gptq")
        assert line == "method: no layer uses it, because the rules name their own; remove it, or theirs"

    @pytest.mark.parametrize("pattern", ["lm_head", "role:embedding"])
    def test_embeddings_have_no_inputs_and_are_rounded(self, pattern):
        decided = by_name(plan({"match": pattern, "weights": "q8_0"}, REST, model=TIED, method="gptq"))
        assert decided["model.embed_tokens"].method == Method.of("rtn")
        assert decided["model.layers.0.mlp.up_proj"].method == Method.of("gptq")


class TestBlocks:
    def formats(self, *rules, role="down", **model):
        made = plan(*rules, {"match": "*", "weights": "q4_0"}, model=TINY | model)
        return [p.format.label for p in made.layers if p.module.role == role]

    def test_a_rule_decides_in_its_blocks_only(self):
        rule = {"match": "role:down", "blocks": ["first 1/8", "last 1/8", "every 3rd"], "weights": "q8_0"}
        wanted = ["q8_0" if i in (0, 3, 6, 7) else "q4_0" for i in range(8)]
        assert self.formats(rule, num_hidden_layers=8) == wanted
        assert self.formats(rule, role="up", num_hidden_layers=8) == ["q4_0"] * 8

    def test_a_single_block_may_be_a_number(self):
        assert self.formats({"match": "role:down", "blocks": 1, "weights": "q8_0"}) == ["q4_0", "q8_0"]

    def test_a_share_of_few_blocks_may_be_none(self):
        assert self.formats({"match": "role:down", "blocks": "first 1/8", "weights": "q8_0"}) == ["q4_0", "q4_0"]

    def test_layers_outside_of_blocks_are_in_none(self):
        made = plan({"match": "re:.*", "blocks": "first 9", "weights": "q8_0"}, REST)
        assert {m: p.label for m, p in by_name(made).items()}["lm_head"] == "int4-g32"
        assert by_name(made)["model.embed_tokens"].format is None

    def test_blocks_that_there_are_not(self):
        assert refusals({"match": "*", "blocks": "1-2", "weights": "q8_0"}, REST) == [
            'layers[0] (match "*"): no such block: wanted 0 to 1, found 2',
        ]


V8 = {"match": "role:v", "when": {"gqa": 2, "experts": 0, "tied": False}, "weights": "q8_0"}


class TestConditions:
    def labels(self, *rules, **arguments):
        return {s.role: s.label for s in plan(*rules, {"match": "*", "weights": "q4_0"}, **arguments).summary()}

    def test_rules_of_other_models_are_left_out(self):
        assert self.labels(V8)["v"] == "q8_0"
        for other in ({"num_key_value_heads": 4}, {"tie_word_embeddings": True}):
            assert self.labels(V8, model=TINY | other)["v"] == "q4_0"

    def test_whether_a_method_measures(self):
        rule = {"match": "role:v", "when": {"calibrated": True}, "weights": "q8_0"}
        assert self.labels(rule)["v"] == "q4_0"
        assert self.labels(rule, method="gptq")["v"] == "q8_0"
        assert self.labels(rule, method="rtn")["v"] == "q4_0"
        assert self.labels(rule | {"method": {"rtn": {"importance": True}}})["v"] == "q8_0"

    def test_one_that_does_not_apply_may_match_nothing(self):
        rule = {"match": "*.experts.*", "when": {"experts": ">=1"}, "weights": "q8_0"}
        assert plan(rule, REST).warnings == ()
        (line,) = refusals(rule | {"when": {"experts": 0}}, REST)
        assert "matches nothing in this model" in line

    def test_what_limited_rules_leave_to_others_depends_on_the_model(self):
        rest = {"match": "role:v", "weights": "q5_0"}
        assert plan(V8, rest, REST).warnings == ()
        assert plan({"match": "role:v", "blocks": "first 2", "keep": True}, rest, REST).warnings == ()
        assert len(plan({"match": "role:v", "keep": True}, rest, REST).warnings) == 1


class TestRules:
    def test_a_role_that_there_is_not(self):
        assert refusals({"match": "role:dwn", "keep": True}, REST) == [
            "layers[0] (match \"role:dwn\"): matches nothing in this model; did you mean 'role:down'?",
        ]

    def test_one_that_matches_nothing(self):
        assert refusals({"match": "*.mlp.dwn_proj", "keep": True}, {"match": "lm_haed", "keep": True}, REST) == [
            "layers[0] (match \"*.mlp.dwn_proj\"): matches nothing in this model; did you mean '*.mlp.down_proj'?",
            "layers[1] (match \"lm_haed\"): matches nothing in this model; did you mean 'lm_head'?",
        ]
        assert refusals({"match": "*.q_prj", "keep": True}, REST) == [
            "layers[0] (match \"*.q_prj\"): matches nothing in this model; did you mean '*.q_proj'?",
        ]

    def test_linears_that_no_rule_matches(self):
        assert refusals({"match": "*.mlp.*", "keep": True}, {"match": "*.q_proj", "keep": True}) == [
            "model.layers.0.self_attn.k_proj and 6 more: no rule matches; end layers: with a rule for the rest, such "
            'as {match: "*", keep: true}',
        ]

    def test_one_that_decides_nothing_is_a_warning(self):
        made = plan(KEEP_HEAD, {"match": "*.mlp.*", "keep": True}, {"match": "*.up_proj", "weights": "q4_0"}, REST)
        assert made.warnings == (
            'layers[2] (match "*.up_proj") decides nothing: earlier rules match all of its 2 layers',
        )

    def test_a_rule_for_the_rest_may_find_none(self):
        assert plan({"match": "re:.*_proj|lm_head", "weights": "q4_0"}, REST).warnings == ()

    def test_a_residual_fits_every_method_but_not_every_matrix(self):
        def rule(method, rank):
            return {"match": "*", "weights": "int4-g16", "method": method, "residuals": [{"low_rank": {"rank": rank}}]}

        for method in ("learned", "gptq"):
            assert all(p.residuals for p in plan(rule(method, 2), export=()).layers if p.format)
        assert refusals(rule("learned", 1000))[0].endswith("low_rank: rank 1000 is more than 64 x 64 matrices have")
        codes = {"codes": {"format": "int2-g16", "share": 0.5, "unit": 40}}
        found = refusals(rule("rtn", 2) | {"residuals": [codes]})
        assert found[0].endswith("codes: rows of 64 columns are not divisible into units of 40")

    def test_an_embedding_has_no_inputs(self):
        rule = {"match": "re:.*", "weights": "int8-channel", "method": "gptq", "activations": "int8-token"}
        assert refusals(rule) == [
            'layers[0] (match "re:.*"): model.embed_tokens: gptq measures inputs, an embedding only looks rows up; '
            "give it a rule with method: rtn",
            'layers[0] (match "re:.*"): model.embed_tokens: an embedding has no inputs to round; give it a rule '
            "without activations:",
        ]

    def test_an_embedding_that_is_the_output_layer_reads_what_that_reads(self):
        rule = {"match": "role:embedding", "weights": "int8-channel", "method": "gptq"}
        (embedding, *_) = plan(rule, REST, model=TIED).layers
        assert (embedding.method.name(), embedding.module.reads) == ("gptq", "head_in")

    def test_mistakes_come_all_at_once_with_their_lines(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = 'recipe: 1\nname: x\nlayers:\n  - {match: "*.q_prj", keep: true}\n'
        text += '  - match: "*.mlp.*"\n    weights: int4-g64\n  - {match: "*.q_proj", weights: int4-g48}\n'
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(PlanError, match="recipe x does not fit MODEL: 4 problems") as caught:
            make_plan(load_recipe("r.yaml"), Shapes(TINY), {})
        assert [line.partition(": ")[0] for line in caught.value.problems] == [
            "model.layers.0.self_attn.k_proj and 6 more",
            "r.yaml:4",
            "r.yaml:5",
            "r.yaml:7",
        ]


class TestArtifacts:
    SPLIT = ({"match": "*.1.self_attn.v_proj", "weights": "q8_0"}, KEEP_HEAD, REST)

    def test_a_set_that_runtimes_merge_needs_one_format(self):
        assert refusals(*self.SPLIT, carrier=Carrier(fuses=True)) == [
            'layers[0] (match "*.1.self_attn.v_proj"): model.layers.1.qkv: these become one tensor in qtool or its '
            "runtimes, wanted one format, found q int4-g32, k int4-g32, v q8_0; let one rule decide them all, such as "
            r'match: "re:.*\.(q_proj|k_proj|v_proj)"',
        ]

    def test_some_hold_one_format_at_a_time(self):
        assert refusals(*self.SPLIT, carrier=Carrier(uniform=True)) == [
            "qtool cannot hold these formats together: it has one format, not int4-g32 and q8_0"
        ]
        plan(KEEP_HEAD, REST, carrier=Carrier(uniform=True))

    @pytest.mark.parametrize(
        "other",
        [
            {"keep": True},
            {"keep": "f32"},
            {"weights": "int4-g32-asym"},
            {"weights": "int4-g32", "activations": "int8-token"},
        ],
        ids=str,
    )
    def test_every_difference_counts(self, other):
        (line,) = refusals({"match": "*.up_proj", **other}, KEEP_HEAD, REST, carrier=Carrier(fuses=True))
        assert "model.layers.0.gate_up and 1 more: these become one tensor in qtool" in line

    def test_a_stack_of_experts_needs_one_format(self):
        odd = {"match": "*.experts.2.down_proj", "weights": "q8_0"}
        (line,) = refusals(odd, KEEP_HEAD, REST, model=EXPERTS)
        assert line == (
            f'layers[0] (match "{odd["match"]}"): model.layers.0.mlp.experts.down_proj and 1 more: these become one '
            "tensor in qtool or its runtimes, wanted one format, found down int4-g32, down q8_0; let one rule decide "
            "them all, "
            r'such as match: "re:.*\.experts\.\d+\.(down_proj)"'
        )
        plan(odd | {"match": r"re:.*\.experts\.\d+\.(down_proj)"}, KEEP_HEAD, REST, model=EXPERTS)

    def test_the_method_may_differ(self):
        plan({"match": "*.up_proj", "weights": "int4-g32", "method": "gptq"}, REST, carrier=Carrier(fuses=True))

    def test_kept_layers_need_one_type_too(self):
        rules = {"match": "*.q_proj", "keep": "f32"}, {"match": "*.self_attn.*", "keep": True}, REST
        (line,) = refusals(*rules, carrier=Carrier(fuses=True))
        assert "wanted one format, found q kept as f32, k kept, v kept; let one rule" in line

    def test_a_set_may_be_kept_whole(self):
        plan({"match": "*.self_attn.*", "keep": True}, REST, carrier=Carrier(fuses=True))

    def test_the_same_fallback_in_all_of_a_set_is_one_format(self):
        rule = {"match": "*", "weights": "int4-g128", "fallback": "int4-g32"}
        assert len(plan(rule, carrier=Carrier(fuses=True)).layers) == 16

    def test_a_split_is_fine_where_nothing_is_merged(self):
        assert by_name(plan(*self.SPLIT))["model.layers.1.self_attn.v_proj"].format == parse_format("q8_0")

    def test_an_artifact_that_does_not_know_the_model(self):
        assert refusals(KEEP_HEAD, REST, carrier=Carrier(stranger=True)) == [
            "qtool cannot hold this model: it knows no llama"
        ]

    def test_a_format_that_the_artifact_cannot_hold(self):
        rules = {"match": "*.down_proj", "weights": "int3-g32"}, {"match": "lm_head", "keep": "f16"}, REST
        assert refusals(*rules, carrier=Carrier(refuses="int3-g32")) == [
            'layers[0] (match "*.down_proj"): model.layers.0.mlp.down_proj and 1 more: qtool cannot hold this '
            "(int3-g32): it has no int3-g32",
        ]
        assert refusals(*rules, carrier=Carrier(refuses="f16")) == [
            'layers[1] (match "lm_head"): lm_head: qtool cannot hold this (kept as f16): it has no f16',
        ]

    def test_a_tied_embedding_is_asked_about_too(self):
        rules = {"match": "lm_head", "weights": "q8_0"}, REST
        (line,) = refusals(*rules, model=TIED, carrier=Carrier(refuses="q8_0"))
        assert "model.embed_tokens: qtool cannot hold this (q8_0)" in line


class TestSmokeRun:
    def test_only_the_first_blocks_are_touched(self):
        made = plan({"match": "re:.*", "weights": "q8_0"}, limit=1)
        touched = {p.module.name for p in made.layers if p.format}
        assert touched == {p.module.name for p in made.layers if p.module.block == 0}
        assert {p.keep for p in made.layers} == {"source"}
        assert made.limited_blocks == 1
        assert made.warnings == (
            "smoke run: only the first 1 of 2 decoder blocks are quantized, the rest is untouched",
        )
        rest = 2 * 100 * 64 + 64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3
        assert made.predicted_bytes == rest * 2 + (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3) * 34 // 32 + 5 * 64 * 2

    def test_the_whole_recipe_is_checked_all_the_same(self):
        assert refusals({"match": "*.1.*", "weights": "int4-g48"}, REST, limit=1)

    @pytest.mark.parametrize("limit", [0, -1, 3])
    def test_a_number_of_blocks_that_there_is_not(self, limit):
        with pytest.raises(UsageError, match=f"wanted 1 to 2 decoder blocks, found {limit}"):
            plan(REST, limit=limit)


class TestFingerprint:
    def fingerprint(self, *rules, model=TINY, digest="0", **fields):
        made = make_plan(recipe(*rules, **fields), Shapes(model, digest=digest), {"qtool": Carrier()})
        return made.fingerprint()

    def test_is_the_same_for_the_same(self):
        assert self.fingerprint(REST) == self.fingerprint(dict(REST))
        assert len(self.fingerprint(REST)) == 64

    @pytest.mark.parametrize(
        "change",
        [
            {"rules": [{"match": "*", "weights": "int4-g16"}]},
            {"rules": [{"match": "*", "weights": {"type": "int", "bits": 4, "group": 32, "scales": "minmax"}}]},
            {"rules": [{"match": "*", "weights": "int4-g32", "method": "gptq"}]},
            {"rules": [{"match": "*", "weights": "int4-g32", "method": {"rtn": {"importance": True}}}]},
            {"rules": [{"match": "*", "weights": "int4-g32", "activations": "int8-token"}]},
            {"rules": [{"match": "lm_head", "keep": "f16"}, REST]},
            {"calibration": {"seed": 1}},
            {"kv_cache": "fp8-tensor"},
            {"digest": "1"},
            {"model": TINY | {"num_hidden_layers": 3}},
        ],
        ids=str,
    )
    def test_changes_with_what_decides_the_codes(self, change):
        rules = change.pop("rules", [REST])
        assert self.fingerprint(*rules, **change) != self.fingerprint(REST)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "other"},
            {"description": "other"},
            {"export": ()},
            {"eval": {"text": "a.txt"}},
            {"rules": [{"match": "re:(?!model.embed).*", "weights": "int4-g32", "method": "rtn"}]},
        ],
        ids=str,
    )
    def test_stays_with_what_does_not(self, change):
        rules = change.pop("rules", [REST])
        assert self.fingerprint(*rules, **change) == self.fingerprint(REST)

    def test_knows_a_smoke_run_and_the_version(self, monkeypatch):
        made = plan(REST)
        assert plan(REST, limit=1).fingerprint() != made.fingerprint()
        assert replace(made, warnings=("x",)).fingerprint() == made.fingerprint()
        before = made.fingerprint()
        monkeypatch.setattr(decided, "__version__", "9.9")
        assert made.fingerprint() != before
