"""Tiny random models of every type that transformers knows as a causal language model.

Nothing is known about a type but its configuration class: fields with usual names get small values, and a few types
that want something particular are listed. `python -m benchmarks.architectures ROWS [TYPE ...]` tries types whose rows
are not in the file ROWS yet, and writes docs/architectures.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qtool.api import quantize
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, modules
from qtool.errors import QtoolError, one_line
from qtool.models import open_model

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_head": 4, "n_heads": 4, "num_heads": 4}
WIDTHS = {"hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64, "word_embed_proj_dim": 64}
FEED_FORWARD = {"intermediate_size": 96, "n_inner": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "d_ff": 96, "d_inner": 96}
LAYERS = {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4}
LENGTHS = {"max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256}
DECODER = {
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "is_decoder": True,
}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
}
RECURRENT = {
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size", "mamba_d_head"), 16
    ),
    **dict.fromkeys(("mamba_head_dim", "ssm_state_size", "chunk_size", "mamba_chunk_size", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_heads", "num_mamba_heads", "mamba_num_heads", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 64,
}
OTHERS = {
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = (
    HEADS | WIDTHS | FEED_FORWARD | LAYERS | LENGTHS | DECODER | EXPERTS | LATENT | RECURRENT | OTHERS
)
LATENT_KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3", "youtu", "axk1", "axk2")
PARTICULAR: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    **{kind: {"num_key_value_heads": 4} for kind in LATENT_KINDS},
}
"""What some types want."""


def tiny_config(kind: str, config_class: Any = None) -> Any:
    """A configuration of a model of some ten thousand weights.

    Args:
        kind: `model_type`.
        config_class: of it; None: transformers'.
    """
    config_class = config_class or CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    known -= set(getattr(config_class, "attribute_map", None) or {})
    fields = {name: value for name, value in SMALL.items() if name in known}
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if name in ("text_config", "decoder") and hasattr(part, "model_type"):
            fields[name] = tiny_config(part.model_type, part)
    return config_class(**fields | PARTICULAR.get(kind, {}))


def save_tiny(kind: str, folder: Path) -> Any:
    """Saves a random model of a type in float32, with matrices that matter, and norms and biases as if trained.

    Returns:
        The model.
    """
    config = tiny_config(kind)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
                elif "A_log" not in name and "dt" not in name:  # states that forget too fast, or never
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


SECONDS = 120
"""For one type."""
ALIKE = 1e-4
"""Nats per token: less says that transformers, which decodes our file, and our evaluation of it run one model."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a type.

    Attributes:
        kind: `model_type`.
        passed: whether all of it went well.
        why: what did not, or what the model is made of.
        divergence: KL divergence between transformers and qtool, nats per token, the larger one of two files.
    """

    kind: str
    passed: bool
    why: str
    divergence: float | None = None


def logits_of(model: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by our own evaluation, block by block: float32 [S, T, V]."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return torch.stack([walker.logits(hidden, s) for s in range(len(tokens))])


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of logits, nats per token."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def recipe(text: Path) -> dict[str, Any]:
    """4-bit weights in groups of 8 columns: the first block rounded to nearest, the others by GPTQ."""
    weights = {"weights": "int4-g8", "fallback": "int4-channel"}
    layers = [
        {"match": "lm_head", "keep": True},
        {"match": r"re:.*\.0\..*", **weights, "method": "rtn"},
        {"match": "*", **weights, "method": "gptq"},
    ]
    calibration = {"data": str(text), "samples": 2, "length": 32}
    return {
        "recipe": 1,
        "name": "study",
        "calibration": calibration,
        "layers": layers,
        "export": [{"to": "compressed-tensors"}],
    }


def attempt(kind: str, tokenizer: Any, folder: Path) -> Row:
    """Saves a tiny model, compares logits, quantizes it, and compares logits with what transformers reads."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(400)))
    source = folder / "model"
    model = save_tiny(kind, source)
    tokenizer.save_pretrained(source)
    tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    checkpoint = open_model(str(source))
    if (worst := divergence(wanted, logits_of(checkpoint, tokens))) > ALIKE:
        return Row(kind, False, "block by block it computes something else", worst)
    out = folder / "quantized"
    quantize(str(source), recipe(text), out, dtype="fp32")
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = type(model).from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found = loaded(input_ids=tokens, use_cache=False).logits
    worst = max(worst, abs(divergence(logits_of(open_model(str(out)), tokens), found)))
    linears = [module for module in modules(checkpoint) if module.kind == "linear" and module.block is not None]
    experts = f", {checkpoint.family.experts(checkpoint.config)} experts" if checkpoint.family.mixture else ""
    about = f"{len(linears)} matrices in {checkpoint.family.blocks(checkpoint.config)} blocks{experts}"
    return Row(kind, worst < ALIKE, about if worst < ALIKE else "transformers reads something else", worst)


def tried(kind: str, tokenizer: Any) -> Row:
    """The row of one type, which may not take longer than `SECONDS`."""
    signal.alarm(SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return attempt(kind, tokenizer, Path(folder))
        except QtoolError as error:
            return Row(kind, False, one_line(error).replace(f"{folder}/model", "it"))
        except Exception as error:  # noqa: BLE001 (whatever transformers raises)
            return Row(kind, False, f"{type(error).__name__}: {one_line(error)}".replace(f"{folder}/model", "it"))
        finally:
            signal.alarm(0)


def rows(store: Path) -> dict[str, Row]:
    """Rows that were found before, from lines of JSON."""
    lines = store.read_text().splitlines() if store.exists() else []
    return {row["kind"]: Row(**row) for row in map(json.loads, lines)}


def study(store: Path, kinds: list[str]) -> None:
    """Tries types whose rows are not known yet."""
    from tests.conftest import make_tokenizer

    tokenizer, known = make_tokenizer(), rows(store)
    for kind in [kind for kind in kinds if kind not in known]:
        with store.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(tried(kind, tokenizer))) + "\n")


INTRODUCTION = """# Model types

A model type without a family file goes through by derivation: transformers' class is built without memory for weights,
one forward pass is watched, and that tells which blocks there are, which layers read the same input, in which order
they run, and what checkpoints call their tensors. Below is what became of a tiny random model of each type tried:
its logits block by block against transformers', then 4-bit weights (the first block rounded to nearest, the others by
GPTQ) in compressed-tensors, read by transformers, whose logits have to be those of our own evaluation (KL divergence
below {alike:g} nats per token). A `no` may be the tiny configuration's fault. Types that are not listed were not tried.

{passed} of {count} types go through (transformers {release}).

| type | goes through | what it is made of, or why not |
| --- | --- | --- |
"""


def page(known: dict[str, Row]) -> str:
    """The rows as a page of the documentation."""
    from transformers import __version__

    passed = sum(row.passed for row in known.values())
    text = INTRODUCTION.format(alike=ALIKE, passed=passed, count=len(known), release=__version__)
    for kind, row in sorted(known.items()):
        why = row.why.replace("|", "/").replace("<", "").replace(">", "").partition("; --model-free")[0]
        text += f"| `{kind}` | {'yes' if row.passed else 'no'} | {why:.160} |\n"
    return text


def late(*_: object) -> None:
    """A type took too long."""
    raise TimeoutError(f"more than {SECONDS} seconds")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, late)
    study(Path(sys.argv[1]), sys.argv[2:] or KINDS)
    Path("docs/architectures.md").write_text(page(rows(Path(sys.argv[1]))), encoding="utf-8")
