"""Small tokenizers of every kind that checkpoints come with, trained on prose that Python brings along."""

from __future__ import annotations

import json
import pydoc_data.topics
import struct
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qtool.checkpoint.pretokenizers import RULES

PROSE = list(pydoc_data.topics.topics.values())[:20]
TEXTS = [
    *(text[:1500] for text in PROSE[5:8]),
    "Hello, world! It's 12345 o'clock; we'Ll see... THEY'RE 1 22 333 4444",
    "  leading\n\n\n  spaces\t\tand\r\ntabs   \n trailing   ",
    "naïve café — Ünïcödé, 你好世界, Привет мир, שלום, 🙂🙃 ½ x² ٣٤٥",
    "snake_case CamelCase kebab-case http://a.b/c?d=e&f=[1,2] {'k': 0.5} // --> <tag/>",
    "def f(x: int) -> int:\n    if x > 10:\n\t\treturn x ** 2  # squared\n    return -x\n",
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    "",
    " ",
    "\n",
]


def byte_level(name: str) -> Tokenizer:
    """A BPE over bytes, trained under one of the known pre-tokenizers."""
    steps, ignore_merges = RULES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(ignore_merges)))
    spelled = json.loads(tokenizer.to_str())
    spelled["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tokenizer = Tokenizer.from_str(json.dumps(spelled))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return tokenizer


def _sentencepiece(special: list[str], bos: str, unknown: str) -> Tokenizer:
    """Spaces are marked, every pair that makes a token is a merge, bytes are the last resort."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learned = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), *sorted(learned, key=learned.get)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    begin = len(special) + 256
    merges = [(p[:i], p[i:]) for p in pieces[begin:] for i in range(1, len(p)) if {p[:i], p[i:]} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
    )
    return tokenizer


def llama2_like(prefix: bool = True) -> Tokenizer:
    """Llama 2's kind, also Mistral's: a space is put before every text."""
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], "<s>", "<unk>")
    steps: list[Any] = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * prefix]
    )
    return tokenizer


def phi3_like() -> Tokenizer:
    """Phi 3's: Llama 2's with tokens for chats behind it, some of which swallow the spaces that follow."""
    tokenizer = llama2_like()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.add_special_tokens(
        [AddedToken(f"<|{role}|>", rstrip=True, normalized=False) for role in ("user", "assistant", "end")]
    )
    return tokenizer


def gemma_like() -> Tokenizer:
    """Gemma's: no space before the text, and runs of whitespace among the added tokens."""
    tokenizer = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], "<bos>", "<unk>")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in ("\n\n", "\n\n\n", "\t\t", "<table>")])
    return tokenizer


def unigram() -> Tokenizer:
    """T5's: SentencePiece's unigram model, spaces marked by the pre-tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's: lower case, words in pieces, a token on either side."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        PROSE, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Newer files of Llama 2's kind: the space in front comes from the pre-tokenizer, of the first word only."""
    tokenizer = llama2_like()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def protobuf(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protocol buffer; sizes below 2^14 are enough here."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tokenizer_model(tokenizer: Tokenizer, kind: int = 2) -> bytes:
    """The same tokens as a SentencePiece model: unknown, control, 256 bytes, then pieces by falling score."""
    types = [2, 3, 3] + [6] * 256
    data = b""
    for text, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        piece = protobuf(1, text) + protobuf(2, float(-max(0, i - 259)))
        data += protobuf(1, piece + (protobuf(3, types[i]) if i < 259 else b""))
    return data + protobuf(2, protobuf(3, kind)) + protobuf(3, protobuf(3, 1))
