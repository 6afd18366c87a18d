"""Matrices that runtimes merge have one matrix scale; others have their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.artifact.qtool import Qtool
from qtool.checkpoint.hf import HFCheckpoint
from qtool.pipeline.quantize import QuantizeOptions, run

RECIPE = """
recipe: 1
name: two-level
calibration: {samples: 2, length: 32}
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: NAME, method: METHOD}
export: [{to: qtool}]
"""


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["nvfp4", "nvint4-minmax", "{type: fp, element: e4m3, group: tensor, scales: minmax}"])
def test_one_scale_over_a_fused_set(name: str, method: str, tiny_checkpoint, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("NAME", name).replace("METHOD", method))
    source = HFCheckpoint(tiny_checkpoint("llama"))
    run(QuantizeOptions(str(tiny_checkpoint("llama")), str(recipe), tmp_path / "out"))
    model = Qtool().open(tmp_path / "out")
    key, top = (
        ("scale", 448.0) if "fp" in name and "nv" not in name else ("tensor", 448.0 * (7 if "int" in name else 6))
    )
    found = {m: model.matrix(m).quantized.params[key].unique().tolist() for m in model.layers}
    assert {model.matrix(m).quantized.params[key].shape[1] for m in model.layers} == {1}
    sets = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    for block in range(2):
        for names in (*sets, ("mlp.down_proj",), ("self_attn.o_proj",)):
            modules = [f"model.layers.{block}.{n}" for n in names]
            largest = max(float(source.tensor(f"{m}.weight").abs().max()) for m in modules)
            assert len({tuple(found[m]) for m in modules}) == 1
            (scale,) = found[modules[0]]
            if name == "nvfp4":
                assert scale / 2 < largest / top <= scale
            else:
                assert scale == pytest.approx(largest / top, rel=4e-3)  # bfloat16
    assert name == "nvfp4" or len({tuple(v) for v in found.values()}) > 6
