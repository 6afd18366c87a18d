"""Uploads a finished folder to the model hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import HubError, one_line


def push_to_hub(folder: Path, repo: str, token: str | None = None, endpoint: str | None = None) -> str:
    """Creates the repository if it is missing, uploads the folder, and returns the repository's address.

    Args:
        folder: what to upload, all of it.
        repo: "owner/name".
        token: None: the one that `hf auth login` saved.
        endpoint: address of the hub; None: the hub library's own.

    Raises:
        HubError: the hub refused or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError descends from the errors of the HTTP library, which differs between major versions.
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model quantized by qtool")
    except failures as error:
        hint = f"nothing is lost: log in with `hf auth login`, then `hf upload {repo} {folder}`"
        raise HubError(f"cannot upload to {repo}", found=one_line(error), hint=hint) from error
    return address
