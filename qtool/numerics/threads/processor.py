"""What processors multiply natively."""

from __future__ import annotations

import torch


def has(*names: str) -> bool:
    """Whether it has one of some instruction sets, as torch calls them; False where torch does not tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in names)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if has("avx512_bf16", "amx_bf16") else torch.float32
