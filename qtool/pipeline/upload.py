"""Uploads a finished result to the model hub."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import HubError
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
    from huggingface_hub import HfApi

    listener(Event("upload", 0, 1, repo))
    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the output of qtool")
    except Exception as error:  # the hub library lets through what its HTTP library raises, and that one changes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = f"the result is in {folder}; log in with `hf auth login` and try `hf upload {repo} {folder}`"
        raise HubError(f"cannot upload to {repo}", found=reason, hint=hint) from error
    listener(Event("upload", 1, 1, address))
    return address
