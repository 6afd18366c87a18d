"""What processors multiply natively, and what of them results depend on."""

from __future__ import annotations

import hashlib

import llvmlite.binding as llvm
import torch
from numba import config


def has(*names: str) -> bool:
    """Whether it has one of some instruction sets, as torch calls them; False where torch does not tell."""
    known = _capabilities()
    return any(known.get(name) for name in names)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if has("avx512_bf16", "amx_bf16") else torch.float32


def processor() -> str:
    """What compiled kernels and torch's products depend on, such as `znver3, torch AVX2, 1f0c27a9`.

    That is the name for which kernels are compiled, the instructions that torch's products use, and a digest of all
    that either can see: virtual machines may hide some.
    """
    name = str(config.CPU_NAME or llvm.get_host_cpu_name())
    features = str(config.CPU_FEATURES or llvm.get_host_cpu_features().flatten())
    flags = sorted(key for key, value in _capabilities().items() if value is True)
    digest = hashlib.sha256(f"{name} {features} {flags}".encode()).hexdigest()[:8]
    return f"{name}, torch {torch.backends.cpu.get_cpu_capability()}, {digest}"


def _capabilities() -> dict[str, object]:
    """Instruction sets by name, where torch tells."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
