"""Runs of two processes against runs of one, on tiny models: what is the same to the bit, and how near the rest is."""

from __future__ import annotations

import pydoc_data.topics
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from qtool.artifact.qtool import Qtool
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import PlanError
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.evaluate import EvaluateOptions
from qtool.pipeline.evaluate import run as evaluate
from qtool.pipeline.found import rows_to_solve
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.report.render import read_report
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram

RECIPE = """
recipe: 1
name: together
calibration: {{data: {text}, samples: 7, length: 48}}
layers:
  - {{match: lm_head, keep: true}}
  - {{match: "*", {layer}}}
export: [{{to: qtool}}]
eval: {{text: {text}, context: 32, chunks: 5}}
"""
CPU = torch.device("cpu")
TIMED = ("report.json", "report.html", "report.md", "README.md", "SHA256SUMS")
"""Files that hold times, or hashes of times."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:9]))
    return path


@pytest.fixture
def alone(use_threads):
    """As many threads as each of the two processes has."""
    use_threads(1)


def quantized(ranks, source, recipe, out, **options):
    return quantize(QuantizeOptions(str(source), str(recipe), out, dtype="fp32", ranks=ranks, **options))


def measured(ranks, source, recipe, out):
    return calibrate(CalibrateOptions(str(source), str(recipe), out, dtype="fp32", ranks=ranks))


def evaluated(ranks, source, text, chunks, out):
    return evaluate(EvaluateOptions(str(out), str(source), text, context=32, chunks=chunks, ranks=ranks))


def both_ways(together, folder, source, text, layer, more=""):
    """(folder of one process, folder of two), of a recipe."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(text=text, layer=layer) + more)
    one, two = folder / "one", folder / "two"
    quantized(ALONE, source, path, one)
    reports = together(quantized, source, path, two)
    assert reports[0] == reports[1] == read_report(two / "report.json")
    assert not (folder / "two.work").exists()
    return one, two


def content(folder, tree):
    return {name: data for name, data in tree(folder).items() if name not in TIMED}


def test_parts_end_with_a_matrix_where_that_is_near():
    def parts(size, *rows):
        plans = [SimpleNamespace(module=SimpleNamespace(name=str(i), shape=(n, 8))) for i, n in enumerate(rows)]
        return [rows_to_solve(plans, [False] * len(rows), Ranks(rank, size)) for rank in range(size)]

    assert parts(2, 4096, 1024, 1024) == [
        {"0": (0, 4096), "1": (0, 0), "2": (0, 0)},
        {"0": (4096, 4096), "1": (0, 1024), "2": (0, 1024)},
    ]
    assert parts(2, 10) == [{"0": (0, 5)}, {"0": (5, 10)}]
    assert parts(4, 7, 7) == [
        {"0": (0, 3), "1": (0, 0)},
        {"0": (3, 7), "1": (0, 0)},
        {"0": (7, 7), "1": (0, 3)},
        {"0": (7, 7), "1": (3, 7)},
    ]
    for size in (2, 3, 5, 8):
        found = parts(size, 30, 7, 12, 1, 25)
        for i, rows in enumerate((30, 7, 12, 1, 25)):
            assert sorted(n for part in found for n in range(*part[str(i)])) == list(range(rows))
        assert max(sum(b - a for a, b in part.values()) for part in found) <= 75 / size * 4 / 3 + 1


def assert_near(one, two, same=0.98, db=0.05):
    """Two results have errors that are alike, and almost all codes in common where these depend on no others.

    Behind the first input, a code that falls to the other side of a tie changes what later layers read; within a row,
    what all codes behind it are rounded from. A row is a hundredth of these matrices, and one or two take another path.

    Args:
        one, two: folders.
        same: share of equal codes in the matrices that read the first input.
        db: most that mean output errors may differ.
    """
    a, b = (read_report(folder / "report.json") for folder in (one, two))
    errors = [[e.output_error_db for e in r.layers if e.output_error_db is not None] for r in (a, b)]
    assert len(errors[0]) == len(errors[1]) > 0
    assert abs(sum(errors[0]) - sum(errors[1])) / len(errors[0]) < db
    told = [[(e.name, e.method, e.fallback, e.tokens if e.expert is None else 0) for e in r.layers] for r in (a, b)]
    assert told[0] == told[1]
    assert a.calibration == b.calibration
    assert a.evaluations[0].base_ppl == b.evaluations[0].base_ppl
    assert b.evaluations[0].kld_mean == pytest.approx(a.evaluations[0].kld_mean, rel=0.1)
    first, second = (Qtool().open(folder) for folder in (one, two))
    modules = [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"]
    equal = [torch.eq(first.matrix(m).quantized.codes, second.matrix(m).quantized.codes) for m in modules]
    assert sum(int(e.sum()) for e in equal) / sum(e.numel() for e in equal) >= same


def test_gptq_differs_by_the_order_of_sums(together, alone, tiny_checkpoint, text, tmp_path):
    one, two = both_ways(together, tmp_path, tiny_checkpoint("llama"), text, "weights: int4-g32, method: gptq")
    assert_near(one, two)


def test_k_quants_differ_by_the_order_of_sums(together, alone, tiny_checkpoint, text, tmp_path):
    fits = "weights: q4_0, method: gptq"
    one, two = both_ways(together, tmp_path, tiny_checkpoint("qwen3"), text, fits)
    assert_near(one, two)


def test_scales_of_inputs_for_all_tokens_are_the_same(together, alone, tiny_checkpoint, text, tmp_path):
    static = "weights: int8-channel, activations: int8-tensor"
    one, two = both_ways(together, tmp_path, tiny_checkpoint("llama"), text, static)
    first, second = (Qtool().open(folder).layers for folder in (one, two))
    assert {name: layer.static for name, layer in first.items()} == {n: layer.static for n, layer in second.items()}
    assert all(layer.static for layer in first.values())


def test_rows_that_share_a_scale_are_solved_by_one(together, alone, tiny_checkpoint, text, tmp_path):
    tied = "weights: fp8-tensor, method: gptq"
    one, two = both_ways(together, tmp_path, tiny_checkpoint("llama"), text, tied)
    assert_near(one, two)


def test_transforms_are_measured_together(together, alone, tiny_checkpoint, text, tmp_path):
    """Scales are means in another order, so that all weights differ in their last bits, and more codes do."""
    layer = "weights: int4-g32, method: gptq"
    one, two = both_ways(together, tmp_path, tiny_checkpoint("llama"), text, layer, "transforms: [awq]\n")
    assert_near(one, two, same=0.97, db=0.1)


def test_without_data_bytes_are_the_same(together, alone, tiny_checkpoint, text, tree, tmp_path):
    one, two = both_ways(together, tmp_path, tiny_checkpoint("qwen3"), text, "weights: q4_0")
    assert content(one, tree) == content(two, tree)


def test_without_data_experts_are_the_same_bytes(together, alone, text, tree, tmp_path):
    one, two = both_ways(together, tmp_path, moe(tmp_path), text, "weights: int4-g32")
    assert content(one, tree) == content(two, tree)


def test_statistics_of_a_folder_give_the_same_bytes(together, alone, tiny_checkpoint, text, tree, tmp_path):
    source, path = tiny_checkpoint("llama"), tmp_path / "recipe.yaml"
    recipe = RECIPE.format(text=text, layer="weights: int4-g32, method: {gptq: {drift: 0}}")
    path.write_text(recipe.replace("48}", "48, propagate: float}"))
    one, stats = tmp_path / "stats-one", tmp_path / "stats"
    assert together(measured, source, path, stats) == [measured(ALONE, source, path, one)] * 2
    quantized(ALONE, source, path, tmp_path / "one", stats=stats)
    together(with_stats, source, path, tmp_path / "two", stats)
    assert content(tmp_path / "one", tree) == content(tmp_path / "two", tree)


def with_stats(ranks, source, recipe, out, stats):
    quantized(ranks, source, recipe, out, stats=stats)


def moe(folder):
    """A mixture whose experts see few tokens each."""
    from tests.conftest import make_checkpoint, make_tokenizer

    place = folder / "moe"
    return place if place.exists() else make_checkpoint("qwen3_moe", place, make_tokenizer())


def measured_inputs(ranks, folder, tokens):
    """Of the first block: tokens of each input in this process and in all, Gram matrices and sums of squares."""
    walker, needs = (
        Walker(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32, ranks=ranks),
        {Gram, Channels},
    )
    mine = tokens[ranks.share(len(tokens))]
    block = walker.load_block(0)
    own = Walker(walker.checkpoint, walker.device, walker.dtype).collect(block, 0, walker.embed(mine), frozenset(needs))
    found = walker.collect(block, 0, walker.embed(mine), frozenset(needs))
    counts = {reads: (own[reads].tokens, stats.tokens) for reads, stats in found.items()}
    return counts, {r: (s[Gram].matrix, s[Channels].high) for r, s in found.items() if s.tokens}


def test_experts_that_no_token_of_a_process_reaches(together, alone, tmp_path, text):
    folder = moe(tmp_path)
    tokens = torch.randint(512, (3, 3), generator=torch.Generator().manual_seed(0))
    whole, want = measured_inputs(ALONE, folder, tokens)
    (first, found), (second, same) = together(measured_inputs, folder, tokens)
    assert any(first[r][0] == 0 < second[r][0] or second[r][0] == 0 < first[r][0] for r in first)
    assert found.keys() == same.keys() == want.keys()
    for reads, (_, total) in whole.items():
        assert first[reads][1] == second[reads][1] == total == first[reads][0] + second[reads][0]
    for reads, (gram, high) in want.items():
        assert_close(found[reads][0], gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
        assert torch.equal(found[reads][0], same[reads][0])
        assert_close(found[reads][1], high, rtol=1e-5, atol=1e-6)


def test_experts_are_solved_together(together, alone, text, tmp_path):
    one, two = both_ways(together, tmp_path, moe(tmp_path), text, "weights: int4-g32, method: gptq")
    assert_near(one, two, same=0.97)


@pytest.mark.parametrize("chunks", [1, 5])
def test_an_evaluation_is_the_same(chunks, together, alone, tiny_checkpoint, text):
    """Of one chunk, the second process gets none."""
    source, other = tiny_checkpoint("llama"), tiny_checkpoint("llama-biased")
    one = evaluated(ALONE, source, text, chunks, other)
    two = together(evaluated, source, text, chunks, other)
    assert two == [one, one]


def refused(ranks, *arguments):
    try:
        quantized(ranks, *arguments)
    except PlanError as error:
        return str(error)


def test_methods_that_train_blocks_are_refused(together, tiny_checkpoint, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(text=text, layer="weights: int4-g32, method: learned"))
    line = "2 processes: learned trains blocks, which one process does; run it without torchrun"
    assert together(refused, tiny_checkpoint("llama"), path, tmp_path / "out") == [line, line]
