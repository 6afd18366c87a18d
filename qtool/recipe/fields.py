"""Formats, methods and the like as fields of a recipe: read from text or mappings, checked, and written back."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from qtool.formats._base import Format
from qtool.formats._spelling import dump_format, parse_format, parse_weights
from qtool.methods._base import Method
from qtool.problems import mistake
from qtool.recipe.cache import KVCache, dump_cache, either
from qtool.residuals._base import Residual
from qtool.spec import Spec
from qtool.transforms._base import Transform


def _parse_fallback(value: Any) -> Any:
    return value if value == "error" else parse_weights(value)


def _dump_fallback(value: Any) -> Any:
    return dump_format(value) if isinstance(value, Format) else value


def _check_inputs(fmt: Format) -> Format:
    if fmt.granularity == "head" or fmt.group_rows not in (None, 1):  # rounding of a token by its neighbours
        raise mistake("no format of inputs", wanted="one such as int8-token or int8-tensor", found=fmt.label)
    if not (isinstance(fmt.ranges, str) or fmt.static):
        wanted = "minmax or search; percentages are for one scale of all tokens (group: tensor)"
        raise mistake(f"scales of {fmt.label} inputs", wanted=wanted, found=fmt.ranges)
    return fmt


InputsField = Annotated[
    Format, BeforeValidator(parse_format), AfterValidator(_check_inputs), PlainSerializer(dump_format)
]
MethodField = Annotated[Method, BeforeValidator(Method.of), PlainSerializer(Spec.spelled)]
ResidualField = Annotated[Residual, BeforeValidator(Residual.of), PlainSerializer(Spec.spelled)]
TransformField = Annotated[Transform, BeforeValidator(Transform.of), PlainSerializer(Spec.spelled)]
StageField = Annotated[Spec, BeforeValidator(partial(Spec.of, room="stages")), PlainSerializer(Spec.spelled)]
CacheField = Annotated[
    KVCache, BeforeValidator(either, json_schema_input_type=Format | KVCache), PlainSerializer(dump_cache)
]
FallbackField = Annotated[Literal["error"] | Format, BeforeValidator(_parse_fallback), PlainSerializer(_dump_fallback)]
