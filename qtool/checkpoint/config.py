"""config.json: read, checked, completed with what transformers assumes, and matched to a family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from stat import S_ISREG
from typing import Any

from qtool import registry
from qtool.checkpoint.derived.family import derived_family
from qtool.checkpoint.derived.skeleton import known_to_transformers
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._rope import rope_parameters
from qtool.checkpoint.links import own_file
from qtool.errors import CheckpointError, reading

FAMILIES = "checkpoint/families"
COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
LIMIT = 2**24
"""No count of a model is larger; a file that claims more is damaged and would exhaust the memory."""
TEXT = 1 << 28
"""Bytes of a text file of a model: the largest tokenizers take 40 MB."""
CONFIG = 1 << 24
"""Bytes of config.json, which is a few thousand."""
BLOCK_LIMIT = 10_000
EXPERT_LIMIT = 2**18
"""Of all blocks together."""


def check_file(path: Path, limit: int = TEXT) -> None:
    """Raises CheckpointError: no such file, a device or the like, or more bytes than `limit`."""
    with reading(path):
        found = path.stat()
    if not S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file", hint="give a copy of its content")
    if found.st_size > limit:
        raise CheckpointError(
            f"{path} is too large", wanted=f"at most {limit >> 20} MiB", found=f"{found.st_size} bytes"
        )


def read_text(path: Path, limit: int = TEXT) -> str:
    """Reads a text. Raises CheckpointError: see `check_file`; or it is not UTF-8."""
    check_file(path, limit)
    try:
        with reading(path), path.open(encoding="utf-8") as file:
            text = file.read(limit + 1)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged", wanted="UTF-8 text", found=f"byte {error.start} is none") from error
    if len(text) > limit:  # files of the system are longer than they say
        raise CheckpointError(f"{path} is too large", wanted=f"at most {limit >> 20} MiB", found="more")
    return text


def read_json(path: Path, limit: int = TEXT) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: no such file, more bytes than `limit`, or something else is in it.
    """
    try:
        value = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wrong content", wanted="a JSON object", found=type(value).__name__)
    return value


def read_own(path: Path) -> dict[str, Any]:
    """config.json as it stands there. Raises CheckpointError: missing, no file of its folder, or damaged."""
    if not own_file(path):
        raise CheckpointError(f"{path.parent} holds no config.json", hint="a checkpoint folder comes with one")
    return read_json(path, CONFIG)


def read_config(path: Path) -> tuple[dict[str, Any], Family]:
    """Reads config.json of a model, all parts of it, and completes it.

    Returns:
        The configuration, its counts checked, with the family's defaults where it says nothing; and the family.

    Raises:
        CheckpointError: missing, damaged, or of a family that qtool does not know.
    """
    return complete(read_own(path), path, whole=True)


OUTER = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
"""Fields that a model of several parts may spell out for all of them."""


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about the text model, where that is one of several parts, such as a vision tower."""
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in (known := registry.names(FAMILIES)):
        return config
    if config.get("model_type") in known:
        return config
    family: Family = registry.load(FAMILIES, text["model_type"])()
    shared = {field: config[field] for field in OUTER if config.get(field) is not None}
    stated = {field: value for field, value in text.items() if value is not None}
    return shared | stated | {"architectures": [family.architecture]}


def complete(config: dict[str, Any], where: Path, whole: bool = False) -> tuple[dict[str, Any], Family]:
    """See `read_config`.

    Args:
        config: of a model.
        where: it is, for errors.
        whole: take a model of several parts for one, if transformers knows it, and not only its text model.
    """
    kind = config.get("model_type")
    if not (whole and isinstance(kind, str) and known_to_transformers(kind)):
        config = text_part(config)
    known = registry.names(FAMILIES)
    kind = config.get("model_type")
    if kind not in known and isinstance(kind, str) and known_to_transformers(kind):
        _check_counts(config, where)
        return config, derived_family(config)
    if kind not in known:
        raise CheckpointError(
            f"{where}: unknown model family",
            wanted=f"model_type one of {', '.join(known)}",
            found=repr(kind)[:60],
            hint="a newer transformers may know it, a package can add it (see the page on extending qtool), and "
            "--model-free quantizes without data",
        )
    family: Family = registry.load(FAMILIES, kind)()
    config = family.defaults | {family.spellings.get(field, field): value for field, value in config.items()}
    _check(config, family, where)
    return config, family


def _check_counts(config: dict[str, Any], where: Path) -> None:
    """Raises CheckpointError: a model of any type cannot be so large."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, where)
        most = BLOCK_LIMIT if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") else LIMIT
        counts = name.startswith(("num_", "n_", "max_")) or name.endswith(("_size", "_dim"))
        if counts and isinstance(value, int) and abs(value) > most:
            raise CheckpointError(f"{where}: impossible {name}", wanted=f"at most {most}", found=repr(value)[:40])


def _check(config: dict[str, Any], family: Family, where: Path) -> None:
    optional = [field for field in ("num_key_value_heads", "head_dim") if config.get(field) is not None]
    optional += ["sliding_window"] if config.get("sliding_window") else []
    for field in (*COUNTS, *family.counts, *optional):
        count = config.get(field)
        if type(count) is not int or not 0 < count <= (BLOCK_LIMIT if field == "num_hidden_layers" else LIMIT):
            raise CheckpointError(f"{where}: impossible {field}", wanted="a positive integer", found=repr(count)[:40])
    if family.experts(config) * config["num_hidden_layers"] > EXPERT_LIMIT:
        raise CheckpointError(f"{where}: impossible number of experts", found=family.experts(config))
    if family.mixture and config["num_experts_per_tok"] > family.experts(config):
        wanted = f"at most {family.experts(config)}, the number of experts"
        raise CheckpointError(
            f"{where}: impossible num_experts_per_tok", wanted=wanted, found=config["num_experts_per_tok"]
        )
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        raise CheckpointError(f"{where}: {heads} attention heads cannot share {kv_heads} key/value heads")
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise CheckpointError(f"{where}: hidden_size {config['hidden_size']} is no multiple of {heads} attention heads")
    for field in ("rope_scaling", "rope_parameters"):
        stated = config.get(field)
        nested = (
            (stated.get("full_attention"), stated.get("sliding_attention")) if isinstance(stated, dict) else (stated,)
        )
        if not all(isinstance(rope, dict | None) for rope in nested):
            raise CheckpointError(f"{where}: wrong {field}", wanted="an object", found=repr(stated)[:40])
    rope_parameters(family.rope(config))
    family.rotary_dim(config)
    epsilon = config["rms_norm_eps"]
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise CheckpointError(f"{where}: wrong rms_norm_eps", wanted="a number from 0", found=repr(epsilon)[:40])
