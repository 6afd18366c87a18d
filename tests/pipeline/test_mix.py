"""A shipped mix from checkpoint to file: calibrated, with fallbacks, loaded by llama.cpp."""

from __future__ import annotations

import gguf
import torch

from qtool.evaluate.llamacpp import LlamaCpp
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.artifact.test_gguf import TOKENS, distance, reference_logits
from tests.conftest import TINY, make_checkpoint, make_tokenizer


def test_q4_k_m_of_narrow_rows(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen3")
    sets = ("calibration.samples=4", "calibration.length=64")
    report = run(QuantizeOptions(str(source), "gguf-q4_k_m", tmp_path / "out", sets))
    (path,) = (tmp_path / "out").glob("*.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    for name in ("attn_q", "attn_k", "attn_output", "ffn_up", "attn_v", "ffn_down"):
        last = "Q8_0" if name in ("attn_v", "ffn_down") else "Q5_0"  # the last eighth of three blocks is one
        assert [types[f"blk.{i}.{name}.weight"] for i in range(3)] == ["Q5_0", "Q5_0", last]
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q5_0")
    told = {e.role: (e.method, e.format, e.bits_per_weight, e.fallback) for e in report.layers}
    reason = "rows of 64 columns are not divisible by 256"
    assert told["up"] == ("gptq", "q5_0", 5.5, f"q5_0 instead of q4_k: {reason}")
    assert told["head"] == ("gptq", "q8_0", 8.5, f"q8_0 instead of q6_k: {reason}")
    assert told["embedding"] == ("rtn", "q5_0", 5.5, f"q5_0 instead of q4_k: {reason}")
    model = open_artifact(path)
    ours = reference_logits(source, {name: model.tensor(name).float() for name in model.names()})
    theirs = LlamaCpp(path, 64).logits(TOKENS)
    assert distance(theirs, ours) < 0.02  # llama.cpp rounds activations to 8 bits
    assert 0.02 < distance(ours, reference_logits(source)) < 0.2


def test_a_type_of_16_bits_is_the_last_resort(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(
        "recipe: 1\nname: t\nlayers:\n"
        '  - {match: "role:down", weights: q6_k}\n  - {match: "*", keep: true}\nexport: [{to: gguf}]\n'
    )
    monkeypatch.setitem(TINY, "llama-narrow", {"dtype": "float32", "intermediate_size": 80})
    source = make_checkpoint("llama-narrow", tmp_path / "llama-narrow", make_tokenizer())
    report = run(QuantizeOptions(str(source), str(tmp_path / "r.yaml"), tmp_path / "out"))
    (path,) = (tmp_path / "out").glob("*.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "F32")
    (down, _) = (e for e in report.layers if e.role == "down")
    assert (down.format, down.bits_per_weight) == (None, 16)
    assert down.fallback == "f16 instead of q6_k: rows of 80 columns are not divisible by 256"
    assert torch.isfinite(LlamaCpp(path, 64).logits(TOKENS)).all()
