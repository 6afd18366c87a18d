"""Families whose attention may slide over a window, all blocks alike; without `sliding_window` it sees everything."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qtool.checkpoint.families._base import Family, Value


class OptionalWindow(Family):
    """The window's way into GGUF files and back."""

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        values = super().gguf_metadata(config)
        if config.get("sliding_window"):
            values[f"{self.gguf_arch}.attention.sliding_window"] = int(config["sliding_window"])
        return values

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """See `Family.gguf_window`: it reads the number, and does nothing with it."""
        return config.get("sliding_window") or None

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Family.gguf_fields`."""
        window = {"sliding_window": metadata.get(f"{self.gguf_arch}.attention.sliding_window")}
        return super().gguf_fields(metadata, tensors) | window
