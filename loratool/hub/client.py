"""huggingface_hub's client as loratool uses it: the user's own token and endpoint, under loratool's name."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def client() -> HfApi:
    """A client with the token of ``HF_TOKEN`` or ``hf auth login``, for the Hub at ``HF_ENDPOINT``."""
    from huggingface_hub import HfApi

    return HfApi(library_name="loratool", library_version=version("loratool"))
