"""What came from what, and what was merged into what."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogued import digest, facts

from registry import AdapterRecord, MergedAdapter, NotFoundError, Registry, RegistryError


def adapter(catalogue: Registry, name: str) -> AdapterRecord:
    return catalogue.adapters.add(name, facts(name))[0]


def merged(record: AdapterRecord, weight: float = 1.0) -> MergedAdapter:
    return MergedAdapter(adapter=record.reference, sha256=record.sha256, weight=weight)


def test_the_family_tree_is_found_from_both_ends(catalogue: Registry) -> None:
    trained, small, other, mix = (adapter(catalogue, name) for name in ("trained", "small", "other", "mix"))
    catalogue.lineage.record(small, trained, "truncate", details={"rank": 4})
    catalogue.lineage.record(mix, small, "combine", details={"weight": 0.7})
    catalogue.lineage.record(mix, other, "combine", details={"weight": 0.3})
    up = [(edge.child, edge.operation, edge.parent) for edge in catalogue.lineage.ancestors(mix)]
    assert up == [
        ("mix@1", "combine", "small@1"),
        ("mix@1", "combine", "other@1"),
        ("small@1", "truncate", "trained@1"),
    ]
    down = [(edge.parent, edge.child) for edge in catalogue.lineage.descendants(trained)]
    assert down == [("trained@1", "small@1"), ("small@1", "mix@1")]
    assert [edge.details for edge in catalogue.lineage.parents(mix)] == [{"weight": 0.7}, {"weight": 0.3}]
    assert catalogue.lineage.ancestors(trained) == catalogue.lineage.descendants(mix) == ()


def test_a_parent_by_two_ways_is_walked_once(catalogue: Registry) -> None:
    top, left, right, bottom = (adapter(catalogue, name) for name in ("top", "left", "right", "bottom"))
    for child, parent in ((left, top), (right, top), (bottom, left), (bottom, right)):
        catalogue.lineage.record(child, parent, "combine")
    assert len(catalogue.lineage.ancestors(bottom)) == len(catalogue.lineage.descendants(top)) == 4


def test_nothing_comes_from_itself(catalogue: Registry) -> None:
    first, second, third = (adapter(catalogue, name) for name in ("first", "second", "third"))
    catalogue.lineage.record(second, first, "truncate")
    catalogue.lineage.record(third, second, "truncate")
    for parent in (first, second, third):
        with pytest.raises(RegistryError, match="made from first@1"):
            catalogue.lineage.record(first, parent, "combine")


def test_the_same_descent_again_changes_nothing(catalogue: Registry) -> None:
    child, parent = adapter(catalogue, "child"), adapter(catalogue, "parent")
    assert catalogue.lineage.record(child, parent, "truncate") == catalogue.lineage.record(child, parent, "truncate")
    catalogue.lineage.record(child, "file.st", "truncate", parent_sha256=digest("file"))
    catalogue.lineage.record(child, "file.st", "truncate", parent_sha256=digest("file"))
    assert [edge.parent for edge in catalogue.lineage.parents(child)] == ["parent@1", "file.st"]


def test_a_removed_parent_keeps_its_label_and_a_removed_child_leaves(catalogue: Registry) -> None:
    child, parent = adapter(catalogue, "child"), adapter(catalogue, "parent")
    catalogue.lineage.record(child, parent, "truncate")
    catalogue.adapters.remove("parent")
    (edge,) = catalogue.lineage.ancestors(child)
    assert (edge.parent, edge.parent_id, edge.parent_sha256) == ("parent@1", None, digest("parent"))
    catalogue.adapters.remove("child")
    assert catalogue.lineage.ancestors(child) == ()


def test_a_merge_comes_back_as_it_was_recorded(catalogue: Registry, tmp_path: Path) -> None:
    catalogue.bases.add("llama", "/llama", fingerprint=digest("llama"))
    pirate, parrot = adapter(catalogue, "pirate"), adapter(catalogue, "parrot")
    recorded = catalogue.merges.record(
        tmp_path / "out",
        base_fingerprint=digest("llama"),
        merged=[
            merged(parrot, 0.25),
            merged(pirate, -1.0),
            MergedAdapter(adapter="x.st", sha256="0" * 64, weight=1.0),
        ],
        output_fingerprint=digest("out"),
        undo_file=tmp_path / "out" / "undo",
        options={"device": "cpu"},
    )
    assert catalogue.merges.list() == (recorded,) == catalogue.merges.of_output(tmp_path / "out")
    assert (recorded.base, recorded.state, recorded.in_place) == ("llama", "merged", False)
    assert [(member.adapter, member.weight) for member in recorded.adapters] == [
        ("parrot@1", 0.25),
        ("pirate@1", -1.0),
        ("x.st", 1.0),
    ]
    assert catalogue.merges.of_adapter(pirate) == (recorded,)
    assert catalogue.merges.of_base(digest("llama")) == catalogue.merges.of_base(digest("out")) == (recorded,)
    assert catalogue.counts().merges == 1


def test_merges_in_place_add_up_and_a_new_output_replaces_the_old(catalogue: Registry, tmp_path: Path) -> None:
    pirate = adapter(catalogue, "pirate")
    facts_of = {"base_fingerprint": digest("llama"), "merged": [merged(pirate)]}
    first = catalogue.merges.record(tmp_path / "m", in_place=True, **facts_of)  # type: ignore[arg-type]
    second = catalogue.merges.record(tmp_path / "m", in_place=True, **facts_of)  # type: ignore[arg-type]
    assert [merge.state for merge in catalogue.merges.of_output(tmp_path / "m")] == ["merged", "merged"]
    assert catalogue.merges.set_state(second.id, "unmerged").state == "unmerged"
    third = catalogue.merges.record(tmp_path / "m", **facts_of)  # type: ignore[arg-type]
    states = {merge.id: merge.state for merge in catalogue.merges.list()}
    assert states == {first.id: "replaced", second.id: "unmerged", third.id: "merged"}
    assert [merge.id for merge in catalogue.merges.list(state="merged")] == [third.id]
    with pytest.raises(NotFoundError):
        catalogue.merges.set_state(99, "unmerged")
    with pytest.raises(RegistryError):
        catalogue.merges.set_state(third.id, "lost")  # type: ignore[arg-type]


def test_a_merge_outlives_its_adapter_and_its_base(catalogue: Registry, tmp_path: Path) -> None:
    catalogue.bases.add("llama", "/llama", fingerprint=digest("llama"))
    pirate = adapter(catalogue, "pirate")
    catalogue.merges.record(tmp_path, base_fingerprint=digest("llama"), merged=[merged(pirate)])
    catalogue.adapters.rename("pirate", "corsair")
    assert catalogue.merges.list()[0].adapters[0].adapter == "corsair@1"
    catalogue.adapters.remove("corsair")
    catalogue.bases.remove("llama")
    (left,) = catalogue.merges.list()
    assert (left.base, left.base_fingerprint) == (None, digest("llama"))
    assert left.adapters[0] == merged(pirate)
