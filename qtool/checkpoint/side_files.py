"""What lies beside the weights of a checkpoint and goes along with them: tokenizers, chat templates, licenses, code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.config import CONFIG, check_file, read_json
from qtool.checkpoint.links import own_file
from qtool.errors import CheckpointError, reading

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
CHATS = "additional_chat_templates"
"""Where chat templates are that have names."""
CODE = 100
"""Files of code that one model brings along, at most."""


def side_files(folder: Path) -> dict[str, Path]:
    """Paths by name below the folder.

    Code is among them where config.json or tokenizer_config.json names some in `auto_map`. It is never run.

    Raises:
        CheckpointError: one is no regular file, is too large, or is a link out of the folder.
    """
    names = [name for name in SIDE_FILES if own_file(folder / name)]
    with reading(folder):
        names += sorted(f"{CHATS}/{path.name}" for path in (folder / CHATS).glob("*.jinja") if own_file(path))
        if any(_auto_map(folder / name) for name in ("config.json", "tokenizer_config.json")):
            names += sorted(path.name for path in folder.glob("*.py") if own_file(path))[:CODE]
    files = {name: folder / name for name in names}
    for path in files.values():
        check_file(path)
    return files


def code_of(config: Mapping[str, Any], files: Mapping[str, Path]) -> str | None:
    """What is to be said about code that comes with a model: what goes along, and what is missing."""
    maps = [
        config.get("auto_map"),
        _auto_map(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {},
    ]
    wanted = set[str]().union(*map(_named, maps))
    if not wanted:
        return None
    there = sorted(name for name in files if name.endswith(".py"))
    missing = sorted(wanted - set(there))
    said = [
        f"along goes, unread, {', '.join(there)}" if there else "",
        f"missing is {', '.join(missing)}" if missing else "",
        "auto_map of config.json is left out" if lost(config, files) else "",
    ]
    return f"auto_map names code, which qtool never runs: {'; '.join(filter(None, said))}"


def lost(config: Mapping[str, Any], files: Mapping[str, Path]) -> bool:
    """Whether `auto_map` of config.json names code that is not there: nobody can make use of it."""
    return not _named(config.get("auto_map")) <= files.keys()


def _named(auto_map: Any) -> set[str]:
    """Files of code."""
    return {f"{module.replace('.', '/')}.py" for module in re.findall(r"'([\w.]+)\.\w+'", str(auto_map or ""))}


def _auto_map(path: Path) -> Any:
    try:
        return read_json(path, CONFIG).get("auto_map") if own_file(path) else None
    except CheckpointError:  # whoever needs the file says what is wrong with it
        return None
