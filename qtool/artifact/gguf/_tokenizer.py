"""A tokenizer in GGUF's words.

Two kinds exist in the architectures that qtool knows: byte-level BPE ("gpt2": tokens, merges, and the name of a
pre-tokenizer) and SentencePiece's BPE with bytes as a last resort ("llama": tokens and scores).
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtool.artifact.gguf._vocabulary import Vocabulary, from_json, from_sentencepiece, merges
from qtool.checkpoint import pretokenizers
from qtool.checkpoint.config import read_json, read_text
from qtool.checkpoint.gguf_tokenizer import PHI3, PHI3_KEEPS
from qtool.checkpoint.side_files import CHATS
from qtool.errors import CheckpointError, suggestion
from qtool.store.gguf_writer import Value

Files = Mapping[str, Path]
Stamped = tuple[str, Path, int, int]
"""Name, path, bytes, and when it was last changed."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name of a special token in config files -> in GGUF."""


def tokenizer_metadata(
    files: Mapping[str, Path], config: Mapping[str, Any], pre: str | None = None
) -> dict[str, Value]:
    """The `tokenizer.*` key-values of a GGUF file.

    Args:
        files: the model's side files by name.
        config: its config.json.
        pre: GGUF's name of the pre-tokenizer, where it is not recognized.

    Raises:
        CheckpointError: no tokenizer, or one that llama.cpp has no name for.
    """
    return dict(_metadata(stamped(files), json.dumps(config, sort_keys=True, default=str), pre))


def stamped(files: Files) -> tuple[Stamped, ...]:
    """Files as they are now: a key for what is read from them, which takes longer than all else of planning a file."""
    found = ((name, path, path.stat()) for name, path in sorted(files.items()) if path.is_file())
    return tuple((name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in found)


@lru_cache(maxsize=4)
def _metadata(known: tuple[Stamped, ...], config_json: str, pre: str | None) -> dict[str, Value]:
    files, config = {name: path for name, path, *_ in known}, json.loads(config_json)
    tokenizer = read_json(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    try:
        vocabulary, values = _model(files, tokenizer, pre)
        vocabulary.resize(int(config["vocab_size"]))
        values |= {"tokenizer.ggml.tokens": vocabulary.texts, "tokenizer.ggml.token_type": vocabulary.types}
        if vocabulary.scores:
            values["tokenizer.ggml.scores"] = vocabulary.scores
        special = _special_ids(vocabulary, settings, config)
        values |= {f"tokenizer.ggml.{SPECIAL[name]}_token_id": token for name, token in special.items()}
        values |= _added_ends(tokenizer, settings, vocabulary, special)
        values |= _chat_templates(files, settings)
        _check_texts(values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the tokenizer files are damaged", found=f"{type(error).__name__}: {error}") from error
    return values


def _check_texts(values: Mapping[str, Value]) -> None:
    """Raises UnicodeEncodeError: a text holds half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    for value in values.values():
        texts = value if isinstance(value, list) else [value]
        if texts and isinstance(texts[0], str):
            "".join(map(str, texts)).encode()


def model_name(name: str, files: Files) -> str:
    """The model's name, changed if llama.cpp would read another tokenizer out of it.

    In models called Phi-3 it drops the blanks behind special tokens, which no other key can ask for, and it fails to
    load such a one without certain tokens.
    """
    drops = _drops_blanks(stamped(files))
    if drops and not PHI3.search(name):
        return f"{name} (Phi-3 vocabulary)"
    return name if drops else PHI3.sub("Phi 3", name)


@lru_cache(maxsize=4)
def _drops_blanks(known: tuple[Stamped, ...]) -> bool:
    """Whether a tokenizer is Phi-3's, which drops blanks behind special tokens."""
    files = {name: path for name, path, *_ in known}
    tokenizer = read_json(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    added = [token for token in tokenizer.get("added_tokens", []) if isinstance(token, dict)]
    names = {token.get("content") for token in added}
    return names >= {"</s>", *PHI3_KEEPS} and any(token.get("rstrip") and token.get("special") for token in added)


def _model(
    files: Mapping[str, Path], tokenizer: dict[str, Any], pre: str | None
) -> tuple[Vocabulary, dict[str, Value]]:
    if not tokenizer:
        if "tokenizer.model" not in files:
            raise CheckpointError("a GGUF file needs a tokenizer", wanted="tokenizer.json or tokenizer.model")
        vocabulary, prefix = from_sentencepiece(files["tokenizer.model"])
        return vocabulary, {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": prefix}
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CheckpointError("GGUF cannot hold this tokenizer", wanted="a BPE model", found=model.get("type"))
    if model.get("byte_fallback"):
        prefix = _space_prefix(tokenizer)
        return from_json(tokenizer), {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": prefix}
    if pre is not None and pre not in pretokenizers.NAMES:
        what = f"llama.cpp knows no pre-tokenizer called {pre!r:.60}"
        hint = suggestion(pre, sorted(pretokenizers.NAMES))
        raise CheckpointError(what, wanted="a name that llama.cpp has for one", hint=hint)
    pre = pre or pretokenizers.identify(tokenizer)
    if pre is None:
        raise CheckpointError(
            "GGUF has a name for each way to split text before merging, and this tokenizer.json's is not recognized",
            wanted=", ".join(pretokenizers.RULES),
            found=json.dumps(tokenizer.get("pre_tokenizer"))[:200],
            hint="if llama.cpp knows it, name it: --pre-tokenizer NAME, or export: [{to: gguf, pre_tokenizer: NAME}]",
        )
    values: dict[str, Value] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    return from_json(tokenizer), values | {"tokenizer.ggml.merges": merges(model)}


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a normalizer in older files, by a pre-tokenizer in newer ones."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or (
        splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme", "always") != "never"
    )


def _special_ids(vocabulary: Vocabulary, settings: dict[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the special tokens that exist; tokenizer_config.json names them, config.json numbers them."""
    ids = {text: i for i, text in enumerate(vocabulary.texts)}
    found = {}
    for name in SPECIAL:
        token, number = settings.get(f"{name}_token"), config.get(f"{name}_token_id")
        text = token["content"] if isinstance(token, dict) else token
        number = number[0] if isinstance(number, list) else number
        if text in ids:
            found[name] = ids[text]
        elif type(number) is int and 0 <= number < len(vocabulary.texts):  # old files say -1 where there is no padding
            found[name] = number
    return found


def _added_ends(
    tokenizer: dict[str, Any], settings: dict[str, Any], vocabulary: Vocabulary, special: dict[str, int]
) -> dict[str, Value]:
    """Whether the tokenizer puts the first and last special token around a text.

    tokenizer_config.json decides if it says anything, as in transformers, else the template in tokenizer.json.
    A SentencePiece model alone knows nothing of it; Llama's tokenizer then adds the first.
    """
    flags = {end: settings.get(f"add_{end}_token") for end in ("bos", "eos")}
    if any(value is not None for value in flags.values()):
        return {f"tokenizer.ggml.add_{end}_token": bool(value) for end, value in flags.items()}
    processor = tokenizer.get("post_processor") or {}
    template = [part for step in processor.get("processors", [processor]) for part in step.get("single", [])]
    ends = {"bos": template[:1], "eos": template[-1:]}
    values: dict[str, Value] = {}
    for end, parts in ends.items():
        text = vocabulary.texts[special[end]] if end in special else None
        added = [part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part]
        values[f"tokenizer.ggml.add_{end}_token"] = text in added if tokenizer else end == "bos"
    return values


def _chat_templates(files: Files, settings: dict[str, Any]) -> dict[str, Value]:
    """The chat template, or several by name. Raises TypeError, KeyError: they are spelled otherwise."""
    template = settings.get("chat_template")
    if "chat_template.json" in files:
        template = read_json(files["chat_template.json"]).get("chat_template")
    if "chat_template.jinja" in files:
        template = read_text(files["chat_template.jinja"])
    beside = {Path(name).stem: read_text(path) for name, path in files.items() if name.startswith(f"{CHATS}/")}
    if isinstance(template, str):
        template = [{"name": "default", "template": template}]
    named = {entry["name"]: entry["template"] for entry in template or []} | beside
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TypeError("a chat template is no text")
    values: dict[str, Value] = {}
    for name, text in named.items():
        values["tokenizer.chat_template" + (f".{name}" if name != "default" else "")] = text
    others = [name for name in named if name != "default"]
    return values | {"tokenizer.chat_templates": others} if others else values
