"""Every layout of compressed-tensors in transformers: the divergence from the source is what our evaluation says.

Also with an older compressed-tensors in front of `PYTHONPATH`, where layouts that it does not decode are skipped.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtool.checkpoint.open import open_checkpoint
from qtool.evaluate.run import chunked, encode, evaluate
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from tests.artifact.conftest import save_llama, skip_if_cache_is_ignored

CONTEXT, CHUNKS = 64, 3
RECIPE = {"recipe": 1, "name": "divergence", "calibration": {"samples": 4, "length": 32}}
KEEP = {"match": "lm_head", "keep": True}
ASYMMETRIC = {"type": "int", "bits": 8, "group": "tensor", "symmetric": False}

LAYOUTS = {  # format of config.json, then weights, inputs, KV cache
    "int2": ("pack-quantized", "int2-g32", None, None),
    "int3": ("pack-quantized", "int3-g32", None, None),
    "int4": ("pack-quantized", "int4-g128", None, None),
    "int4-asym": ("pack-quantized", "int4-g32-asym", None, None),
    "int5-asym": ("pack-quantized", "int5-g64-asym", None, None),
    "int8": ("pack-quantized", "int8-channel", None, None),
    "w4a8": ("pack-quantized", "int4-g128", "int8-token", None),
    "w4afp8": ("pack-quantized", "int4-g128", "fp8-token", None),
    "mxint8": ("pack-quantized", "mxint8", None, None),
    "w8a8": ("int-quantized", "int8-channel", "int8-token", None),
    "w8a8-asym": ("int-quantized", "int8-channel", "int8-token-asym", None),
    "w8a8-static": ("int-quantized", "int8-channel", "int8-tensor", None),
    "w8a8-static-asym": ("int-quantized", "int8-tensor", ASYMMETRIC, None),
    "fp8": ("naive-quantized", "fp8-channel", None, None),
    "fp8-dynamic": ("float-quantized", "fp8-channel", "fp8-token", None),
    "fp8-static": ("float-quantized", "fp8-tensor", "fp8-tensor", None),
    "fp8-block": ("float-quantized", "fp8-block", "fp8-g128", None),
    "mxfp8": ("mxfp8-quantized", "mxfp8", None, None),
    "mxfp8-inputs": ("mxfp8-quantized", "mxfp8", "mxfp8", None),
    "mxfp6": ("mxfp6-pack-quantized", "mxfp6", None, None),
    "mxfp6-inputs": ("mxfp6-pack-quantized", "mxfp6", "mxfp8", None),
    "mxfp4": ("mxfp4-pack-quantized", "mxfp4", None, None),
    "mxfp4-inputs": ("mxfp4-pack-quantized", "mxfp4", "mxfp4", None),
    "nvfp4": ("nvfp4-pack-quantized", "nvfp4", None, None),
    "nvfp4-inputs": ("nvfp4-pack-quantized", "nvfp4", "nvfp4", None),
    "cache": ("naive-quantized", "fp8-channel", None, "fp8-tensor"),
    "cache-heads": ("pack-quantized", "int4-g128", None, "fp8-head"),
    "mixed": ("mixed-precision", "int4-g128", "fp8-token", None),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that decoded weights are not rounded, but of numbers that bfloat16 holds."""
    folder = save_llama(tmp_path_factory.mktemp("source"), 128, torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(pydoc_data.topics.topics["assert"][:2000], encoding="utf-8")
    return path


def written(name: str, source: Path, out: Path) -> Path:
    """The artifact that a whole run leaves."""
    _, weights, inputs, cache = LAYOUTS[name]
    both = {} if inputs is None else {"activations": inputs}
    fp8 = [{"match": "role:q,k,v,o", "weights": "fp8-channel", **both}] if name == "mixed" else []
    rules = [KEEP, *fp8, {"match": "*", "weights": weights, **both}]
    told = {"layers": rules, "kv_cache": cache, "export": [{"to": "compressed-tensors"}]}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({key: value for key, value in (RECIPE | told).items() if value}))
    run(QuantizeOptions(str(source), str(recipe), out, device="cpu", dtype="fp32"))
    return out


def loaded(folder: Path, tokens: Tensor) -> PreTrainedModel:
    """What transformers makes of it, in float32: small floats are decoded to bfloat16, which holds these exactly."""
    small = "mxfp" in (told := (folder / "config.json").read_text()) or "nvfp4" in told
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if small else torch.float32).eval()
    with torch.no_grad():
        model(tokens[:1])  # decodes
    return torch.nn.Module.float(model)


def divergence(found: PreTrainedModel, source: PreTrainedModel, tokens: Tensor) -> float:
    """Mean over the second halves of all chunks."""
    with torch.no_grad():
        p, q = (m(tokens).logits[:, CONTEXT // 2 : -1].double().log_softmax(-1) for m in (source, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", LAYOUTS)
def test_divergence(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    if LAYOUTS[name][3] is not None:
        skip_if_cache_is_ignored()
    out = written(name, source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == LAYOUTS[name][0]
    import compressed_tensors

    if Version(compressed_tensors.__version__) < Version(config["version"]):
        pytest.skip(f"needs compressed-tensors {config['version']}")
    baseline = open_checkpoint(str(source))
    tokens = chunked(*encode(text, baseline), CONTEXT, CHUNKS)
    model = loaded(out, tokens)
    wanted = divergence(model, loaded(source, tokens), tokens)
    settings = {"context": CONTEXT, "chunks": CHUNKS, "device": torch.device("cpu"), "dtype": torch.float32}
    ours = evaluate(open_artifact(out), baseline, text, **settings, progress=lambda *_: None).kld_mean
    assert ours == pytest.approx(wanted, rel=1e-4 if LAYOUTS[name][2] is None else 1e-3)  # inputs may lie on a tie
    generated = model.generate(tokens[:1, :40], min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 44)
