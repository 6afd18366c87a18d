"""Files of a model's folder that are links: a downloaded folder is given away as a whole, and is to show nothing else.

The hub's cache consists of links, from `snapshots/REVISION` to `blobs` of the same repository
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
from pathlib import Path

from qtool.errors import CheckpointError, reading


def own_file(path: Path) -> bool:
    """Whether there is a file of that name in its folder.

    Raises:
        CheckpointError: it is a device or the like, or a link that leads out of the folder, and not within a hub cache
            either.
    """
    if not os.path.exists(path):  # nor if the name is impossible
        return False
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is no regular file", hint="give a copy of its content")
    if path.is_symlink():
        with reading(path):
            real, folder = path.resolve(), path.parent.resolve()
        places = (place.parents[1] / "blobs" for place in (folder, folder.parent) if place.parent.name == "snapshots")
        blobs = next(places, folder)
        if not (real.is_relative_to(folder) or real.is_relative_to(blobs)):
            hint = "copy the file there, or name the folder that holds it"
            raise CheckpointError(f"{path} is a link out of its folder", found=str(real), hint=hint)
    return True
