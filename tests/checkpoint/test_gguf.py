from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.pretokenizers import RULES
from qtool.errors import CheckpointError

Find = Callable[[str], Path]


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    spelled = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spelled["model"]["vocab"]
    added = {token["id"] for token in spelled["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens.append("HELLO")  # which no merges build
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), 512))])
    writer.add_token_types([3 if i in added else 1 for i in range(len(tokens))] + [5] * (512 - len(tokens)))
    writer.add_token_merges([" ".join(pair) for pair in spelled["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write_gguf(folder: Path, path: Path, kind: Kind, pre: str = "gpt-2") -> dict[str, torch.Tensor]:
    """Converts a tiny checkpoint, matrices in blocks of `kind`. Returns what a reader should find."""
    checkpoint = HFCheckpoint(folder)
    family, config = checkpoint.family, checkpoint.config
    writer = gguf.GGUFWriter(path, family.gguf_arch)
    writer.add_name("tiny")
    for key, value in family.gguf_metadata(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    write_tokenizer(writer, folder, pre)
    names, expected = family.gguf_names(config), {}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name).float().numpy()
        stored = kind if tensor.ndim == 2 else Kind.F32
        packed = gguf.quantize(tensor + np.float32(family.gguf_offset(name)), stored)
        expected[name] = torch.from_numpy(gguf.dequantize(packed, stored).reshape(tensor.shape))
        expected[name] -= family.gguf_offset(name)
        role = next((linear.role for linear in family.linears if f".{linear.path}." in name), "")
        order = family.gguf_rows(config, role)
        packed = packed if order is None else packed[order.numpy()]
        writer.add_tensor(names[name], np.ascontiguousarray(packed), raw_dtype=stored)
    for name, extra in family.gguf_extra_tensors(config).items():
        writer.add_tensor(name, extra.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def tiny_gguf(tiny_checkpoint: Find, tmp_path: Path) -> Path:
    write_gguf(tiny_checkpoint("llama"), tmp_path / "llama.gguf", Kind.Q8_0)
    return tmp_path / "llama.gguf"


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda k: k.name)
def test_every_stored_type(kind: Kind, tiny_checkpoint: Find, tmp_path: Path) -> None:
    expected = write_gguf(tiny_checkpoint("llama"), tmp_path / "x.gguf", kind)
    checkpoint = GGUFCheckpoint(tmp_path / "x.gguf")
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == checkpoint.info(name).dtype == (dtype if tensor.ndim == 2 else torch.float32)
        assert found.shape == checkpoint.info(name).shape
        assert torch.equal(found.float(), tensor)
        assert torch.equal(checkpoint.rows(name, 3, 9), found[3:9])
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")


def test_every_family_as_transformers_reads_it(tiny_folder: Path, tmp_path: Path) -> None:
    name = tiny_folder.name.rstrip("0123456789")
    state = write_gguf(tiny_folder, tmp_path / "x.gguf", Kind.Q8_0)
    checkpoint = GGUFCheckpoint(tmp_path / "x.gguf")
    original = HFCheckpoint(tiny_folder)
    assert checkpoint.names() == original.names()
    assert checkpoint.tied == original.tied
    config = AutoConfig.for_model(**checkpoint.config)
    wanted = AutoConfig.from_pretrained(tiny_folder)
    unsaid = {"dtype", "initializer_range", "transformers_version", "_name_or_path"}
    if name.startswith("mistral"):  # without a window it is a Llama
        unsaid |= {"sliding_window", "model_type", "architectures"}
    for field in set(wanted.to_dict()) - unsaid:
        assert getattr(config, field) == getattr(wanted, field), field
    if not name.startswith("smollm"):  # 3, whose files transformers does not read
        source = {"gguf_file": "x.gguf", "config": config, "dtype": torch.float32}
        state = AutoModelForCausalLM.from_pretrained(tmp_path, **source).state_dict()
    assert all(torch.equal(checkpoint.tensor(tensor), state[tensor]) for tensor in checkpoint.names())


def test_mistral_with_a_window(tiny_checkpoint: Find, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("mistral"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf(folder, tmp_path / "x.gguf", Kind.F16)
    found = GGUFCheckpoint(tmp_path / "x.gguf").config
    assert (found["model_type"], found["sliding_window"]) == ("mistral", 1024)


TEXTS = [
    "In 1999 and 2024, 123456 people said: don't\n\n   do that!  x_y = 3.14;\t\tÜber 漢字 🙂\r\n",
    "<|im_start|>user\nHELLO Hello hello<|im_end|>\n",
    " leading and trailing  ",
]


@pytest.mark.parametrize("pre", RULES)
def test_tokenizer(pre: str, tiny_checkpoint: Find, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    write_gguf(folder, tmp_path / "x.gguf", Kind.F16, pre)
    files = GGUFCheckpoint(tmp_path / "x.gguf").files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer.json"].parent)
    reference = AutoTokenizer.from_pretrained(folder)
    spelled = json.loads(reference.backend_tokenizer.to_str())
    spelled["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": RULES[pre][0]}
    spelled["model"]["ignore_merges"] = bool(RULES[pre][1])
    spelled["model"]["vocab"]["HELLO"] = len(spelled["model"]["vocab"])
    expected = type(reference.backend_tokenizer).from_str(json.dumps(spelled))
    begin = [1] if pre in ("llama-bpe", "tekken") else []
    for text in TEXTS:
        assert tokenizer(text).input_ids == begin + expected.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids[len(begin) :]) == text
    special = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(tokenizer, s) for s in special] == [getattr(reference, s) for s in special]
    message = [{"role": "user", "content": "hi"}]
    chat = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(message, **chat) == reference.apply_chat_template(message, **chat)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["a", " 1234", "'s", "\n\n ", " B", "..."]),
        ("smollm", ["a", " ", "1", "2", "3", "4", "'s", "\n\n ", " B", "..."]),
        ("llama-bpe", ["a", " ", "123", "4", "'s", "\n\n", " ", " B", "..."]),
        ("qwen2", ["a", " ", "1", "2", "3", "4", "'s", "\n\n", " ", " B", "..."]),
        ("tekken", ["a", " ", "1", "2", "3", "4", "'s", "\n\n", " ", " B", "..."]),
        ("gpt-4o", ["a", " ", "123", "4", "'s", "\n\n", " ", " B", "..."]),
    ],
)
def test_splitting(pre: str, words: list[str]) -> None:
    from tokenizers import Tokenizer

    spelled = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": RULES[pre][0]}, "model": {"type": "BPE"}}
    spelled["model"] |= {"vocab": {}, "merges": []}
    splitter = Tokenizer.from_str(json.dumps(spelled)).pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("a 1234's\n\n  B...")]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == words


def test_sentencepiece(tiny_checkpoint: Find, tmp_path: Path) -> None:
    """A Llama 2 style tokenizer trained here; GGUF keeps its merges only as scores, and gives the same tokens back."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    original.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=12
    )
    words = " ".join(list(pydoc_data.topics.topics.values())[:3]).split(" ")
    original.train_from_iterator([f" {word}" for word in words], trainer)
    spelled = json.loads(original.to_str())
    spelled["added_tokens"] = spelled["added_tokens"][:3]
    original = Tokenizer.from_str(json.dumps(spelled))
    tokens = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)

    write_gguf(tiny_checkpoint("llama"), tmp_path / "plain.gguf", Kind.F16)
    metadata = GGUFFile(tmp_path / "plain.gguf")
    metadata.metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    }
    from qtool.checkpoint.gguf_tokenizer import save_tokenizer

    (tmp_path / "t").mkdir()
    save_tokenizer(metadata, tmp_path / "t")
    found = AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in [*TEXTS, *list(pydoc_data.topics.topics.values())[20:25]]:
        assert found(text).input_ids == [1, *original.encode(text).ids]
        assert found.decode(found(text).input_ids[1:]) == original.decode(original.encode(text).ids)


BAD_TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"model": "rwkv"}, "unknown kind of tokenizer: wanted gpt2 or llama, found 'rwkv'"),
    "pre": ({"pre": "mystery"}, r"unknown pre-tokenizer: wanted .*smollm.*found 'mystery'"),
    "no-pre": ({"pre": None}, "unknown pre-tokenizer"),
    "tokens": ({"tokens": [1, 2]}, "damaged vocabulary"),
    "repeated": ({"tokens": ["a", "a"]}, "damaged vocabulary"),
    "types": ({"token_type": [1]}, "wanted 512 token types"),
    "no-merges": ({"merges": None}, "wanted merges"),
    "merge": ({"merges": ["a b c"]}, "wanted merges of tokens into tokens"),
    "ghost-merge": ({"merges": ["ghost token"]}, "wanted merges of tokens into tokens"),
    "bos": ({"bos_token_id": 512}, "impossible bos_token_id: wanted less than 512, found 512"),
    "score": ({"model": "llama", "scores": ["x"] * 512}, "wanted 512 scores"),
    "scores": ({"model": "llama", "scores": [0.0]}, "wanted 512 scores"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_tokenizer_that_cannot_be_rebuilt(case: str, tiny_gguf: Path, tmp_path: Path) -> None:
    from qtool.checkpoint.gguf_tokenizer import save_tokenizer

    changes, message = BAD_TOKENIZERS[case]
    file = GGUFFile(tiny_gguf)
    for key, value in changes.items():
        file.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        save_tokenizer(file, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_vanish_with_the_process(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], Any]] = []
    monkeypatch.setattr("atexit.register", lambda call, *args, **kw: at_exit.append(lambda: call(*args, **kw)))
    folder = GGUFCheckpoint(tiny_gguf).files["tokenizer.json"].parent
    assert folder.is_dir()
    for call in at_exit:
        call()
    assert not folder.exists()


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def start(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    extents = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + extents + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "magic": (b"GGML" + bytes(40), "is no GGUF file"),
    "old-version": (start(version=1), r"wrong GGUF version .*: wanted 2 or 3, little-endian, found 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found a big-endian file"),
    "tensor-count": (start(2**40), "impossible number of tensors or keys"),
    "key-count": (start(0, 2**63), "impossible number of tensors or keys"),
    "keys-missing": (start(0, 3), "claims more bytes than the file can hold"),
    "tensors-missing": (start(3), "claims more bytes than the file can hold"),
    "string-length": (start(0, 1) + struct.pack("<Q", 2**63) + b"abc", "impossible length of a string"),
    "string-behind-end": (start(0, 1) + struct.pack("<Q", 60000) + b"abc", "more bytes than the file can hold"),
    "string-utf8": (start(0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(8), "a string is not UTF-8"),
    "key-empty": (start(0, 1) + string("") + bytes(8), "empty, unprintable or repeated key"),
    "key-control": (start(0, 1) + string("a\x1b[2J") + bytes(8), "unprintable"),
    "key-twice": (start(0, 2) + 2 * (string("a") + struct.pack("<II", 4, 1)), "repeated key"),
    "value-type": (start(0, 1) + string("a") + struct.pack("<I", 13) + bytes(8), "unknown type of a value"),
    "array-length": (start(0, 1) + string("a") + struct.pack("<IIQ", 9, 4, 2**62), "impossible length of an array"),
    "array-behind-end": (start(0, 1) + string("a") + struct.pack("<IIQ", 9, 4, 99), "more bytes than the file"),
    "array-nested": (start(0, 1) + string("a") + struct.pack("<IIQ", 9, 9, 1), "unknown type of an array's values"),
    "alignment": (start(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0), "impossible alignment"),
    "name-long": (start(1) + tensor("t" * 65) + bytes(256), r"impossible length of a string .*wanted at most 64"),
    "name-twice": (start(2) + 2 * tensor() + bytes(512), "repeated tensor"),
    "no-dimensions": (start(1) + tensor(dims=()) + bytes(256), "impossible number of dimensions"),
    "five-dimensions": (start(1) + tensor(dims=(1,) * 5) + bytes(256), "impossible number of dimensions"),
    "zero-extent": (start(1) + tensor(dims=(32, 0)) + bytes(256), "tensor 't' has an impossible shape"),
    "overflow": (start(1) + tensor(dims=(2**63, 2**63)) + bytes(256), "is truncated: tensor 't'"),
    "unknown-type": (start(1) + tensor(kind=999) + bytes(256), "tensor 't' has an unknown ggml type"),
    "cut-block": (start(1) + tensor(dims=(48, 2), kind=8) + bytes(256), "tensor 't' has an impossible shape"),
    "vector-in-blocks": (start(1) + tensor(dims=(64,), kind=8) + bytes(256), "tensor 't' has an impossible shape"),
    "offset": (start(1) + tensor(offset=32) + bytes(256), "leaves a gap or overlaps: wanted offset 0, found 32"),
    "offset-huge": (start(1) + tensor(offset=2**63) + bytes(256), "leaves a gap or overlaps"),
    "overlap": (start(2) + tensor("a") + tensor("b", offset=64) + bytes(512), "tensor 'b' leaves a gap or overlaps"),
    "truncated": (start(1) + tensor() + bytes(100), "is truncated: tensor 't' ends behind it"),
    "no-decoder": (
        start(1) + tensor(dims=(256, 1), kind=15) + bytes(512),
        r"cannot decode tensor 't': found type Q8_K",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_anywhere(tiny_gguf: Path) -> None:
    content = tiny_gguf.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(content), len(content) // 40), len(content) - 200]:
        tiny_gguf.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GGUFCheckpoint(tiny_gguf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "unknown architecture: wanted one of .*llama, .*qwen3.*, found 'mamba'"),
        ({"general.architecture": None}, "unknown architecture"),
        ({"split.count": 3}, "is one of 3 parts: wanted NAME-00001-of-3.gguf"),
        ({"llama.expert_count": 8}, "impossible num_experts_per_tok: wanted a positive integer, found None"),
        ({"llama.block_count": None}, r"lacks llama.block_count: wanted a number, found None"),
        ({"qwen3.expert_count": 8, "general.architecture": "qwen3"}, "found 'qwen3' with experts"),
        ({"llama.block_count": 3}, "lacks 9 of the 30 tensors"),
        ({"llama.block_count": 1}, "holds a tensor that llama models do not have: blk.1"),
        ({"llama.block_count": 10**6}, "impossible num_hidden_layers"),
        ({"llama.attention.head_count": 0}, "impossible num_attention_heads"),
        ({"llama.attention.head_count_kv": [2, 4]}, "differs between blocks"),
        ({"llama.rope.dimension_count": 8}, "wrong rope.dimension_count for a llama model: wanted 16, found 8"),
        ({"llama.attention.key_length": 32}, "wrong rope.dimension_count for a llama model: wanted 32, found 16"),
        ({"llama.attention.value_length": 32}, "heads with parts of different length"),
        ({"llama.attention.key_length": "x"}, "heads with parts of different length"),
        ({"llama.rope.scaling.type": "longrope"}, "unknown rotary scaling"),
        ({"llama.rope.scaling.type": "linear"}, "impossible factor of the rotary embedding"),
        ({"llama.rope.freq_base": "x"}, "impossible rope_theta of the rotary embedding"),
        ({"llama.rope.dimension_count": "x"}, "wrong rope.dimension_count for a llama model: wanted 16, found 'x'"),
    ],
)
def test_metadata_that_does_not_fit(
    change: dict[str, Any], message: str, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(path: Path) -> GGUFFile:
        file = GGUFFile(path)
        file.metadata = {key: value for key, value in (file.metadata | change).items() if value is not None}
        return file

    monkeypatch.setattr("qtool.checkpoint.gguf_parts.GGUFFile", changed)
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(tiny_gguf)


def test_fingerprint_follows_content(tiny_gguf: Path) -> None:
    before = GGUFCheckpoint(tiny_gguf).fingerprint()
    assert GGUFCheckpoint(tiny_gguf).fingerprint() == before
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1
    tiny_gguf.write_bytes(content)
    assert GGUFCheckpoint(tiny_gguf).fingerprint() != before


def test_vanished(tiny_gguf: Path) -> None:
    checkpoint = GGUFCheckpoint(tiny_gguf)
    tiny_gguf.unlink()
    with pytest.raises(CheckpointError, match="No such file or directory"):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.demo
def test_demo_equals_transformers(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # transformers asks for the same table of names at each of the model's 397 modules
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    checkpoint = GGUFCheckpoint(demo_gguf)
    config = AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    reference = load_gguf_checkpoint(str(demo_gguf), return_tensors=True, model_to_load=model)
    assert checkpoint.tied
    assert set(checkpoint.names()) == set(reference["tensors"])
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in reference["tensors"].items())
    told = reference["config"]
    assert told.pop("rope_theta") == config.rope_parameters["rope_theta"]
    assert told.pop("rms_norm_eps") == pytest.approx(config.rms_norm_eps)
    for field in ("_model_name_or_path", "unk_token_id"):  # no business of the architecture
        told.pop(field)
    assert told == {field: getattr(config, field) for field in told}


@pytest.mark.demo
def test_demo_metadata_is_what_a_converter_wrote(demo_gguf: Path) -> None:
    checkpoint, stored = GGUFCheckpoint(demo_gguf), GGUFFile(demo_gguf).metadata
    written = checkpoint.family.gguf_metadata(checkpoint.config)
    assert written == {key: pytest.approx(value) for key, value in stored.items() if key.startswith("llama.")}
