"""Uploads a finished result to the model hub."""

from __future__ import annotations

from pathlib import Path

from qtool.artifact._hub import push_to_hub
from qtool.pipeline.events import Event, Listener


def upload(folder: Path, repo: str, listener: Listener, endpoint: str | None = None, token: str | None = None) -> str:
    """Creates the repository if it is missing, uploads the folder in one commit, and returns the address.

    Args:
        folder: what to upload.
        repo: its name on the hub, "owner/name".
        listener: told about progress.
        endpoint: address of the hub; None: the hub library's own.
        token: None: the one that `hf auth login` saved.

    Raises:
        HubError: refused, or out of reach; the folder stays as it is.
    """
    listener(Event("upload", 0, 1, repo))
    address = push_to_hub(folder, repo, token=token, endpoint=endpoint)
    listener(Event("upload", 1, 1, address))
    return address
