"""A store's labels say what its entries are: a lost catalogue is made again from them, and nothing is freed by mistake."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from catalogued import digest, facts

from registry import AdapterRecord, Location, MergedAdapter, NotSureError, Registry, RegistryFullError
from registry.label_files import own_suffix
from registry.tables import metadata

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


def add(catalogue: Registry, name: str, weights: str | None = None, **more: Any) -> AdapterRecord:
    """An adapter with files of its own in the store."""
    known = facts(weights or name, config={"r": 8}, recipe={"lr": 0.1}, family="llama")
    with catalogue.store.stage({**FILES, "name": (weights or name).encode()}) as staged:
        return catalogue.adapters.add(name, known, staged=staged, **more)[0]


@pytest.fixture
def filled(catalogue: Registry, tmp_path: Path) -> Registry:
    """A catalogue with two bases, three adapters of which one came from another, and tags."""
    (tmp_path / "llama").mkdir()
    catalogue.bases.add(
        "llama", "meta/llama", path=tmp_path / "llama", fingerprint=digest("llama"), files={"m": {"size": 1}}
    )
    catalogue.bases.add("llama-nf4", "here", fingerprint=digest("nf4"), variant_of="llama")
    add(catalogue, "pirate", "a", base="llama", tags=["speech", "sea"])
    newest = add(
        catalogue, "pirate", "b", base="llama-nf4", locations=[Location(kind="hub", repo="me/pirate", revision="c")]
    )
    parrot = add(catalogue, "parrot")
    catalogue.lineage.record(parrot, newest, "truncate", details={"rank": 4})
    return catalogue


def lose(catalogue: Registry) -> None:
    """Empties every table, as a file that is lost and made anew."""
    with catalogue.database.writing() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


def state(catalogue: Registry) -> list[Any]:
    """Everything that the catalogue says of its adapters and bases, but for row ids."""
    seen: list[Any] = []
    for summary in catalogue.adapters.list():
        record = catalogue.adapters.find(summary.reference)
        edges = [
            (edge.parent, edge.operation, edge.details, edge.parent_id is None)
            for edge in catalogue.lineage.parents(record)
        ]
        seen.append(
            (
                {
                    **{name: getattr(record, name) for name in record.__dataclass_fields__},
                    "id": 0,
                    "locations": {*record.locations},
                },
                edges,
            )
        )
    return [
        *seen,
        *(
            {name: getattr(base, name) for name in base.__dataclass_fields__ if name != "id"}
            for base in catalogue.bases.list()
        ),
    ]


def label(catalogue: Registry, record: AdapterRecord) -> Path:
    folder = catalogue.adapters.files(record)
    return folder.with_name(folder.name + own_suffix(catalogue.store))


def test_a_lost_catalogue_is_made_again_from_its_store_alone(filled: Registry) -> None:
    before = state(filled)
    lose(filled)
    assert state(filled) == []
    rebuilt = filled.doctor.rebuild()
    assert (rebuilt.named, rebuilt.bases, rebuilt.unnamed) == (
        ("parrot@1", "pirate@1", "pirate@2"),
        ("llama", "llama-nf4"),
        (),
    )
    assert state(filled) == before
    assert filled.doctor.examine(deep=True) == ()
    again = filled.doctor.rebuild()
    assert (again.named, again.bases, again.unnamed) == ((), (), ())
    assert state(filled) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda registry: registry.adapters.tag("pirate", "late"),
        lambda registry: registry.adapters.untag("pirate@1", "sea"),
        lambda registry: registry.adapters.rename("pirate", "corsair"),
        lambda registry: registry.adapters.update("parrot", base="llama", metrics={"loss": 2.5}),
        lambda registry: registry.adapters.add_location("parrot", Location(kind="hub", repo="me/parrot")),
        lambda registry: registry.adapters.remove("pirate@1"),
        lambda registry: registry.bases.update("llama", path=Path("/elsewhere")),
        lambda registry: registry.bases.remove("llama-nf4", force=True),
        lambda registry: add(registry, "second", "a", tags=["same-files"]),
    ],
)
def test_labels_follow_what_changes(filled: Registry, change: Callable[[Registry], object]) -> None:
    change(filled)
    before = state(filled)
    lose(filled)
    filled.doctor.rebuild()
    assert state(filled) == before


def test_what_was_rolled_back_is_not_in_a_label(filled: Registry) -> None:
    before = state(filled)
    with pytest.raises(ValueError, match="stop"), filled.writing():
        filled.adapters.tag("parrot", "never")
        filled.adapters.rename("pirate", "never")
        raise ValueError("stop")
    filled.adapters.tag("parrot", "then")
    filled.adapters.untag("parrot", "then")
    lose(filled)
    filled.doctor.rebuild()
    assert state(filled) == before


def test_rows_that_are_there_stay_and_a_version_that_is_taken_gets_the_next_number(filled: Registry) -> None:
    lose(filled)
    taken = add(filled, "pirate", "other", tags=["new"])
    rebuilt = filled.doctor.rebuild()
    assert rebuilt.named == ("parrot@1", "pirate@2", "pirate@3 (was pirate@1)")
    assert filled.adapters.find("pirate@1") == taken
    assert filled.adapters.find("pirate@3").sha256 == digest("a")
    assert filled.doctor.rebuild().named == ()


def test_an_adapter_that_was_added_again_by_hand_is_not_named_twice(filled: Registry) -> None:
    lose(filled)
    add(filled, "parrot")
    assert filled.doctor.rebuild().named == ("pirate@1", "pirate@2")
    assert filled.counts().versions == 3


def test_merges_that_a_backup_still_has_know_their_adapters_again(filled: Registry, tmp_path: Path) -> None:
    member = MergedAdapter(adapter="parrot@1", sha256=digest("parrot"), weight=1.0)
    lose(filled)
    filled.merges.record(tmp_path / "out", base_fingerprint=digest("llama"), merged=[member])
    filled.doctor.rebuild()
    assert len(filled.merges.of_adapter(filled.adapters.find("parrot"))) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"{"),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text("[" * 5000 + "]" * 5000),
        lambda path: path.write_text(json.dumps({"schema": 99, "adapters": []})),
        lambda path: path.write_text(json.dumps({"schema": 1, "adapters": {"name": "parrot"}})),
        lambda path: path.write_text(path.read_text().replace('"parrot"', '"../parrot"')),
        lambda path: path.write_text(path.read_text().replace('"rank": 8', '"rank": 1e999')),
        lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": true')),
        lambda path: path.write_text(path.read_text().replace('"alpha": 16.0', '"alpha": 1' + "0" * 400)),
        lambda path: path.write_text(path.read_text().replace('"llama"', '"\\ud800"')),
        lambda path: path.write_text(path.read_text().replace('"r": 8', '"r": NaN')),
        lambda path: path.write_text(
            re.sub('"created_at": "[^"]*"', '"created_at": "9999-12-31T23:59:59-23:59"', path.read_text())
        ),
        lambda path: path.write_text(
            re.sub('"created_at": "[^"]*"', '"created_at": "0001-01-01T00:00:00+23:59"', path.read_text())
        ),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: os.truncate(path, 1 << 30),
    ],
)
def test_a_label_that_is_none_is_said_with_the_entry_and_the_way_on(
    filled: Registry, harm: Callable[[Path], object]
) -> None:
    parrot = filled.adapters.find("parrot")
    folder = filled.adapters.files(parrot)
    harm(label(filled, parrot))
    lose(filled)
    rebuilt = filled.doctor.rebuild()
    assert rebuilt.named == ("pirate@1", "pirate@2")
    (unnamed,) = rebuilt.unnamed
    assert unnamed.path == folder
    assert f"loratool add {folder} --name NAME" in unnamed.message
    assert unnamed.message.isprintable()


def test_a_label_may_not_make_a_family_that_goes_round_in_a_circle(filled: Registry) -> None:
    path = label(filled, filled.adapters.find("pirate@2"))
    value = json.loads(path.read_text())
    (edge,) = json.loads(label(filled, filled.adapters.find("parrot")).read_text())["adapters"][0]["parents"]
    value["adapters"][0]["parents"] = [edge | {"parent": "parrot@1", "parent_sha256": digest("parrot")}]
    path.write_text(json.dumps(value))
    lose(filled)
    filled.doctor.rebuild()
    parrot = filled.adapters.find("parrot")
    assert parrot.id not in {edge.parent_id for edge in filled.lineage.ancestors(parrot)}


def test_without_the_list_of_bases_they_are_made_from_what_adapters_say(filled: Registry) -> None:
    (filled.store.root / f"bases{own_suffix(filled.store)}").unlink()
    lose(filled)
    assert filled.doctor.rebuild().bases == ("llama", "llama-nf4")
    llama = filled.bases.find("llama")
    assert (llama.source, llama.fingerprint) == ("meta/llama", digest("llama"))
    assert filled.adapters.find("pirate@1").base == "llama"


def test_collecting_what_a_rebuild_could_name_has_to_be_meant(filled: Registry) -> None:
    lose(filled)
    add(filled, "single")
    assert {finding.kind for finding in filled.doctor.examine()} == {"store-orphan"}
    assert all("--rebuild" in finding.message for finding in filled.doctor.examine())
    with pytest.raises(NotSureError, match=r"parrot@1, pirate@1, pirate@2.*--rebuild.*--yes"):
        filled.doctor.collect()
    assert len(list(filled.store.entries())) == 4
    filled.doctor.rebuild()
    assert filled.doctor.collect().entries == 0
    lose(filled)
    assert filled.doctor.collect(sure=True).entries == 4
    assert [path for path in filled.store.root.glob("*/*") if path.name != "tmp"] == []


def test_labels_that_are_missing_are_written_by_the_next_collection(filled: Registry) -> None:
    before = state(filled)
    for record in (filled.adapters.find("parrot"), filled.adapters.find("pirate")):
        label(filled, record).unlink()
    (filled.store.root / f"bases{own_suffix(filled.store)}").unlink()
    filled.doctor.collect()
    lose(filled)
    filled.doctor.rebuild()
    assert state(filled) == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "endless"])
def test_a_label_is_written_in_the_place_of_what_cannot_be_read_to_its_end(
    filled: Registry, make: Callable[[Path], object]
) -> None:
    parrot = filled.adapters.find("parrot")
    path = label(filled, parrot)
    path.unlink()
    make(path)
    assert filled.adapters.tag("parrot", "kept").tags == ("kept",)
    assert json.loads(path.read_text())["adapters"][0]["tags"] == ["kept"]


def test_a_label_that_cannot_be_written_fails_nothing_and_is_said(
    filled: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object, **more: object) -> None:
        raise RegistryFullError("the disk is full")

    monkeypatch.setattr("registry.labels.write_label", full)
    assert filled.adapters.tag("parrot", "kept").tags == ("kept",)
    assert "doctor --gc" in caplog.text


def test_an_empty_catalogue_beside_a_full_store_says_so(filled: Registry) -> None:
    assert filled.lost_note() is None
    lose(filled)
    note = filled.lost_note()
    assert note is not None
    assert "holds 3 adapters" in note and "loratool doctor --rebuild" in note


def test_catalogues_that_share_a_store_keep_labels_of_their_own(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with Registry.open(home) as one, Registry.open(home, f"sqlite:///{other}") as two:
        add(one, "pirate", "same", tags=["one"])
        add(two, "parrot", "same", tags=["two"])
        lose(one)
        assert one.doctor.rebuild().named == ("pirate@1",)
        assert one.lost_note() is None
        lose(two)
        assert two.doctor.rebuild().named == ("parrot@1",)
    other.unlink()
    with Registry.open(home) as one:  # what was the other's is nobody's now
        assert one.doctor.rebuild().named == ("parrot@1",)
        assert one.doctor.rebuild().named == ()
