"""What the package index shows: README.md with links that lead somewhere, and the project's addresses.

Links between files of this repository lead nowhere on the page of a package. Where $QTOOL_REPOSITORY names the address
that a release is published at, such as https://HOST/OWNER/NAME, builds lead them there, to the files of that version;
without it they leave README.md as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")
"""A picture's exclamation mark, what is shown, and the path of a file."""


def absolute(text: str, repository: str, version: str) -> str:
    """Markdown whose links to files lead to those of a version, at an address without a slash at its end."""

    def lead(found: re.Match[str]) -> str:
        picture, shown, path = found.groups()
        return f"{picture}[{shown}]({repository}/{'raw' if picture else 'blob'}/v{version}/{path})"

    return LINK.sub(lead, text)


class PackageIndex(MetadataHookInterface):
    """Fills in `readme` and `urls`; hatchling calls it when it builds a package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Changes the `project` table of pyproject.toml."""
        text, repository = (ROOT / "README.md").read_text(encoding="utf-8"), os.environ.get("QTOOL_REPOSITORY", "")
        if repository := repository.rstrip("/"):
            version = re.search(
                r'^__version__ = "(.+)"$', (ROOT / "qtool/__init__.py").read_text(encoding="utf-8"), re.M
            )
            assert version is not None
            text = absolute(text, repository, version[1])
            metadata["urls"] = {
                "Homepage": repository,
                "Documentation": f"{repository}/blob/v{version[1]}/docs/getting-started.md",
                "Changelog": f"{repository}/blob/v{version[1]}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
