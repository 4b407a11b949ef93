"""The doctor finds what is gone or damaged, says what to do, and is silent about what is well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from catalogued import digest, facts
from sqlalchemy import event, update

from registry import Location, MergedAdapter, Registry
from registry.label_files import own_suffix
from registry.tables import locations


@pytest.fixture
def well(catalogue: Registry, tmp_path: Path) -> Registry:
    """A catalogue with a base, an adapter in the store and beside it, and a merge, all there."""
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "undo").write_bytes(b"undo")
    (tmp_path / "pirate.st").write_bytes(b"weights")
    catalogue.bases.add("llama", "here", path=tmp_path / "base", fingerprint=digest("llama"))
    with catalogue.store.stage({"adapter_model.safetensors": b"weights"}) as staged:
        catalogue.adapters.add("stored", facts("stored"), staged=staged)
    catalogue.adapters.add("beside", facts(), locations=[Location(kind="path", path=tmp_path / "pirate.st")])
    catalogue.adapters.add("remote", facts(), locations=[Location(kind="hub", repo="me/pirate")])
    catalogue.merges.record(
        tmp_path / "out",
        base_fingerprint=digest("llama"),
        merged=[MergedAdapter(adapter="beside@1", sha256=digest("weights"), weight=1.0)],
        undo_file=tmp_path / "out" / "undo",
    )
    return catalogue


def found(catalogue: Registry, *, deep: bool = False) -> list[tuple[str, str]]:
    findings = catalogue.doctor.examine(deep=deep)
    for finding in findings:
        assert finding.message.isprintable()
        assert "; " in finding.message, "it does not say what to do"
        assert finding.path is not None and str(finding.path) in finding.message
        assert all(name in finding.message for name in finding.subject.split(" + "))
    return [(finding.kind, finding.subject) for finding in findings]


def test_a_catalogue_that_is_well_has_no_findings(well: Registry) -> None:
    assert found(well, deep=True) == []


def test_a_catalogue_that_was_never_made_is_well(home: Path) -> None:
    with Registry.open(home, read_only=True) as nothing:
        assert found(nothing, deep=True) == []
    assert not home.exists()


def test_a_base_whose_folder_is_gone_is_found(well: Registry, tmp_path: Path) -> None:
    (tmp_path / "base").rmdir()
    assert found(well) == [("base-missing", "llama")]


def test_an_adapter_whose_files_are_gone_is_found(well: Registry, tmp_path: Path) -> None:
    (tmp_path / "pirate.st").unlink()
    shutil.rmtree(well.adapters.files(well.adapters.find("stored")))
    assert found(well) == [("adapter-files-missing", "beside@1"), ("adapter-files-missing", "stored@1")]


def test_an_adapter_that_still_lies_elsewhere_is_not_lost(well: Registry, tmp_path: Path) -> None:
    well.adapters.add_location("beside", Location(kind="path", path=tmp_path / "gone.st"))
    assert found(well) == []


def test_a_merged_model_that_is_gone_is_found_unless_it_was_unmerged(well: Registry, tmp_path: Path) -> None:
    (tmp_path / "out" / "undo").unlink()
    assert found(well) == [("undo-file-missing", "beside@1")]
    (tmp_path / "out").rmdir()
    assert found(well) == [("merge-output-missing", "beside@1")]
    well.merges.set_state(well.merges.list()[0].id, "unmerged")
    assert found(well) == []


def add(catalogue: Registry, name: str, *places: Location) -> Path:
    """An adapter of three files; its folder in the store."""
    files = {"adapter_model.safetensors": name.encode() * 1000, "adapter_config.json": b"{}", "loratool.json": b"[]"}
    with catalogue.store.stage(files) as staged:
        record, _ = catalogue.adapters.add(name, facts(name), staged=staged, locations=places)
    return catalogue.adapters.files(record)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "loratool.json"])
def test_a_file_that_is_deleted_or_cut_is_found_without_a_deep_look(catalogue: Registry, name: str) -> None:
    folder = add(catalogue, "pirate")
    add(catalogue, "parrot")
    (folder / name).write_bytes(b"")
    (cut,) = catalogue.doctor.examine()
    assert (cut.kind, cut.subject, cut.path) == ("store-damaged", "pirate@1", folder / name)
    assert "0 bytes instead of" in cut.message and f"delete '{folder}'" in cut.message
    (folder / name).unlink()
    (gone,) = catalogue.doctor.examine()
    assert (gone.kind, gone.subject, gone.path) == ("adapter-files-missing", "pirate@1", folder / name)
    assert str(folder / name) in gone.message and "loratool remove pirate@1" in gone.message
    add(catalogue, "pirate")
    assert found(catalogue, deep=True) == []


def test_a_link_or_folder_in_the_place_of_a_file_is_no_file(catalogue: Registry, tmp_path: Path) -> None:
    folder = add(catalogue, "pirate")
    (folder / "loratool.json").rename(tmp_path / "elsewhere")
    (folder / "loratool.json").symlink_to(tmp_path / "elsewhere")
    assert found(catalogue) == [("adapter-files-missing", "pirate@1")]
    shutil.rmtree(folder)
    folder.write_bytes(b"a file")
    assert found(catalogue) == [("store-damaged", "pirate@1")]


def test_a_deep_look_names_the_adapter_the_file_and_the_way_back(catalogue: Registry) -> None:
    folder = add(catalogue, "pirate", Location(kind="hub", repo="me/pirate", revision="abc"))
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"x")
    assert found(catalogue) == []
    (changed,) = catalogue.doctor.examine(deep=True)
    assert (changed.kind, changed.subject) == ("store-damaged", "pirate@1")
    assert changed.path == folder / "adapter_model.safetensors"
    assert "'loratool pull me/pirate@abc --name pirate'" in changed.message
    # Without the label, the changed file cannot be named.
    folder.with_name(f"{folder.name}{own_suffix(catalogue.store)}").unlink()
    (changed,) = catalogue.doctor.examine(deep=True)
    assert (changed.subject, changed.path) == ("pirate@1", folder)


def test_a_fault_is_said_of_every_adapter_that_the_entry_is(catalogue: Registry) -> None:
    for name in ("one", "two"):
        with catalogue.store.stage({"adapter_model.safetensors": b"weights"}) as staged:
            record, _ = catalogue.adapters.add(name, facts("weights"), staged=staged)
    (catalogue.adapters.files(record) / "adapter_model.safetensors").unlink()
    assert [subject for _, subject in found(catalogue)] == ["one@1", "two@1"]


def test_what_was_put_into_an_entry_is_named_and_nothing_waits_for_it(catalogue: Registry, tmp_path: Path) -> None:
    folder = add(catalogue, "pirate")
    (folder / "letter.txt").write_text("mine")
    os.mkfifo(folder / "zz")
    (folder / "zy").symlink_to(tmp_path)
    (folder / "zx").mkdir()
    for removed in (False, True):
        if removed:
            catalogue.adapters.remove("pirate")
        for deep in (False, True):
            seen = catalogue.doctor.examine(deep=deep)
            assert [each.path for each in seen] == [folder / name for name in ("letter.txt", "zx", "zy", "zz")]
            assert all("was not there" in each.message and "; delete it" in each.message for each in seen)


def test_an_entry_without_a_label_holds_only_files(catalogue: Registry) -> None:
    folder = add(catalogue, "pirate")
    folder.with_name(f"{folder.name}{own_suffix(catalogue.store)}").unlink()
    os.mkfifo(folder / "zz")
    assert found(catalogue) == [("store-foreign", "pirate@1")]


def test_a_row_that_names_no_entry_is_found_and_ends_nothing(catalogue: Registry) -> None:
    add(catalogue, "pirate")
    folder = add(catalogue, "parrot")
    with catalogue.database.writing() as connection:
        connection.execute(update(locations).where(locations.c.adapter_id == 1).values(store_key="../../etc"))
    shutil.rmtree(folder)
    kinds = [(finding.kind, finding.subject) for finding in catalogue.doctor.examine(deep=True)]
    assert ("adapter-files-missing", "parrot@1") in kinds and ("adapter-files-missing", "pirate@1") in kinds


def test_the_files_of_a_removed_adapter_are_looked_for(catalogue: Registry) -> None:
    folder = add(catalogue, "pirate")
    catalogue.adapters.remove("pirate")
    assert found(catalogue, deep=True) == []
    (folder / "adapter_model.safetensors").unlink()
    (lost,) = catalogue.doctor.examine()
    assert (lost.subject, lost.path) == ("pirate@1", folder / "adapter_model.safetensors")
    assert "loratool remove pirate@1 --now" in lost.message
    shutil.rmtree(folder)
    assert found(catalogue) == [("adapter-files-missing", "pirate@1")]
    catalogue.adapters.remove("pirate", now=True)
    assert found(catalogue) == []


def test_the_number_of_queries_does_not_grow_with_the_catalogue(catalogue: Registry, tmp_path: Path) -> None:
    queries: list[str] = []
    event.listen(catalogue.database.engine, "before_cursor_execute", lambda *args: queries.append(args[2]))

    def count(deep: bool) -> int:
        queries.clear()
        catalogue.doctor.examine(deep=deep)
        return len(queries)

    counts = []
    for number in range(3):
        for each in range(8):
            name = f"pirate-{number}-{each}"
            shutil.rmtree(add(catalogue, f"{name}-gone"))
            add(catalogue, name)
            catalogue.bases.add(f"base-{name}", "here", path=tmp_path / name)
            merged = [MergedAdapter(adapter=f"{name}@1", sha256=digest(name), weight=1.0)]
            catalogue.merges.record(tmp_path / name, base_fingerprint=digest("llama"), merged=merged)
            catalogue.store.put({"orphan": name.encode()})
        counts.append((count(False), count(True)))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] < 15


class Watching:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.label, self.total, self.done = "", 0, 0

    def begin(self, label: str, total: int) -> None:
        self.label, self.total = label, total

    def advance(self, count: int) -> None:
        self.done += count


def test_a_watcher_is_told_how_far_it_is(catalogue: Registry) -> None:
    for name in ("pirate", "parrot"):
        add(catalogue, name)
    for deep, total in ((False, 2), (True, sum(len(name) * 1000 + 4 for name in ("pirate", "parrot")))):
        watching = Watching()
        catalogue.doctor.examine(deep=deep, watcher=watching)
        assert (watching.total, watching.done) == (total, total)


def test_a_changed_byte_in_the_store_is_found_by_a_deep_look(well: Registry) -> None:
    (well.adapters.files(well.adapters.find("stored")) / "adapter_model.safetensors").write_bytes(b"weighty")
    assert found(well) == []
    assert [kind for kind, _ in found(well, deep=True)] == ["store-damaged"]
