"""On a CUDA device: formats, methods, the walk and whole runs give what they give on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.artifact.qtool import Qtool
from qtool.calibrate import blocks, hidden
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram
from tests.artifact.test_generation import TOLERANCES, generates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMATS = sorted({label for n in registry.names("formats") for label in (registry.load("formats", n).examples or (n,))})
TOKENS = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(0))


def layer() -> tuple[Tensor, Tensor]:
    """A matrix [64, 512] and inputs [1024, 512]."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(512, 512, generator=generator) / 512**0.5 + torch.eye(512)
    return torch.randn(64, 512, generator=generator), torch.randn(1024, 512, generator=generator) @ mix


def measured(x: Tensor) -> InputStats:
    """Statistics of inputs, on their device."""
    stats = InputStats(x.shape[1], frozenset({Gram, Channels}), x.device)
    stats.add(x)
    return stats


@pytest.mark.parametrize("label", FORMATS)
def test_rounding_is_as_good(label: str) -> None:
    w, x = layer()
    fmt = parse_format(label)
    want = RTN(importance=True).solve(w, measured(x), fmt).quantized.decode()
    found = RTN(importance=True).solve(w.cuda(), measured(x.cuda()), fmt).quantized.decode()
    assert found.device.type == "cuda"
    stats = measured(x)
    importance = stats[Channels].importance
    errors = [float(((q.cpu() - w).square() * importance).sum()) for q in (found, want)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)  # sums in another order tip a choice between two scales


@pytest.mark.parametrize("label", FORMATS)
def test_gptq_is_as_good(label: str) -> None:
    w, x = layer()
    fmt, errors = parse_format(label), []
    for device in ("cpu", "cuda"):
        q = GPTQ().solve(w.to(device), measured(x.to(device)), fmt).quantized
        errors.append(float((x @ (q.decode().cpu() - w).T).square().sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("family", ["llama-biased", "qwen3", "gemma3_text", "phi3", "qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_the_cpu(family: str, tiny_checkpoint) -> None:  # type: ignore[no-untyped-def]
    checkpoint, found = HFCheckpoint(tiny_checkpoint(family)), []
    for device in ("cpu", "cuda"):
        walker = Walker(checkpoint, torch.device(device), torch.float32)
        states = walker.embed(TOKENS)
        for i in range(len(walker.blocks)):
            walker.advance(walker.load_block(i), i, states)
        found.append(walker.logits(states, 1).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].std()))


@pytest.mark.parametrize("recipe", ["w4a16-gptq-g32", "fp8-dynamic", "mxfp4", "w8a8-int8", "gguf-q4_0"])
def test_whole_runs(recipe: str, tiny_checkpoint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, small = str(tiny_checkpoint("llama")), ("calibration.samples=4", "calibration.length=32")
    errors = []
    for device in ("cpu", "cuda"):
        options = QuantizeOptions(model, recipe, tmp_path / device, small, device=device, dtype="fp32")
        layers = [entry for entry in quantize(options).layers if entry.format]
        errors.append([entry.weight_error_db for entry in layers])
    assert errors[1] == pytest.approx(errors[0], abs=0.3)


def test_a_device_without_room_gives_the_same(tiny_checkpoint, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Hidden states in pinned memory, batches that start anew in front of every input, outputs of the same bytes."""
    monkeypatch.setattr(blocks, "DEVICE_TOKENS", 64)  # two samples at a time, of five
    model, small = str(tiny_checkpoint("llama")), ("calibration.samples=5", "calibration.length=32")
    bytes_of = []
    for name in ("room", "none"):
        if name == "none":
            monkeypatch.setattr(hidden, "device_memory", lambda _: 0)
        out = tmp_path / name
        quantize(QuantizeOptions(model, "w4a16-gptq-g32", out, small, device="cuda", dtype="fp32"))
        bytes_of.append((out / "model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1]


def test_samples_that_were_copied_ahead_are_those_of_now() -> None:
    held = torch.arange(7 * 3 * 4.0).view(7, 3, 4).pin_memory()
    copies = hidden.CopiesAhead(held, torch.device("cuda"))
    assert torch.equal(copies.take(slice(0, 2)).cpu(), held[:2])
    assert copies.begun is not None
    assert copies.begun[0] == slice(2, 4)
    assert torch.equal(copies.take(slice(2, 4)).cpu(), held[2:4])
    held[4:6] = -1
    copies.forget(slice(5, 6))
    assert torch.equal(copies.take(slice(4, 6)).cpu(), held[4:6])
    copies.forget(slice(0, 6))
    assert copies.begun is not None  # of other samples
    assert torch.equal(copies.take(slice(6, 8)).cpu(), held[6:])
    assert copies.begun is None
    assert torch.equal(copies.take(slice(0, 7)).cpu(), held)


@pytest.mark.parametrize("recipe", TOLERANCES)
def test_generation(recipe: str, tiny_checkpoint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    generates(recipe, tiny_checkpoint("llama"), tmp_path / "out", "cuda")


CALIBRATED = """
recipe: 1
name: calibrated
calibration: {samples: 4, length: 32}
layers: [{match: "*", weights: nvfp4, activations: nvfp4}]
kv_cache: {keys: int4-channel-asym, values: fp8-head}
export: [{to: qtool}]
"""


def test_scales_for_all_tokens(tiny_checkpoint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of inputs, keys and values, and what they cost attention."""
    model, path = str(tiny_checkpoint("llama")), tmp_path / "calibrated.yaml"
    path.write_text(CALIBRATED)
    scales, errors = [], []
    for device in ("cpu", "cuda"):
        report = quantize(QuantizeOptions(model, str(path), tmp_path / device, device=device, dtype="fp32"))
        errors.append([db for entry in report.kv_cache for db in (entry.scores_error_db, entry.outputs_error_db)])
        found = Qtool().open(tmp_path / device)
        assert found.cache is not None
        scales.append([s.scale for block in found.cache.statics.values() for side in block for s in side])
    assert errors[1] == pytest.approx(errors[0], abs=1.0)
    assert scales[1] == pytest.approx(scales[0], rel=0.1)
