"""The one way from what a user types to a checkpoint: a folder, a GGUF file, or the id of a repository on the hub."""

from __future__ import annotations

import os
import re
from errno import ENOSPC
from pathlib import Path

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.gguf_checkpoint import GGUFCheckpoint
from qtool.checkpoint.hf import INDEX, HFCheckpoint
from qtool.checkpoint.side_files import CHATS, SIDE_FILES
from qtool.errors import CheckpointError, HubError, StorageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)
WANTED = [
    "config.json",
    "hf_quant_config.json",
    INDEX,
    "*.safetensors",
    "README.md",
    "*.py",
    f"{CHATS}/*.jinja",
    *SIDE_FILES,
]
UNWANTED = ["consolidated*.safetensors", "*/*.safetensors", "*/*.py"]
"""The same weights once more under the maker's own names, and folders with other versions of them."""


def open_checkpoint(
    source: str,
    *,
    token: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Checkpoint:
    """Opens a plain model; quantized artifacts are opened by their own readers.

    Args:
        source: folder, .gguf file, or hub id such as "HuggingFaceTB/SmolLM2-135M", with "@revision" if wanted.
        token: for private and gated repositories; None: the one that `hf auth login` saved.
        offline: use what the hub cache holds and connect to nothing.
        cache: folder of the hub cache; None: the hub library's own.
        endpoint: address of the hub; None: the hub library's own.

    Raises:
        CheckpointError: nothing there, or not a model that qtool can read.
        HubError: the hub refused or cannot be reached.
    """
    path = find_model(source, token=token, offline=offline, cache=cache, endpoint=endpoint)
    return GGUFCheckpoint(path) if path.is_file() else HFCheckpoint(path, source)


def find_model(
    source: str,
    *,
    token: str | None = None,
    offline: bool = False,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder or .gguf file that a model is in, downloaded if need be; see `open_checkpoint`."""
    path = local(source)
    if os.path.isdir(path) or (os.path.isfile(path) and path.suffix == ".gguf"):
        return path
    if os.path.exists(path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source} is no checkpoint",
            wanted="a folder with config.json and safetensors, a .gguf file, or a hub id",
            found="another kind of file" if os.path.exists(path) else "no such file or folder",
        )
    return _download(source, token, offline, cache, endpoint)


def local(source: str) -> Path:
    """The path that a user means. Raises CheckpointError: it begins with the home of somebody who has none."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{source} is no checkpoint", found=str(error)) from error


def _download(source: str, token: str | None, offline: bool, cache: Path | None, endpoint: str | None) -> Path:
    """Folder of the hub cache that holds the repository's files, downloaded where missing."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                cache_dir=cache,
                token=token,
                local_files_only=offline,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                endpoint=endpoint,
            )
        )
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page, then pass a token or run: hf auth login"
        raise HubError(f"the repository {repository} is gated", hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; a private one needs a token: hf auth login"
        raise HubError(f"no folder and no hub repository is called {repository}", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"the repository {repository} has no revision {revision}", hint="check the spelling") from error
    except errors.LocalEntryNotFoundError as error:
        why = _line(error.__cause__) if error.__cause__ else "qtool is offline"
        hint = "connect, or name a local folder"
        raise HubError(f"no folder is called {source} and the hub cache lacks it: {why}", hint=hint) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{source} is neither a file or folder nor a valid hub id") from error
    except Exception as error:  # the hub library lets through what its HTTP library raises, and that one changes
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise StorageError(f"the disk is too full to download {repository}", hint="free space") from error
        hint = "try again, or name a local folder"
        raise HubError(f"{repository} cannot be downloaded: {_line(error)}", hint=hint) from error


def _line(error: BaseException) -> str:
    """A message of whatever length as part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
