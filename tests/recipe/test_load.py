"""Text -> recipe: what is accepted, and what is said about everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.errors import RecipeError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.recipe.cache import dump_cache, parse_cache
from qtool.recipe.load import find_recipe, list_recipes, load_recipe
from qtool.recipe.nodes import DEEPEST, LARGEST
from qtool.recipe.schema import Calibration, Recipe, Source

HEAD = "recipe: 1\nname: test\n"
LAYERS = 'layers:\n  - {match: "*", weights: int4-g64}\n'


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes recipes into the working folder, so that messages hold bare file names."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="r.yaml"):
        content = text if isinstance(text, bytes) else text.encode()
        Path(name).write_bytes(content)
        return name

    return write


def problems(name, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return list(caught.value.problems)


def test_a_whole_recipe(write):
    text = """
recipe: 1
name: whole
description: all keys
calibration: {data: [{data: builtin, weight: 2}, {data: a.jsonl}], samples: 8, length: 64, seed: 3, chat_template: true}
layers:
  - {match: lm_head, keep: bf16}
  - match: "re:.*down_proj"
    weights: {type: int, bits: 4, group: 32, symmetric: no, scales: minmax}
    method: {gptq: {damp: 0.5, order: none}}
    fallback: int4-channel
  - {match: "*", weights: int8-channel, activations: int8-token}
export: [{to: qtool}]
eval: {text: b.txt, context: 64, chunks: 2, gates: {kld: 0.05, top1: 1}}
"""
    recipe = load_recipe(write(text))
    assert recipe.calibration == Calibration(
        data=(Source(data="builtin", weight=2), Source(data="a.jsonl")),
        samples=8,
        length=64,
        seed=3,
        chat_template=True,
    )
    head, down, rest = recipe.layers
    assert (head.keep, head.weights, head.method, head.fallback) == ("bf16", None, None, None)
    assert down.weights == Int(bits=4, group=32, symmetric=False, scales="minmax")
    assert down.method == GPTQ(damp=0.5, order="none")
    assert down.fallback == Int(bits=4, group="channel")
    assert (rest.weights, rest.activations) == (Int(bits=8, group="channel"), Int(bits=8, group="token"))
    assert rest.method is None
    assert [rule.where for rule in recipe.layers] == ["r.yaml:7", "r.yaml:8", "r.yaml:12"]
    assert recipe.eval.gates == {"kld": 0.05, "top1": 1.0}
    assert recipe.export[0].to == "qtool"


def test_what_a_recipe_dumps_reads_back_equal(write):
    fmt = "{type: int, bits: 3, group: 32, scales: minmax}"
    rule = f'  - {{match: "*.q_proj", weights: {fmt}, method: {{gptq: {{damp: 0.3}}}}}}\n'
    recipe = load_recipe(
        write(
            HEAD
            + "layers:\n  - {match: lm_head, keep: true}\n"
            + rule
            + '  - {match: "*", weights: q4_0, fallback: q8_0}\n'
        )
    )
    dumped = recipe.model_dump(mode="json")
    assert dumped["layers"][2]["weights"] == "q4_0"
    again = Recipe.model_validate(dumped)
    assert again.model_dump() == recipe.model_dump()
    assert [(r.weights, r.method, r.fallback) for r in again.layers] == [
        (r.weights, r.method, r.fallback) for r in recipe.layers
    ]


def test_all_mistakes_at_once(write):
    text = """recipe: 1
nmae: test
calibration:
  samples: "8"
  length: 3
  lenght: 1
layers:
  - match: lm_head
    keep: true
    weights: int8-channel
  - match: "re:["
    weights: in4-g64
  - weights: {type: int, bits: 9, gruop: 3}
    method: {gptq: {dmap: 1}}
    fallback: int4-65
  - {match: x, keep: f64}
  - {match: y, match: z}
  - {match: "*", weights: int4-g64, method: rnt}
export: [{to: qtol}, {to: qtool}, {to: qtool}]
eval: {gates: {kld: much, kdl: 0.1}}
"""
    found = problems(write(text))
    for expected in [
        "r.yaml:1: the key 'name' is missing",
        "r.yaml:2: nmae: unknown key; did you mean 'name'?",
        "r.yaml:4: calibration.samples: wanted a whole number, found '8'",
        "r.yaml:5: calibration.length: wanted at least 16, found 3",
        "r.yaml:6: calibration.lenght: unknown key; did you mean 'length'?",
        "r.yaml:10: layers[0].weights: a rule with keep: quantizes nothing; remove one of the two",
        "r.yaml:11: layers[1].match: 're:[' is not a regular expression: unterminated character set at position 0",
        "r.yaml:12: layers[1].weights: no format is called 'in4-g64'; did you mean 'int4-g64'?",
        "r.yaml:13: layers[2]: the key 'match' is missing",
        "r.yaml:13: layers[2].weights: the key 'group' is missing",
        "r.yaml:13: layers[2].weights.gruop: unknown key; did you mean 'group'?",
        "r.yaml:13: layers[2].weights.bits: wanted at most 8, found 9",
        "r.yaml:14: layers[2].method.gptq.dmap: unknown key; did you mean 'damp'?",
        "r.yaml:15: layers[2].fallback: no format is called 'int4-65'; did you mean 'int4-g64'?",
        "r.yaml:16: layers[3].keep: wanted true, 'f32', 'f16' or 'bf16', found 'f64'",
        "r.yaml:17: layers[4].match: this key stands at r.yaml:17 already; remove one of them",
        "r.yaml:17: layers[4]: a rule says what to do with its layers; add weights: FORMAT or keep: true",
        "r.yaml:18: layers[5].method: no method is called 'rnt'; did you mean 'rtn'?",
        "r.yaml:19: export[0].to: no artifact is called 'qtol'; did you mean 'qtool'?",
        "r.yaml:19: export[2]: 'qtool' is listed twice",
        "r.yaml:20: eval: the key 'text' is missing",
        "r.yaml:20: eval.gates.kld: wanted a number, found 'much'",
        "r.yaml:20: eval.gates.kdl: no gate is called 'kdl'; did you mean 'kld'?",
    ]:
        assert expected in found
        found.remove(expected)
    assert found == []


MISTAKES = [
    ("", "r.yaml:1: wanted a mapping, found nothing"),
    ("[1]", "r.yaml:1: wanted a mapping, found a list of 1"),
    (HEAD, "r.yaml:1: the key 'layers' is missing"),
    (HEAD + "layers: []", "r.yaml:3: layers: wanted at least 1 entry, found a list of 0"),
    (HEAD + "layers: {}", "r.yaml:3: layers: wanted a list, found an empty mapping"),
    (HEAD + "layers: [3]", "r.yaml:3: layers[0]: wanted a mapping, found 3"),
    (HEAD + 'layers: [{match: "*"}]', "r.yaml:3: layers[0]: a rule says what to do with its layers; "),
    (HEAD + 'layers: [{match: "*", keep: false}]', "r.yaml:3: layers[0].keep: wanted true, 'f32', "),
    (
        HEAD + 'layers: [{match: "*", weights: int}]',
        "layers[0].weights: the format int needs options; write {type: int",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int4-g0}]',
        "layers[0].weights: wanted more than 0 or 'channel', 'token', 'head' or 'tensor', found 0",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: 4}]',
        "layers[0].weights: no format: wanted a format such as int4-g128",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: {type: itn}}]',
        "weights.type: no format is called 'itn'; did you mean 'int'?",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: {type: int, bits: 4, group: row}}]',
        "layers[0].weights.group: wanted a whole number or 'channel', 'token', 'head' or 'tensor', found 'row'",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int4-g64, method: {rtn: {}, gptq: {}}}]',
        "no method: wanted a name such as rtn, or {gptq: {damp: 0.01}}, found a mapping with rtn, gptq",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int4-g64, method: {gptq: 3}}]',
        "r.yaml:3: layers[0].method.gptq: wanted a mapping, found 3",
    ),
    *(
        (
            HEAD + f'layers: [{{match: "*", keep: true, blocks: {blocks}}}]',
            "layers[0].blocks: no choice of blocks: wanted first 4, last 1/8, every 3rd, 0-3, 7, or a list of such, "
            f"found {found}",
        )
        for blocks, found in [
            ("first", "'first'"),
            ("first 0", "'first 0'"),
            ("first 9/8", "'first 9/8'"),
            ("first 1/0", "'first 1/0'"),
            ("every 0th", "'every 0th'"),
            ("3-2", "'3-2'"),
            ("-1", "-1"),
            ("true", "true"),
            ("0.5", "0.5"),
            ("[]", "an empty list"),
            ("[0, [1]]", "a list of 1"),
            ("[0, third]", "'third'"),
            ("{a: 1}", "a mapping with a"),
            ("9" * 10, "9999999999"),
        ]
    ),
    (
        HEAD + 'layers: [{match: "*", keep: true, when: {}}]',
        "layers[0].when: wanted a condition: blocks, gqa, experts, tied, calibrated",
    ),
    (
        HEAD + 'layers: [{match: "*", keep: true, when: {expert: 8}}]',
        "layers[0].when.expert: unknown key; did you mean 'experts'?",
    ),
    (
        HEAD + 'layers: [{match: "*", keep: true, when: {gqa: =>4}}]',
        'layers[0].when.gqa: no condition on a number: wanted a whole number, or a comparison such as ">=4", '
        "found '=>4'",
    ),
    (
        HEAD + 'layers: [{match: "*", keep: true, when: {tied: 1}}]',
        "layers[0].when.tied: wanted true or false, found 1",
    ),
    (HEAD + LAYERS + "method: gtpq", "r.yaml:5: method: no method is called 'gtpq'; did you mean 'gptq'?"),
    (
        HEAD + LAYERS + "kv_cache: nvfp4",
        "r.yaml:5: kv_cache: no format of a KV cache: wanted scales per tensor, head, channel or token, or of "
        "groups in a head, as fp8-head, int4-token, bfp4-g16, found nvfp4",
    ),
    (
        HEAD + LAYERS + "kv_cache:\n  keys: int4-chanel\n  values: q4_0",
        "r.yaml:6: kv_cache.keys: no format is called 'int4-chanel'; did you mean 'int8-channel'?",
    ),
    (
        HEAD + LAYERS + "kv_cache:\n  keys: int4-channel\n  values: biased4-channel",
        "r.yaml:7: kv_cache.values: no format of a KV cache: wanted scales",
    ),
    (HEAD + LAYERS + "kv_cache: {keys: int4-channel}", "r.yaml:5: kv_cache: the key 'values' is missing"),
    (
        HEAD + LAYERS + "kv_cache: {keys: fp8-head, vales: fp8-head}",
        "r.yaml:5: kv_cache.vales: unknown key; did you mean 'values'?",
    ),
    (HEAD + LAYERS + "kv_cache: 4", "r.yaml:5: kv_cache: no format: wanted a format such as int4-g128"),
    (
        HEAD + LAYERS + "kv_cache: {type: int, bits: 4, group: token, scales: 99}",
        "r.yaml:5: kv_cache: scales of a int4-token KV cache: wanted minmax or search; percentages are for scales",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int8-head}]',
        "r.yaml:3: layers[0].weights: no format of weights: wanted one such as int8-channel, found int8-head",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int4-g64, fallback: fp8-head}]',
        "r.yaml:3: layers[0].fallback: no format of weights: wanted one such as int8-channel, found fp8-head",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: {type: int, bits: 8, group: tensor, scales: 99.5}}]',
        "layers[0].weights: scales of weights: wanted minmax or search; percentages are of what calibration saw",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: int8-channel, activations: fp8-head}]',
        "layers[0].activations: no format of inputs: wanted one such as int8-token or int8-tensor, found fp8-head",
    ),
    (
        HEAD + 'layers: [{match: "*", weights: fp8-block, activations: fp8-block}]',
        "layers[0].activations: no format of inputs: wanted one such as int8-token or int8-tensor, found fp8-block",
    ),
    (
        HEAD
        + 'layers: [{match: "*", weights: int8-channel, activations: {type: int, bits: 8, group: token, scales: 99}}]',
        "layers[0].activations: scales of int8-token inputs: wanted minmax or search; percentages are for one scale",
    ),
    (
        HEAD
        + 'layers: [{match: "*", weights: int8-channel, activations: {type: int, bits: 8, group: tensor, scales: 5}}]',
        "layers[0].activations.scales: wanted 'minmax' or 'search' or more than 50, found 5",
    ),
    ("recipe: 2\nname: test\n" + LAYERS, "r.yaml:1: recipe: wanted 1, found 2"),
    ("recipe: 1\nname: no\n" + LAYERS, "r.yaml:2: name: wanted a string, found false; put it in quotes"),
    ("recipe: 1\nname: 3\n" + LAYERS, "r.yaml:2: name: wanted a string, found 3; put it in quotes"),
    ('recipe: 1\nname: ""\n' + LAYERS, "r.yaml:2: name: wanted at least 1 character, found ''"),
    (HEAD + LAYERS + "calibration: {seed: true}", "r.yaml:5: calibration.seed: wanted a whole number, found true"),
    (HEAD + LAYERS + "calibration: {samples: 0}", "calibration.samples: wanted at least 1, found 0"),
    (HEAD + LAYERS + "calibration: {data: []}", "calibration.data: wanted at least 1 entry, found a list of 0"),
    (
        HEAD + LAYERS + "calibration: {data: buildin}",
        "calibration.data: no token source: wanted builtin, code, self, a file",
    ),
    (
        HEAD + LAYERS + "calibration: {data: [{data: x.doc}]}",
        "calibration.data[0].data: no token source: wanted builtin",
    ),
    (
        HEAD + LAYERS + "calibration: {data: [{weight: 0}]}",
        "calibration.data[0].weight: wanted more than 0, found 0",
    ),
    (
        HEAD + LAYERS + "eval: {text: a.txt, gates: {kld: .nan}}",
        "eval.gates.kld: wanted a finite number below 2^64, found .nan",
    ),
    (
        HEAD + LAYERS + "eval: {text: a.txt, gates: {kld: 1.0e+999}}",
        "eval.gates.kld: wanted a finite number below 2^64, found 1.0e",
    ),
    (
        HEAD + LAYERS + f"calibration: {{seed: 0x{'f' * 6000}}}",
        "calibration.seed: wanted a finite number below 2^64, found",
    ),
    (HEAD + LAYERS + "eval: {text: 2026-01-01}", "eval.text: wanted text or a number, found a YAML timestamp"),
    (HEAD + LAYERS + "eval: {text: 0b_}", "eval.text: '0b_' cannot be read: "),
    (HEAD + LAYERS + "1: 2", "r.yaml:5: wanted a word as key, found '1'"),
    (HEAD + LAYERS + "? [a]\n: 2", "r.yaml:5: wanted a word as key, found something else"),
    (HEAD + LAYERS + "name: again", "r.yaml:5: name: this key stands at r.yaml:2 already; remove one of them"),
    (HEAD + LAYERS + "x: &x [1]", "r.yaml:5: YAML anchors are not used in recipes"),
    (
        HEAD + "layers:\n  - {match: *x, keep: true}",
        'r.yaml:4: a pattern that begins with * needs quotes, as in match: "*"',
    ),
    (
        HEAD + "layers:\n  - {match: *, keep: true}",
        "r.yaml:4: no valid YAML: expected alphabetic or numeric character",
    ),
    (HEAD + "layers:\n  - match: *\n", 'a pattern that begins with * needs quotes, as in match: "*"'),
    (HEAD + LAYERS + "x: !!python/name:os.system y", "r.yaml:5: YAML tags are not used in recipes"),
    (HEAD + LAYERS + "<<: {a: 1}", "r.yaml:5: wanted a word as key, found '<<'"),
    (
        HEAD + "layers:\n\t- {match: x}",
        "r.yaml:4: no valid YAML: found character '\\t' that cannot start any token; YAML ",
    ),
    (HEAD + "layers: [", "r.yaml:3: no valid YAML: expected the node content, but found '<stream end>'"),
    (HEAD + LAYERS + "---\na: 1", "no valid YAML: but found another document"),
    (HEAD + 'description: "\\UFFFFFFFF"', "r.yaml:1: no valid YAML: "),
    (HEAD + 'description: "\\ud800"', "r.yaml:3: description: '\\ud800' cannot be read: "),
    (HEAD + "description: a\0b", "r.yaml:3: YAML does not allow the character '\\x00'"),
    (HEAD.encode() + b"description: \xff", "r.yaml:3: wanted UTF-8, found byte 0xff"),
    (HEAD + "x: " + "[" * 2000, f"r.yaml:3: wanted at most {DEEPEST} levels of nesting"),
    (HEAD + f"layers: {'x' * 80}", f"r.yaml:3: layers: wanted a list, found '{'x' * 56}..."),
    (HEAD + "# " + "x" * LARGEST, "r.yaml: wanted at most 256 KiB of YAML, found more"),
]


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_one_mistake(write, text, expected):
    found = problems(write(text))
    assert any(expected in line for line in found), found


def test_aliases_are_refused_before_they_multiply(write):
    layers = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
    assert problems(write(f"a0: &a0 [x]\n{layers}")) == [
        "r.yaml:1: YAML anchors are not used in recipes; write the value out, or use extends:"
    ]


def test_byte_order_mark_and_windows_line_ends_are_fine(write):
    recipe = load_recipe(write(b"\xef\xbb\xbf" + (HEAD + LAYERS).replace("\n", "\r\n").encode()))
    assert recipe.layers[0].where == "r.yaml:4"


class TestExtends:
    BASE = """
recipe: 1
name: base
description: of the base
calibration: {samples: 8, length: 64}
layers:
  - {match: lm_head, keep: true}
  - {match: "*.down_proj", weights: int8-channel}
  - {match: "*", weights: int4-g64, method: gptq}
export: [{to: qtool}]
eval: {text: a.txt}
"""

    def test_rules_replace_by_pattern_or_come_first(self, write):
        write(self.BASE, "base.yaml")
        child = 'layers:\n  - {match: "*.q_proj", keep: f16}\n  - {match: "*", weights: int4-g32}\n'
        recipe = load_recipe(write(HEAD + "extends: base.yaml\n" + child))
        assert [(r.match, r.where) for r in recipe.layers] == [
            ("*.q_proj", "r.yaml:5"),
            ("lm_head", "base.yaml:7"),
            ("*.down_proj", "base.yaml:8"),
            ("*", "r.yaml:6"),
        ]
        assert (recipe.layers[3].weights, recipe.layers[3].method) == (Int(bits=4, group=32), None)

    def test_a_rule_for_other_blocks_or_models_is_another_rule(self, write):
        base = """recipe: 1
name: base
layers:
  - {match: "*.down_proj", blocks: [first 1/8, 9], weights: q8_0}
  - {match: "*.down_proj", when: {gqa: ">=4"}, weights: q5_0}
  - {match: "*", weights: q4_0}
"""
        write(base, "base.yaml")
        child = """extends: base.yaml
layers:
  - {match: "*.down_proj", blocks: first 1/8, weights: q5_1}
  - {match: "*.down_proj", when: {gqa: ">=4"}, weights: q4_1}
"""
        recipe = load_recipe(write(HEAD + child))
        assert [(r.blocks, r.when and r.when.gqa, r.weights.label) for r in recipe.layers] == [
            (("first 1/8",), None, "q5_1"),
            (("first 1/8", "9"), None, "q8_0"),
            (None, ">=4", "q4_1"),
            (None, None, "q4_0"),
        ]

    def test_mappings_merge_lists_replace_and_names_are_not_inherited(self, write):
        write(self.BASE, "base.yaml")
        recipe = load_recipe(
            write(HEAD + "extends: base.yaml\ncalibration: {seed: 5, samples: 9}\nexport: []\neval: null\n")
        )
        assert (recipe.name, recipe.description) == ("test", "")
        assert recipe.calibration == Calibration(samples=9, length=64, seed=5)
        assert recipe.export == ()
        assert recipe.eval is None
        assert len(recipe.layers) == 3

    def test_every_file_names_itself(self, write):
        write(self.BASE, "base.yaml")
        assert problems(write("extends: base.yaml")) == [
            "r.yaml:1: the key 'recipe' is missing",
            "r.yaml:1: the key 'name' is missing",
        ]

    def test_paths_count_from_the_file_that_says_them(self, write, tmp_path):
        Path("sub/deep").mkdir(parents=True)
        write(self.BASE, "sub/base.yaml")
        write(HEAD + "extends: ../base.yaml", "sub/deep/middle.yaml")
        recipe = load_recipe(write(HEAD + "extends: sub/deep/middle.yaml"))
        assert recipe.layers[0].where == "sub/deep/../base.yaml:7"

    def test_mistakes_of_both_files_come_together(self, write):
        write(self.BASE.replace("gptq", "gpqt"), "base.yaml")
        assert problems(write(HEAD + "extends: base.yaml\nexprot: []")) == [
            "base.yaml:9: layers[2].method: no method is called 'gpqt'; did you mean 'gptq'?",
            "r.yaml:4: exprot: unknown key; did you mean 'export'?",
        ]

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (
                {"r.yaml": "extends: r.yaml"},
                "r.yaml:3: extends: recipes extend each other in a circle: r.yaml -> r.yaml",
            ),
            (
                {"r.yaml": "extends: a.yaml", "a.yaml": "extends: ./sub/../r.yaml"},
                "a.yaml:3: extends: recipes extend each other in a circle: r.yaml -> a.yaml -> r.yaml",
            ),
            (
                {"r.yaml": "extends: w4a16-gtpq"},
                "r.yaml:3: extends: no file and no shipped recipe is called 'w4a16-gtpq'; did you mean 'w4a16-gptq'?",
            ),
            ({"r.yaml": "extends: 3"}, "r.yaml:3: extends: wanted a recipe's name or path, found 3"),
            ({"r.yaml": "extends: a.yaml", "a.yaml": "x: ["}, "a.yaml:3: no valid YAML: "),
        ],
    )
    def test_bases_that_do_not_work(self, write, files, expected):
        Path("sub").mkdir()
        for name, text in files.items():
            write(HEAD + text, name)
        (line,) = problems("r.yaml")
        assert line.startswith(expected)

    def test_a_shipped_recipe_can_be_extended(self, write):
        recipe = load_recipe(
            write(HEAD + 'extends: w4a16-rtn\nexport: [{to: qtool}]\nlayers: [{match: "*", weights: int5-g64}]')
        )
        assert [rule.match for rule in recipe.layers] == ["lm_head", "*"]
        assert recipe.layers[1].weights == Int(bits=5, group=64)


class TestOverrides:
    def test_values_are_yaml_at_dotted_paths(self, write):
        sets = [
            "calibration.samples=32",
            "layers.0.weights={type: int, bits: 3, group: 32}",
            "layers.0.method.gptq.damp=0.25",
        ]
        sets += ["name='a=b'", "export=[{to: qtool}]"]
        recipe = load_recipe(write(HEAD + LAYERS), sets)
        assert recipe.calibration.samples == 32
        assert recipe.layers[0].weights == Int(bits=3, group=32)
        assert recipe.layers[0].method == GPTQ(damp=0.25)
        assert (recipe.name, recipe.export[0].to) == ("a=b", "qtool")

    def test_a_recipes_method_is_set_as_a_whole(self, write):
        assert load_recipe(write(HEAD + LAYERS + "method: gptq"), ["method=rtn"]).method == RTN()
        flag = "method={rtn: {importance: true}}"
        assert load_recipe(write(HEAD + LAYERS), [flag]).method == RTN(importance=True)

    def test_they_come_after_extends(self, write):
        write(TestExtends.BASE, "base.yaml")
        recipe = load_recipe(write(HEAD + "extends: base.yaml"), ["layers.1.weights=int8-g32", "calibration.samples=9"])
        assert recipe.layers[1].weights == Int(bits=8, group=32)
        assert recipe.calibration == Calibration(samples=9, length=64)

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            ("calibration.samples", "wanted KEY=VALUE, as in calibration.samples=32"),
            ("=3", "wanted KEY=VALUE, as in calibration.samples=32"),
            ("a..b=3", "wanted KEY=VALUE, as in calibration.samples=32"),
            ("calibration.smaples=3", "calibration.smaples: unknown key; did you mean 'samples'?"),
            ("calibration.samples=x", "calibration.samples: wanted a whole number, found 'x'"),
            ("calibration.samples=", "calibration.samples: wanted a whole number, found nothing"),
            ("calibration=[", "no valid YAML: expected the node content, but found '<stream end>'"),
            ("layers.1.keep=true", "layers: wanted an index below 1, found 1"),
            ("layers.x.keep=true", "layers: wanted an index below 1, found 'x'"),
            ("0.keep=true", "wanted a key, found the index 0"),
            (
                "layers.0.weights.group=32",
                "layers[0].weights: has no keys to set, found 'int4-g64'; set the whole of it",
            ),
            (
                "layers.0.weights=int4-g65x",
                "layers[0].weights: no format is called 'int4-g65x'; did you mean 'int4-g64'?",
            ),
        ],
    )
    def test_mistakes_name_the_flag(self, write, flag, expected):
        assert problems(write(HEAD + LAYERS), ["name=x", flag]) == [f"--set {flag}: {expected}"]

    def test_mistakes_of_flags_and_file_come_together(self, write):
        found = problems(write(HEAD + LAYERS + "x: 1"), ["y=1", "calibration.seed=z"])
        assert [line.split(": ")[0] for line in found] == ["--set calibration.seed=z", "--set y=1", "r.yaml:5"]


class TestFinding:
    def test_a_file_comes_before_a_shipped_recipe_and_a_folder_is_no_file(self, write):
        assert find_recipe("w4a16-rtn").parent != Path()
        Path("w4a16-rtn").mkdir()
        assert find_recipe("w4a16-rtn").name == "w4a16-rtn.yaml"
        write(HEAD + LAYERS, "w8a16")
        assert find_recipe("w8a16") == Path("w8a16")

    @pytest.mark.parametrize("name", ["w4a16-rtm", "x" * 5000, "a\0b", ""])
    def test_what_cannot_be_found_is_said(self, name):
        with pytest.raises(RecipeError, match="no file and no shipped recipe is called"):
            find_recipe(name)

    def test_near_names_are_suggested(self):
        with pytest.raises(RecipeError, match="did you mean 'gguf-q8_0'"):
            find_recipe("gguf-q80")

    def test_a_file_that_cannot_be_read_is_said(self, write, monkeypatch):
        name = write(HEAD + LAYERS)

        def refuse(self, *_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        assert problems(name) == ["r.yaml: cannot be read: Permission denied"]

    def test_listing(self):
        entries = {entry.name: entry for entry in list_recipes()}
        assert entries["w4a16-gptq"].description == "4-bit weights, groups of 128, symmetric, GPTQ"
        assert entries["w4a16-gptq"].path.read_text().startswith("# 4-bit weights in groups of 128")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("2G", 2 * 10**9),
        ("500M", 500 * 10**6),
        ("1048576", 1048576),
        ("'7'", 7),
        ("4.2GB", 4_200_000_000),
        ("1.5GiB", 3 * 2**29),
        ("0.3KB", 300),
        ("110.4kB", 110_400),
    ],
)
def test_sizes_of_parts(write, written, wanted):
    (export,) = load_recipe(write(HEAD + LAYERS + f"export: [{{to: gguf, split_max_size: {written}}}]")).export
    assert export.options == {"split_max_size": wanted}


@pytest.mark.parametrize("written", ["2P", "0", "-1", "1.5.5G", "G", "true", "[1]", "2 G", "2kiB", "2m", "0.0001K"])
def test_what_is_no_size(write, written):
    (line,) = problems(write(HEAD + LAYERS + f"export: [{{to: gguf, split_max_size: {written}}}]"))
    wanted = "wanted a number of bytes, or one such as 2G, 500M or 4.2GB, found "
    start = f"r.yaml:5: export[0].split_max_size: no size: {wanted}"
    assert line.startswith(start)


def test_a_file_type_that_does_not_exist(write):
    (line,) = problems(write(HEAD + LAYERS + "export: [{to: gguf, file_type: q4_k_x}]"))
    assert line == "r.yaml:5: export[0].file_type: no file type is called 'q4_k_x'; did you mean 'q4_k_s'?"


def test_only_gguf_has_parts(write):
    assert problems(write(HEAD + LAYERS + "export: [{to: qtool, split_max_size: 2G}]")) == [
        "r.yaml:5: export[0].split_max_size: an option of gguf, not of 'qtool'"
    ]


def test_scales_of_a_kv_cache_cover_everything_unless_a_recipe_says_otherwise():
    searched = {"type": "int", "bits": 4, "group": "channel", "scales": "search"}
    plain, told = parse_cache("int4-channel"), parse_cache(searched)
    assert (plain.keys.scales, told.keys.scales, parse_cache("int4-token").keys.scales) == (
        "minmax",
        "search",
        "search",
    )
    assert parse_cache({"keys": parse_format("int4-channel"), "values": "int4-channel"}) == plain
    mixed = parse_cache({"keys": told.keys, "values": "fp8-head"})
    for cache in (plain, told, mixed, parse_cache("int4-token-asym")):
        assert parse_cache(json.loads(json.dumps(dump_cache(cache)))) == cache
    assert dump_cache(plain) == "int4-channel"
    assert dump_cache(mixed)["values"] == "fp8-head"
    assert dump_cache(mixed)["keys"]["scales"] == "search"


def test_what_no_artifact_has_is_no_option(write):
    assert problems(write(HEAD + LAYERS + "export: [{to: gguf, split_max_sizes: 2G}]")) == [
        "r.yaml:5: export[0].split_max_sizes: unknown key; did you mean 'split_max_size'?"
    ]
    assert problems(write(HEAD + LAYERS + "export: [{to: gguf, file_type: q4_kx, split: 2G}]")) == [
        "r.yaml:5: export[0].file_type: no file type is called 'q4_kx'; did you mean 'q4_k_s'?",
        "r.yaml:5: export[0].split: unknown key; known: file_type, mmproj, pre_tokenizer, split_max_size, to",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{start: {gptq: {dmp: 1}}}", ".start.gptq.dmp: unknown key; did you mean 'damp'?"),
        ("{start: {gptq: {rounds: x}}}", ".start.gptq.rounds: wanted a whole number, found 'x'"),
        ("{start: gtpq}", ".start: no method is called 'gtpq'; did you mean 'gptq'?"),
    ],
)
def test_mistakes_of_a_method_within_a_method_say_where(write, options, expected):
    text = HEAD + f'layers: [{{match: "*", weights: int4-g64, method: {{learned: {options}}}}}]'
    (line,) = problems(write(text))
    assert line == f"r.yaml:3: layers[0].method.learned{expected}"
