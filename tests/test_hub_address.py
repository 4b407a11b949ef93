"""What a person writes for a repository on the Hub, against the Hub's own library."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from hypothesis import example, given
from hypothesis import strategies as st

from loratool.errors import HubError
from loratool.hub.address import is_repository, repository_id


@given(st.from_regex(r"[aB1_.é-]{0,4}/[aB1_.é-]{0,4}(\.git)?", fullmatch=True))
@example(f"a/{'b' * 96}")
@example(f"a/{'b' * 97}")
@example("a")
@example("a/b/c")
@example("a/b\n")
def test_a_repository_is_what_the_hubs_library_takes_for_one(name: str) -> None:
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    assert is_repository(name) == valid


@pytest.mark.parametrize(
    "link", ["me/it", "me/it/", "https://huggingface.co/me/it", "https://hf.co/me/it/", "hf://me/it"]
)
def test_a_link_to_a_repository_is_as_good_as_its_id(link: str) -> None:
    assert repository_id(link) == "me/it"


@pytest.mark.parametrize(
    "text", ["", "it", "me/it/inside", "me/it@main", "https://example.com/me/it", "../it", "me/.."]
)
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(HubError, match="write owner/name"):
        repository_id(text)
