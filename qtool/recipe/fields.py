"""Formats, methods and the like as fields of a recipe: read from text or mappings, checked, and written back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from qtool.formats._base import Format
from qtool.formats._spelling import dump_format, parse_format
from qtool.methods._base import Method
from qtool.problems import mistake
from qtool.recipe.cache import KVCache, dump_cache, either
from qtool.recipe.parse import dump_named, parse_method, parse_residual, parse_stage, parse_transform
from qtool.residuals._base import Residual
from qtool.spec import Spec
from qtool.transforms._base import Transform


def _parse_fallback(value: Any) -> Any:
    return value if value == "error" else _check_weights(parse_format(value))


def _dump_fallback(value: Any) -> Any:
    return dump_format(value) if isinstance(value, Format) else value


def _check_weights(fmt: Format) -> Format:
    if fmt.granularity == "head":
        raise mistake("no format of weights", wanted="one such as int8-channel", found=fmt.label)
    if fmt.augmented:
        raise mistake("no format of weights", wanted="augment: 0; only inputs have more channels", found=fmt.label)
    if not isinstance(fmt.ranges, str):
        wanted = "minmax or search; percentages are of what calibration saw of inputs and KV caches"
        raise mistake("scales of weights", wanted=wanted, found=fmt.ranges)
    return fmt


def _check_inputs(fmt: Format) -> Format:
    if fmt.granularity == "head" or fmt.group_rows not in (None, 1):  # rounding of a token by its neighbours
        raise mistake("no format of inputs", wanted="one such as int8-token or int8-tensor", found=fmt.label)
    if not (isinstance(fmt.ranges, str) or fmt.static):
        wanted = "minmax or search; percentages are for one scale of all tokens (group: tensor)"
        raise mistake(f"scales of {fmt.label} inputs", wanted=wanted, found=fmt.ranges)
    return fmt


WeightsField = Annotated[
    Format, BeforeValidator(parse_format), AfterValidator(_check_weights), PlainSerializer(dump_format)
]
InputsField = Annotated[
    Format, BeforeValidator(parse_format), AfterValidator(_check_inputs), PlainSerializer(dump_format)
]
MethodField = Annotated[Method, BeforeValidator(parse_method), PlainSerializer(dump_named)]
ResidualField = Annotated[Residual, BeforeValidator(parse_residual), PlainSerializer(dump_named)]
TransformField = Annotated[Transform, BeforeValidator(parse_transform), PlainSerializer(dump_named)]
StageField = Annotated[Spec, BeforeValidator(parse_stage), PlainSerializer(dump_named)]
CacheField = Annotated[
    KVCache, BeforeValidator(either, json_schema_input_type=Format | KVCache), PlainSerializer(dump_cache)
]
FallbackField = Annotated[Literal["error"] | Format, BeforeValidator(_parse_fallback), PlainSerializer(_dump_fallback)]
