"""What a run knows when it is done, as model card and as report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtool import __version__
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.evaluate.result import Evaluation
from qtool.pipeline.prepare import Job
from qtool.report.model import ArtifactEntry, CacheEntry, LayerEntry, Report, StageEntry

PACKAGES = ("torch", "transformers", "safetensors", "numba", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


def model_card(
    job: Job, entries: Sequence[LayerEntry], evaluations: Sequence[Evaluation], calibration: dict[str, object]
) -> dict[str, Any]:
    """What artifacts say about themselves: no times and no paths, so that the same run writes the same bytes."""
    recipe = job.plan.recipe
    nbytes = sum(e.nbytes for e in entries) + job.plan.other_bytes
    return {
        "base_model": model_name(job.checkpoint.source),
        "recipe_name": recipe.name,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "source_bytes": source_bytes(job.checkpoint),
        "bits_per_weight": 8 * nbytes / parameters(job.checkpoint),
        "quality": [e.model_dump(mode="json") for e in evaluations],
        "importance": calibration if "entries" in calibration else None,
    }


def make_report(
    job: Job,
    entries: Sequence[LayerEntry],
    caches: Sequence[CacheEntry],
    artifacts: Sequence[ArtifactEntry],
    stages: Sequence[StageEntry],
    evaluations: Sequence[Evaluation],
    calibration: dict[str, object],
) -> Report:
    """The whole report of a run."""
    recipe = job.plan.recipe
    return Report(
        qtool=__version__,
        recipe_name=recipe.name,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        source=job.checkpoint.source,
        source_fingerprint=job.plan.source_fingerprint,
        source_bytes=source_bytes(job.checkpoint),
        parameters=parameters(job.checkpoint),
        calibration=calibration,
        other_bytes=job.plan.other_bytes,
        limited_blocks=job.plan.limited_blocks,
        layers=tuple(entries),
        artifacts=tuple(artifacts),
        stages=tuple(stages),
        evaluations=tuple(evaluations),
        warnings=job.plan.warnings,
        environment=environment(job.device),
        kv_cache=tuple(caches),
    )


def model_name(source: str) -> str:
    """A hub id as it is; of a path its last part."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a model as they are stored, with codes where it has some."""
    layers = checkpoint.layers if isinstance(checkpoint, QuantizedCheckpoint) else {}
    total = 0
    for name in checkpoint.names():
        info, layer = checkpoint.info(name), layers.get(name.removesuffix(".weight"))
        total += layer.format.storage_bits(info.shape[0], info.shape[1]) // 8 if layer else info.nbytes
    return total


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in all tensors of a model."""
    infos = (checkpoint.info(name) for name in checkpoint.names())
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
