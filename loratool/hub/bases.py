"""Base models from the Hub, in huggingface_hub's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loratool.errors import NotFoundError, quoted

MODEL_FILES: Final = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
"""What a model folder needs; pickles and other frameworks' weights stay on the Hub."""


def fetch_config(repo: str, revision: str | None = None) -> Path:
    """The ``config.json`` of a model repository, and nothing else of it.

    Raises:
        NotFoundError: as `fetch_base`.
    """
    return _fetched(repo, revision, ["config.json"]) / "config.json"


def fetch_base(repo: str, revision: str | None = None) -> Path:
    """The folder of a model repository in the local cache, downloaded where it is not there yet.

    Raises:
        NotFoundError: there is no such repository or revision, it is gated, or the Hub cannot be reached.
    """
    return _fetched(repo, revision, MODEL_FILES)


def _fetched(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=files))
    except LocalEntryNotFoundError:
        raise NotFoundError(
            f"{quoted(repo)} is not in the local cache and the Hub cannot be reached; give a folder, or go online once"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise NotFoundError(f"cannot get {quoted(repo)} from the Hub: {first_line}") from None
