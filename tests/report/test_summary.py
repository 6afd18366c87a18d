import math

import pytest

from qtool.evaluate.gates import judge
from qtool.report import quality, summary
from qtool.report.meaning import ANCHORS, meaning


def test_totals_by_hand(report):
    """Embedding at 16 bits, 26 downs of int4-g64 (4.25 bits) and 4 of int8-g64 (8.25), the other six roles at 4.25."""
    per_block = 576 * 576 * 2 + 192 * 576 * 2 + 1536 * 576 * 2
    bits = 49152 * 576 * 16 + 30 * per_block * 4.25 + 1536 * 576 * (26 * 4.25 + 4 * 8.25)
    assert summary.model_bytes(report) == bits / 8 + 70_272
    assert summary.bits_per_weight(report) == pytest.approx((bits + 8 * 70_272) / 134_515_008)


def test_size_rows_split_a_role_by_format_and_add_up(report):
    rows = {(r.role, r.format): r for r in summary.size_rows(report)}
    assert [key for key in rows if key[0] == "down"] == [("down", "int8-g64"), ("down", "int4-g64")]
    assert rows["down", "int8-g64"].layers == 4
    assert rows["down", "int8-g64"].bits == 8.25
    assert rows["embedding", "kept"].share == pytest.approx(49152 * 576 * 2 / summary.model_bytes(report))
    assert sum(r.nbytes for r in rows.values()) + report.other_bytes == summary.model_bytes(report)
    assert sum(r.layers for r in rows.values()) == len(report.layers)


def test_error_rows_name_the_worst_layer(report):
    row = next(r for r in summary.error_rows(report) if r.role == "up")
    found = sorted((x.output_error_db, x.name) for x in report.layers if x.role == "up")
    assert (row.worst, row.worst_layer) == found[0]
    assert row.best == found[-1][0]
    assert row.median == (found[14][0] + found[15][0]) / 2
    assert row.layers == 30


def test_tokens_per_expert_by_hand(report):
    assert summary.expert_rows(report) == []
    tokens = {(0, 0): 10, (0, 1): 700, (0, 2): 30, (0, 3): 40, (4, 0): 5, (4, 1): 1}
    layers = [
        report.layers[5].model_copy(update={"role": role, "block": block, "expert": e, "tokens": count})
        for (block, e), count in tokens.items()
        for role in ("gate", "up", "down")
    ]
    mixture = report.model_copy(update={"layers": (*report.layers, *layers)})
    assert summary.expert_rows(mixture) == [
        summary.ExpertRow(0, experts=4, least=10, median=35, most=700),
        summary.ExpertRow(4, experts=2, least=1, median=3, most=5),
    ]
    blind = [layer.model_copy(update={"tokens": 0}) for layer in layers]
    assert summary.expert_rows(report.model_copy(update={"layers": tuple(blind)})) == []


def test_without_output_errors_weight_errors_are_shown(report):
    plain = report.model_copy(
        update={"layers": tuple(x.model_copy(update={"output_error_db": None}) for x in report.layers)}
    )
    assert summary.measures_output(report)
    assert not summary.measures_output(plain)
    assert [db for _, db in summary.errors(plain)] == [x.weight_error_db for x in report.layers if x.format]


def test_notices_come_in_order_and_fallbacks_once_per_reason(report):
    layers = [x.model_copy(update={"fallback": "rtn"}) if x.role == "v" else x for x in report.layers]
    artifacts = [a.model_copy(update={"verified": False}) for a in report.artifacts]
    update = {"layers": tuple(layers), "artifacts": tuple(artifacts)}
    found = summary.notices(report.model_copy(update=update))
    assert [n.kind for n in found] == ["fallback", "fallback", "not verified", "warning"]
    assert found[0].layers == tuple(f"model.layers.{i}.self_attn.v_proj" for i in range(30))
    assert found[1].layers == ("model.layers.7.self_attn.o_proj",)


def test_the_verdict(report):
    assert summary.verdict(report) == (
        "269.1 MB became 114.9 MB (42.7 %), 6.83 bits per weight of the whole model. "
        "KL divergence 0.0413 nats per token, perplexity +2.2 % on evaluation.txt."
    )
    smoke = report.model_copy(update={"limited_blocks": 4})
    assert summary.verdict(smoke) == "Smoke run of 4 decoder blocks: " + summary.verdict(report)
    single = report.model_copy(update={"limited_blocks": 1})
    assert summary.verdict(single) == "Smoke run of 1 decoder block: " + summary.verdict(report)
    unmeasured = report.model_copy(update={"evaluations": ()})
    assert summary.verdict(unmeasured).endswith("6.83 bits per weight of the whole model. Quality was not measured.")
    alone = report.evaluations[0].model_copy(update={"base_ppl": None, "kld_mean": None})
    assert summary.verdict(report.model_copy(update={"evaluations": (alone,)})).endswith(
        "Perplexity 21.37 on evaluation.txt."
    )


def test_the_verdict_quotes_the_evaluation_with_a_baseline(report):
    first = report.evaluations[0].model_copy(update={"base_ppl": None, "kld_mean": None, "text": "other.txt"})
    assert summary.verdict(report.model_copy(update={"evaluations": (first, *report.evaluations)})).endswith(
        "perplexity +2.2 % on evaluation.txt."
    )


def test_every_measured_value_has_a_row(report):
    rows = dict(quality.evaluation_rows(report))
    assert rows["KL divergence, mean (nats)"] == ["0.0413 ± 0.00051", "0.0415 ± 0.00051"]
    assert rows["perplexity ratio"] == ["1.0221", "1.0221"]
    assert rows["same most likely token"] == ["90.3 %", "90.3 %"]
    assert rows["Δp of the right token, mean"] == ["-0.21 %", "-0.21 %"]
    assert rows["KL divergence, 99.9 %"] == ["1.27", "1.27"]
    assert len(rows) == 17
    exact = report.evaluations[0].model_copy(update={"ppl_ratio_error": 0.00123, "top1_error": 0.0045})
    rows = dict(quality.evaluation_rows(report.model_copy(update={"evaluations": (exact,)})))
    assert rows["perplexity ratio"] == ["1.0221 ± 0.0012"]
    assert rows["same most likely token"] == ["90.3 % ± 0.45"]


def judged(report, **limits):
    """The report with these gates on its first evaluation."""
    first = report.evaluations[0]
    first = first.model_copy(update={"gates": judge(first, limits)})
    return report.model_copy(update={"evaluations": (first, *report.evaluations[1:])})


def test_one_missed_gate_fails_the_whole(report):
    assert quality.outcome(report) is None
    assert quality.outcome(judged(report, kld=0.05)) == "PASS"
    assert quality.outcome(judged(report, kld=0.05, top1=0.95)) == "FAIL"
    assert [(text, gate.name) for text, gate in quality.gates(judged(report, kld=1, top1=0))] == [
        ("evaluation.txt", "kld"),
        ("evaluation.txt", "top1"),
    ]


def test_divergences_in_words(report):
    assert meaning(0.0) == "practically the original (less than Q8_0 of Llama 3 8B)"
    assert meaning(0.0413) == "noticeable where answers are long or exact (between Q4_K_M and Q3_K_M of Llama 3 8B)"
    assert meaning(0.02) == "the usual price of four bits (between Q5_K_M and Q4_K_M of Llama 3 8B)"
    assert meaning(math.inf) == meaning(3.0) == "another model than the original (more than Q2_K of Llama 3 8B)"
    rows = quality.anchor_rows(report)
    assert [row.kld for row in rows] == sorted(row.kld for row in rows)
    assert [row.kld for row in rows if row.own] == [0.04127, 0.0415]
    assert len(rows) == len(ANCHORS) + 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1402, "1.4 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (1.5e15, "1500.0 TB")],
)
def test_sizes(value, text):
    assert summary.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00 s"), (0.42, "0.42 s"), (4.25, "4.2 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (138, "2 min 18 s"),
     (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(value, text):
    assert summary.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (math.inf, "exact"), (18.249, "18.2"), (-3.0, "-3.0")], ids=str
)
def test_decibels(value, text):
    assert summary.decibels(value) == text


@pytest.mark.parametrize(("ratio", "text"), [(1.0211, "+2.1 %"), (0.97, "-3.0 %"), (0.9998, "+0.0 %")])
def test_changes(ratio, text):
    assert summary.change(ratio) == text
