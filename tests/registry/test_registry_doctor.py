"""The doctor finds what is gone or damaged, says what to do, and is silent about what is well."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from catalogued import digest, facts

from registry import Location, MergedAdapter, Registry


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
    assert all(finding.message.isprintable() and ";" in finding.message for finding in findings)
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


def test_a_changed_byte_in_the_store_is_found_by_a_deep_look(well: Registry) -> None:
    (well.adapters.files(well.adapters.find("stored")) / "adapter_model.safetensors").write_bytes(b"weighty")
    assert found(well) == []
    assert [kind for kind, _ in found(well, deep=True)] == ["store-damaged"]
