"""The recipe as checked, immutable objects. `load.py` turns YAML into them; nothing downstream sees text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationError,
)

from qtool import registry
from qtool.errors import nearest
from qtool.formats._base import Format
from qtool.methods._base import Method
from qtool.recipe.export import Export
from qtool.recipe.match import compile_pattern
from qtool.recipe.problems import Keys, Mistakes, checked, mistake, show
from qtool.recipe.scope import Blocks, When
from qtool.recipe.strict import Strict


def parse_format(value: Any) -> Format:
    """`int4-g128`, `q4_0`, or a mapping with `type:` and the format's own fields."""
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return _shorthand(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        wanted = "a format such as int4-g128, or a mapping with type: and the format's fields"
        raise mistake("no format", wanted=wanted, found=show(value))
    name, known = value["type"], registry.names("formats")
    if name not in known:
        raise Mistakes([(("type",), f"no format is called {show(name)}; {nearest(name, known)}")])
    fields = {key: field for key, field in value.items() if key != "type"}
    return cast(Format, checked(registry.load("formats", name), fields))


def _shorthand(text: str) -> Format:
    """The format that a single word spells: a registered name, or what a family's `parse` accepts."""
    families = {name: registry.load("formats", name) for name in registry.names("formats")}
    if text in families:
        try:
            return cast(Format, families[text]())
        except ValidationError:
            hint = f"write {{type: {text}, ...}} or a shorthand, as in {', '.join(families[text].examples)}"
            raise mistake(f"the format {text} needs options", hint=hint) from None
    for family in families.values():
        if found := checked(family, text, family.parse):
            return cast(Format, found)
    examples = [example for family in families.values() for example in family.examples]
    raise mistake(f"no format is called {show(text)}", hint=nearest(text, [*families, *examples]))


def parse_method(value: Any) -> Method:
    """`gptq`, or `{gptq: {damp: 0.01}}`."""
    if isinstance(value, Method):
        return value
    options = {value: {}} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or len(options) != 1:
        raise mistake("no method", wanted="a name such as rtn, or {gptq: {damp: 0.01}}", found=show(value))
    ((name, fields),) = options.items()
    if name not in registry.names("methods"):
        raise mistake(f"no method is called {show(name)}", hint=nearest(str(name), registry.names("methods")))
    try:
        return cast(Method, checked(registry.load("methods", name), {} if fields is None else fields))
    except Mistakes as error:
        raise Mistakes([((name, *path), text) for path, text in error.found]) from None


def dump_format(fmt: Format) -> Any:
    """What `parse_format` reads back as an equal format: the shorthand where it says everything."""
    if type(fmt).parse(fmt.label) == fmt:
        return fmt.label
    return {"type": type(fmt).__module__.rpartition(".")[2], **fmt.model_dump(mode="json")}


def _parse_cache(value: Any) -> Format:
    fmt = parse_format(value)
    if fmt.block_columns or fmt.group_rows not in (None, 1):
        wanted = "one scale per tensor or token, such as fp8-tensor or int4-token"
        raise mistake("no format of a KV cache", wanted=wanted, found=fmt.label)
    return fmt


def _parse_fallback(value: Any) -> Any:
    return value if value == "error" else parse_format(value)


def _dump_fallback(value: Any) -> Any:
    return dump_format(value) if isinstance(value, Format) else value


def _dump_method(method: Method) -> Any:
    return {method.name(): method.model_dump(mode="json")}


def _check_pattern(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


def _check_source(data: str) -> str:
    if data in ("builtin", "self") or data.startswith("hf:") or data.endswith((".txt", ".jsonl", ".parquet")):
        return data
    raise mistake(
        "no token source",
        wanted="builtin, self, a file that ends in .txt, .jsonl or .parquet, or hf:REPO[:CONFIG[:SPLIT]]",
        found=show(data),
    )


def _shape_of(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


FormatField = Annotated[Format, BeforeValidator(parse_format), PlainSerializer(dump_format)]
MethodField = Annotated[Method, BeforeValidator(parse_method), PlainSerializer(_dump_method)]
CacheField = Annotated[Format, BeforeValidator(_parse_cache), PlainSerializer(dump_format)]
FallbackField = Annotated[Literal["error"] | Format, BeforeValidator(_parse_fallback), PlainSerializer(_dump_fallback)]
TokenSource = Annotated[str, AfterValidator(_check_source)]


class Source(Strict):
    """One token source of a mixture.

    Attributes:
        data: builtin (prose of Python's standard library), self (sampled from the model), a file that ends in .txt,
            .jsonl or .parquet, or hf:repo[:config[:split]].
        weight: its share of the samples, relative to the other sources.
    """

    data: TokenSource
    weight: float = Field(default=1.0, gt=0)


class Calibration(Strict):
    """Which tokens are run through the model, and how.

    Attributes:
        data: builtin (prose of Python's standard library), self (sampled from the model), a file that ends in .txt,
            .jsonl or .parquet, hf:repo[:config[:split]], or a list of these with weights.
        samples: token sequences.
        length: tokens per sequence.
        seed: chooses the sequences.
        chat_template: whether messages of a .jsonl file are laid out by the model's chat template.
        experts: the tokens that an expert is measured on: those that are routed to it, or all of them.
        min_tokens: an expert that fewer tokens reach is rounded to nearest, without data.
        propagate: what a block reads: the output of the quantized blocks before it, or of the original ones.
    """

    data: Annotated[
        Annotated[TokenSource, Tag("text")] | Annotated[tuple[Source, ...], Field(min_length=1), Tag("list")],
        Discriminator(_shape_of),
    ] = "builtin"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=16)
    seed: int = 0
    chat_template: bool = False
    experts: Literal["routed", "all"] = "routed"
    min_tokens: int = Field(default=128, ge=1)
    propagate: Literal["quantized", "float"] = "quantized"


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
            per tensor such as int8-tensor, with a scale that calibration finds for all tokens.
        keep: true leaves the layers as they are; f32, f16 or bf16 casts them.
        fallback: the format for layers whose rows the first one cannot divide; error refuses them. If nothing is said,
            GGUF's block types fall back as in llama.cpp, and the others refuse.
    """

    match: Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
    blocks: Blocks | None = None
    when: When | None = None
    weights: FormatField | None = None
    method: MethodField | None = None
    activations: FormatField | None = None
    keep: Literal[True, "f32", "f16", "bf16"] | None = None
    fallback: FallbackField | None = None
    _where: str = PrivateAttr("")

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """A rule gives a format or keeps, and only a format has options."""
        given = [k for k in ("weights", "method", "activations", "fallback") if value.get(k) not in (None, "error")]
        if value.get("keep") is not None:
            return [((key,), "a rule with keep: quantizes nothing; remove one of the two") for key in given]
        if "weights" in given:
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
        gates: limits by name, such as kld: 0.05; a result that misses one fails the run.
    """

    text: str
    context: int = Field(default=512, ge=16)
    chunks: int | None = Field(default=None, ge=1)
    gates: dict[str, float] = Field(default_factory=dict)


class Recipe(Strict):
    """A whole recipe.

    Attributes:
        recipe: version of this grammar.
        name: what reports and model cards call it.
        description: one line for `qtool recipes list`.
        method: how codes are chosen where no rule says; rtn if nothing is said. Embeddings, which have no inputs to
            measure, are rounded (rtn) all the same.
        calibration: which tokens are run through the model, and how.
        layers: rules; the first one that matches a layer decides.
        kv_cache: the format of keys and values in the KV cache: fp8-tensor, with scales that calibration finds, or
            int4-token, which rounds every token's heads by themselves. Layers are calibrated with an unrounded cache.
        export: artifacts to write.
        eval: what to measure after quantizing.
    """

    recipe: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    method: MethodField | None = None
    calibration: Calibration = Calibration()
    layers: tuple[Rule, ...] = Field(min_length=1)
    kv_cache: CacheField | None = None
    export: tuple[Export, ...] = ()
    eval: Eval | None = None

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """Two artifacts of one layout would have the same place."""
        exports = value.get("export")
        names = [e.get("to") for e in exports if isinstance(e, Mapping)] if isinstance(exports, list | tuple) else []
        return [(("export", i), f"{n!r} is listed twice") for i, n in enumerate(names) if n in names[:i]]
