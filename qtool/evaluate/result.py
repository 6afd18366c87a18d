"""What an evaluation measured. Reports hold these objects as they are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Gate(BaseModel):
    """A limit, and what was found.

    Attributes:
        name: of the gate.
        limit: as asked.
        at_least: True if less than the limit misses it; else more does.
        value: what was measured.
        low, high: the 95 % confidence interval of the mean, by the standard error; None where there is none.
        passed: whether the value keeps the limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    limit: float
    at_least: bool
    value: float
    low: float | None
    high: float | None
    passed: bool


class Proof(BaseModel):
    """What a program that is not ours computes from an artifact, compared with what we compute from it.

    Attributes:
        reader: it, with its version.
        tokens: how many were run; 0: it was not.
        distance, limit: norm of the difference of logits, relative to theirs, and how much that may be.
        largest: difference of a logit.
        why_not: it was not run.
        remark: what whoever runs it there has to know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    reader: str
    tokens: int = 0
    distance: float = 0.0
    limit: float = 0.0
    largest: float = 0.0
    why_not: str = ""
    remark: str = ""

    @property
    def words(self) -> str:
        """A clause about it, the same wherever rounding differs a little: "runs in llama.cpp 1, ..."."""
        if not self.tokens:
            return f"not run in {self.reader}: {self.why_not}"
        remark = f"; {self.remark}" if self.remark else ""
        return f"runs in {self.reader}, {self.tokens} tokens, largest logit difference {self.largest:.1g}{remark}"


class Evaluation(BaseModel):
    """Quality on a text, by llama-perplexity's protocol, alone and against the unquantized model.

    Everything that compares with a baseline is None where there was none.

    Attributes:
        text: file name of the text.
        tokens: scored positions.
        context, chunks: tokens per chunk, and how many chunks.
        runtime: what ran the quantized model: "qtool" or "llama.cpp".
        ppl, ppl_error: perplexity and its standard error.
        base_ppl: perplexity of the baseline.
        kld_mean, kld_error: KL divergence from the baseline to the quantized model per position, nats, and the
            standard error of the mean.
        kld_median, kld_p90, kld_p95, kld_p99, kld_p999, kld_max: its distribution over positions.
        top1: share of positions where both models find the same token most likely.
        dp_mean, rms_dp: mean and root mean square of the change of the correct token's probability, in [-1, 1].
        ppl_ratio_error, top1_error: standard errors of the perplexity ratio, of paired differences, and of `top1`.
        artifact, baseline: fingerprints of the two models; the first is None where a run measured its own codes before
            it wrote them.
        text_sha256: of the text's bytes.
        qtool: program version.
        gates: limits that it was held against.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    text: str
    tokens: int
    context: int
    chunks: int
    runtime: str
    ppl: float
    ppl_error: float
    base_ppl: float | None = None
    kld_mean: float | None = None
    kld_error: float | None = None
    kld_median: float | None = None
    kld_p90: float | None = None
    kld_p95: float | None = None
    kld_p99: float | None = None
    kld_p999: float | None = None
    kld_max: float | None = None
    top1: float | None = None
    dp_mean: float | None = None
    rms_dp: float | None = None
    ppl_ratio_error: float | None = None
    top1_error: float | None = None
    artifact: str | None = None
    baseline: str | None = None
    text_sha256: str | None = None
    qtool: str | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def ppl_ratio(self) -> float | None:
        """Perplexity over the baseline's."""
        return None if self.base_ppl is None else self.ppl / self.base_ppl


class TaskScore(BaseModel):
    """One metric of one task.

    Attributes:
        task, metric: their names.
        higher_is_better: whether more is better.
        samples: questions.
        value, error: mean of the quantized model, and its standard error.
        base: the baseline's mean.
        difference, difference_error: mean of the differences, question by question, and its standard error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    task: str
    metric: str
    higher_is_better: bool
    samples: int
    value: float
    error: float | None = None
    base: float | None = None
    difference: float | None = None
    difference_error: float | None = None


class TaskEvaluation(BaseModel):
    """How a model does in tasks of lm-evaluation-harness, alone and beside the unquantized one.

    Attributes:
        scores: each task with each of its metrics.
        fewshot: examples in front of each question; None: as many as each task says.
        limit: questions of each task at most; None: all.
        runtime: what ran the quantized model: "qtool" or "llama.cpp".
        harness: its release.
        artifact, baseline, qtool, gates: see `Evaluation`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    scores: tuple[TaskScore, ...]
    fewshot: int | None = None
    limit: int | None = None
    runtime: str
    harness: str
    artifact: str | None = None
    baseline: str | None = None
    qtool: str | None = None
    gates: tuple[Gate, ...] = ()
