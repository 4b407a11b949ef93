"""huggingface_hub's client as loratool uses it: the user's own token and endpoint, under loratool's name."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from loratool.hub.logs import keep_logs_clean

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def client() -> HfApi:
    """A client with the token of ``HF_TOKEN`` or ``hf auth login``, for the Hub at ``HF_ENDPOINT``; its logs show no secret."""
    from huggingface_hub import HfApi

    keep_logs_clean()
    return HfApi(library_name="loratool", library_version=version("loratool"))
