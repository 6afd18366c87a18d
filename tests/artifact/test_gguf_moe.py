"""Mixtures of experts as GGUF: stacked tensors, and llama.cpp's logits beside those of transformers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from qtool import registry
from qtool.artifact.gguf import GGUF
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError, PlanError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.formats.int import Int
from tests.artifact.test_gguf import TOKENS, distance, neutral, reference_logits, write
from tests.checkpoint.test_gguf import write_tokenizer
from tests.conftest import MIXTURES

Q4_0, Q8_0 = (registry.load("formats", name)() for name in ("q4_0", "q8_0"))


@pytest.fixture(params=MIXTURES)
def folder(request, tiny_checkpoint) -> Path:
    return tiny_checkpoint(request.param)


def experts(fmt):
    """Chooses the format for every expert's matrices."""
    return lambda module: None if module.expert is None else fmt


def state_dict(model):
    """Decoded weights as transformers 5 holds them, put together by plain loops."""
    state, stacks = {}, defaultdict(dict)
    for name in model.names():
        whole, e = stacked(name.replace("block_sparse_moe", "mlp"))
        if e is None:
            state[whole] = model.tensor(name).float()
        else:
            place, projection, kind = whole.rsplit(".", 2)
            role = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(projection, projection)
            stacks[place, "_bias" if kind == "bias" else ""].setdefault(e, {})[role] = model.tensor(name).float()
    for (place, ending), members in stacks.items():
        both, down = [], []
        for e in range(len(members)):
            gate, up = members[e]["gate_proj"], members[e]["up_proj"]
            if model.config["model_type"] == "gpt_oss":
                turns = torch.stack((gate, up), 1).flatten(0, 1)
                both.append(turns if ending else turns.T)
                down.append(members[e]["down_proj"] if ending else members[e]["down_proj"].T)
            else:
                both.append(torch.cat((gate, up)))
                down.append(members[e]["down_proj"])
        state[f"{place}.gate_up_proj{ending}"], state[f"{place}.down_proj{ending}"] = (
            torch.stack(both),
            torch.stack(down),
        )
    return state


def distances(a, b):
    """Relative, of the logits at each position; the first token is padding, and may have an embedding of zeros."""
    return ((a - b).norm(dim=1) / b.norm(dim=1))[1:]


def test_llama_cpp_computes_what_transformers_computes(folder, tmp_path):
    path = write(neutral(folder, tmp_path / "work"), tmp_path / "out")
    assert distance(LlamaCpp(path, 64).logits(TOKENS), reference_logits(folder)) < 1e-5


@pytest.mark.parametrize(
    ("name", "fmt"), [("mixtral", Q8_0), ("qwen2_moe", Q4_0), ("qwen3_moe", Q4_0), ("gpt_oss", Q4_0)]
)
def test_quantized_models_read_back_and_run(name, fmt, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(name)
    model = neutral(folder, tmp_path / "work", lambda module: None if module.kind == "router" else fmt)
    path = write(model, tmp_path / "out")
    written = GGUF().open(path)
    assert written.layers == model.layers
    for module in model.layers:
        codes, params = written.matrix(module).quantized.codes, written.matrix(module).quantized.params
        wanted = model.matrix(module).quantized
        assert torch.equal(codes, wanted.codes)
        assert all(torch.equal(params[p], wanted.params[p]) for p in wanted.params)
    for name in model.names():
        assert torch.equal(written.tensor(name).float(), model.tensor(name).float())
    ours = reference_logits(folder, state_dict(written))
    runtime = distances(LlamaCpp(path, 64).logits(TOKENS), ours)
    assert float(runtime.median()) < 0.02  # llama.cpp rounds activations to 8 bits ...
    assert int((runtime > 0.05).sum()) <= 3  # ... which sends a token to another expert here and there
    assert float(distances(reference_logits(folder), ours).median()) > (0.06 if fmt is Q4_0 else 0.003)


def test_what_the_gguf_package_finds_in_a_stack(folder, tmp_path):
    """Expert by expert, in order; everything llama.cpp adds to or compares is F32."""
    source = HFCheckpoint(folder)
    path = write(neutral(folder, tmp_path / "work", experts(Q8_0), keep="bf16"), tmp_path / "out")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names, count = source.family.gguf_names(source.config), source.family.experts(source.config)
    for module in modules(source):
        tensor = stored[names[f"{module.name}.weight"]]
        if module.expert is not None:
            n, k = module.shape
            assert list(tensor.shape) == [k, n, count]
            assert tensor.tensor_type == Kind.Q8_0
            found = torch.from_numpy(gguf.dequantize(tensor.data, Kind.Q8_0))[module.expert]
            assert float((found - source.tensor(f"{module.name}.weight")).norm() / found.norm()) < 0.01
        elif module.kind == "router":
            assert tensor.tensor_type == Kind.F32
            kept = source.tensor(f"{module.name}.weight")
            found = torch.from_numpy(tensor.data.reshape(kept.shape).copy())
            assert torch.equal(found, kept.bfloat16().float())
        else:
            assert tensor.tensor_type == Kind.BF16
    assert {t.tensor_type for t in stored.values() if t.name.endswith(".bias") or len(t.shape) == 1} == {Kind.F32}


def test_files_read_back_as_the_models_they_were(folder, tmp_path):
    """The same names, tensors and, for transformers, configuration."""
    from transformers import AutoConfig

    source = HFCheckpoint(folder)
    found = GGUFCheckpoint(write(neutral(folder, tmp_path / "work"), tmp_path / "out"))
    assert found.names() == source.names()
    for name in source.names():
        assert torch.equal(found.tensor(name), source.tensor(name))
        if len(source.tensor(name)) > 4:
            assert torch.equal(found.rows(name, 2, 4), source.tensor(name)[2:4])
    ours, theirs = (AutoConfig.for_model(**config).to_dict() for config in (found.config, source.config))
    unsaid = {"dtype", "initializer_range", "transformers_version", "use_cache", "mlp_only_layers"}
    said = [field for field in ours if field not in unsaid and (field != "head_dim" or theirs.get(field))]
    assert {field: ours[field] for field in said} == {field: theirs[field] for field in said}


def test_integers_go_into_one_block_type_for_all_experts(tiny_checkpoint, tmp_path):
    """Minima that are exact in fp16 for some experts only decide for all of them."""
    fmt = Int(bits=4, group=32, symmetric=False)
    model = neutral(tiny_checkpoint("mixtral"), tmp_path / "work", experts(fmt))
    path = write(model, tmp_path / "out")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors if "_exps" in t.name}
    assert len(kinds) == 6
    assert set(kinds.values()) <= {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    written = GGUF().open(path)
    assert all(torch.equal(written.tensor(n).float(), model.tensor(n).float()) for n in model.names())


def test_experts_in_different_formats_are_no_stack(tiny_checkpoint, tmp_path):
    model = neutral(tiny_checkpoint("mixtral"), tmp_path / "a", lambda m: Q8_0 if m.expert == 1 else experts(Q4_0)(m))
    with pytest.raises(
        PlanError, match=r"different formats: model\.layers\.0\.block_sparse_moe\.experts\.w1 and 5 more"
    ):
        GGUF().check(model)
    with pytest.raises(PlanError, match="have different formats; let one rule decide all experts"):
        write(model, tmp_path / "out")
    one = neutral(tiny_checkpoint("mixtral"), tmp_path / "b", lambda m: Q8_0 if m.expert == 1 else None)
    with pytest.raises(PlanError, match="have different formats"):
        write(one, tmp_path / "other")


def test_scales_that_blocks_cannot_hold_stop_the_writer(tiny_checkpoint, tmp_path):
    fmt = Int(bits=4, group=32, scale_dtype="fp32")
    model = neutral(tiny_checkpoint("mixtral"), tmp_path / "work", experts(fmt))
    with pytest.raises(PlanError, match=r"experts\.0\.w1: q4_0: some scales are not exact in fp16"):
        write(model, tmp_path / "out")


def test_a_stack_of_another_number_of_experts(tiny_checkpoint, tmp_path):
    path = write(neutral(tiny_checkpoint("qwen3_moe"), tmp_path / "work"), tmp_path / "out")
    content = path.read_bytes()
    key = b"qwen3moe.expert_count"
    at = content.index(key) + len(key) + 4
    path.write_bytes(content[:at] + (5).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.ffn_gate_exps\.weight: wanted one for each of 5 experts, found \[6"
    ):
        GGUFCheckpoint(path)


def test_a_matrix_of_one_row_may_be_a_vector(tiny_checkpoint, tmp_path):
    """ggml drops extents of 1 behind the others, so files of llama-quantize have such gates for shared experts."""
    folder = tiny_checkpoint("qwen2_moe")
    source = HFCheckpoint(folder)
    path = write(neutral(folder, tmp_path / "work"), tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2moe")
    for key, value in source.family.gguf_metadata(source.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    write_tokenizer(writer, folder, "gpt-2")
    for tensor in gguf.GGUFReader(path).tensors:
        values = np.array(tensor.data).reshape(tensor.shape[::-1])
        writer.add_tensor(tensor.name, values[0] if tensor.name.endswith("gate_inp_shexp.weight") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFCheckpoint(tmp_path / "x.gguf")
    for name in source.names():
        assert torch.equal(found.tensor(name), source.tensor(name))


def test_same_input_same_bytes(tiny_checkpoint, tmp_path):
    model = neutral(tiny_checkpoint("gpt_oss"), tmp_path / "work", experts(Q4_0))
    first, second = (write(model, tmp_path / out, recipe_name="x") for out in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
