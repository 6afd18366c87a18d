"""compressed-tensors artifacts against the library of that name, transformers, and files written by that library."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import compressed_tensors
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.artifact import _shards
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, PlanError
from qtool.formats.int import Int
from qtool.formats.q4_0 import Q4_0
from qtool.formats.q4_1 import Q4_1
from qtool.formats.q8_0 import Q8_0
from qtool.numerics.threads.ranks import ALONE, Ranks
from tests.artifact.conftest import assert_same_model, quantize

TOKENS = torch.arange(3, 40).reshape(1, -1)
TOKEN8 = Int(bits=8, group="token")


def write(model, folder, card=None):
    folder.mkdir(exist_ok=True)
    return CompressedTensors().write(model, folder, card or {})


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def decompressed(model):
    """Weights that compressed-tensors computes from the file, by its own code."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            compressed_tensors.compressors.decompress_module(module)
    return model.state_dict()


def dense(model, folder):
    """The model that transformers makes of our decoded weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    state = twin.state_dict()
    for module in model.layers:
        state[f"{module}.weight"].copy_(model.matrix(module).decode())
    return twin


def assert_loads_exactly(model, folder, origin):
    loaded, twin = load(folder), dense(model, origin)
    with torch.no_grad():
        logits, expected = loaded(TOKENS).logits, twin(TOKENS).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, expected)
    state, reference = loaded.state_dict(), twin.state_dict()  # the first forward pass has decompressed it
    assert {name for name in state if not re.search(r"_scale$|_zero_point$|_shape$|inv_freq", name)} == set(reference)
    for name, tensor in reference.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


PACKED = [Int(bits=b, group=32) for b in range(2, 9)]
PACKED += [Int(bits=b, group=16, symmetric=False) for b in (2, 3, 4, 8)]
PACKED += [Int(bits=b, group="channel", symmetric=b == 4) for b in (3, 4, 8)]
PACKED += [Int(bits=4, group="tensor"), Int(bits=4, group=64, scales="minmax")]


@pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.label)
def test_packed_weights_load_in_transformers(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt)
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("llama"))


@pytest.mark.parametrize("block", [Q4_0(), Q8_0()], ids=lambda f: f.label)
def test_blocks_of_gguf_without_minimum_are_integers(block, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("mistral"), block)  # in fp16, which is the type of their scales
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("mistral"))
    labels = {layer.format.label for layer in CompressedTensors().open(tmp_path).layers.values()}
    assert labels == {f"int{block.bits}-g32"}


def test_every_family_loads_in_transformers(tiny_folder, tmp_path):
    model = quantize(tiny_folder, Int(bits=4, group=32, scale_dtype="bf16"), head=Int(bits=8, group=32))
    files = write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, tiny_folder)
    assert sorted(files) == sorted(tmp_path.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("some text").input_ids == AutoTokenizer.from_pretrained(tiny_folder)("some text").input_ids


@pytest.mark.parametrize("group", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_w8a8_loads_in_transformers(group, symmetric, tiny_checkpoint, tmp_path):
    inputs = Int(bits=8, group="token", symmetric=symmetric)
    model = quantize(tiny_checkpoint("llama"), Int(bits=8, group=group), inputs)
    write(model, tmp_path)
    state, reference = decompressed(load(tmp_path)), dense(model, tiny_checkpoint("llama")).state_dict()
    for name, tensor in reference.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        logits = load(tmp_path)(TOKENS).logits.float()
        expected = dense(model, tiny_checkpoint("llama"))(TOKENS).logits.float()
    error = float((logits - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1  # inputs are rounded to 8 bits, and only they


def test_mixed_formats_have_targets_that_do_not_overlap(tiny_checkpoint, tmp_path):
    int4, int8 = Int(bits=4, group=32), Int(bits=8, group="channel")
    model = quantize(tiny_checkpoint("llama"), int4, down=int8, o=None, head=int8)
    write(model, tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    for module in model.layers:
        matching = [g for g in groups.values() for t in g["targets"] if re.match(t.removeprefix("re:"), module)]
        assert [g["weights"]["num_bits"] for g in matching] == [model.layers[module].format.bits]
    for other in (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_projx",
        "xlm_head",
        "model.layers.10.mlp.down_proj",
    ):
        assert not [t for g in groups.values() for t in g["targets"] if re.match(t.removeprefix("re:"), other)]
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("llama"))
    assert_same_model(CompressedTensors().open(tmp_path), model)


def test_configuration(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama-tied"), Int(bits=4, group=32, symmetric=False)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.15.0",
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "dequantize": True,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    assert list(config) == sorted(config)
    known = compressed_tensors.quantization.QuantizationArgs.model_fields
    assert set(weights) <= set(known)


def test_layout_on_disk(tiny_checkpoint, tmp_path):
    model = quantize(
        tiny_checkpoint("llama"), Int(bits=3, group=32, symmetric=False), head=Int(bits=3, group=32, symmetric=False)
    )
    write(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {
            name: file.get_tensor(name) for name in list(file.keys()) if name.startswith("model.layers.0.mlp.up_proj.")
        }
        kept = file.get_tensor("model.norm.weight")
    assert torch.equal(kept, model.tensor("model.norm.weight"))
    shapes = {name.rpartition(".")[2]: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    assert shapes == {
        "weight_packed": (torch.int32, (128, 6)),
        "weight_scale": (torch.bfloat16, (128, 2)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (12, 2)),
    }
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["version"] == "0.18.0"


@pytest.mark.parametrize(
    ("fmt", "inputs"),
    [
        (Int(bits=4, group=32), None),
        (Int(bits=3, group=16, symmetric=False), None),
        (Int(bits=8, group="channel"), TOKEN8),
    ],
    ids=["sym", "asym", "w8a8"],
)
def test_comes_back(fmt, inputs, tiny_folder, tmp_path):
    model = quantize(tiny_folder, fmt, inputs)
    model.config["dtype"] = "bfloat16"
    write(model, tmp_path)
    assert CompressedTensors.recognizes(tmp_path)
    found = CompressedTensors().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)


def test_same_bytes_again(tiny_checkpoint, tmp_path, tree):
    for name in ("a", "b"):
        write(quantize(tiny_checkpoint("qwen2"), Int(bits=4, group=32)), tmp_path / name, {"base_model": "org/model"})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_shards(tiny_checkpoint, tmp_path, monkeypatch):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    monkeypatch.setattr(_shards.write_shards, "__defaults__", (80_000, ALONE))
    write(model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    tensors = {name: t for shard in shards for name, t in load_file(tmp_path / shard).items()}
    assert {name: shard for shard in shards for name in load_file(tmp_path / shard)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(sum(t.nbytes for t in load_file(tmp_path / s).values()) <= 80_000 for s in shards)
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("llama"))
    assert_same_model(CompressedTensors().open(tmp_path), model)
    together = tmp_path / "together"
    together.mkdir()
    met = threading.Barrier(2)
    monkeypatch.setattr(Ranks, "barrier", lambda _: met.wait(60))
    with ThreadPoolExecutor(2) as lanes:
        found = lanes.map(
            lambda rank: CompressedTensors().write_together(model, together, {}, Ranks(rank, 2)), range(2)
        )
        files, none = found
    assert list(none) == []
    assert {p.name for p in files} == {p.name for p in together.iterdir()} >= {*shards, "config.json"}
    assert all((together / s).read_bytes() == (tmp_path / s).read_bytes() for s in (*shards, "config.json"))


def test_pieces_are_shared_by_their_bytes():
    """In each process those that follow each other; none is left out, none written twice."""
    sizes = [7, 1, 1, 90, 3, 0, 40, 40, 18]
    pieces = {str(i): {str(i): TensorInfo((n,), torch.uint8)} for i, n in enumerate(sizes)}
    for count in (1, 2, 3, 5):
        found = [sorted(_shards.share(pieces, Ranks(rank, count)), key=int) for rank in range(count)]
        assert [key for part in found for key in part] == list(pieces)
        assert max(sum(sizes[int(key)] for key in part) for part in found) <= 200 / count + 90
    assert [_shards.share(pieces, Ranks(rank, 2)) for rank in range(2)] == [{*"0123"}, {*"45678"}]


@pytest.mark.parametrize(
    ("preset", "fmt"),
    [
        ("W4A16", Int(bits=4, group=128)),
        ("W4A16_ASYM", Int(bits=4, group=128, symmetric=False)),
        ("W8A16", Int(bits=8, group="channel")),
        ("W8A8", Int(bits=8, group="channel")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reads_what_the_library_writes(preset, fmt, tiny_checkpoint, tmp_path):
    """A model compressed by compressed-tensors itself, as llm-compressor does it."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    dense_model = load(tiny_checkpoint("llama"))
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size, fmt = 32, fmt.model_copy(update={"group": 32})
    scheme.format = "int-quantized" if preset == "W8A8" else "pack-quantized"
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(dense_model, config)
    expected = {}
    for name, module in dense_model.named_modules():
        if hasattr(module, "quantization_scheme"):
            width = fmt.group_columns or module.weight.shape[1]
            groups = module.weight.detach().reshape(module.weight.shape[0], -1, width)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
            compressed_tensors.compressors.compress_module(module)
            expected[name] = None
    compressor = compressed_tensors.compressors.ModelCompressor.from_pretrained_model(dense_model)
    dense_model.save_pretrained(tmp_path)
    if compressor is not None:
        compressor.update_config(tmp_path)
    found = CompressedTensors().open(tmp_path)
    assert found.layers.keys() == expected.keys()
    assert {layer.format.label for layer in found.layers.values()} == {fmt.label}
    assert {layer.activations for layer in found.layers.values()} == {TOKEN8 if preset == "W8A8" else None}
    state = decompressed(dense_model)
    for module in found.layers:
        assert torch.equal(found.matrix(module).decode().bfloat16(), state[f"{module}.weight"])


def test_scales_that_the_model_type_cannot_hold(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32, scale_dtype="fp32"))
    with pytest.raises(PlanError, match=r"q_proj: scales stored as float32 are not exact in bfloat16; quantize with"):
        write(model, tmp_path)


REFUSED = [
    pytest.param({"fmt": Q4_1()}, r"holds integers such as int4-g128 and int8-channel, .*, not q4_1", id="q4_1"),
    pytest.param(
        {"fmt": None, "embedding": Int(bits=8, group=32)}, "the token embedding stays unquantized", id="embedding"
    ),
    pytest.param(
        {"fmt": Int(bits=8, group=32), "activations": TOKEN8},
        "inputs of int8-g32 weights are left alone, not int8-token",
        id="w8-group",
    ),
    pytest.param(
        {"fmt": Int(bits=4, group="tensor"), "activations": TOKEN8},
        "inputs of int4-tensor weights are left alone, not int8-token",
        id="w4a8",
    ),
    pytest.param(
        {"fmt": Int(bits=8, group="channel"), "activations": Int(bits=8, group="tensor")},
        r"nobody measured it: model\.layers\.0\.self_attn\.q_proj and 13 more",
        id="per-tensor-inputs",
    ),
    pytest.param(
        {"fmt": Int(bits=4, group=32), "v": Int(bits=8, group=32)},
        r"layers that become one tensor, .*, have different formats: model\.layers\.0\.qkv and 1 more",
        id="fused",
    ),
]


@pytest.mark.parametrize(("what", "message"), REFUSED)
def test_what_it_cannot_hold_is_refused_by_name(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        write(quantize(tiny_checkpoint("llama"), **what), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tied_embedding_says_why(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama-tied"), None, embedding=Int(bits=8, group=32))
    with pytest.raises(PlanError, match=r"and is the output layer at the same time: keep it: model\.embed_tokens$"):
        write(model, tmp_path)


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config["quantization_config"][key] = value
        path.write_text(json.dumps(config))

    return change


def change_group(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        group = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in changes.items():
            (group if key in group else group["weights"])[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
DAMAGE = {
    "other method": (change_config(quant_method="gptq"), "is no compressed-tensors artifact"),
    "groups of another kind": (change_config(config_groups=[1]), "wrong config_groups"),
    "broken expression": (change_group(targets=["re:("]), "wrong config_groups"),
    "cache": (change_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: wanted 8-bit float per tensor or"),
    "no target": (change_group(targets=["re:^other$"]), r"no group of config_groups has model\.layers\.0"),
    "floats": (
        change_group(type="float"),
        "wanted one of pack-quantized, .*, found pack-quantized, 4-bit float per group",
    ),
    "words for a number": (change_group(num_bits="four"), "wrong config_groups"),
    "other width": (change_group(num_bits=3), r"weight_packed: wanted int32 \[64, 6\], found int32 \[64, 8\]"),
    "other group": (change_group(group_size=16), r"weight_scale: wanted bfloat16 \[64, 4\]"),
    "group of nothing": (change_group(group_size=-1), "found -1"),
    "hidden zero points": (change_group(symmetric=False), "lacks .*q_proj.weight_zero_point"),
    "inputs of another kind": (
        change_group(input_activations={"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}),
        "wanted inputs that qtool knows, scaled at run time, found 4-bit int per token, dynamic",
    ),
    "no scale": (change_tensors(lambda t: t.pop(f"{UP}.weight_scale")), f"lacks {UP}.weight_scale"),
    "no codes": (change_tensors(lambda t: t.pop(f"{UP}.weight_packed")), f"lacks {UP}.weight_packed: wanted int32"),
    "lying shape": (
        change_tensors(lambda t: t[f"{UP}.weight_shape"].add_(1)),
        r"weight_shape: wanted \[128, 64\], found \[129, 65\]",
    ),
    "group order": (
        change_tensors(lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(64)})),
        "weight_g_idx: wanted 32 columns in each of 2 groups, found others",
    ),
    "group order of others": (
        change_tensors(lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(63)})),
        "weight_g_idx: wanted 32 columns in each of 2 groups, found others",
    ),
    "zero points": (
        change_tensors(lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(128, 2)})),
        "weight_zero_point: wanted none, or zeros, found others",
    ),
    "unknown module": (change_tensors(lambda t: t.update({"x.weight_packed": torch.zeros(4)})), "lacks x.weight_scale"),
    "scale type": (
        change_tensors(lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].double()})),
        r"weight_scale: wanted bfloat16 \[128, 2\], found float64",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_artifacts(damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path).matrix(UP)


def test_inputs_with_calibrated_scales_are_read_but_not_exported(tiny_checkpoint, tmp_path):
    """No format of qtool says how these inputs are rounded, so nothing else may claim to be the same model."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=8, group="channel"), TOKEN8)
    write(model, tmp_path / "a")
    static = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}
    change_group(input_activations=static)(tmp_path / "a")
    change_tensors(lambda t: t.update({f"{m}.input_scale": torch.ones(1) for m in model.layers}))(tmp_path / "a")
    found = CompressedTensors().open(tmp_path / "a")
    assert set(found.decoded) == set(model.layers)
    assert set(found.decoded.values()) == {"its inputs have calibrated scales that qtool does not read"}
    assert torch.equal(found.tensor(f"{UP}.weight"), model.tensor(f"{UP}.weight"))
    with pytest.raises(PlanError, match="its inputs have calibrated scales"):
        write(found, tmp_path / "b")


def test_a_plain_checkpoint_is_not_recognized(tiny_checkpoint, tmp_path):
    assert not CompressedTensors.recognizes(tiny_checkpoint("llama"))
    assert not CompressedTensors.recognizes(tmp_path)
    with pytest.raises(CheckpointError, match="already quantized"):
        write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path)
        HFCheckpoint(tmp_path)


def test_asymmetric_beside_another_scheme(tiny_checkpoint, tmp_path):
    """transformers would decode everything by the first group if it decoded on loading, so it must not be told to."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32, symmetric=False), down=Int(bits=8, group=32))
    write(model, tmp_path)
    assert "dequantize" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert_same_model(CompressedTensors().open(tmp_path), model)


def test_options_of_the_search_do_not_split_a_fused_set(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32), v=Int(bits=4, group=32, scales="minmax"))
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("llama"))


def test_int8_tensors_that_hold_fewer_bits(tiny_checkpoint, tmp_path):
    """llm-compressor's W4A8: 4-bit values in int8."""
    write(quantize(tiny_checkpoint("llama"), Int(bits=8, group="channel"), TOKEN8), tmp_path)
    change_group(num_bits=4)(tmp_path)
    with pytest.raises(CheckpointError, match=r"codes of .*up_proj: wanted below 16, found larger"):
        CompressedTensors().open(tmp_path).matrix(UP)
    change_tensors(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"] // 16}))(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    expected = values[f"{UP}.weight"].float() * values[f"{UP}.weight_scale"].float()
    assert torch.equal(CompressedTensors().open(tmp_path).matrix(UP).decode(), expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_groups_in_activation_order(symmetric, tiny_checkpoint, tmp_path):
    """Files of llm-compressor with actorder=group, which newer versions no longer load."""
    fmt = Int(bits=4, group=32, symmetric=symmetric)
    model = quantize(tiny_checkpoint("llama"), fmt)
    write(model, tmp_path)
    index = torch.arange(64) // 32
    shuffled = index[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    change_tensors(
        lambda t: t.update({f"{UP}.weight_g_idx": shuffled.int(), f"{GATE}.weight_g_idx": index.int() * 0 - 1})
    )(tmp_path)
    found = CompressedTensors().open(tmp_path)
    assert found.decoded == {UP: "its groups are in activation order (weight_g_idx)"}
    assert UP not in found.layers
    scale, offset = (p[:, shuffled] for p in fmt.affine(model.matrix(UP).quantized.params))
    expected = (model.matrix(UP).quantized.codes.double() - 8) * scale.double() + offset.double()
    assert torch.equal(found.tensor(f"{UP}.weight"), expected.float())
    assert torch.equal(found.rows(f"{UP}.weight", 3, 9), expected.float()[3:9])
    assert torch.equal(found.tensor(f"{GATE}.weight"), model.tensor(f"{GATE}.weight"))


def spread(fields, bits):
    """Fields of a row, none of which goes on in the next word, as versions before 0.18 packed them."""
    per_word = 32 // bits
    rows = torch.nn.functional.pad(fields.long(), (0, -fields.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (rows << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_odd_widths_of_old_versions(bits, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=bits, group=32, symmetric=False))
    write(model, tmp_path)
    q = model.matrix(UP).quantized
    codes, params, fmt = q.codes, q.params, q.format
    zero = (params["zero"].int() - fmt.lowest).to(torch.uint8)
    tensors = {
        f"{UP}.weight_packed": spread(codes, bits),
        f"{UP}.weight_zero_point": spread(zero.T, bits).T.contiguous(),
    }
    change_tensors(lambda t: t.update(tensors))(tmp_path)
    assert_same_model(CompressedTensors().open(tmp_path), model)


def test_zero_points_that_old_versions_wrote_for_symmetric_codes(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    write(model, tmp_path)
    change_tensors(lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(128, 2, dtype=torch.int8)}))(tmp_path)
    assert_same_model(CompressedTensors().open(tmp_path), model)


@pytest.mark.demo
def test_the_demo_model_loads_exactly(demo_checkpoint, tmp_path):
    model = quantize(demo_checkpoint, Int(bits=4, group=64, scales="minmax"))
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, demo_checkpoint)
    matrices = [(layer.format, model.info(f"{name}.weight").shape) for name, layer in model.layers.items()]
    kept = [model.info(name).nbytes for name in model.names() if name.removesuffix(".weight") not in model.layers]
    predicted = sum(fmt.storage_bits(*shape) for fmt, shape in matrices) // 8 + sum(kept)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(predicted, rel=2e-3)
