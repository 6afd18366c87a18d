"""What the processor multiplies natively."""

from __future__ import annotations

import torch


def has(*names: str) -> bool:
    """Whether it has one of some instruction sets, as torch calls them; False where torch does not tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in names)
