"""`--tensor-type`: which tensors a pattern means, and which rule decides."""

from __future__ import annotations

import pytest
from gguf import GGUFReader

from qtool.artifact.gguf.tensor_types import with_tensor_types
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import UsageError
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.recipe.load import load_recipe


def test_the_file_has_the_types_that_were_asked_for(tiny_checkpoint, tmp_path):
    types = ("blk.1.attn_v=Q5_0", "ATTN_(v|q)=q5_1", "token_embd=f16")
    options = QuantizeOptions(str(tiny_checkpoint("llama")), "gguf-q8_0", tmp_path / "out", tensor_types=types)
    report = run(options)
    (file,) = (tmp_path / "out").glob("*.gguf")
    found = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors if t.name.endswith("weight")}
    assert (found["blk.0.attn_v.weight"], found["blk.1.attn_v.weight"]) == ("Q5_1", "Q5_0")
    assert (found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"]) == ("Q5_1", "Q8_0")
    assert (found["token_embd.weight"], found["output.weight"]) == ("F16", "Q8_0")
    assert report.warnings == ()


def test_experts_of_a_layer_are_one_tensor(tiny_checkpoint):
    plan = prepare(str(tiny_checkpoint("qwen3_moe")), "gguf-q8_0", tensor_types=("blk.0.ffn_down_exps=q4_0",)).plan
    experts = [p for p in plan.layers if p.format and p.module.expert is not None]
    found = {(p.module.block, p.module.role, p.format.label) for p in experts}
    rest = {(block, role, "q8_0-ggml") for block in (0, 1) for role in ("gate", "up", "down")}
    assert found == (rest - {(0, "down", "q8_0-ggml")}) | {(0, "down", "q4_0")}


def test_what_was_asked_for_by_name_is_not_open_to_a_budget(tiny_checkpoint, tmp_path):
    from qtool.allocate.decisions import decisions

    model = str(tiny_checkpoint("llama"))
    job = prepare(model, "gguf-fit", tensor_types=("attn_v=q4_k",), budget={"size": 10**6})
    names = {d.name for d in decisions(job.plan, job.checkpoint, job.artifacts["gguf"])}
    assert not [name for name in names if "v_proj" in name]
    assert "model.layers.0.self_attn.q_proj" in names


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attn_v", "--tensor-type: wanted PATTERN=TYPE, as in attn_v=q6_k, found 'attn_v'"),
        ("=q4_0", "wanted PATTERN=TYPE"),
        ("attn_v=", "wanted PATTERN=TYPE"),
        ("(=q4_0", "--tensor-type (=q4_0: wanted a regular expression"),
        ("attn_w=q4_0", "wanted a part of a name such as blk.0.attn_k.weight, found none that has it"),
        ("attn_v=q4_9", "no format is called 'q4_9'"),
    ],
)
def test_what_is_no_tensor_type(text, told, tiny_checkpoint):
    with pytest.raises(UsageError) as caught:
        with_tensor_types(load_recipe("gguf-q8_0"), HFCheckpoint(tiny_checkpoint("llama")), [text])
    assert told in str(caught.value)
