"""GGUF files of tiny models, judged by llama.cpp and by gguf's own reader."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qtool import registry
from qtool.artifact._base import Carry
from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._writer import size_label, usual
from qtool.checkpoint._base import Layer, Module
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.modules import modules
from qtool.checkpoint.raw_bytes import read_bytes
from qtool.errors import CheckpointError, PlanError, StorageError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.formats.int import Int
from qtool.methods.rtn import RTN
from qtool.residuals._base import Matrix
from qtool.store.neutral import NeutralCheckpoint, NeutralWriter
from tests.llamacpp import generate, tokenize

TOKENS = [(7 * i * i + 3 * i) % 500 for i in range(40)]
FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def neutral(folder: Path, work: Path, choose=lambda module: None, keep="f32"):
    """A neutral checkpoint in which `choose` gives some modules a format; the others are cast."""
    source = HFCheckpoint(folder)
    chosen = {module.name: choose(module) for module in modules(source)}
    writer = NeutralWriter(work, {}, keep={name: keep for name, fmt in chosen.items() if fmt is None})
    layers = {
        name: Matrix(RTN().solve(source.tensor(f"{name}.weight").float(), None, fmt).quantized)
        for name, fmt in chosen.items()
        if fmt
    }
    writer.enter("all", writer.write_block("all", layers))
    return NeutralCheckpoint(work, source)


def write(model, out: Path, **card):
    out.mkdir()
    return GGUF().write(model, out, card)[0]


def reference_logits(folder: Path, tensors=None, tokens=TOKENS):
    """float32 [T, V] by transformers, with other weights if given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if tensors is not None:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and missing in ([], ["lm_head.weight"])
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def distance(a, b):
    return float((a - b).norm() / b.norm())


def tolerance(folder: Path) -> float:
    """Of `distance` to llama.cpp, which looks GELU up in a table of 16-bit floats."""
    return 5e-4 if "gemma" in folder.name else 1e-5


def test_llama_cpp_computes_what_transformers_computes(tiny_folder: Path, tmp_path: Path):
    """Samples are longer than sliding windows and than the original context of stretched ones."""
    path = write(neutral(tiny_folder, tmp_path / "work"), tmp_path / "out")
    assert distance(LlamaCpp(path, 64).logits(TOKENS), reference_logits(tiny_folder)) < tolerance(tiny_folder)


LONG = [(7 * i * i + 3 * i) % 500 for i in range(600)]


def test_llama_cpp_follows_llama_3_beyond_its_original_context(tiny_checkpoint, tmp_path: Path):
    folder = tiny_checkpoint("llama-rope3")
    path = write(neutral(folder, tmp_path / "work"), tmp_path / "out")
    assert distance(LlamaCpp(path, 640).logits(LONG), reference_logits(folder, tokens=LONG)) < 1e-5


def test_llama_cpp_uses_the_short_factors_in_short_contexts(tiny_checkpoint, tmp_path: Path):
    folder = changed(tiny_checkpoint("phi3-long"), tmp_path / "model", {"original_max_position_embeddings": 1024})
    path = write(neutral(folder, tmp_path / "work"), tmp_path / "out")
    assert distance(LlamaCpp(path, 64).logits(TOKENS), reference_logits(folder)) < 1e-5


def changed(folder: Path, copy: Path, fields: dict[str, object]) -> Path:
    """A copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(folder, copy)
    told = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(told | fields))
    return copy


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama-rope3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("qwen3-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("gemma2", {"sliding_window": 1024}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3_text", {"sliding_window": 1024}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 7}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                }
            },
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
        ),
        ("phi3-long", {"original_max_position_embeddings": 4096}),
        ("phi3-long", {"max_position_embeddings": 32}),
        ("smollm3", {"no_rope_layers": [1] * 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_is_special_about_a_family_matters_here(name, fields, tiny_checkpoint, tmp_path: Path):
    """Guards the comparisons above: without it, the tiny model computes something else."""
    folder = tiny_checkpoint(name)
    tokens = LONG if name == "llama-rope3" else TOKENS
    other = reference_logits(changed(folder, tmp_path / "other", fields), tokens=tokens)
    assert distance(other, reference_logits(folder, tokens=tokens)) > 10 * tolerance(folder)


def test_files_read_back_as_the_models_they_were(tiny_folder: Path, tmp_path: Path):
    """Written by us and read by us, bit for bit; tests of the reader compare configurations."""
    source, model = HFCheckpoint(tiny_folder), neutral(tiny_folder, tmp_path / "work")
    found = GGUF().open(write(model, tmp_path / "out"))
    assert found.names() == source.names()
    assert all(torch.equal(found.tensor(n), source.tensor(n).float()) for n in source.names())
    assert all(torch.equal(found.rows(n, 3, 9), source.tensor(n)[3:9].float()) for n in source.names())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_kept_matrices_keep_their_type(dtype, tiny_checkpoint: Callable[[str], Path], tmp_path: Path):
    model = neutral(tiny_checkpoint("llama-biased"), tmp_path / "work", keep=dtype)
    path = write(model, tmp_path / "out")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    kinds = {name: t.tensor_type.name.lower() for name, t in stored.items()}
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == dtype
    assert {kinds[n] for n in kinds if n.endswith((".bias", "_norm.weight"))} == {"f32"}
    written = GGUF().open(path)
    assert all(torch.equal(written.tensor(n), model.tensor(n).to(written.info(n).dtype)) for n in model.names())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model_name", ["llama", "qwen2"])
def test_quantized_models_read_back_and_run(name, model_name, tiny_checkpoint, tmp_path: Path):
    fmt = registry.load("formats", name)()
    folder = tiny_checkpoint(model_name)
    model = neutral(folder, tmp_path / "work", lambda module: fmt)
    path = write(model, tmp_path / "out")
    written = GGUF().open(path.parent)
    assert written.layers == model.layers
    for module in model.layers:
        codes, params = written.matrix(module).quantized.codes, written.matrix(module).quantized.params
        wanted = model.matrix(module).quantized
        assert torch.equal(codes, wanted.codes)
        assert all(torch.equal(params[p], wanted.params[p]) for p in wanted.params)
    tensors = {n: written.tensor(n).float() for n in written.names()}
    assert all(torch.equal(tensors[n], model.tensor(n).float()) for n in model.names())
    ours = reference_logits(folder, tensors)
    assert distance(LlamaCpp(path, 64).logits(TOKENS), ours) < 0.02  # llama.cpp rounds activations to 8 bits
    assert distance(reference_logits(folder), ours) > {"4": 0.06, "5": 0.03, "8": 0.003}[name[1]]


def test_integers_go_into_blocks_of_the_same_values(tiny_checkpoint, tmp_path: Path):
    sources = {
        "q": Int(bits=4, group=32),
        "k": Int(bits=4, group=32, symmetric=False),
        "v": Int(bits=3, group=64, symmetric=False),
        "gate": Int(bits=8, group="channel"),
        "down": Int(bits=5, group=64),
    }
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", lambda module: sources.get(module.role))
    path = write(model, tmp_path / "out")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.attn_v.weight"] == "Q4_0"
    assert kinds["blk.0.attn_k.weight"] == "Q5_0"  # some minima are not exact in fp16, as Q4_1 would need
    assert kinds["blk.0.ffn_gate.weight"] == "Q8_0" and kinds["blk.0.ffn_down.weight"] == "Q5_0"
    written = GGUF().open(path)
    assert set(written.layers) == set(model.layers)
    assert all(torch.equal(written.tensor(n).float(), model.tensor(n).float()) for n in model.names())


def test_scales_that_blocks_cannot_hold_stop_the_writer(tiny_checkpoint, tmp_path: Path):
    fmt = Int(bits=4, group=32, scale_dtype="fp32")
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work", lambda m: fmt if m.role == "up" else None)
    with pytest.raises(PlanError, match=r"mlp\.up_proj: q4_0: some scales are not exact in fp16"):
        write(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        *(("Q3_K", "MOSTLY_Q3_K_M"), ("Q4_K", "MOSTLY_Q4_K_M"), ("Q5_K", "MOSTLY_Q5_K_M"), ("Q6_K", "MOSTLY_Q6_K")),
        *(("IQ2_XS", "MOSTLY_IQ2_XS"), ("IQ2_S", "MOSTLY_IQ2_M"), ("TQ2_0", "MOSTLY_TQ2_0"), ("Q5_1", "MOSTLY_Q5_1")),
        *(("IQ4_NL", "MOSTLY_IQ4_NL"), ("MXFP4", "MOSTLY_MXFP4_MOE"), ("NVFP4", "MOSTLY_NVFP4")),
        *(("F32", "ALL_F32"), ("F16", "MOSTLY_F16"), ("BF16", "MOSTLY_BF16")),
    ],
)
def test_file_type_by_the_most_frequent_type(block, wanted):
    assert usual(gguf.GGMLQuantizationType[block]) == gguf.LlamaFileType[wanted]


def test_file_type_as_asked(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work")
    (tmp_path / "out").mkdir()
    files = GGUF(split_max_size=100_000, file_type="q3_k_s").write(model, tmp_path / "out", {})
    assert files[1].name.endswith("-00002-of-00006.gguf")
    assert GGUFFile(files[0]).metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q3_K_S


def test_metadata_and_table_as_the_gguf_package_reads_them(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("llama-tied"), tmp_path / "work", lambda m: registry.load("formats", "q8_0")())
    path = write(model, tmp_path / "out", base_model="maker/My Model", recipe_name="q8")
    assert path.name == "My-Model-q8.gguf"
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["GGUF.version"] == 3 and values["GGUF.tensor_count"] == len(reader.tensors) == 3 * 9 + 2
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "My Model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.size_label": "144K",
        "llama.block_count": 3,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: values[key] for key in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == np.float32(model.config["rms_norm_eps"])
    assert len(values["tokenizer.ggml.tokens"]) == 512 and values["tokenizer.ggml.tokens"][505] == "[PAD505]"
    assert values["tokenizer.chat_template"].startswith("{% for message in messages %}")
    assert "output.weight" not in {t.name for t in reader.tensors}
    first = next(t for t in reader.tensors if t.name == "blk.2.ffn_down.weight")
    assert list(first.shape) == [128, 64]  # GGUF counts from the fastest extent


def test_same_input_same_bytes(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("qwen3"), tmp_path / "work", lambda m: registry.load("formats", "q4_1")())
    first, second = (write(model, tmp_path / out, recipe_name="x") for out in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def module(role="q", k=64):
    return Module(f"model.layers.0.self_attn.{role}_proj", (), "linear", role, 0, "x", None, (64, k))


@pytest.mark.parametrize(
    ("layer", "k", "carry"),
    [
        (None, 64, Carry(True)),
        (Layer(registry.load("formats", "q4_0")()), 64, Carry(True)),
        (Layer(Int(bits=4, group=32, symmetric=False)), 64, Carry(True)),
        (
            Layer(registry.load("formats", "q4_0")()),
            48,
            Carry(False, "q4_0: rows of 48 columns are not divisible by 32"),
        ),
        (
            Layer(Int(bits=8, group=16)),
            64,
            Carry(False, "no GGUF block type holds int8-g16; q4_0 to q8_0 are some"),
        ),
        (
            Layer(Int(bits=8, group="channel"), Int(bits=8, group="token")),
            64,
            Carry(False, "GGUF cannot say how activations are quantized; llama.cpp decides that itself"),
        ),
    ],
    ids=["kept", "block", "int", "width", "group", "activations"],
)
def test_what_it_can_carry_is_known_before_any_data(layer, k, carry):
    assert GGUF().can_carry(module(k=k), layer, "source") == carry


def test_recognizing_and_opening(tiny_checkpoint, tmp_path: Path):
    path = write(neutral(tiny_checkpoint("llama"), tmp_path / "work"), tmp_path / "out")
    assert GGUF.recognizes(path) and GGUF.recognizes(path.parent)
    assert not GGUF.recognizes(tiny_checkpoint("llama")) and not GGUF.recognizes(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"wanted one \.gguf model, found 0"):
        GGUF().open(tmp_path)


def test_an_unwritable_folder_is_a_storage_error(tiny_checkpoint, tmp_path: Path):
    model = neutral(tiny_checkpoint("llama"), tmp_path / "work")
    with pytest.raises(StorageError, match="cannot write"):
        GGUF().write(model, tmp_path / "missing", {})


@pytest.mark.parametrize(
    ("weights", "label"),
    [(134_515_008, "135M"), (1_235_814_400, "1.2B"), (8_030_261_248, "8.0B"), (70_553_706_496, "71B"), (5400, "5.4K")],
)
def test_size_labels(weights, label):
    assert size_label(weights) == label


def test_llama_cpp_gives_its_reason(tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"llama\.cpp does not load .*bad\.gguf: found .*version"):
        LlamaCpp(path, 32)


@pytest.mark.slow
def test_the_demo_file_is_rewritten_as_it_was(demo_gguf: Path, tmp_path: Path):
    """Blocks unpacked, permuted back and forth and packed again are the bytes that llama.cpp's converter wrote."""
    path = write(GGUF().open(demo_gguf), tmp_path / "out")
    there, here = GGUFFile(demo_gguf), GGUFFile(path)
    assert here.tensors.keys() == there.tensors.keys()
    for name, tensor in here.tensors.items():
        original = there.tensors[name]
        assert (tensor.kind, tensor.shape) == (original.kind, original.shape)
        wanted = read_bytes(demo_gguf, original.offset, original.nbytes, name)
        assert torch.equal(read_bytes(path, tensor.offset, tensor.nbytes, name), wanted)
    wanted = {key: value for key, value in there.metadata.items() if not key.startswith("general.")}
    wanted.pop("tokenizer.ggml.add_space_prefix")  # llama.cpp reads it for SentencePiece only
    assert {key: here.metadata.get(key) for key in wanted} == wanted
    assert {key: here.metadata[f"general.{key}"] for key in ("file_type", "size_label")} == {
        "file_type": 3,
        "size_label": "135M",
    }
    prompt = "<|im_start|>user\nWhat is 12345 plus 1?<|im_end|>\n<|im_start|>assistant\n"
    runtime, again = LlamaCpp(demo_gguf, 64), LlamaCpp(path, 64)
    answer = generate(again, tokenize(again, prompt), 4)
    assert len(answer) == 4 and answer == generate(runtime, tokenize(runtime, prompt), 4)
