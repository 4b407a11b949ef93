"""Check of links in a model's folder: into the folder, into huggingface_hub's cache for it, or elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_BLOB: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def leads_outside(file: Path, folder: Path) -> bool:
    """Return whether `file`, which lies below `folder`, is a link to a file that does not belong to the folder.

    Links into the folder belong to it. So do the links of huggingface_hub's cache, from a file below ``snapshots/<commit>``
    to ``blobs/<hash>`` of the same repository.
    """
    target = Path(os.path.realpath(file))
    if target.is_relative_to(os.path.realpath(folder)):
        return False
    return not _is_blob_of_its_snapshot(Path(os.path.abspath(file)), target)


def _is_blob_of_its_snapshot(file: Path, target: Path) -> bool:
    if target.parent.name != "blobs" or not _BLOB.fullmatch(target.name):
        return False
    snapshots = (each for each in file.parents if _COMMIT.fullmatch(each.name) and each.parent.name == "snapshots")
    return any(Path(os.path.realpath(each.parent.parent / "blobs")) == target.parent for each in snapshots)
