"""The recipe as checked, immutable objects. `load.py` turns YAML into them; nothing downstream sees text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PrivateAttr, Tag

from qtool.formats._spelling import WeightsField
from qtool.problems import Keys, mistake, show
from qtool.recipe.budget import Budget
from qtool.recipe.export import Export
from qtool.recipe.fields import (
    CacheField,
    FallbackField,
    InputsField,
    MethodField,
    ResidualField,
    StageField,
    TransformField,
)
from qtool.recipe.gates import Gates
from qtool.recipe.match import compile_pattern
from qtool.recipe.scope import Blocks, When
from qtool.recipe.strict import Strict


def _check_pattern(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


def _check_source(data: str) -> str:
    if data in ("builtin", "code", "self") or data.startswith("hf:"):
        return data
    if data.endswith((".txt", ".json", ".jsonl", ".parquet")):
        return data
    raise mistake(
        "no token source",
        wanted="builtin, code, self, a file that ends in .txt, .json, .jsonl or .parquet, or hf:REPO[:CONFIG[:SPLIT]]",
        found=show(data),
    )


def _shape_of(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


TokenSource = Annotated[str, AfterValidator(_check_source)]


class Source(Strict):
    """One token source of a mixture.

    Attributes:
        data: builtin (prose of Python's standard library), code (source of it), self (sampled from the model), a file
            that ends in .txt, .json, .jsonl or .parquet, or hf:repo[:config[:split]].
        weight: its share of the samples, relative to the other sources.
    """

    data: TokenSource
    weight: float = Field(default=1.0, gt=0)


class TokenWeights(Strict):
    """How much the error of each token counts: squared gradients of the whole model's loss by a layer's outputs.

    Attributes:
        groups: of a layer's outputs that have weights of their own, where its format treats rows alone.
        power: of the squares; 0 weighs all tokens alike, 1 trusts gradients of the unquantized model fully.
        cap: the largest weight, relative to the mean.
        labels: the loss is that of the text's own next tokens, or of tokens that the model draws.
    """

    groups: int = Field(default=1, ge=1, le=64)
    power: float = Field(default=0.5, ge=0, le=2)
    cap: float = Field(default=1000.0, ge=1)
    labels: Literal["text", "sampled"] = "text"


class Calibration(Strict):
    """Which tokens are run through the model, and how.

    Attributes:
        data: builtin (prose of Python's standard library), code (source of it), self (sampled from the model), a file
            that ends in .txt, .json, .jsonl or .parquet, hf:repo[:config[:split]], or a list of these with weights.
        samples: token sequences.
        length: tokens per sequence.
        continued: how many sequences more for each of these, which begin with its first eighth, and which the model
            goes on with by itself: more text of a kind of which there is no more.
        seed: chooses the sequences.
        chat_template: whether messages of a .json or .jsonl file are laid out by the model's chat template.
        experts: the tokens that an expert is measured on: those that are routed to it, or all of them.
        min_tokens: an expert that fewer tokens reach is rounded to nearest, without data.
        propagate: what a block reads: the output of the quantized blocks before it, or of the original ones.
        token_weights: how much the error of each token counts; all alike if nothing is said.
    """

    data: Annotated[
        Annotated[TokenSource, Tag("text")] | Annotated[tuple[Source, ...], Field(min_length=1), Tag("list")],
        Discriminator(_shape_of),
    ] = "builtin"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=16)
    continued: int = Field(default=0, ge=0, le=64)
    seed: int = 0
    chat_template: bool = False
    experts: Literal["routed", "all"] = "routed"
    min_tokens: int = Field(default=128, ge=1)
    propagate: Literal["quantized", "float"] = "quantized"
    token_weights: TokenWeights | None = None


class Rule(Strict):
    """What to do with the layers that a pattern matches. The first rule that matches a layer decides.

    Attributes:
        match: a glob on module names in which * crosses dots; re: and a regular expression for the whole name; or role:
            and what layers do in any family, such as role:v or role:gate,up. A single * means every linear layer.
        blocks: only these decoder blocks: first 4, last 1/8, every 3rd (of those that no entry before it chose), 0-3,
            7, or a list of such.
        when: only in models of which this holds.
        weights: the format of the weights.
        method: how their codes are chosen; the recipe's method if nothing is said.
        activations: the format that inputs are rounded to at run time: token by token, or, in a format with one scale
            per tensor such as int8-tensor and nvfp4, with a scale that calibration finds for all tokens. How it does:
            see scales of the format.
        residuals: what is kept beside the codes to correct them, one after the other, such as low_rank or
            {sparse: {share: 0.01}}. Few artifacts can hold any: qtool can.
        keep: true leaves the layers as they are; f32, f16 or bf16 casts them.
        fallback: the format for layers whose rows the first one cannot divide; error refuses them. If neither the rule
            nor the recipe says anything, GGUF's block types fall back as in llama.cpp, and the others refuse.
    """

    match: Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
    blocks: Blocks | None = None
    when: When | None = None
    weights: WeightsField | None = None
    method: MethodField | None = None
    activations: InputsField | None = None
    residuals: tuple[ResidualField, ...] = ()
    keep: Literal[True, "f32", "f16", "bf16"] | None = None
    fallback: FallbackField | None = None
    _where: str = PrivateAttr("")

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """A rule gives a format or keeps, and only a format has options."""
        keys = ("weights", "method", "activations", "residuals", "fallback")
        present = [key for key in keys if value.get(key) not in (None, "error", (), [])]
        if value.get("keep") is not None:
            return [((key,), "a rule with keep: quantizes nothing; remove one of the two") for key in present]
        if "weights" in present:
            return []
        return [((), "a rule says what to do with its layers; add weights: FORMAT or keep: true")]

    @property
    def where(self) -> str:
        """File and line that it stands in; empty for a rule that was not read from text."""
        return self._where

    def place(self, where: str) -> None:
        """Remembers where it stands."""
        self._where = where


class Eval(Strict):
    """What to measure after quantizing.

    Attributes:
        text: file with the text to score.
        context: tokens per window.
        chunks: windows to score; all of them if nothing is said.
        gates: limits by name, such as kld: 0.05; a result that misses one fails the run. There are ppl, ppl_ratio, kld
            (mean), kld_median, kld_p90, kld_p95, kld_p99, kld_p999, kld_max, rms_dp, and top1, which is a lower limit.
    """

    text: str
    context: int = Field(default=512, ge=16)
    chunks: int | None = Field(default=None, ge=1)
    gates: Gates = Field(default_factory=dict)


class Recipe(Strict):
    """A whole recipe.

    Attributes:
        recipe: version of this grammar.
        name: what reports and model cards call it.
        description: one line for `qtool recipes list`.
        method: how codes are chosen where no rule says; rtn if nothing is said. Embeddings, which have no inputs to
            measure, are rounded (rtn) all the same.
        fallback: for rows that a format cannot divide, where no rule says: a second format, or error, which refuses
            them.
        calibration: which tokens are run through the model, and how.
        transforms: rewrites of the model before it is quantized, in order, such as rotate or {smooth: {alpha: 0.5}}; it
            computes the same afterwards.
        layers: rules; the first one that matches a layer decides.
        budget: how large the artifact may be, and which formats layers may get so that it is as good as possible.
        kv_cache: the format of the KV cache, or one of keys and one of values. Layers are calibrated with an unrounded
            cache.
        finish: stages behind the last block, in order: each looks at the whole quantized model and moves scales, norms
            or biases, never codes.
        export: artifacts to write.
        eval: what to measure after quantizing.
    """

    recipe: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    method: MethodField | None = None
    fallback: FallbackField | None = None
    calibration: Calibration = Calibration()
    transforms: tuple[TransformField, ...] = ()
    layers: tuple[Rule, ...] = Field(min_length=1)
    budget: Budget | None = None
    kv_cache: CacheField | None = None
    finish: tuple[StageField, ...] = ()
    export: tuple[Export, ...] = ()
    eval: Eval | None = None

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """Two artifacts of one layout would have the same place; a budget is that of one."""
        exports = value.get("export")
        names = [e.get("to") for e in exports if isinstance(e, Mapping)] if isinstance(exports, list | tuple) else []
        found: list[tuple[Keys, str]]
        found = [(("export", i), f"{n!r} is listed twice") for i, n in enumerate(names) if n in names[:i]]
        if value.get("budget") is not None and len(names) != 1:
            found.append((("budget",), f"the size is that of one artifact: wanted one export, found {len(names)}"))
        return found
