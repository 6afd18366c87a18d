"""Shifts of values from recipe to checkpoint: nothing changes but ranges, and what has no biases is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import save_tiny
from qtool.checkpoint.edits import model_edges
from qtool.errors import PlanError
from qtool.models import open_artifact
from qtool.pipeline.events import silent
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.transform import transformed
from tests.conftest import make_tokenizer
from tests.pipeline.test_transforms import apart, logits, recipe

LAYERS = [
    {"match": "lm_head", "keep": True},
    {"match": "*.o_proj", "weights": "int8-channel", "activations": "int4-tensor"},
]
REST = {"match": "*", "keep": True}


@pytest.fixture
def lopsided(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose values lie far to one side of zero, channel by channel."""
    source, folder = tiny_checkpoint("llama-biased"), tmp_path / "lopsided"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    for name, bias in tensors.items():
        if name.endswith("v_proj.bias"):
            tensors[name] = bias + 5 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


def test_what_models_compute_stays_and_static_inputs_lose_less(lopsided: Path, tmp_path: Path) -> None:
    original = logits(prepare(str(lopsided), recipe(tmp_path, [], layers=[*LAYERS, REST])).original)
    lost = []
    for transforms in ([], ["shift"]):
        text, out = recipe(tmp_path, transforms, layers=[*LAYERS, REST], method="rtn"), tmp_path / f"{len(transforms)}"
        run(QuantizeOptions(str(lopsided), text, out, dtype="fp32", device="cpu"))
        lost.append(apart(logits(open_artifact(out)), original))
    assert lost[1] < 0.5 * lost[0]
    whole = [LAYERS[0], {"match": "*.o_proj", "weights": "int8-channel"}, REST]
    text = recipe(tmp_path, ["shift"], layers=whole)
    run(QuantizeOptions(str(lopsided), text, tmp_path / "exact", dtype="fp32", device="cpu"))
    found, source = open_artifact(tmp_path / "exact"), load_file(next(lopsided.glob("*.safetensors")))
    assert apart(logits(found), original) < 0.02
    for block in range(2):
        name = f"model.layers.{block}.self_attn."
        before, after = source[f"{name}v_proj.bias"], found.tensor(f"{name}v_proj.bias")
        assert float(after.abs().mean()) < 0.3 * float(before.abs().mean())
        given, heads = source[f"{name}o_proj.weight"].double(), found.family.heads(found.config)
        amounts = (before - after).double().view(heads[1], 1, heads[2])
        read = amounts.expand(-1, heads[0] // heads[1], -1).reshape(-1)
        added = found.tensor(f"{name}o_proj.bias") - source[f"{name}o_proj.bias"]
        assert torch.allclose(added.double(), given @ read, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["starcoder2", "gpt_neox"])
def test_norms_that_have_biases_are_shifted_as_well(kind: str, tmp_path: Path) -> None:
    """Their inputs lie far to one side of zero; linear layers have biases, and what they compute stays."""
    folder, draw = tmp_path / "model", torch.Generator().manual_seed(0)
    model = save_tiny(kind, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.bias"):
                parameter.add_(10 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (text := tmp_path / "text.txt").write_text(" ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(400)))
    calibration = {"data": str(text), "samples": 2, "length": 32}
    layers = [LAYERS[0], {"match": "*", "weights": "int8-channel", "activations": "int8-tensor"}]
    plain, shifted = (
        prepare(str(folder), recipe(tmp_path, some, layers=layers, calibration=calibration), dtype="fp32", device="cpu")
        for some in ([], ["shift", "smooth"])
    )
    original = logits(plain.original)
    changed, made = transformed(shifted, tmp_path / "none", None, silent)
    norms = [e for e in model_edges(shifted.original).values() if e.kind == "norm" and len(e.readers) > 1]
    done = {edit.edge for edit in made.edits if edit.op and edit.op.name() == "shift"}
    assert {edge.name for edge in norms} <= done
    assert apart(logits(changed.checkpoint), original) < 1e-4
    for edge in norms:
        bias = f"{edge.source[0]}.bias"
        before, after = (m.tensor(bias).abs().mean() for m in (shifted.original, changed.checkpoint))
        assert float(after) < 0.5 * float(before)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_oss"])
def test_models_without_biases_of_values_and_outputs_are_refused(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"shift: no norm and no values of .* models have biases"):
        prepare(str(tiny_checkpoint(name)), recipe(tmp_path, ["shift"]))
