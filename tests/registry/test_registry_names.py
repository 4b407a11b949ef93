"""Which names the catalogue takes, and what it says of the others."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import (
    InvalidNameError,
    Reference,
    Registry,
    check_name,
    is_name,
    is_reference,
    parse_reference,
    printable,
)
from registry.names import LONGEST_NAME, nearest_names

LETTERS_AND_DIGITS = string.ascii_letters + string.digits
valid_names = st.builds(
    str.__add__,
    st.sampled_from(LETTERS_AND_DIGITS),
    st.text(LETTERS_AND_DIGITS + "._-", max_size=LONGEST_NAME - 1),
)


@given(valid_names)
def test_a_name_of_the_allowed_characters_is_returned_as_it_is(name: str) -> None:
    assert check_name(name) == name
    assert parse_reference(name) == Reference(name)


@given(valid_names, st.integers(1, 999_999_999))
def test_a_reference_reads_back_from_its_text(name: str, version: int) -> None:
    reference = Reference(name, version)
    assert parse_reference(str(reference)) == reference
    assert is_reference(str(reference))


@given(st.text())
def test_any_text_is_a_name_or_an_error_without_control_characters(text: str) -> None:
    allowed = (
        0 < len(text) <= LONGEST_NAME and set(text) <= set(LETTERS_AND_DIGITS + "._-") and text[0] in LETTERS_AND_DIGITS
    )
    assert is_name(text) == allowed
    if not allowed:
        with pytest.raises(InvalidNameError) as raised:
            check_name(text)
        assert str(raised.value).isprintable()


@given(st.text())
def test_any_text_is_a_reference_or_an_error_without_control_characters(text: str) -> None:
    try:
        parse_reference(text)
    except InvalidNameError as error:
        assert not is_reference(text)
        assert str(error).isprintable()
    else:
        assert is_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "a\\b",
        "-rf",
        "_a",
        "a b",
        "a\n",
        "a\x1b[31m",
        "a\u202eb",
        "ä",
        "a" * 97,
        "a" * 300,
        "a@1",
        "a\x00",
        "１",
    ],
)
def test_what_is_no_name_is_refused_everywhere_a_name_goes_in(text: str, catalogue: Registry) -> None:
    from catalogued import facts

    for attempt in (
        lambda: check_name(text, "tag"),
        lambda: catalogue.bases.add(text, "/somewhere"),
        lambda: catalogue.adapters.add(text, facts()),
        lambda: catalogue.adapters.add("fine", facts(), tags=[text]),
    ):
        with pytest.raises(InvalidNameError) as raised:
            attempt()
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 400
    assert catalogue.counts().versions == catalogue.counts().bases == 0


@pytest.mark.parametrize("text", ["a@", "a@0", "a@01", "a@-1", "a@1.0", "a@x", "a@1@2", "a@٣", "@1", "a@9999999999"])
def test_a_version_is_a_number_from_one(text: str) -> None:
    with pytest.raises(InvalidNameError):
        parse_reference(text)


@given(st.text(), st.integers(2, 50))
def test_printable_text_is_printable_and_short(text: str, longest: int) -> None:
    shown = printable(text, longest)
    assert shown.isprintable()
    assert len(shown) <= longest


def test_printable_text_of_a_terminal_escape_keeps_only_the_letters() -> None:
    assert printable("a\x1b]0;title\x07b\u202ec\r\n") == "a]0;titlebc"


def test_the_nearest_names_come_best_first_whatever_their_case() -> None:
    assert nearest_names("pirat", ["parrot", "Pirate", "cook", "pirate-v2"])[0] == "Pirate"
    assert nearest_names("zzz", ["parrot", "Pirate"]) == ()
