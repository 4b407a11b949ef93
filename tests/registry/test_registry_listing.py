"""The list of a thousand adapters, by SQLAlchemy and without it, filtered and sorted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalogued import digest, facts
from sqlalchemy import event

from registry import AdapterSummary, NotFoundError, Registry, RegistryError, list_adapters

KINDS = ("lora", "dylora", "adalora")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Registry]]:
    """A home with 1,000 adapters: 500 names in two versions, of three kinds, three bases and none, with tags."""
    home = tmp_path_factory.mktemp("thousand") / "home"
    chance = random.Random(7)
    with Registry.open(home) as registry, registry.writing():
        registry.bases.add("llama", "/llama", fingerprint=digest("llama"))
        registry.bases.add("llama-nf4", "/nf4", fingerprint=digest("nf4"), variant_of="llama")
        registry.bases.add("mistral", "/mistral", fingerprint=digest("mistral"))
        numbers = list(range(1000))
        chance.shuffle(numbers)
        for number in numbers:
            registry.adapters.add(
                f"{'Pirate' if number % 2 else 'parrot'}-{number // 4}",
                facts(
                    str(number),
                    kind=KINDS[number % 3],
                    rank=number % 7 or None,
                    alpha=float(number % 5),
                    size_bytes=number * 1000,
                ),
                base=(None, "llama", "llama-nf4", "mistral")[number % 4],
                tags=[f"tag{number % 10}", "all"],
            )
    yield home, registry


def test_a_thousand_adapters_are_all_listed_alike_either_way(thousand: tuple[Path, Registry]) -> None:
    home, registry = thousand
    quick, through_sqlalchemy = list_adapters(home), registry.adapters.list()
    assert len({adapter.reference for adapter in quick}) == 1000
    assert quick == through_sqlalchemy
    for adapter in quick[::97]:
        full = registry.adapters.find(adapter.reference)
        assert adapter == AdapterSummary(**{name: getattr(full, name) for name in AdapterSummary.__dataclass_fields__})


def test_a_list_takes_as_few_queries_for_a_thousand_as_for_one(thousand: tuple[Path, Registry]) -> None:
    _, registry = thousand
    statements: list[str] = []
    event.listen(registry.database.engine, "before_cursor_execute", lambda *facts: statements.append(str(facts[2])))
    registry.adapters.list()
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 3


@pytest.mark.parametrize("kind", [*KINDS, "unknown", None])
@pytest.mark.parametrize("tag", ["tag3", "all", "unknown", None])
def test_filters_take_what_they_say_and_nothing_else(
    thousand: tuple[Path, Registry], kind: str | None, tag: str | None
) -> None:
    home, registry = thousand
    expected = {
        adapter.reference
        for adapter in registry.adapters.list()
        if (kind is None or adapter.kind == kind) and (tag is None or tag in adapter.tags)
    }
    assert {adapter.reference for adapter in list_adapters(home, kind=kind, tag=tag)} == expected


def test_a_base_lists_the_adapters_of_its_variants_too(thousand: tuple[Path, Registry]) -> None:
    home, _ = thousand
    for name in ("llama", "llama-nf4"):
        assert {adapter.base for adapter in list_adapters(home, base=name)} == {"llama", "llama-nf4"}
        assert len(list_adapters(home, base=name)) == 500
    assert {adapter.base for adapter in list_adapters(home, base="mistral")} == {"mistral"}
    with pytest.raises(NotFoundError, match="did you mean 'mistral'"):
        list_adapters(home, base="mistrl")


@pytest.mark.parametrize("sort", ["rank", "alpha", "size_bytes", "created_at"])
def test_numbers_sort_from_the_largest_and_the_unknown_come_last(thousand: tuple[Path, Registry], sort: str) -> None:
    home, registry = thousand
    values = [getattr(adapter, sort) for adapter in list_adapters(home, sort=sort)]  # type: ignore[arg-type]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=True)
    assert values[len(known) :] == [None] * (1000 - len(known))
    assert registry.adapters.list(sort=sort) == list_adapters(home, sort=sort)  # type: ignore[arg-type]


@pytest.mark.parametrize("sort", ["name", "kind", "base"])
def test_words_sort_from_a_and_equal_ones_by_name_and_version(thousand: tuple[Path, Registry], sort: str) -> None:
    home, _ = thousand
    keys = [
        (
            getattr(adapter, sort) is None,
            (getattr(adapter, sort) or "").lower(),
            adapter.name.lower(),
            adapter.version,
        )
        for adapter in list_adapters(home, sort=sort)  # type: ignore[arg-type]
    ]
    assert keys == sorted(keys)


def test_an_unknown_order_is_refused(thousand: tuple[Path, Registry]) -> None:
    home, _ = thousand
    with pytest.raises(RegistryError, match="created_at"):
        list_adapters(home, sort="age\x1b")  # type: ignore[arg-type]
