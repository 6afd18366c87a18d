"""The recipe as checked, immutable objects. `load.py` turns YAML into them; nothing downstream sees text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from qtool import registry
from qtool.formats._base import Format
from qtool.methods._base import Method


class Strict(BaseModel):
    """Unknown keys are errors; objects do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_format(value: Any) -> Format:
    """`int4-g128`, `q4_0`, or a mapping with `type:` and the format's own fields."""
    raise NotImplementedError


def parse_method(value: Any) -> Method:
    """`gptq`, or `{gptq: {damp: 0.01}}`."""
    raise NotImplementedError


FormatField = Annotated[SerializeAsAny[Format], BeforeValidator(parse_format)]
MethodField = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]


class Source(Strict):
    """One token source of a mixture: builtin, self, path.txt, .jsonl, .parquet, hf:repo[:config[:split]]."""

    data: str
    weight: float = Field(1.0, gt=0)


class Calibration(Strict):
    """Which tokens are run through the model, and how."""

    data: str | tuple[Source, ...] = "builtin"
    samples: int = Field(128, ge=1)
    length: int = Field(2048, ge=16)
    seed: int = 0
    chat_template: bool = False
    propagate: Literal["quantized", "float"] = "quantized"


class Rule(Strict):
    """What to do with the layers that a pattern matches. The first rule that matches a layer decides."""

    match: str
    weights: FormatField | None = None
    method: MethodField | None = None
    activations: FormatField | None = None
    keep: Literal[True, "f32", "f16", "bf16"] | None = None
    fallback: Literal["error"] | FormatField = "error"


class Export(Strict):
    """One artifact to write. Further keys are the artifact's own options."""

    to: str


class Eval(Strict):
    """What to measure after quantizing."""

    text: str
    context: int = 512
    chunks: int | None = None
    gates: dict[str, float] = Field(default_factory=dict)


class Recipe(Strict):
    """A whole recipe."""

    recipe: Literal[1]
    name: str
    description: str = ""
    calibration: Calibration = Calibration()
    layers: tuple[Rule, ...] = Field(min_length=1)
    export: tuple[Export, ...] = ()
    eval: Eval | None = None
