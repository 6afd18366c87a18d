"""MLX folders in mlx-lm itself: right ones pass, and mistakes of a conversion are caught."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import tiny
from benchmarks.tiny import save_tiny
from qtool.api import quantize
from qtool.artifact import _mlx_models
from qtool.artifact.mlx import MLX
from qtool.errors import PlanError, VerifyError
from qtool.evaluate.proof import prove
from qtool.evaluate.readers import READERS
from qtool.formats._spelling import parse_format
from tests.artifact.conftest import quantize as in_memory
from tests.conftest import make_tokenizer

pytestmark = pytest.mark.proven


@pytest.fixture(scope="module", autouse=True)
def mlx():
    return pytest.importorskip("mlx_lm", reason="needs mlx-lm; `make test-mlx` has it")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("fmt", ["int4-g32", "mxfp4"])
def test_mlx_lm_computes_what_we_compute(kind, fmt, tiny_checkpoint, tmp_path):
    model = in_memory(tiny_checkpoint(kind), parse_format(fmt))
    if not MLX().supports(model).possible:
        pytest.fail(MLX().supports(model).reason)
    MLX().write(model, tmp_path, {})
    found = prove(MLX(), MLX().open(tmp_path), model)
    assert found.reader.startswith("mlx-lm ") and found.tokens == (8 if kind == "gemma2" else 24)  # its window
    assert found.distance < 1e-4


SOME = {"cohere2", "granitemoe", "mamba", "olmo2"}
"""Attention with windows, experts, no attention, norms behind matrices; the others are tried by `-m slow`."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow) for kind in sorted(_mlx_models.TRIED)]
)
def test_types_without_a_family_file_run(kind, tmp_path):
    save_tiny(kind, tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rule = {"match": r"re:.*(attn|attention)\.(o_proj|out_proj|q_proj)|.*(embed|wte).*", "method": "rtn"}
    layers = [rule | {"weights": "int8-g32-asym"}, {"match": "*", "keep": True}]
    recipe = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "mlx"}]}
    report = quantize(str(tmp_path / "model"), recipe, tmp_path / "out")
    assert report.artifacts[0].proof.words.startswith("runs in mlx-lm ")
    assert not any("nobody has seen" in text for text in report.warnings)


def test_a_matrix_that_it_takes_apart_is_kept(tmp_path, monkeypatch):
    """mlx-lm rounds its parts anew, so that what it computes is not what was meant."""
    monkeypatch.setitem(tiny.PARTICULAR, "deepseek_v3", ATTENTION)
    save_tiny("deepseek_v3", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    layers = [{"match": "*.kv_b_proj", "weights": "int4-g32-asym", "method": "rtn"}, {"match": "*", "keep": True}]
    recipe = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "mlx"}]}
    with pytest.raises(PlanError, match="mlx-lm takes this matrix apart and rounds its parts again: keep it"):
        quantize(str(tmp_path / "model"), recipe, tmp_path / "out")
    monkeypatch.setattr(_mlx_models, "TAKEN_APART", set())
    with pytest.raises(VerifyError, match=r"mlx-lm \d.* computes something else"):
        quantize(str(tmp_path / "model"), recipe, tmp_path / "out")


ATTENTION = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4}
MISTAKES = {
    "norm": lambda tensors: tensors["model.norm.weight"][::2].mul_(0.5),
    "bias": lambda tensors: tensors["model.layers.0.self_attn.q_proj.bias"].zero_(),
    "scale": lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].mul_(1.3),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_caught(mistake, tiny_checkpoint, tmp_path):
    model = in_memory(tiny_checkpoint("qwen2"), parse_format("int4-g32"))
    MLX().write(model, tmp_path, {})
    opened = MLX().open(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    MISTAKES[mistake](tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(VerifyError, match=r"mlx-lm \d.* computes something else"):
        prove(MLX(), opened, model)


def test_rope_that_it_is_not_told_is_caught(tiny_checkpoint, tmp_path):
    model = in_memory(tiny_checkpoint("llama"), parse_format("int4-g32"))
    MLX().write(model, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=r"computes something else"):
        prove(MLX(), MLX().open(tmp_path), model)


def test_reports_say_it(tiny_checkpoint, tmp_path):
    layers = [{"match": "re:.*_proj", "weights": "int4-g32", "method": "rtn"}, {"match": "*", "keep": True}]
    recipe = {"recipe": 1, "name": "test", "layers": layers, "export": [{"to": "mlx"}]}
    report = quantize(str(tiny_checkpoint("llama")), recipe, tmp_path / "out")
    words = report.artifacts[0].proof.words
    assert words.startswith(f"runs in mlx-lm {READERS['mlx-lm'].version}, 24 tokens")
    assert words in " ".join((tmp_path / "out" / "README.md").read_text().replace("\\", "").split())
