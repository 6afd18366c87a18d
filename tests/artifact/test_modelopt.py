"""ModelOpt checkpoints against loops over their layouts, literal bytes, other tools' habits, and damage."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.modelopt import ModelOpt
from qtool.artifact.modelopt._algos import ALGOS
from qtool.checkpoint._base import Cache, Layer, Static
from qtool.errors import CheckpointError, PlanError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.formats.nvfp4 import NVFP4
from qtool.recipe.cache import KVCache, parse_cache
from tests.artifact.conftest import assert_same_model, quantize
from tests.reference import packed

UP, DOWN, K = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"
SCHEMES = {
    "W4A16_AWQ": (Int(bits=4, group=32), None),
    "W8A16": (Int(bits=8, group="channel"), None),
    "FP8_PER_CHANNEL_PER_TOKEN": (parse_format("fp8-channel"), parse_format("fp8-token")),
    "MXFP8": (parse_format("mxfp8"), parse_format("mxfp8")),
    "W4A16_NVFP4": (parse_format("nvfp4"), None),
    "FP8": (parse_format("fp8-tensor"), parse_format("fp8-tensor")),
    "NVFP4": (parse_format("nvfp4"), parse_format("nvfp4")),
}


def share(model):
    """Gives merged matrices one scale, and inputs theirs, as the pipeline does."""
    for i, (name, layer) in enumerate(list(model.layers.items())):
        q = model.matrices[name]
        if q.format.needs_largest:
            fmt = q.format.with_largest(2.0)
            w = model.origin.tensor(f"{name}.weight").float()
            params = fmt.fit(w)
            model.matrices[name] = Quantized(fmt.snap(w, params), params, q.format)
        if layer.activations and layer.activations.static:
            model.layers[name] = replace(layer, static=Static((i + 1) / 64))
    return model


def write(model, folder):
    folder.mkdir(exist_ok=True)
    return ModelOpt().write(share(model), folder, {})


def stored(folder, module):
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{module}.")}


def exact(found, model):
    assert found.names() == model.names()
    assert found.config == model.config
    for name in model.names():
        assert torch.equal(found.tensor(name).float(), model.tensor(name).float()), name
        assert torch.equal(found.rows(name, 3, 18).float(), model.tensor(name)[3:18].float()), name
    for module, layer in model.layers.items():
        assert found.layers[module].format.label == layer.format.label
        inputs = found.layers[module].activations
        assert (inputs and inputs.label) == (layer.activations and layer.activations.label)
        assert found.layers[module].static == layer.static
    assert found.cache == model.cache


@pytest.mark.parametrize("algo", SCHEMES)
def test_comes_back(algo, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), *SCHEMES[algo])
    files = write(model, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert ModelOpt.recognizes(tmp_path)
    found = ModelOpt().open(tmp_path)
    exact(found, model)
    assert found.decoded == {}
    config = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert config["producer"]["name"] == "modelopt"
    assert config["quantization"]["quant_algo"] == algo
    assert config["quantization"]["exclude_modules"] == ["lm_head", "model.embed_tokens"]
    flat = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert flat["quant_algo"] == algo and flat["ignore"] == ["lm_head", "model.embed_tokens"]
    assert (
        flat["config_groups"] == {"group_0": GROUPS[algo] | {"targets": ["Linear"]}} and "kv_cache_scheme" not in flat
    )


E8, E4 = ({"dynamic": False, "num_bits": bits, "type": "float"} for bits in (8, 4))
I8, I4 = ({"dynamic": False, "num_bits": bits, "type": "int"} for bits in (8, 4))
GROUPS = {  # as ModelOpt 0.47 writes them
    "FP8": {"input_activations": E8, "weights": E8},
    "FP8_PER_CHANNEL_PER_TOKEN": {"input_activations": E8, "weights": E8 | {"strategy": "channel"}},
    "MXFP8": {"input_activations": E8 | {"group_size": 32}, "weights": E8 | {"group_size": 32}},
    "NVFP4": {"input_activations": E4 | {"group_size": 16}, "weights": E4 | {"group_size": 16}},
    "W4A16_NVFP4": {"weights": E4 | {"group_size": 16}},
    "W4A16_AWQ": {"weights": I4 | {"group_size": 32}},
    "W8A16": {"weights": I8},
}


def test_nibbles_in_pairs_of_outputs(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    write(model, tmp_path)
    for module, factors in ((UP, None), (DOWN, 128)):
        tensors = stored(tmp_path, module)
        expected = packed.modelopt_int4(tensors["weight"], tensors["weight_scale"], 32)
        assert torch.equal(expected.float(), model.tensor(f"{module}.weight"))
        assert ("pre_quant_scale" in tensors) == (factors is not None)  # merged matrices have theirs in the norm
    assert stored(tmp_path, DOWN)["pre_quant_scale"].tolist() == [1.0] * 128
    codes = torch.tensor([[0], [15], [8], [7]], dtype=torch.uint8)
    found = ALGOS["W4A16_AWQ"].encode(Quantized(codes, {"scale": torch.ones(4, 1)}, Int(bits=4, group=1)))
    assert found["weight"].tolist() == [[0x78], [0xF0]]  # -8 and 7, 0 and -1


def test_floats_are_what_torch_and_tables_say(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), *SCHEMES["FP8_PER_CHANNEL_PER_TOKEN"])
    write(model, tmp_path)
    tensors = stored(tmp_path, UP)
    expected = tensors["weight"].float() * tensors["weight_scale"][:, None]
    assert torch.equal(expected, model.tensor(f"{UP}.weight"))
    assert tensors["weight_scale"].dtype == torch.float32

    model = quantize(tiny_checkpoint("llama"), *SCHEMES["MXFP8"])
    write(model, tmp_path / "mx")
    tensors = stored(tmp_path / "mx", UP)
    power = torch.exp2(tensors["weight_scale"].float() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(tensors["weight"].float() * power, model.tensor(f"{UP}.weight"))

    model = quantize(tiny_checkpoint("llama"), *SCHEMES["W4A16_NVFP4"])
    write(model, tmp_path / "nv")
    tensors = stored(tmp_path / "nv", UP)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    nibbles = torch.stack([tensors["weight"] & 15, tensors["weight"] >> 4], dim=-1).flatten(1)
    scale = tensors["weight_scale"].double().repeat_interleave(16, dim=1) * tensors["weight_scale_2"].double()
    assert torch.equal((table[nibbles.long()].double() * scale).float(), model.tensor(f"{UP}.weight"))


def test_mixtures(tiny_checkpoint, tmp_path):
    fp8 = parse_format("fp8-channel")
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32), down=Int(bits=8, group="channel"), o=None)
    model.layers["lm_head"] = Layer(fp8, parse_format("fp8-token"))
    w = model.origin.tensor("lm_head.weight").float()
    params = fp8.fit(w)
    model.matrices["lm_head"] = Quantized(fp8.snap(w, params), params, fp8)
    write(model, tmp_path)
    how = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert how["quant_algo"] == "MIXED_PRECISION"
    assert how["quantized_layers"][UP] == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 32,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    assert how["quantized_layers"][DOWN] == {"quant_algo": "W8A16"}
    assert how["exclude_modules"] == [*(f"model.layers.{i}.self_attn.o_proj" for i in range(2)), "model.embed_tokens"]
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert sorted(name for group in groups for name in group["targets"]) == sorted(how["quantized_layers"])
    assert [group["weights"] for group in groups if UP in group["targets"]] == [GROUPS["W4A16_AWQ"]["weights"]]
    exact(ModelOpt().open(tmp_path), model)


def test_every_family_comes_back(tiny_folder, tmp_path):
    model = quantize(tiny_folder, Int(bits=4, group=32, scale_dtype="fp16"))
    model.config["dtype"] = "float16"
    write(model, tmp_path)
    assert_same_model(ModelOpt().open(tmp_path), model)


REFUSED = {
    "zero points": ({"fmt": Int(bits=4, group=32, symmetric=False)}, "ModelOpt holds .*, not int4-g32-asym"),
    "width": ({"fmt": Int(bits=3, group=32)}, "not int3-g32"),
    "inputs": ({"fmt": parse_format("fp8-channel")}, "not fp8-channel:"),
    "other inputs": (
        {"fmt": Int(bits=8, group="channel"), "activations": parse_format("int8-token")},
        "not int8-channel with int8-token inputs",
    ),
    "embedding": ({"fmt": None, "embedding": Int(bits=4, group=32)}, "token embedding stays unquantized"),
}


@pytest.mark.parametrize(("what", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_hold_is_refused(what, message, tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match=message):
        write(quantize(tiny_checkpoint("llama"), **what), tmp_path)


def test_scales_of_whole_matrices_must_be_exact_and_shared(tiny_checkpoint, tmp_path):
    with pytest.raises(PlanError, match="runtimes merge it with matrices that have another scale of the whole matrix"):
        ModelOpt().write(quantize(tiny_checkpoint("llama"), NVFP4()), tmp_path, {})
    model = share(quantize(tiny_checkpoint("llama"), NVFP4()))
    for q in model.matrices.values():
        q.params["tensor"] = q.params["tensor"] / 3
    with pytest.raises(PlanError, match="the scale of the whole matrix is the inverse of a number that fp32 holds"):
        ModelOpt().write(model, tmp_path, {})


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "hf_quant_config.json").read_text())
    config["quantization"] |= changes
    (folder / "hf_quant_config.json").write_text(json.dumps(config))


def test_calibrated_scales_of_nvfp4_inputs_are_not_lost_in_an_export(tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), *SCHEMES["NVFP4"]), tmp_path)
    assert stored(tmp_path, UP)["input_scale"].dtype == torch.float32
    edit(tmp_path, lambda t: t.update({n: torch.tensor(0.25) for n in t if n.endswith("input_scale")}))
    model = ModelOpt().open(tmp_path)
    (tmp_path / "ct").mkdir()
    CompressedTensors().write(model, tmp_path / "ct", {})
    assert stored(tmp_path / "ct", UP)["input_global_scale"].tolist() == [4.0]
    exact(CompressedTensors().open(tmp_path / "ct"), model)
    edit(tmp_path, lambda t: t.update({f"{UP}.input_scale": torch.tensor([0.3])}))
    with pytest.raises(PlanError, match=f"{UP}: the scale of the whole matrix is not the reciprocal of a float32"):
        CompressedTensors().write(ModelOpt().open(tmp_path), tmp_path / "ct", {})
    edit(tmp_path, lambda t: t.pop(f"{UP}.input_scale"))
    with pytest.raises(PlanError, match=f"inputs with one scale for all tokens need one, and nobody measured it: {UP}"):
        ModelOpt().check(ModelOpt().open(tmp_path))


def test_inputs_whose_scale_it_may_not_hold_are_refused(tiny_checkpoint, tmp_path):
    model = share(quantize(tiny_checkpoint("llama"), *SCHEMES["NVFP4"]))
    model.layers[UP] = replace(model.layers[UP], static=Static(1 / 3))
    with pytest.raises(PlanError, match=f"{UP}: the scale of its inputs is the inverse of a number that fp32 holds"):
        ModelOpt().write(model, tmp_path, {})
    minmax = quantize(tiny_checkpoint("llama"), NVFP4(), parse_format("nvfp4-minmax"))
    with pytest.raises(PlanError, match="not nvfp4 with nvfp4-minmax inputs"):
        ModelOpt().check(minmax)


def test_fp8_as_others_write_it(tiny_checkpoint, tmp_path):
    """One number has one dimension or none."""
    write(quantize(tiny_checkpoint("llama"), *SCHEMES["FP8"]), tmp_path)
    tensors = stored(tmp_path, UP)
    assert tensors["weight_scale"].shape == tensors["input_scale"].shape == ()
    change = {f"{UP}.weight_scale": torch.tensor([0.25]), f"{UP}.input_scale": torch.tensor([3.0])}
    edit(tmp_path, lambda t: t.update(change))
    found = ModelOpt().open(tmp_path)
    assert torch.equal(found.tensor(f"{UP}.weight"), tensors["weight"].float() * 0.25)
    assert found.layers[UP].static == Static(3.0)


def cached(folder):
    """A model whose first block's attention stays as it is, with FP8 in its KV cache."""
    model = quantize(folder, Int(bits=4, group=32))
    statics = {i: ((Static(0.5 + i),), (Static(0.25),)) for i in range(2)}
    fp8 = parse_format("fp8-tensor").model_copy(update={"scale_dtype": "fp32"})
    model.cache = Cache(KVCache(keys=fp8, values=fp8), statics)
    model.layers = {name: layer for name, layer in model.layers.items() if "0.self_attn" not in name}
    return model


def test_scales_of_the_cache(tiny_checkpoint, tmp_path):
    model = cached(tiny_checkpoint("llama"))
    write(model, tmp_path)
    how = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert how["kv_cache_quant_algo"] == "FP8"
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] == E8
    tensors = load_file(tmp_path / "model.safetensors")
    assert [float(tensors[f"model.layers.{i}.self_attn.k_proj.k_scale"]) for i in range(2)] == [0.5, 1.5]
    assert tensors["model.layers.0.self_attn.v_proj.v_scale"].dtype == torch.float32
    exact(ModelOpt().open(tmp_path), model)
    edit(tmp_path, lambda t: t.pop(f"{K}.k_scale"))
    assert ModelOpt().open(tmp_path).cache.statics[0] == ((Static(1.0),), (Static(0.25),))
    other = cached(tiny_checkpoint("llama"))
    for label in ("int8-token", "fp8-head"):
        other.cache = Cache(parse_cache(label), {})
        with pytest.raises(PlanError, match=f"its KV caches are fp8-tensor, not {label}: the model as a whole"):
            ModelOpt().check(other)


def test_factors_of_inputs_are_multiplied_into_the_weights(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    write(model, tmp_path)
    factors = torch.rand(128, generator=torch.Generator().manual_seed(0)).bfloat16() + 0.5
    edit(tmp_path, lambda t: t.update({f"{DOWN}.pre_quant_scale": factors}))
    found = ModelOpt().open(tmp_path)
    assert found.decoded == {DOWN: "its inputs are scaled first (pre_quant_scale)"}
    assert torch.equal(found.tensor(f"{DOWN}.weight"), model.tensor(f"{DOWN}.weight") * factors.float())
    assert torch.equal(found.tensor(f"{UP}.weight"), model.tensor(f"{UP}.weight"))


def test_either_configuration_is_enough(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    write(model, tmp_path)
    name = tmp_path / "hf_quant_config.json"
    kept = name.read_text()
    name.unlink()
    exact(ModelOpt().open(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not ModelOpt.recognizes(tmp_path)
    name.write_text(kept)
    exact(ModelOpt().open(tmp_path), model)


def nan_scale(tensors):
    """Tensors of FP8, with a scale of inputs that is none."""
    codes = {f"{UP}.weight": torch.zeros(128, 64, dtype=torch.float8_e4m3fn), f"{UP}.weight_scale": torch.tensor(1.0)}
    others = {n: torch.tensor(1.0) for n in tensors if n.endswith("weight_scale")}
    shapes = {n.removesuffix("_scale"): tensors[n.removesuffix("_scale")].shape for n in others}
    weights = {n: torch.zeros(2 * s[0], s[1], dtype=torch.float8_e4m3fn) for n, s in shapes.items()}
    return {**others, **weights, **codes, f"{UP}.input_scale": torch.tensor(torch.nan)}


DAMAGE = {
    "algorithm": (lambda f: edit_config(f, quant_algo="NVFP4_SVD"), "quant_algo: wanted W4A16_AWQ, .*'NVFP4_SVD'"),
    "none": (lambda f: edit_config(f, quant_algo=None), "quantization_config: quant_algo"),
    "group": (lambda f: edit_config(f, group_size=-1), "quantization_config: group_size"),
    "other group": (lambda f: edit_config(f, group_size=64), r"weight_scale: wanted bfloat16 \[64, 1\], found"),
    "odd group": (lambda f: edit_config(f, group_size=48), "rows of 64 columns are not divisible by 48"),
    "layers": (lambda f: edit_config(f, quantized_layers=[1]), "quantized_layers: wanted objects by module"),
    "cut": (
        lambda f: edit(f, lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-1].clone()})),
        r"up_proj.weight: wanted uint8 \[64, 64\], found uint8 \[63, 64\]",
    ),
    "input scale": (
        lambda f: (edit_config(f, quant_algo="FP8"), edit(f, lambda t: t.update(nan_scale(t)))),
        "input_scale: wanted a positive float32, found tensor",
    ),
    "cache": (lambda f: edit_config(f, kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo: .*found 'NVFP4'"),
    "factors": (
        lambda f: edit(f, lambda t: t.update({f"{DOWN}.pre_quant_scale": torch.ones(3)})),
        r"pre_quant_scale: wanted \[128\], found \[3\]",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        ModelOpt().open(tmp_path)


def test_integers_that_only_tensorrt_llm_loads_are_said(tiny_checkpoint):
    for name, scheme in SCHEMES.items():
        model = quantize(tiny_checkpoint("llama"), *scheme)
        text = f"vLLM does not load {scheme[0].label} from ModelOpt checkpoints; TensorRT-LLM does"
        assert ModelOpt().caveats(model, model.layers) == ([text] if name in ("W4A16_AWQ", "W8A16") else [])
