"""Budgets: how large an artifact may be, and the formats that its layers may get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from qtool.formats._spelling import WeightsField, dump_format
from qtool.problems import Keys, Mistakes, checked
from qtool.recipe.fields import InputsField, ResidualField
from qtool.recipe.size import Size
from qtool.recipe.strict import Strict


class Candidate(Strict):
    """What a layer may become.

    Attributes:
        weights: the format of its weight.
        activations: the format that its inputs are rounded to at run time.
        residuals: what is kept beside the codes, such as {low_rank: {rank: 16}}; what its rule says if none is named.
        keep: true leaves it as it is; f32, f16 or bf16 casts it.
    """

    weights: WeightsField | None = None
    activations: InputsField | None = None
    residuals: tuple[ResidualField, ...] = ()
    keep: Literal[True, "f32", "f16", "bf16"] | None = None

    @property
    def label(self) -> str:
        """In a few words: "q4_k", "int4-g64 + low_rank rank 16", "nvfp4 with nvfp4 inputs", "kept", "kept as f16"."""
        if self.weights is None:
            return "kept" if self.keep is True else f"kept as {self.keep}"
        stored = " + ".join((self.weights.label, *(residual.label for residual in self.residuals)))
        return stored + (f" with {self.activations.label} inputs" if self.activations else "")

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """Either a format or kept."""
        chosen = [key for key in ("weights", "keep") if value.get(key) is not None]
        if len(chosen) != 1:
            return [((), f"wanted one of weights and keep, found {' and '.join(chosen) or 'none'}")]
        if chosen == ["weights"]:
            return []
        told = {"activations": "a layer that is kept rounds no inputs", "residuals": "a layer that is kept is exact"}
        return [((key,), text) for key, text in told.items() if value.get(key)]


def _parse_candidate(value: Any) -> Any:
    """A format alone, "keep", or a mapping."""
    if isinstance(value, Candidate):
        return value
    if value == "keep":
        return Candidate(keep=True)
    if isinstance(value, Mapping) and "type" not in value:
        lists = {key: tuple(x) for key, x in value.items() if isinstance(x, list)}
        return checked(Candidate, {**value, **lists})
    try:
        return checked(Candidate, {"weights": value})
    except Mistakes as error:
        raise Mistakes([(path[1:] if path[:1] == ("weights",) else path, text) for path, text in error.found]) from None


def _dump_candidate(candidate: Candidate) -> Any:
    if candidate.weights is None:
        return {"keep": candidate.keep}
    if candidate.activations is None and not candidate.residuals:
        return dump_format(candidate.weights)
    found: dict[str, Any] = {"weights": dump_format(candidate.weights)}
    if candidate.activations:
        found["activations"] = dump_format(candidate.activations)
    return found | ({"residuals": [r.spelled() for r in candidate.residuals]} if candidate.residuals else {})


CandidateField = Annotated[
    Candidate,
    BeforeValidator(_parse_candidate, json_schema_input_type=WeightsField | Candidate),
    PlainSerializer(_dump_candidate),
]


class Latency(Strict):
    """How long a token may take.

    Attributes:
        table: YAML file with microseconds that a layer takes for a token, by format: of a million weights, or by shape.
        milliseconds: that all layers may take together.
    """

    table: str
    milliseconds: float = Field(gt=0)


class Budget(Strict):
    """How large the artifact may be, or how far from the original, and what its layers may become.

    A layer whose rule gives it one of these formats may get any other of them; all other layers, kept ones among them,
    stay as their rules say. Exactly one of size, bits, kld and like is given, here or as --fit, --bits or --kld.

    Attributes:
        size: bytes that the artifact's files of tensors have at most, headers and tokenizer included, such as 4.2GB.
        bits: the same, per number in the model's tensors.
        kld: KL divergence from the original in nats per token, on calibration samples that were held out, that is not
            exceeded, with 95 % confidence; the artifact is as small as that allows.
        like: a recipe, such as gguf-q4_k_m: the artifact has at most as many bytes as its rules would give it.
        operations: bit operations that a token may take, as a share of those with 16-bit weights and inputs; a limit
            beside the others.
        latency: time that a token may take by a table of latencies; a limit beside the others.
        formats: what layers may become: a format, keep, or a mapping with weights, activations and residuals.
        against: recipes whose rules are tried as well; of those that fit, the most promising is measured, and taken
            if it is better than the plan, both tried rounded.
        samples: calibration sequences from which it is learned how much each layer matters.
        held_out: sequences that plans are compared on, which are in no other use.
        scores: what is held to be the cost of rounding a matrix: half its outputs' squared errors times squared
            gradients (second-order), their errors times gradients (first-order), or its weights' squared errors times
            the mean diagonal (trace) or the largest eigenvalue (eigenvalue) of the loss's curvature.
        swaps: other plans of the same size that are measured, each what would be best if layers of one role cost twice
            or half as much as they seem to.
        confirm: whether a plan and the best that nobody allocated are both carried out where they are nearly as good
            when tried rounded; that takes the time of another run.
    """

    size: Size | None = None
    bits: float | None = Field(default=None, gt=0)
    kld: float | None = Field(default=None, gt=0)
    like: str | None = None
    operations: float | None = Field(default=None, gt=0, le=1)
    latency: Latency | None = None
    formats: Annotated[tuple[CandidateField, ...], Field(min_length=1)]
    against: tuple[str, ...] = ()
    samples: int = Field(default=8, ge=1)
    held_out: int = Field(default=16, ge=1)
    scores: Literal["second-order", "first-order", "trace", "eigenvalue"] = "second-order"
    swaps: int = Field(default=4, ge=0)
    confirm: bool = True

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """At most one limit of size or divergence, and with one of divergence none beside it."""
        given = [key for key in ("size", "bits", "kld", "like") if value.get(key) is not None]
        beside = [key for key in ("operations", "latency") if value.get(key) is not None]
        if given == ["kld"] and beside:
            return [((beside[0],), f"{beside[0]} goes with size, bits or like, found kld")]
        return [((), f"wanted one limit, found {' and '.join(given)}")] if len(given) > 1 else []
