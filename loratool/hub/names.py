"""Names of repositories on the Hub."""

from __future__ import annotations

from loratool.errors import HubError, quoted


def is_repository(name: str) -> bool:
    """Whether `name` is ``owner/name`` as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def repository_id(text: str) -> str:
    """The id of a repository from what a user gave: ``owner/name``, or its address at ``HF_ENDPOINT``.

    Raises:
        HubError: it is neither.
    """
    from huggingface_hub import constants

    name = text.removeprefix(f"{constants.ENDPOINT}/").removeprefix("https://huggingface.co/").rstrip("/")
    if not is_repository(name):
        raise HubError(f"{quoted(text)} is no name of a repository on the Hub; write owner/name")
    return name
