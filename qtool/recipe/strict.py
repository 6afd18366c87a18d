"""What every part of a recipe has in common: unknown keys are errors, and mistakes are worded where they are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from typing_extensions import Self

from qtool.problems import Keys, Mistakes, explain


class Strict(BaseModel):
    """Unknown keys are errors; objects do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """Mistakes that more than one key makes together."""
        return []

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Words every mistake at the level where it is made, so that its wording knows the keys that exist there."""
        mistakes = cls.conflicts(value) if isinstance(value, Mapping) else []
        try:
            result = handler(value)
        except ValidationError as error:
            raise Mistakes([*explain(error, cls, value), *mistakes]) from None
        if mistakes:
            raise Mistakes(mistakes)
        return result
