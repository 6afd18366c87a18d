"""Weights that are read while those before them are solved are those that the run itself would read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.models import open_model
from qtool.pipeline import rows
from qtool.pipeline.module_weights import ModulesAhead, modules_ahead
from qtool.pipeline.prepare import Job
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.units import steps


@pytest.mark.parametrize("piece", [1, 1000, 1 << 24])
def test_weights_in_pieces(piece: int, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PART", piece)
    model = open_model(str(tiny_checkpoint("qwen3")))
    names = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    ahead = ModulesAhead(model, names, torch.device("cpu"))
    for name in reversed(names):
        found = ahead.of(name)[name]
        assert found.dtype == model.info(f"{name}.weight").dtype
        assert torch.equal(found, model.tensor(f"{name}.weight"))


def test_a_run_comes_to_the_same(
    tiny_checkpoint, recipes, gguf_run, tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    class Seen(ModulesAhead):
        def of(self, module: str) -> dict[str, torch.Tensor]:
            asked.append(module)
            return super().of(module)

    def here(job: Job) -> Seen:
        assert modules_ahead(job) is None  # a processor reads for itself
        modules = [p.module.name for unit in steps(job.plan) for plans in unit.inputs().values() for p in plans]
        return Seen(job.checkpoint, modules, job.device)

    monkeypatch.setattr("qtool.pipeline.statistics.modules_ahead", here)
    run(QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], tmp_path / "out"))
    files = tree(tmp_path / "out"), tree(gguf_run[1])
    assert len(asked) == len(set(asked)) > 10
    (name,) = (name for name in files[0] if name.endswith(".gguf"))
    assert files[0][name] == files[1][name]
