"""huggingface_hub's client, with the user's token and endpoint, and loratool's name as the user agent."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from loratool.hub.logs import keep_logs_clean
from loratool.hub.retry import is_transient

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ANSWER_SECONDS: Final = 10.0
"""Timeout of the request that tests whether the Hub answers."""


def client() -> HfApi:
    """Return a client for the Hub at ``HF_ENDPOINT`` with the token of ``HF_TOKEN`` or ``hf auth login``.

    Its logs show no secrets.
    """
    from huggingface_hub import HfApi

    keep_logs_clean()
    return HfApi(library_name="loratool", library_version=version("loratool"))


def ask_once() -> None:
    """Send the Hub one tiny request; raise the error of huggingface_hub's HTTP library if the Hub cannot be reached.

    huggingface_hub repeats some requests six times over half a minute, with a log line for each. That suits a server that
    hung up, not one that cannot be reached.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=ANSWER_SECONDS)
    except Exception as error:
        if not is_transient(error):
            raise
