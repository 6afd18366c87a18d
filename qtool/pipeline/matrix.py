"""One matrix, without a model, a file or a recipe.

Shape letters: N rows (output features), K columns (input features).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtool.errors import NumericsError, UsageError
from qtool.formats._base import Format, Quantized
from qtool.formats._spelling import parse_format
from qtool.methods._base import Method
from qtool.numerics.checks import finite
from qtool.numerics.metrics import all_finite
from qtool.stats._base import InputStats


def quantize_matrix(
    w: Tensor,
    format: str | Mapping[str, Any] | Format,
    method: str | Mapping[str, Any] | Method = "rtn",
    *,
    inputs: Tensor | None = None,
) -> Quantized:
    """Quantizes one matrix, without a model or a file.

    Args:
        w: [N, K] of any float type, finite.
        format: as recipes spell it: "q4_k", {"type": "int", "bits": 4, "group": 32}.
        method: as recipes spell it: "gptq", {"gptq": {"damp": 0.05}}.
        inputs: what the layer reads, [..., K]; for methods that measure.

    Returns:
        Codes and parameters; `decode()` gives the float32 [N, K] that a runtime sees.

    Raises:
        UsageError: no such format or method; or shapes, or inputs, that do not fit.
        NumericsError: the matrix or the inputs are not finite, or the result is not.
    """
    try:
        fmt, how = parse_format(format), Method.of(method)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if w.ndim != 2 or not w.is_floating_point():
        raise UsageError("the matrix", wanted="float [N, K]", found=f"{w.dtype} {list(w.shape)}")
    if problem := fmt.misfit(w.shape[1]):
        raise UsageError(f"{fmt.label}: {problem}")
    if how.needs and inputs is None:
        raise UsageError(f"method {how.name()} measures inputs", wanted="inputs=...", found="none")
    w = finite(w.detach().float(), "w")
    stats = None if inputs is None or not how.needs else _measure(inputs, how, w)
    chosen = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    if stats:
        how.prepare(stats, chosen)
    found = replace(how.solve(w, stats, chosen).quantized, format=fmt)
    if not all_finite(found.decode()):
        raise NumericsError(f"{how.name()} made the matrix infinite or NaN in {fmt.label}")
    return found


def _measure(inputs: Tensor, method: Method, w: Tensor) -> InputStats:
    """What a method needs to know of inputs [..., K]."""
    k = w.shape[1]
    if inputs.shape[-1] != k or not inputs.numel():
        raise UsageError("inputs", wanted=f"[..., {k}], as the matrix has columns", found=list(inputs.shape))
    stats = InputStats(k, method.needs, w.device)
    stats.add(finite(inputs.detach().reshape(-1, k).to(w.device, torch.float32), "inputs"))
    return stats
