"""huggingface_hub's client as loratool uses it: the user's own token and endpoint, under loratool's name."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from loratool.hub.logs import keep_logs_clean
from loratool.hub.retry import is_transient

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ANSWER_SECONDS: Final = 10.0
"""How long the Hub may take to answer at all."""


def client() -> HfApi:
    """A client with the token of ``HF_TOKEN`` or ``hf auth login``, for the Hub at ``HF_ENDPOINT``; its logs show no secret."""
    from huggingface_hub import HfApi

    keep_logs_clean()
    return HfApi(library_name="loratool", library_version=version("loratool"))


def ask_once() -> None:
    """Ask the Hub for next to nothing: what huggingface_hub's HTTP library raises where nobody answers, at once.

    Some of what huggingface_hub asks it asks six times, over half a minute, with a line for each; which is right where somebody
    answered and hung up.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=ANSWER_SECONDS)
    except Exception as error:
        if not is_transient(error):
            raise
