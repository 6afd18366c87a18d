"""Tasks of lm-evaluation-harness: tiny local ones with tiny models, against the harness's class for transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import GateError, MissingExtra, UsageError
from qtool.evaluate import tasks
from qtool.evaluate.continuations import Request, llama_cpp, streamed
from qtool.evaluate.gates import judge_tasks, parse_task_gates, validate_task_gates
from qtool.evaluate.result import TaskEvaluation, TaskScore
from qtool.pipeline.tasks import TaskOptions, run

CPU = torch.device("cpu")
QUESTIONS = [
    {"question": f"What is {a} plus {b}?", "choices": [str(a + b + d) for d in (0, 1, 10)], "gold": 0}
    for a in range(3, 9)
    for b in range(2, 6)
]
CHOICE = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, higher_is_better: false}
"""
WRITING = CHOICE.replace("multiple_choice", "generate_until").replace("tiny_sums", "tiny_writing")


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="needs the extra `tasks`; `make test-tasks` has it")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Paths of task files by name, whose data lies beside them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    texts = {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path / "data.jsonl")))
    return {name: str(tmp_path / f"{name}.yaml") for name in texts}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_log_probabilities_are_those_of_the_whole_model(family, tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    draw = torch.Generator().manual_seed(0)
    lengths = [(2, 1), (9, 3), (17, 16), (18, 1), (40, 7), (41, 7)]
    rows = [torch.randint(3, 500, (n,), generator=draw).tolist() for n, _ in lengths]
    requests = [Request(tuple(row), first) for row, (_, first) in zip(rows, lengths, strict=True)]
    rows[1][3:] = greedily(model, rows[1][:3], 6)
    requests[1] = Request(tuple(rows[1]), 3)
    found = streamed(HFCheckpoint(folder), CPU, torch.float32, lambda *_: None)(requests)
    for request, outcome in zip(requests, found, strict=True):
        log_p = model(torch.tensor([request.tokens])).logits[0].detach().double().log_softmax(1)
        wanted = math.fsum(float(log_p[t - 1, request.tokens[t]]) for t in range(request.first, len(request.tokens)))
        assert outcome.log_probability == pytest.approx(wanted, rel=1e-4)
    assert [outcome.greedy for outcome in found] == [False, True, False, False, False, False]


def greedily(model, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def test_long_contexts_lose_their_beginning():
    assert tasks.request([1, 2, 3], [4, 5], 10) == Request((1, 2, 3, 4, 5), 3)
    assert tasks.request([1, 2, 3], [4, 5], 3) == Request((2, 3, 4, 5), 2)
    assert tasks.request([1], [4, 5, 6], 2) == Request((4, 5, 6), 1)


@pytest.mark.parametrize("name", ["choice", "rolling"])
def test_scores_are_those_of_the_harness(name, harness, local, tiny_checkpoint):
    """The harness's own class runs the same model with transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1, device="cpu")
    wanted = harness.simple_evaluate(theirs, tasks=[local[name]], task_manager=tasks.task_manager(), bootstrap_iters=0)
    checkpoint = HFCheckpoint(folder)
    score = streamed(checkpoint, CPU, torch.float32, lambda *_: None)
    ((task, found),) = tasks.answers(checkpoint, score, tasks.Asked((local[name],), None, None)).items()
    assert found.means
    for metric, (value, _) in found.means.items():
        assert value == pytest.approx(wanted["results"][task][f"{metric},none"], rel=1e-4)
    if name == "choice":
        assert len(found.samples["acc"]) == len(QUESTIONS)
        theirs_each = [s["acc_norm"] for s in sorted(wanted["samples"][task], key=lambda s: s["doc_id"])]
        assert found.samples["acc_norm"] == theirs_each


def test_an_artifact_beside_its_baseline(harness, local, tiny_checkpoint, tmp_path):
    """A real artifact, from the command line: differences of the same questions, a gate, JSON, report and page."""
    from tests.cli.test_commands import qtool

    model, out = tiny_checkpoint("llama"), tmp_path / "out"
    assert qtool("quantize", model, "-r", "w4a16-rtn-g32", "-o", out).exit_code == 0
    common = ["eval", out, "--baseline", model, "--tasks", local["choice"], "--device", "cpu"]
    done = qtool(*common, "--json", "--gate", "tiny_sums_drop=100", "--update", "-o", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "found.json").read_text())
    (acc, norm) = found["scores"]
    assert (acc["metric"], norm["metric"], acc["samples"]) == ("acc", "acc_norm", len(QUESTIONS))
    for score in (acc, norm):
        assert score["difference"] == pytest.approx(score["value"] - score["base"])
        assert score["difference_error"] <= score["error"] * 2
    gate = found["gates"][0]
    assert gate["value"] == pytest.approx(100 * (acc["base"] - acc["value"]))
    assert "tiny_sums" in (out / "report.html").read_text()
    assert " | acc | 24 | " in (out / "report.md").read_text()
    shown = qtool(*common, "--limit", "5", "--gate", "tiny_sums_drop=-101")
    assert shown.exit_code == 9
    assert "FAIL tiny_sums_drop" in shown.stdout
    assert "at most -101" in shown.stdout


def test_what_is_refused(harness, local, tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint("llama"))
    with pytest.raises(UsageError, match="found tiny_writing, in which the model writes text"):
        run(TaskOptions(model, None, (local["writing"],)))
    with pytest.raises(UsageError, match="--tasks cannot be loaded"):
        run(TaskOptions(model, None, ("no_such_task_at_all",)))
    with pytest.raises(UsageError, match="no gate is called 'tiny_sum_drop'; did you mean 'tiny_sums_drop'"):
        run(TaskOptions(model, model, (local["choice"],), gates={"tiny_sum_drop": 1.0}))
    with pytest.raises(UsageError, match="compares with a baseline and none is given"):
        run(TaskOptions(model, None, (local["choice"],), gates={"tiny_sums_drop": 1.0}))


def test_without_the_package(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="eval --tasks needs the package lm-eval"):
        run(TaskOptions(str(tiny_checkpoint("llama")), None, ("arc_easy",)))


def test_gates_hold_percentage_points_against_limits():
    scores = (
        TaskScore(task="a", metric="acc", higher_is_better=True, samples=9, value=0.5, base=0.52, difference=-0.02,
                  difference_error=0.01),
        TaskScore(task="b", metric="ppl", higher_is_better=False, samples=9, value=2.0, base=1.0, difference=1.0),
        TaskScore(task="c", metric="word_perplexity", higher_is_better=False, samples=0, value=2.0),
    )  # fmt: skip
    found = TaskEvaluation(scores=scores, runtime="qtool", harness="0")
    lost, worse = judge_tasks(found, {"a_drop": 1.9, "b_drop": 101})
    assert (lost.value, lost.passed, worse.value, worse.passed) == (pytest.approx(2), False, 100, True)
    assert (lost.low, lost.high) == (pytest.approx(0.04), pytest.approx(3.96))
    assert (worse.low, worse.high) == (None, None)
    with pytest.raises(UsageError, match="wanted a metric of each question, found word_perplexity"):
        judge_tasks(found, {"c_drop": 1})
    assert parse_task_gates(["a_drop=0.5"]) == {"a_drop": 0.5}
    with pytest.raises(UsageError, match=r"wanted TASK_drop=POINTS, found kld=0\.1"):
        parse_task_gates(["kld=0.1"])
    with pytest.raises(UsageError, match="wanted a finite number"):
        validate_task_gates({"a_drop": math.nan}, ["a"], compared=True)


def test_llama_cpp_finds_the_same(tiny_checkpoint, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra `llamacpp`")
    from qtool.models import open_artifact
    from qtool.pipeline.quantize import QuantizeOptions
    from qtool.pipeline.quantize import run as quantize

    quantize(QuantizeOptions(str(tiny_checkpoint("llama")), "gguf-q8_0", tmp_path / "out", device="cpu"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    requests = [Request(tuple(range(5, 5 + n)), first) for n, first in ((6, 2), (20, 19), (33, 10))]
    ours = streamed(open_artifact(file), CPU, torch.float32, lambda *_: None)(requests)
    theirs = llama_cpp(file, 64, lambda *_: None)(requests)
    for a, b in zip(ours, theirs, strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, rel=2e-3)


def test_one_of_text_and_tasks(tiny_checkpoint):
    from tests.cli.test_commands import qtool

    for given in ([], ["--text", "a.txt", "--tasks", "arc_easy"]):
        refused = qtool("eval", tiny_checkpoint("llama"), *given)
        assert (refused.exit_code, refused.stderr) == (2, "error: wanted one of --text and --tasks\n")


def test_a_missed_gate_is_an_error():
    from qtool.evaluate.gates import refuse_missed

    score = TaskScore(task="a", metric="acc", higher_is_better=True, samples=9, value=0.5, base=0.52, difference=-0.02)
    found = TaskEvaluation(scores=(score,), runtime="qtool", harness="0")
    with pytest.raises(GateError, match="a_drop wanted at most 1, found 2"):
        refuse_missed(judge_tasks(found, {"a_drop": 1}))
