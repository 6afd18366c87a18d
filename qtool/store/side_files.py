"""What lies beside the weights of an artifact: configuration, tokenizer, chat templates, licenses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint._base import Checkpoint
from qtool.errors import reading
from qtool.store.files import storage_errors


def write_side_files(model: Checkpoint, out: Path, config: Mapping[str, Any]) -> list[Path]:
    """Writes config.json and copies tokenizer files, generation_config.json and licenses.

    Args:
        model: whose files they are.
        out: the folder.
        config: content of config.json.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(out):
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, path in sorted(model.files.items()):
        with reading(path):
            content = path.read_bytes()
        with storage_errors(out):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
    return [out / "config.json", *(out / name for name in sorted(model.files))]
