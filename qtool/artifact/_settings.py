"""What config.json says about quantization, which nobody has checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError

SETTINGS = "quantization_config"
"""Key of config.json."""


class Settings(BaseModel):
    """Part of a `quantization_config` as far as qtool reads it; other keys are left alone."""

    model_config = ConfigDict(strict=True, frozen=True)


Read = TypeVar("Read", bound=BaseModel)


def read_settings(kind: type[Read], value: Mapping[str, Any], where: str) -> Read:
    """Validates settings. Raises CheckpointError: the first mistake in them."""
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        found = repr(first["input"])[:60]
        raise CheckpointError(f"{where}: quantization_config: {place}: {first['msg']}", found=found) from error


def quantization_config(folder: Path, key: str = SETTINGS) -> dict[str, Any] | None:
    """What config.json of a folder says about quantization; None if nothing, or if it cannot be read."""
    try:
        how = read_json(folder / "config.json").get(key)
    except CheckpointError:
        return None
    return how if isinstance(how, dict) else None
