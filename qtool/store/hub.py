"""The model hub: what it calls things, and uploading a finished folder in one commit."""

from __future__ import annotations

import re
from pathlib import Path

from qtool.errors import HubError, one_line

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""Name of a repository, "owner/name"."""
LICENSE = ("license", "license_name", "license_link")
"""What the hub's metadata says of a license."""


def push_to_hub(
    folder: Path,
    repo: str,
    token: str | None = None,
    endpoint: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Creates the repository if it is missing, uploads the folder, and returns the repository's address.

    Args:
        folder: what to upload, all of it.
        repo: "owner/name".
        token: None: the one that `hf auth login` saved.
        endpoint: address of the hub; None: the hub library's own.
        private: create it so that nobody else sees it; one that exists stays as it is.
        revision: branch that gets the commit, created if it is missing; None: the main one.

    Raises:
        HubError: the hub refused or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    message = "Upload a model quantized by qtool"
    hint = f"nothing is lost: log in with `hf auth login`, then `hf upload {repo} {folder}`"
    address = create_repository(repo, token, endpoint, private, revision, hint)
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, revision=revision)
    except failures() as error:
        raise HubError(f"cannot upload to {repo}", found=one_line(error), hint=hint) from error
    return address


def create_repository(
    repo: str,
    token: str | None = None,
    endpoint: str | None = None,
    private: bool = False,
    revision: str | None = None,
    hint: str = "log in with `hf auth login`",
) -> str:
    """Creates a repository, and a branch of it, if they are missing, and returns its address.

    Args:
        repo: see `push_to_hub`, as for the next four.
        token: see there.
        endpoint: see there.
        private: see there.
        revision: see there.
        hint: what to do about a refusal.

    Raises:
        HubError: the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = str(api.create_repo(repo, exist_ok=True, private=private or None))
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    except failures() as error:
        raise HubError(f"cannot upload to {repo}", found=one_line(error), hint=hint) from error
    return address


def refuse_stranger(repo: str, token: str | None = None, endpoint: str | None = None) -> None:
    """Makes sure that the hub knows who uploads, and that the repository would be theirs. Nothing is created.

    Args:
        repo: "owner/name".
        token: None: the one that `hf auth login` saved.
        endpoint: address of the hub; None: the hub library's own.

    Raises:
        HubError: nobody is logged in, the owner is somebody else, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    refused: tuple[type[BaseException], ...] = (*failures(), KeyError, TypeError)
    try:
        known = HfApi(endpoint=endpoint, token=token).whoami()
        names = [str(known["name"]), *(str(organization["name"]) for organization in known.get("orgs", ()))]
    except refused as error:
        raise HubError(f"cannot upload to {repo}", found=one_line(error), hint="log in with `hf auth login`") from error
    if (owner := repo.partition("/")[0]) not in names:
        raise HubError(f"cannot upload to {repo}", wanted=f"an owner among {', '.join(names)}", found=owner)


def failures() -> tuple[type[BaseException], ...]:
    """What the hub's library raises. Its errors descend from those of an HTTP library that differs among versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
