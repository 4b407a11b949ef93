"""What is removed goes to the trash and comes back as it was; emptied, it is gone and nothing else is."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from catalogued import digest, facts
from sqlalchemy import update
from test_registry_rebuild import add, lose, state

from registry import (
    AdapterRecord,
    InUseError,
    InvalidNameError,
    Location,
    MergedAdapter,
    NotFoundError,
    NotSureError,
    Registry,
)
from registry.siblings import names_nothing
from registry.tables import removed_adapters


@pytest.fixture
def filled(catalogue: Registry, tmp_path: Path) -> Registry:
    """Two versions with tags and a place on the Hub, a child, and a merge of the newest."""
    catalogue.bases.add("llama", "meta/llama", fingerprint=digest("llama"))
    add(catalogue, "pirate", "a", base="llama", tags=["speech"])
    newest = add(
        catalogue, "pirate", "b", base="llama", locations=[Location(kind="hub", repo="me/pirate", revision="c")]
    )
    catalogue.lineage.record(add(catalogue, "small"), newest, "truncate")
    catalogue.lineage.record(newest, "file.st", "extract", parent_sha256=digest("file"))
    member = MergedAdapter(adapter="pirate@2", sha256=newest.sha256, weight=1.0)
    catalogue.merges.record(tmp_path / "out", base_fingerprint=digest("llama"), merged=[member])
    return catalogue


def days_pass(catalogue: Registry, days: float) -> None:
    with catalogue.database.writing() as connection:
        connection.execute(update(removed_adapters).values(removed_at=datetime.now(UTC) - timedelta(days=days)))


def entries(catalogue: Registry) -> int:
    return len(list(catalogue.store.entries()))


def test_what_was_removed_is_restored_as_it_was(filled: Registry) -> None:
    before = state(filled), [each.id for each in filled.merges.list()]
    for _ in range(2):
        filled.adapters.remove("pirate", all_versions=True)
        assert [record.name for record in filled.adapters.list()] == ["small"]
        assert [each.reference for each in filled.trash.list()] == ["pirate@2", "pirate@1"]
        assert entries(filled) == 3
        filled.trash.restore("pirate", all_versions=True)
        assert filled.trash.list() == ()
    assert (state(filled), [each.id for each in filled.merges.list()]) == before
    newest = filled.adapters.find("pirate@2")
    assert [edge.child for edge in filled.lineage.descendants(newest)] == ["small@1"]
    assert len(filled.merges.of_adapter(newest)) == 1


def test_one_version_of_several_is_restored_never_several_by_accident(filled: Registry) -> None:
    filled.adapters.remove("pirate", all_versions=True)
    with pytest.raises(InUseError, match="pirate@2"):
        filled.trash.restore("pirate")
    filled.trash.restore("pirate@1")
    filled.trash.restore("pirate")
    assert [record.version for record in filled.adapters.versions("pirate")] == [1, 2]


def test_a_removed_adapter_is_found_to_be_in_the_trash(filled: Registry) -> None:
    filled.adapters.remove("small")
    with pytest.raises(NotFoundError, match="'loratool restore small@1' puts it back"):
        filled.adapters.find("small")
    with pytest.raises(NotFoundError, match="small"):
        filled.trash.restore("smal")
    with pytest.raises(NotFoundError):
        filled.trash.restore("pirate")
    with pytest.raises(InvalidNameError):
        filled.trash.restore("../small")


def test_a_version_number_is_not_given_twice_unless_the_same_adapter_comes_back(filled: Registry) -> None:
    filled.adapters.remove("pirate@2")
    assert add(filled, "pirate", "new").version == 3
    again = add(filled, "pirate", "b")
    assert (again.version, again.tags, filled.trash.list()) == (2, (), ())
    assert [edge.child for edge in filled.lineage.descendants(again)] == ["small@1"]


def test_a_number_that_was_taken_meanwhile_gives_way(filled: Registry) -> None:
    filled.adapters.remove("small")
    filled.adapters.rename("pirate", "small")
    (restored,) = filled.trash.restore("small")
    record = filled.adapters.get(restored)
    assert record is not None
    assert (record.reference, record.sha256) == ("small@3", digest("small"))


def test_the_trash_is_emptied_of_what_has_been_there_for_its_time(filled: Registry) -> None:
    filled.adapters.remove("pirate@1")
    days_pass(filled, 29)
    filled.adapters.remove("small")
    assert filled.doctor.examine(deep=True) == () or {each.kind for each in filled.doctor.examine()} == {
        "merge-output-missing"
    }
    assert (filled.doctor.collect().emptied, entries(filled)) == ((), 3)
    freed = filled.doctor.collect(trash_days=29)
    assert (freed.emptied, freed.entries, entries(filled)) == (("pirate@1",), 1, 2)
    with pytest.raises(NotFoundError):
        filled.trash.restore("pirate@1")
    filled.trash.restore("small")


def test_emptying_a_trash_that_is_most_of_a_store_needs_no_second_word(filled: Registry) -> None:
    for name in ("pirate@1", "pirate@2", "small"):
        filled.adapters.remove(name)
    assert filled.doctor.collect(trash_days=0).entries == 3
    assert entries(filled) == 0


def test_removing_now_frees_at_once_also_what_is_in_the_trash(filled: Registry) -> None:
    filled.adapters.remove("pirate@1", now=True)
    assert (entries(filled), filled.trash.list()) == (2, ())
    filled.adapters.remove("small")
    (removed,) = filled.adapters.remove("small", now=True)
    assert isinstance(removed, AdapterRecord)
    assert (removed.reference, removed.sha256, entries(filled)) == ("small@1", digest("small"), 1)


def test_files_that_another_adapter_has_too_stay(filled: Registry) -> None:
    add(filled, "twin", "small")
    filled.adapters.remove("small", now=True)
    filled.adapters.remove("twin")
    add(filled, "third", "small")
    filled.doctor.collect(trash_days=0)
    assert filled.adapters.files(filled.adapters.find("third")).is_dir()


def test_a_restored_adapter_whose_files_are_gone_is_refused(filled: Registry) -> None:
    (folder,) = [filled.adapters.files(each) for each in filled.adapters.remove("small")]
    shutil.rmtree(folder)
    with pytest.raises(NotFoundError, match="gone from the trash"):
        filled.trash.restore("small")
    assert len(filled.trash.list()) == 1


def test_a_removal_or_restoration_that_is_rolled_back_did_not_happen(filled: Registry) -> None:
    before = state(filled)
    with pytest.raises(ValueError, match="stop"), filled.writing():
        filled.adapters.remove("small")
        raise ValueError("stop")
    assert (state(filled), filled.trash.list()) == (before, ())
    filled.adapters.remove("small")
    with pytest.raises(ValueError, match="stop"), filled.writing():
        filled.trash.restore("small")
        raise ValueError("stop")
    assert len(filled.trash.list()) == 1
    lose(filled)
    assert filled.doctor.rebuild().named == ("pirate@1", "pirate@2")
    assert [each.reference for each in filled.trash.list()] == ["small@1"]


def test_a_rebuild_puts_what_was_removed_into_the_trash_again(filled: Registry) -> None:
    filled.adapters.remove("pirate@2")
    removed = filled.trash.list()
    before = state(filled)
    lose(filled)
    assert filled.doctor.rebuild().named == ("pirate@1", "small@1")
    assert state(filled) == before
    assert [(each.reference, each.removed_at) for each in filled.trash.list()] == [("pirate@2", removed[0].removed_at)]
    assert filled.doctor.rebuild().named == ()
    filled.trash.restore("pirate@2")
    assert [edge.child for edge in filled.lineage.descendants(filled.adapters.find("pirate@2"))] == ["small@1"]


def test_a_catalogue_of_nothing_but_trash_is_not_lost_and_keeps_its_files_from_others(
    home: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.db"
    with Registry.open(home, f"sqlite:///{other}") as catalogue:
        add(catalogue, "pirate")
        catalogue.adapters.remove("pirate")
        assert catalogue.lost_note() is None
    assert not names_nothing(other)
    with Registry.open(home) as catalogue:
        assert catalogue.store.other_catalogues() == [str(other)]
        assert catalogue.doctor.collect().entries == 0


def test_an_adapter_that_lies_elsewhere_is_restored_too(catalogue: Registry, tmp_path: Path) -> None:
    (tmp_path / "pirate.st").write_bytes(b"weights")
    before, _ = catalogue.adapters.add(
        "pirate", facts(), locations=[Location(kind="path", path=tmp_path / "pirate.st")]
    )
    catalogue.adapters.remove("pirate")
    (restored,) = catalogue.trash.restore("pirate")
    after = catalogue.adapters.get(restored)
    assert after is not None
    assert (after.locations, after.created_at) == (before.locations, before.created_at)


def test_what_a_lost_trash_had_is_freed_without_being_asked_for(filled: Registry) -> None:
    filled.adapters.remove("small")
    with filled.database.writing() as connection:
        connection.execute(removed_adapters.delete())
    assert filled.doctor.lost() == {}
    assert filled.doctor.collect().entries == 1
    lose(filled)
    with pytest.raises(NotSureError):
        filled.doctor.collect()
