"""Uploads a finished result to the model hub."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import UsageError
from qtool.pipeline.events import Event, Listener
from qtool.store.hub import HUB_ID, create_repository, push_to_hub, refuse_stranger


def check_repository(repo: str | None, private: bool = False, revision: str | None = None) -> None:
    """Refuses what is no repository's name, and flags that have none. Raises UsageError."""
    if repo is None and (private or revision):
        flag = "--private" if private else "--revision"
        raise UsageError(flag, wanted="--push-to-hub OWNER/NAME beside it", found="none")
    if repo is not None and not HUB_ID.fullmatch(repo):
        raise UsageError("--push-to-hub", wanted="OWNER/NAME of a repository", found=repr(repo))


def claim(
    repo: str | None,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> None:
    """Creates the repository that a run will upload to, before hours of work; None: it uploads to none.

    Args:
        repo: see `upload`, as for the others.
        private: see there.
        revision: see there.
        endpoint: see there.
        token: see there.

    Raises:
        UsageError, HubError: see `check_repository`, `refuse_stranger` and `create_repository`.
    """
    check_repository(repo, private, revision)
    if repo is not None:
        refuse_stranger(repo, token, endpoint)
        create_repository(repo, token, endpoint, private, revision)


def upload(
    folder: Path,
    repo: str,
    listener: Listener,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Creates the repository if it is missing, uploads the folder in one commit, and returns the address.

    Args:
        folder: what to upload.
        repo: its name on the hub, "owner/name".
        listener: called with events of progress.
        endpoint: address of the hub; None: the hub library's own.
        token: None: the one that `hf auth login` saved.
        private: create it so that nobody else sees it.
        revision: branch that gets the commit; None: the main one.

    Raises:
        HubError: refused, or out of reach; the folder stays as it is.
    """
    listener(Event("upload", 0, 1, repo))
    address = push_to_hub(folder, repo, token, endpoint, private, revision)
    listener(Event("upload", 1, 1, address))
    return address
