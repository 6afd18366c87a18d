"""qtool turns model checkpoints into quantized artifacts, and proves what that cost.

What the command line does is here as functions, `qtool.quantize(...)` and its like: those of `qtool.api`, imported when
they are first asked for, since they need torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

API = (
    "QtoolError",
    "calibrate",
    "evaluate",
    "export",
    "load_recipe",
    "open_model",
    "plan",
    "quantize",
    "quantize_matrix",
)


class _Package(ModuleType):
    """This package; functions come before rooms of the same name, which the import system would put in their place."""

    def __getattribute__(self, name: str) -> Any:
        return getattr(import_module("qtool.api"), name) if name in API else super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *API})


sys.modules[__name__].__class__ = _Package
