"""Methods, residuals, transforms and stages as recipes spell them."""

from __future__ import annotations

from typing import Any, cast

from qtool.methods._base import Method
from qtool.residuals._base import Residual
from qtool.spec import Spec, named
from qtool.transforms._base import Transform


def parse_method(value: Any) -> Method:
    """`gptq`, or `{gptq: {damp: 0.01}}`."""
    return cast(Method, named(value, "methods", Method, "a name such as rtn, or {gptq: {damp: 0.01}}"))


def parse_residual(value: Any) -> Residual:
    """`low_rank`, or `{low_rank: {rank: 64}}`."""
    return cast(Residual, named(value, "residuals", Residual, "a name such as low_rank, or {low_rank: {rank: 64}}"))


def parse_transform(value: Any) -> Transform:
    """`rotate`, or `{smooth: {alpha: 0.5}}`."""
    return cast(Transform, named(value, "transforms", Transform, "a name such as rotate, or {smooth: {alpha: 0.5}}"))


def parse_stage(value: Any) -> Spec:
    """`{distill: {steps: 100}}`, or its name alone: a `qtool.stages._base.Stage`."""
    return cast(Spec, named(value, "stages", Spec))


def dump_named(thing: Spec) -> dict[str, Any]:
    """What `parse_method` and its like read back: the name, with every option."""
    return {thing.name(): thing.model_dump(mode="json")}
