"""Artifacts are run by programs that are not ours: right ones pass, and every mistake of a conversion is caught."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qtool.api import export, quantize
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._writer import ModelWriter
from qtool.checkpoint._base import Layer
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families.gemma2 import Gemma2
from qtool.checkpoint.hf import HFCheckpoint
from qtool.cli.app import app
from qtool.errors import CheckpointError, VerifyError
from qtool.evaluate import proof, readers
from qtool.evaluate.llamacpp import try_file
from qtool.evaluate.proof import apart, eight_bits, prove
from qtool.evaluate.readers import ForeignReader
from qtool.evaluate.twin import _proven, prove_twin
from qtool.formats.int import Int
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.q3_k import Q3_K
from qtool.formats.q8_0 import Q8_0
from qtool.pipeline.check import check
from qtool.pipeline.prepare import prepare
from tests.artifact.conftest import quantize as in_memory
from tests.artifact.test_gguf import TOKENS, changed, neutral, reference_logits
from tests.conftest import MIXTURES, TINY

pytestmark = pytest.mark.proven


def written(folder, out, fmt=None):
    """A GGUF file with the blocks' matrices in a format, or all in F32; opened, and what it was written from."""
    out.mkdir()
    model = neutral(folder, out.parent / f"{out.name}-work", lambda m: fmt if m.block is not None else None)
    GGUF().write(model, out, {})
    return GGUF().open(out), model


def test_every_family_runs_in_llama_cpp_as_in_our_own_evaluation(tiny_folder, tmp_path):
    found = prove(GGUF(), *written(tiny_folder, tmp_path / "out", Q8_0()))
    assert found.reader.startswith("llama.cpp 20") and found.tokens >= 24
    assert 1e-3 < found.distance < found.limit < 0.07 and 0 < found.largest < 2
    exact = prove(GGUF(), *written(tiny_folder, tmp_path / "exact"))
    assert exact.distance < (1e-3 if "gemma" in tiny_folder.name else 1e-5)


def scaled(ending, factor):
    """Tensors whose names end so are written as multiples of themselves."""
    kept = ModelWriter._rows

    def rows(self, name):
        yield from (part * (factor if name.endswith(ending) else 1) for part in kept(self, name))

    return ModelWriter, "_rows", rows


def without(key):
    kept = Gemma2.gguf_metadata
    return Gemma2, "gguf_metadata", lambda self, config: {k: v for k, v in kept(self, config).items() if k != key}


MISTAKES = {
    "permutation": ("llama", lambda: (Family, "gguf_rows", lambda *_: None)),
    "norm offset": ("gemma2", lambda: (Family, "gguf_offset", lambda *_: 0.0)),
    "bias": ("llama-biased", lambda: scaled("q_proj.bias", 0)),
    "one bias of many": ("qwen2", lambda: scaled("0.self_attn.v_proj.bias", 0)),
    "rope factors": ("llama-rope3", lambda: (Family, "gguf_extra_tensors", lambda *_: {})),
    "softcap": ("gemma2", lambda: without("gemma2.attn_logit_softcapping")),
    "a matrix": ("qwen3", lambda: scaled("1.mlp.down_proj.weight", 1.3)),
}


@pytest.mark.parametrize("fmt", [None, Q8_0()], ids=["f32", "q8_0"])
@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_of_a_conversion_are_caught(mistake, fmt, tiny_checkpoint, tmp_path, monkeypatch):
    name, change = MISTAKES[mistake]
    with monkeypatch.context() as patch:
        patch.setattr(*change())
        found = written(tiny_checkpoint(name), tmp_path / "out", fmt)
        with pytest.raises(
            VerifyError, match=r"llama\.cpp 20.* computes something else .*wanted a relative difference"
        ):
            if fmt is not None:
                _proven.cache_clear()
                prove_twin(GGUF(), found[1])
            prove(GGUF(), *found)


def test_folders_run_in_transformers(tiny_checkpoint, tmp_path, monkeypatch):
    model = in_memory(tiny_checkpoint("qwen2"), Int(bits=4, group=32))
    CompressedTensors().write(model, tmp_path, {})
    opened = CompressedTensors().open(tmp_path)
    found = prove(CompressedTensors(), opened, model)
    assert found.reader.startswith("transformers 5") and found.tokens == 24 and found.distance < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.3}))
    with pytest.raises(VerifyError, match=r"transformers 5.* computes something else"):
        prove(CompressedTensors(), opened, model)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    found = prove(CompressedTensors(), opened, model)  # vLLM may load what transformers does not
    assert found.tokens == 0 and found.why_not.startswith("transformers cannot run")
    monkeypatch.setattr(CompressedTensors, "runtimes", ("transformers",))
    with pytest.raises(CheckpointError, match=r"^transformers cannot run"):
        prove(CompressedTensors(), opened, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_integers_with_zero_points_may_be_decoded_in_the_type_of_scales(dtype, tiny_checkpoint, tmp_path):
    """As transformers does where it decodes while it loads: that leads farther than float32, and no farther than so."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("llama-tied"), source)
    tensors = load_file(source / "model.safetensors")
    save_file({k: t.to(getattr(torch, dtype)) for k, t in tensors.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    scales = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    model = in_memory(source, Int(bits=4, group=32, symmetric=False, scale_dtype=scales))
    (tmp_path / "out").mkdir()
    CompressedTensors().write(model, tmp_path / "out", {})
    opened = CompressedTensors().open(tmp_path / "out")
    found = prove(CompressedTensors(), opened, model)
    assert found.distance < 1e-3
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("down_proj.weight_scale")]:
        tensors[name] *= 1.02
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerifyError, match="computes something else"):
        prove(CompressedTensors(), CompressedTensors().open(tmp_path / "out"), model)


def test_a_quantized_output_layer_is_decoded_in_the_type_of_scales_as_well(tiny_checkpoint):
    fmt = Int(bits=4, group=32, symmetric=False, scale_dtype="fp32")
    model = in_memory(tiny_checkpoint("llama"), fmt, head=fmt)
    exact = model.tensor("lm_head.weight").float()
    _, table = proof.Decoding(model, torch.float32, torch.bfloat16).output_layer()
    assert torch.equal(table, exact.bfloat16().float())
    assert not torch.equal(table, exact)


def flipped(tensors):
    """Rows of the queries in another order, codes and scales alike."""
    for part in ("weight_packed", "weight_scale"):
        name = f"model.layers.0.self_attn.q_proj.{part}"
        tensors[name] = tensors[name].flip(0).contiguous()


FOLDER_MISTAKES = {
    "permutation": flipped,
    "norm offset": lambda tensors: tensors["model.layers.0.input_layernorm.weight"].add_(1.0),
    "bias": lambda tensors: tensors["model.layers.0.self_attn.q_proj.bias"].zero_(),
    "one bias of many": lambda tensors: tensors["model.layers.0.self_attn.v_proj.bias"].zero_(),
    "a scale": lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].mul_(1.3),
    "rope factors": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "rope base": {"rope_type": "default", "rope_theta": 100.0},
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A compressed-tensors folder of a tiny Qwen2, and what it was written from."""
    out = tmp_path_factory.mktemp("folder")
    model = in_memory(tiny_checkpoint("qwen2"), Int(bits=4, group=32))
    CompressedTensors().write(model, out, {})
    return out, model


def test_packed_layers_are_decoded_one_by_one(folder, monkeypatch):
    out, model = folder
    held = []

    def load(made, place, dtype):
        loaded, remark = found(made, place, dtype)
        packed = [m for m in loaded.modules() if hasattr(m, "quantization_scheme")]

        def count(*_):
            held.append(sum(m.weight.numel() > 0 for m in packed if hasattr(m, "weight")))

        for layer in loaded.model.layers:
            layer.register_forward_hook(count)
            layer.mlp.act_fn.register_forward_hook(count)  # behind one of the layer's matrices, in front of another
        assert len(packed) == len(model.layers)
        return loaded, remark

    found = readers.load_in_transformers
    monkeypatch.setattr(readers, "load_in_transformers", load)
    opened = CompressedTensors().open(out)
    assert prove(CompressedTensors(), opened, model).distance < 1e-5
    assert held and set(held) == {0}
    held.clear()
    monkeypatch.setattr(readers, "unpack_one_by_one", lambda loaded, _: None)
    prove(CompressedTensors(), opened, model)
    assert set(held) == {len(model.layers)}  # so that the count above says something


@pytest.mark.parametrize("mistake", sorted(FOLDER_MISTAKES))
def test_mistakes_of_a_folder_are_caught(mistake, folder, tmp_path):
    source, model = folder
    shutil.copytree(source, out := tmp_path / "out")
    opened, change = CompressedTensors().open(out), FOLDER_MISTAKES[mistake]
    if isinstance(change, dict):
        config = json.loads((out / "config.json").read_text())
        config.pop("rope_theta", None)
        (out / "config.json").write_text(json.dumps(config | {"rope_parameters": change}))
    else:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=r"transformers 5.* computes something else"):
        prove(CompressedTensors(), opened, model)


def test_a_model_that_does_not_fit_into_memory_is_not_run(tiny_checkpoint, tmp_path, monkeypatch):
    found, model = written(tiny_checkpoint("llama"), tmp_path / "out")
    exactly = 2 * sum(math.prod(model.info(name).shape) for name in model.names())
    monkeypatch.setattr(proof, "free_memory", lambda: exactly - 1)
    why = prove(GGUF(), found, model).why_not
    assert why == "that takes about 0.0 GB of memory, and 0.0 GB are free"
    monkeypatch.setattr(proof, "free_memory", lambda: exactly)
    assert prove(GGUF(), found, model).tokens == 24


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"needs": "no_such_package"}, "no_such_package is not installed"),
        ({"threshold": 1000}, "the model has more than 1e+03 weights"),
    ],
)
def test_what_is_not_run_says_why(change, why, tiny_checkpoint, tmp_path, monkeypatch):
    told = vars(readers.READERS["llama.cpp"]) | change
    monkeypatch.setitem(readers.READERS, "llama.cpp", ForeignReader(**told))
    found = prove(GGUF(), *written(tiny_checkpoint("llama"), tmp_path / "out"))
    assert (found.tokens, found.why_not) == (0, why)
    assert found.words == f"not run in llama.cpp: {why}"


def test_inputs_are_rounded_in_groups_as_large_as_the_blocks_of_a_weight():
    """ggml has 256 columns share a scale where a super-block does (Q8_K), else 32 (Q8_0)."""
    layers = (None, Layer(Q8_0()), Layer(Q3_K()), Layer(Int(bits=4, group=128)))
    assert [eight_bits(layer).activations.group for layer in layers] == [32, 32, 256, 32]


def test_differences_are_relative_and_of_the_median_token_where_experts_are_chosen():
    b = torch.tensor([[1.0, -1.0], [3.0, 1.0], [-2.0, 2.0]])
    a = b + torch.tensor([[0.1, -0.1], [0.0, 0.0], [4.0, 4.0]])
    assert apart(a, b, False) == pytest.approx((0.02 + 32) ** 0.5 / (2 + 2 + 8) ** 0.5)
    assert apart(a, b, True) == pytest.approx(0.1)
    with pytest.raises(VerifyError, match=r"relative difference of at most 0\.01, found 0\.1, and"):
        proof.compared(b + torch.tensor([0.1, -0.1]), b, b, "it", 0.01, True)
    assert proof.compared(b, b, a, "it", 0.01, True).limit == pytest.approx(0.31)


def test_activations_are_looked_up_as_ggml_looks_them_up(tiny_checkpoint, tmp_path):
    """Without its table, a file of Gemma 2 is as far away as one that lost the bias of a block's keys."""
    found, model = written(tiny_checkpoint("gemma2"), tmp_path / "out")
    ran = try_file(found.parts[0], TOKENS)
    exact, looked_up = (proof.in_type(model, TOKENS, torch.float32, tables=tables) for tables in (False, True))
    assert apart(ran, looked_up, False) < 2e-5 < 5e-5 < apart(ran, exact, False)


RECIPE = {
    "recipe": 1,
    "name": "test",
    "layers": [{"match": "re:.*_proj", "weights": "q8_0", "method": "rtn"}, {"match": "*", "keep": True}],
    "export": [{"to": "gguf"}],
}


def test_experts_that_are_kept_in_16_bits_are_computed_in_float32(tiny_checkpoint, tmp_path):
    """Transformers puts them together in the type of their file, in which a right folder is off by a thousandth."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("mixtral"), source)
    tensors = load_file(source / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, source / "model.safetensors")
    layers = [{"match": "*o_proj", "weights": "int8-channel", "method": "rtn"}, {"match": "*", "keep": True}]
    report = quantize(
        str(source), RECIPE | {"layers": layers, "export": [{"to": "compressed-tensors"}]}, tmp_path / "o"
    )
    assert report.artifacts[0].proof.tokens and report.artifacts[0].proof.distance < 1e-5


def test_rounding_to_16_bits_is_told_from_a_mistake(tiny_checkpoint, tmp_path, monkeypatch):
    """Where computing in bfloat16 leads farther than the limit, logits have to be those of our bfloat16."""
    model = in_memory(tiny_checkpoint("llama"), MXFP4())
    CompressedTensors().write(model, tmp_path, {})
    found = CompressedTensors().open(tmp_path)
    tokens = list(range(3, 27))
    exact, rounded = (proof.in_type(model, tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    distance = apart(rounded, exact, several=False)
    monkeypatch.setitem(proof.FLOORS, torch.bfloat16, distance / 2)
    reading = CompressedTensors().reading(found)
    assert reading.dtype == torch.bfloat16
    assert proof.judged(rounded, model, tokens, reading, "reader").distance == 0
    assert proof.judged(exact, model, tokens, reading, "reader").distance < 1e-6
    scaled_up = exact + 2 * (exact - rounded)
    with pytest.raises(VerifyError, match="computes something else"):
        proof.judged(scaled_up, model, tokens, reading, "reader")
    with pytest.raises(VerifyError, match="computes something else"):
        proof.judged(rounded, model, tokens, replace(reading, dtype=torch.float32), "reader")


def test_report_and_model_card_say_it(tiny_checkpoint, tmp_path):
    report = quantize(str(tiny_checkpoint("llama")), RECIPE, tmp_path / "out")
    words = report.artifacts[0].proof.words
    assert words.startswith("runs in llama.cpp 20") and "24 tokens, largest logit difference 0.0" in words
    assert f"Proven: it {words}." in (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    for page in ("report.md", "report.html"):
        assert "largest logit difference 0.0" in (tmp_path / "out" / page).read_text()
    assert export(tmp_path / "out", "qtool", tmp_path / "neutral").proof is None
    assert quantize(str(tiny_checkpoint("llama")), RECIPE, tmp_path / "b", verify=False).artifacts[0].proof is None


def test_a_run_whose_file_computes_something_else_leaves_no_result(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "gguf_extra_tensors", lambda *_: {})
    with pytest.raises(VerifyError, match="computes something else"):
        quantize(str(tiny_checkpoint("llama-rope3")), RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*TINY, *MIXTURES])
def test_twins_run_in_llama_cpp(name, tiny_checkpoint):
    _proven.cache_clear()
    found = prove_twin(GGUF(), HFCheckpoint(tiny_checkpoint(name)))
    assert found.tokens == (64 if name == "mixtral" else 240) and found.distance < (1.5e-3 if "gemma" in name else 1e-4)


def test_plan_check_converts_a_twin(tiny_checkpoint, tmp_path, monkeypatch):
    folder = tiny_checkpoint("llama-rope3")
    job = prepare(str(folder), RECIPE)
    assert check(job, tmp_path) == []
    _proven.cache_clear()
    monkeypatch.setattr(Family, "gguf_extra_tensors", lambda *_: {})
    assert "computes something else than was meant" in check(job, tmp_path)[0]


WINDOWS = {"mistral": {"sliding_window": 16}, "qwen2": {"use_sliding_window": True, "sliding_window": 16}}
WINDOWS["qwen2"] |= {"max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_llama_cpp_leaves_out_are_said(name, tiny_checkpoint, tmp_path):
    """A file is right up to the window, and not beyond it."""
    folder = changed(tiny_checkpoint(name), tmp_path / "model", WINDOWS[name])
    text = "llama.cpp lets attention see more than its window: results are the model's up to 16 tokens"
    report = quantize(str(folder), RECIPE, tmp_path / "out")
    assert f"gguf: {text}" in report.warnings
    assert f"- Note: {text}." in (tmp_path / "out" / "README.md").read_text()
    assert report.artifacts[0].proof.tokens == 16
    found, wanted = try_file(next((tmp_path / "out").glob("*.gguf")), TOKENS), reference_logits(folder)
    assert float((found - wanted)[:16].norm() / wanted[:16].norm()) < 0.03
    assert float((found - wanted)[16:].norm() / wanted[16:].norm()) > 0.05
    runner = CliRunner()
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    said = runner.invoke(app, ["plan", str(folder), "-r", str(tmp_path / "recipe.yaml"), "--strict"])
    assert said.exit_code != 0 and text in said.stderr.replace("\n", " ")
