"""What a run knows when it is done, as its report."""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtool import __version__
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.evaluate.result import Evaluation
from qtool.pipeline.card import Provenance
from qtool.pipeline.prepare import Job
from qtool.recipe.schema import Recipe
from qtool.report.model import CacheEntry, LayerEntry, Report

PACKAGES = ("torch", "transformers", "safetensors", "numba", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


def make_report(
    job: Job,
    entries: Sequence[LayerEntry],
    caches: Sequence[CacheEntry],
    evaluations: Sequence[Evaluation],
    calibration: dict[str, object],
    source: Provenance,
) -> Report:
    """The report of a run that has not written anything yet."""
    recipe = job.plan.recipe
    return Report(
        qtool=__version__,
        recipe_name=recipe.name,
        recipe=as_written(recipe),
        source=job.original.source,
        source_fingerprint=job.plan.source_fingerprint,
        source_bytes=source_bytes(job.original),
        parameters=parameters(job.original, job.plan.outside),
        calibration=calibration,
        other_bytes=job.plan.other_bytes,
        limited_blocks=job.plan.limited_blocks,
        layers=tuple(entries),
        artifacts=(),
        stages=(),
        evaluations=tuple(evaluations),
        warnings=job.plan.warnings,
        environment=environment(job.device),
        kv_cache=tuple(caches),
        base_model=source.base_model,
        license=dict(source.license),
    )


def as_written(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what it does not say."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return {key: value for key, value in content.items() if key not in ("transforms", "finish") or value}


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a model as they are stored, with codes where it has some."""
    layers = checkpoint.layers if isinstance(checkpoint, QuantizedCheckpoint) else {}
    total = 0
    for name in checkpoint.names():
        info, layer = checkpoint.info(name), layers.get(name.removesuffix(".weight"))
        total += layer.format.storage_bits(info.shape[0], info.shape[1]) // 8 if layer else info.nbytes
    return total


def parameters(checkpoint: Checkpoint, outside: Collection[str] = ()) -> int:
    """Numbers in all tensors of a model but some."""
    infos = (checkpoint.info(name) for name in checkpoint.names() if name not in outside)
    return sum(info.nbytes // info.dtype.itemsize for info in infos)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    found |= {"system": platform.platform(), "cpu": cpu_name(), "threads": str(torch.get_num_threads())}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {**found, "device": name}


def cpu_name() -> str:
    """As Linux calls it, else as Python does."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
