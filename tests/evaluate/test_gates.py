import math

import pytest

from qtool.errors import GateError, UsageError
from qtool.evaluate.gates import GATES, judge, parse_gates, refuse_missed, validate_gates
from qtool.evaluate.result import Evaluation
from qtool.report.units import verdicts

FOUND = Evaluation(
    text="t.txt", tokens=510, context=512, chunks=2, runtime="qtool", ppl=20.4, ppl_error=0.5, base_ppl=20.0,
    kld_mean=0.04, kld_error=0.001, kld_median=0.02, kld_p90=0.1, kld_p95=0.15, kld_p99=0.4, kld_p999=0.9, kld_max=2.0,
    top1=0.91, dp_mean=-0.01, rms_dp=0.05,
)  # fmt: skip


def test_parses_limits():
    assert parse_gates(["kld=0.05", "ppl_ratio = 1.02"]) == {"kld": 0.05, "ppl_ratio": 1.02}


@pytest.mark.parametrize("text", ["kld", "kld=", "kld=low", "=0.1x"])
def test_what_is_no_gate(text):
    with pytest.raises(UsageError, match=r"wanted e\.g\. kld=0.05, found"):
        parse_gates([text])


def test_a_near_spelling_is_suggested():
    with pytest.raises(UsageError, match="no gate is called 'kdl'; did you mean 'kld'"):
        parse_gates(["kdl=0.05"])


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_must_be_finite(limit):
    with pytest.raises(UsageError, match="the limit of gate kld: wanted a finite number"):
        validate_gates({"kld": limit}, compared=True)


def test_comparing_gates_need_a_baseline():
    validate_gates({"ppl": 30.0}, compared=False)
    with pytest.raises(UsageError, match="gate top1 compares with a baseline"):
        validate_gates({"ppl": 30.0, "top1": 0.9}, compared=False)


MEASURED = {
    "ppl": 20.4, "ppl_ratio": 1.02, "kld": 0.04, "kld_median": 0.02, "kld_p90": 0.1, "kld_p95": 0.15, "kld_p99": 0.4,
    "kld_p999": 0.9, "kld_max": 2.0, "rms_dp": 0.05, "top1": 0.91,
}  # fmt: skip


def test_all_gates_are_known_here():
    assert set(GATES) == set(MEASURED)


@pytest.mark.parametrize("gate", MEASURED)
def test_each_gate_turns_at_its_limit(gate):
    inward = -1 if gate == "top1" else 1
    refuse_missed(judge(FOUND, {gate: MEASURED[gate] * (1 + inward * 1e-6)}))
    with pytest.raises(GateError):
        refuse_missed(judge(FOUND, {gate: MEASURED[gate] * (1 - inward * 1e-6)}))


@pytest.mark.parametrize("gate", ["kld", "top1"])
def test_the_limit_itself_is_good(gate):
    refuse_missed(judge(FOUND, {gate: MEASURED[gate]}))


def test_each_missed_gate_is_named_and_no_other():
    with pytest.raises(GateError) as caught:
        refuse_missed(judge(FOUND, {"kld": 0.01, "ppl_ratio": 1.05, "top1": 0.95}))
    assert str(caught.value) == (
        "quality misses 2 of 3 gates: kld wanted at most 0.01, found 0.04; top1 wanted at least 0.95, found 0.91"
    )


def test_intervals_are_those_of_the_mean():
    found = FOUND.model_copy(update={"top1_error": 0.02})
    kld, median, top1 = judge(found, {"kld": 0.0405, "kld_median": 0.01, "top1": 0.9})
    assert (kld.value, kld.limit, kld.passed, kld.at_least) == (0.04, 0.0405, True, False)
    assert (kld.low, kld.high) == pytest.approx((0.04 - 1.96 * 0.001, 0.04 + 1.96 * 0.001))
    assert (median.low, median.high, median.passed) == (None, None, False)
    assert (top1.low, top1.high) == pytest.approx((0.91 - 1.96 * 0.02, 0.91 + 1.96 * 0.02))
    assert top1.at_least
    assert top1.passed
    assert verdicts([FOUND.model_copy(update={"gates": (kld, median, top1)})]) == [
        "PASS kld 0.04 (95 % between 0.03804 and 0.04196), at most 0.0405",
        "FAIL kld_median 0.02, at most 0.01",
        "PASS top1 0.91 (95 % between 0.8708 and 0.9492), at least 0.9",
    ]


def test_a_measurement_that_is_no_number_misses():
    with pytest.raises(GateError):
        refuse_missed(judge(FOUND.model_copy(update={"kld_mean": math.nan}), {"kld": 0.1}))
