"""A damaged row is named by `doctor` with its way out, is repaired, and stops only what needs that very row."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from catalogued import SERVER, digest, facts
from sqlalchemy import text
from test_registry_rebuild import add, state

from registry import MergedAdapter, Registry, RegistryError
from registry.label_files import label_path, own_suffix, read_label
from registry.tables import removed_adapters

pytestmark = pytest.mark.skipif(SERVER is not None, reason="other databases check what their columns hold")

BAD = ["[[[", "5", "null", "{}", b"\xff", "9" * 5000]


@pytest.fixture
def filled(catalogue: Registry) -> Registry:
    """Two adapters in the trash and two in the catalogue, all with tags."""
    for name in ("terse", "other", "pirate", "parrot"):
        add(catalogue, name, tags=["speech"])
    catalogue.adapters.remove("terse")
    catalogue.adapters.remove("other")
    return catalogue


def spoil(catalogue: Registry, table: str, column: str, value: object, where: str = "1 = 1") -> None:
    with catalogue.database.writing() as connection:
        connection.execute(text(f"UPDATE {table} SET {column} = :value WHERE {where}"), {"value": value})


def spoil_alpha(catalogue: Registry) -> None:
    """An entry in the trash gets a number that no float can hold."""
    with catalogue.database.reading() as connection:
        entry = connection.execute(removed_adapters.select().where(removed_adapters.c.name == "terse")).one().entry
    value = json.dumps(entry | {"alpha": 10**400})
    spoil(catalogue, "removed_adapters", "entry", value, "name = 'terse'")


def damaged(catalogue: Registry) -> dict[str, str]:
    return {each.subject: each.message for each in catalogue.doctor.examine() if each.kind == "row-damaged"}


def lose_label(catalogue: Registry, name: str) -> None:
    with catalogue.database.reading() as connection:
        query = text(
            "SELECT store_key FROM removed_adapters WHERE name = :name UNION SELECT l.store_key FROM locations l "
            "JOIN adapters a ON a.id = l.adapter_id WHERE a.name = :name"
        )
        key = connection.execute(query, {"name": name}).scalar_one()
    label_path(catalogue.store, key, own_suffix(catalogue.store)).unlink()


@pytest.mark.parametrize("value", BAD)
def test_a_damaged_row_of_the_trash_stops_only_its_own_restoration(filled: Registry, value: object) -> None:
    spoil(filled, "removed_adapters", "entry", value, "name = 'terse'")
    assert {each.reference for each in filled.trash.list()} == {"terse@1", "other@1"}
    with pytest.raises(RegistryError, match="terse@1 in the trash is damaged"):
        filled.trash.restore("terse")
    filled.trash.restore("other")
    filled.adapters.remove("pirate")
    add(filled, "terse", "again")
    assert list(damaged(filled)) == ["terse@1"]
    assert filled.doctor.collect().emptied == ()
    assert len(list(filled.store.entries())) == 5


@pytest.mark.parametrize("spoiled", ["text", "number"])
def test_a_damaged_row_of_the_trash_is_repaired_from_its_label(filled: Registry, spoiled: str) -> None:
    before = filled.trash.list()
    spoil_alpha(filled) if spoiled == "number" else spoil(filled, "removed_adapters", "entry", "[[[")
    filled.doctor.collect()  # keeps the labels
    assert "'loratool doctor --rebuild'" in damaged(filled)["terse@1"]
    assert "terse@1 in the trash" in filled.doctor.rebuild().repaired
    assert (filled.trash.list(), damaged(filled)) == (before, {})
    filled.trash.restore("terse")
    assert filled.adapters.find("terse").tags == ("speech",)


def test_a_damaged_row_of_the_trash_without_a_label_is_forgotten_by_the_command_that_is_given(filled: Registry) -> None:
    spoil(filled, "removed_adapters", "entry", "[[[", "name = 'terse'")
    lose_label(filled, "terse")
    add(filled, "terse", "again")  # version 2: the name is in the catalogue too
    assert filled.doctor.rebuild().repaired == ()
    assert "'loratool remove terse@1 --now'" in damaged(filled)["terse@1"]
    (removed,) = filled.adapters.remove("terse@1", now=True)
    assert (removed.reference, damaged(filled), filled.adapters.find("terse").version) == ("terse@1", {}, 2)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("config", "[[["),
        ("config", "5"),
        ("ranks", '{"q": "x"}'),
        ("scaling", "9" * 400),
        ("scaling", "[1]"),
        ("created_at", "last week"),
        ("target_modules", b"\xff"),
    ],
)
def test_a_damaged_row_of_the_catalogue_stops_only_its_own_adapter(
    filled: Registry, column: str, value: object
) -> None:
    before = state(filled)
    spoil(filled, "adapters", column, value, "name = 'pirate'")
    assert list(damaged(filled)) == ["pirate@1"]
    filled.trash.restore("other")
    filled.adapters.tag("parrot", "sea")
    filled.adapters.untag("parrot", "sea")
    filled.adapters.remove("other")
    assert filled.doctor.collect().entries == 0
    assert [each.name for each in filled.adapters.list() if each.name != "pirate"] == ["parrot"]
    assert filled.doctor.rebuild().repaired == ("pirate@1",)
    assert (state(filled), damaged(filled)) == (before, {})


@pytest.mark.parametrize(("column", "value"), [("config", "[[["), ("ranks", b"\xff"), ("created_at", "x")])
def test_what_needs_a_damaged_row_names_it(filled: Registry, column: str, value: object) -> None:
    spoil(filled, "adapters", column, value, "name = 'pirate'")
    needs: list[Callable[[], object]] = [
        lambda: filled.adapters.find("pirate"),
        lambda: filled.adapters.versions("pirate"),
        lambda: filled.adapters.find_by_sha256(digest("pirate")),
        lambda: filled.adapters.remove("pirate"),
    ]
    for need in needs:
        with pytest.raises(RegistryError, match="the row of pirate@1") as raised:
            need()
        assert "'loratool doctor'" in str(raised.value)


def test_a_damaged_value_that_no_label_has_is_left_empty(filled: Registry) -> None:
    spoil(filled, "adapters", "config", "[[[", "name = 'pirate'")
    lose_label(filled, "pirate")
    assert filled.doctor.rebuild().repaired == ("pirate@1",)
    record = filled.adapters.find("pirate")
    assert (record.config, record.tags, record.ranks) == (None, ("speech",), facts().ranks)


def test_damaged_rows_of_bases_merges_and_lineage_are_named_and_repaired(filled: Registry, tmp_path: Path) -> None:
    filled.bases.add("llama", "meta/llama", fingerprint=digest("llama"))
    filled.lineage.record(filled.adapters.find("parrot"), filled.adapters.find("pirate"), "truncate", details={"a": 1})
    member = MergedAdapter(adapter="pirate@1", sha256=digest("pirate"), weight=1.0)
    filled.merges.record(tmp_path, base_fingerprint=digest("llama"), merged=[member])
    spoil(filled, "bases", "files", "[[[")
    spoil(filled, "merges", "options", "[[[")
    spoil(filled, "lineage", "details", "[[[")
    assert {word.split()[0] for word in damaged(filled)} == {"base", "merge", "lineage,"}
    filled.adapters.tag("pirate", "sea")
    assert len(filled.doctor.rebuild().repaired) == 3
    assert damaged(filled) == {}
    assert filled.bases.list()[0].created_at < datetime.now(UTC)


def test_a_merge_and_a_lineage_whose_details_are_damaged_are_read_without_them_and_named(
    filled: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pirate, parrot = filled.adapters.find("pirate"), filled.adapters.find("parrot")
    filled.lineage.record(parrot, pirate, "truncate", details={"a": 1})
    member = MergedAdapter(adapter="pirate@1", sha256=digest("pirate"), weight=1.0)
    for name in ("first", "second"):
        filled.merges.record(
            tmp_path / name, base_fingerprint=digest("llama"), merged=[member], options={"seconds": 1.0}
        )
    spoil(filled, "merges", "options", "[[[", "id = 1")
    spoil(filled, "lineage", "details", "[[[")
    found = filled.merges.list()
    assert [(merge.output, merge.options) for merge in found] == [
        (tmp_path / "second", {"seconds": 1.0}),
        (tmp_path / "first", None),
    ]
    assert [merge.adapters for merge in found] == [(member,), (member,)]
    assert f"the merge into '{tmp_path / 'first'}'" in caplog.text and "'loratool doctor'" in caplog.text
    caplog.clear()
    (edge,) = filled.lineage.ancestors(parrot)
    assert (edge.parent, edge.operation, edge.details) == ("pirate@1", "truncate", None)
    assert "the lineage of parrot@1" in caplog.text and "[[[" in caplog.text
    assert filled.lineage.record(parrot, pirate, "truncate") == edge
    spoil(filled, "merges", "created_at", "yesterday", "id = 1")
    with pytest.raises(RegistryError, match=r"row 1 of merges .*'loratool doctor'"):
        filled.merges.list()
    filled.doctor.rebuild()
    caplog.clear()
    assert len(filled.merges.list()) == 2 and caplog.text == ""


def test_a_damaged_row_of_a_base_is_left_out_of_the_list_with_a_note(
    filled: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("llama", "qwen"):
        filled.bases.add(name, f"meta/{name}", fingerprint=digest(name))
    spoil(filled, "bases", "files", "[[[", "name = 'llama'")
    assert [base.name for base in filled.bases.list()] == ["qwen"]
    (note,) = caplog.messages
    assert "base llama" in note
    assert filled.doctor.rebuild().repaired == ("base llama",)
    assert [base.name for base in filled.bases.list()] == ["llama", "qwen"]


def test_the_label_of_a_damaged_row_keeps_what_it_says(filled: Registry) -> None:
    (key,) = [place.store_key for place in filled.adapters.find("pirate").locations if place.store_key]
    path = label_path(filled.store, key, own_suffix(filled.store))
    before = read_label(path)
    spoil(filled, "adapters", "scaling", "9" * 400, "name = 'pirate'")
    with filled.writing():
        filled.labels.refresh_all()
    assert read_label(path) == before


def test_adapters_of_one_name_and_version_in_the_trash_are_not_told_apart_by_it(filled: Registry) -> None:
    filled.adapters.rename("pirate", "terse")
    filled.adapters.remove("terse@1")
    with pytest.raises(RegistryError, match="with --all"):
        filled.trash.restore("terse")
    assert len(filled.trash.restore("terse", all_versions=True)) == 2
    assert [each.version for each in filled.adapters.versions("terse")] == [1, 2]
