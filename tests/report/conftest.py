"""A report as a calibrated run on a model of 30 blocks leaves it, with made-up but plausible numbers."""

import math
import random

import pytest

from qtool.evaluate.result import Evaluation
from qtool.report.model import ArtifactEntry, FileEntry, LayerEntry, Report, StageEntry

SHAPES = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip
BASE_DB = {"q": 21.0, "k": 22.5, "v": 15.5, "o": 17.0, "gate": 16.5, "up": 15.0, "down": 18.0}
BLOCKS = 30
PATHS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def make_layer(role, block, rng):
    wide = role == "down" and block in (0, 1, 28, 29)
    bits = 8.25 if wide else 4.25
    n, k = SHAPES[role]
    db = BASE_DB[role] + 3 * math.cos(block / 5) - 0.1 * block + rng.gauss(0, 0.8) + 24 * wide
    return LayerEntry(
        name=f"model.layers.{block}.{PATHS[role]}",
        role=role,
        block=block,
        shape=(n, k),
        format="int8-g64" if wide else "int4-g64",
        method="gptq",
        activations=None,
        bits_per_weight=bits,
        nbytes=int(n * k * bits / 8),
        weight_error_db=19 + rng.gauss(0, 0.3) + 24 * wide,
        output_error_db=db,
        tokens=16384,
        fallback="rtn instead of gptq: the Hessian stayed singular at damping 1" if (role, block) == ("o", 7) else None,
        seconds=0.1 + rng.random() * 0.2,
    )


@pytest.fixture
def report():
    rng = random.Random(0)
    layers = [
        LayerEntry(
            name="model.embed_tokens", role="embedding", block=None, shape=(49152, 576), format=None, method=None,
            activations=None, bits_per_weight=16, nbytes=49152 * 576 * 2, weight_error_db=None, output_error_db=None,
            tokens=0, fallback=None, seconds=0.0,
        )
    ]  # fmt: skip
    layers += [make_layer(role, block, rng) for block in range(BLOCKS) for role in SHAPES]
    evaluation = Evaluation(
        text="evaluation.txt", tokens=32640, context=512, chunks=128, runtime="qtool", ppl=21.374, ppl_error=0.412,
        base_ppl=20.911, kld_mean=0.04127, kld_error=0.00051, kld_median=0.02313, kld_p90=0.0911, kld_p95=0.1402,
        kld_p99=0.3614, kld_p999=1.271, kld_max=3.942, top1=0.9031, dp_mean=-0.0021, rms_dp=0.0523,
    )  # fmt: skip
    stages = [
        ("plan", 0.41, 0.38e9), ("calibrate and quantize", 61.3, 0.91e9), ("write compressed-tensors", 1.9, 0.91e9),
        ("verify compressed-tensors", 1.2, 0.91e9), ("evaluate", 98.4, 1.12e9),
    ]  # fmt: skip
    files = [("model.safetensors", 113_642_480), ("config.json", 1402), ("tokenizer.json", 3_522_871)]
    return Report(
        qtool="0.1.0",
        recipe_name="w4a16-gptq",
        recipe={
            "recipe": 1,
            "name": "w4a16-gptq",
            "calibration": {"data": "builtin", "samples": 32, "length": 512, "seed": 0},
            "layers": [{"match": "*", "weights": "int4-g64", "method": {"gptq": {"damp": 0.01}}}],
            "export": [{"to": "compressed-tensors"}],
        },
        source="/models/SmolLM2-135M",
        source_fingerprint="9f2c" * 16,
        source_bytes=269_060_552,
        parameters=134_515_008,
        calibration={"data": "builtin", "samples": 32, "length": 512, "tokens": 16384},
        limited_blocks=None,
        layers=tuple(layers),
        artifacts=(
            ArtifactEntry(
                kind="compressed-tensors", path="out",
                files=tuple(FileEntry(name=n, nbytes=b, sha256=f"{i:x}" * 64) for i, (n, b) in enumerate(files, 10)),
                runtimes=("vLLM", "transformers"), verified=True,
            ),
        ),
        stages=tuple(StageEntry(name=n, seconds=t, peak_bytes=int(b)) for n, t, b in stages),
        evaluations=(evaluation, evaluation.model_copy(update={"runtime": "llama.cpp", "kld_mean": 0.0415})),
        warnings=("12 modules keep their bf16 weights: no rule names them",),
        environment={"python": "3.11.9", "torch": "2.13.0", "cpu": "x86-64, 2 threads", "device": "cpu"},
        other_bytes=70_272,
    )  # fmt: skip
