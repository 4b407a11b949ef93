"""Adapters: versions, tags, places, removal."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from catalogued import SERVER, digest, facts

from registry import AlreadyExistsError, InUseError, Location, NotFoundError, Registry, RegistryError, list_adapters


def test_an_adapter_comes_back_as_it_was_added(catalogue: Registry, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    added, new = catalogue.adapters.add(
        "pirate",
        facts(
            scaling={"q_proj": 2.0, "v_proj": 0.1},
            target_modules={"v_proj", "q_proj"},
            recipe={"steps": 100, "lr": 1e-4, "data": ["a", "ä"]},
            metrics={"loss": 0.17, "perplexity": float("inf")},
            config={"peft_type": "LORA", "r": 8, "bias": None},
            base_model="org/llama",
        ),
        tags=["speech", "fun", "fun"],
        locations=[
            Location(kind="path", path=tmp_path / "pirate.safetensors"),
            Location(kind="hub", repo="me/pirate", revision="abc"),
        ],
    )
    found = catalogue.adapters.find("pirate")
    assert new
    assert found == added == catalogue.adapters.find("pirate@1") == catalogue.adapters.get(added.id)
    assert (found.name, found.version, found.reference, found.base) == ("pirate", 1, "pirate@1", None)
    assert found.tags == ("fun", "speech")
    assert found.scaling == {"q_proj": 2.0, "v_proj": 0.1}
    assert found.target_modules == ["q_proj", "v_proj"]
    assert found.recipe == {"steps": 100, "lr": 1e-4, "data": ["a", "ä"]}
    assert found.metrics == {"loss": 0.17, "perplexity": "inf"}
    assert found.config == {"peft_type": "LORA", "r": 8, "bias": None}
    assert found.locations[0].path == tmp_path / "pirate.safetensors"
    assert (found.locations[1].repo, found.locations[1].revision) == ("me/pirate", "abc")
    assert before <= found.created_at <= datetime.now(UTC)
    json.dumps(asdict(found), default=str, allow_nan=False)


@pytest.mark.parametrize("scaling", [2.0, 16 / 9, 1e-30, -0.5, 1 / 3])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", ["q_proj"], None, "123"])
def test_scaling_and_targets_keep_every_bit(
    catalogue: Registry, home: Path, scaling: float, targets: list[str] | str | None
) -> None:
    catalogue.adapters.add("pirate", facts(scaling=scaling, alpha=scaling, target_modules=targets))
    found = catalogue.adapters.find("pirate")
    assert (found.scaling, found.alpha, found.target_modules) == (scaling, scaling, targets)
    assert isinstance(found.scaling, float)
    assert list_adapters(home, SERVER)[0].target_modules == targets


def test_the_same_adapter_again_is_the_same_version_with_more_tags(catalogue: Registry) -> None:
    first, _ = catalogue.adapters.add("pirate", facts(), tags=["one"])
    again, new = catalogue.adapters.add("pirate", facts(), tags=["two"], locations=[Location(kind="hub", repo="me/p")])
    assert not new
    assert (again.id, again.version, again.created_at) == (first.id, 1, first.created_at)
    assert again.tags == ("one", "two")
    assert again.locations == (Location(kind="hub", repo="me/p"),)
    repeated, _ = catalogue.adapters.add("pirate", facts(), locations=[Location(kind="hub", repo="me/p")])
    assert repeated.locations == again.locations


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "other"},
        {"alpha": 32.0},
        {"scaling": 4.0},
        {"rank": 4},
        {"kind": "dylora"},
        {"target_modules": ["q"]},
    ],
)
def test_other_weights_or_other_numbers_are_the_next_version(catalogue: Registry, changes: dict[str, Any]) -> None:
    catalogue.adapters.add("pirate", facts())
    second, new = catalogue.adapters.add("pirate", facts(**changes))
    assert new
    assert second.version == 2
    assert catalogue.adapters.find("pirate").version == 2
    assert catalogue.adapters.find("pirate@1").version == 1
    assert catalogue.adapters.add("pirate", facts())[0].version == 1
    assert catalogue.adapters.add("parrot", facts())[0].version == 1
    assert len(catalogue.adapters.find_by_sha256(digest("weights"))) >= 2


def test_what_is_not_there_is_answered_with_what_is_nearest(catalogue: Registry) -> None:
    for weights in "abcd":
        catalogue.adapters.add("pirate", facts(weights))
    with pytest.raises(NotFoundError, match="did you mean 'pirate'"):
        catalogue.adapters.find("pirat")
    with pytest.raises(NotFoundError) as raised:
        catalogue.adapters.find("pirate@9")
    assert raised.value.nearest == ("pirate@4", "pirate@3", "pirate@2")
    with pytest.raises(NotFoundError, match="loratool list"):
        catalogue.adapters.find("xyz")


def test_an_adapter_belongs_to_the_base_it_names_or_whose_fingerprint_it_records(catalogue: Registry) -> None:
    catalogue.bases.add("llama", "/llama", fingerprint=digest("llama"))
    catalogue.bases.add("nf4", "/nf4", fingerprint=digest("nf4"), variant_of="llama")
    catalogue.bases.add("mistral", "/mistral", fingerprint=digest("mistral"))
    named, _ = catalogue.adapters.add("named", facts(), base="llama")
    recorded, _ = catalogue.adapters.add("recorded", facts(base_fingerprint=digest("llama")))
    variant, _ = catalogue.adapters.add("variant", facts(base_fingerprint=digest("nf4")), base="llama")
    unknown, _ = catalogue.adapters.add("unknown", facts(base_fingerprint=digest("gemma")))
    assert (named.base, named.base_fingerprint) == ("llama", digest("llama"))
    assert (recorded.base, recorded.base_fingerprint) == ("llama", digest("llama"))
    assert (variant.base, variant.base_fingerprint) == ("llama", digest("nf4"))
    assert (unknown.base, unknown.base_fingerprint) == (None, digest("gemma"))
    with pytest.raises(RegistryError, match="--variant-of mistral"):
        catalogue.adapters.add("wrong", facts(base_fingerprint=digest("llama")), base="mistral")
    with pytest.raises(NotFoundError, match="did you mean 'mistral'"):
        catalogue.adapters.add("wrong", facts(), base="mistrl")
    assert catalogue.adapters.versions("wrong") == ()
    assert catalogue.adapters.update("unknown", metrics={"loss": 1.0}).metrics == {"loss": 1.0}
    with pytest.raises(RegistryError, match="records"):
        catalogue.adapters.update("unknown", base="llama")


def test_tags_come_and_go(catalogue: Registry) -> None:
    catalogue.adapters.add("pirate", facts("a"), tags=["one"])
    catalogue.adapters.add("pirate", facts("b"))
    assert catalogue.adapters.tag("pirate", "two", "two").tags == ("two",)
    assert catalogue.adapters.tag("pirate@1", "one", "three").tags == ("one", "three")
    assert catalogue.adapters.untag("pirate@1", "one").tags == ("three",)
    with pytest.raises(NotFoundError, match="its tags are three"):
        catalogue.adapters.untag("pirate@1", "two")
    with pytest.raises(NotFoundError):
        catalogue.adapters.tag("parrot", "one")


def test_removal_takes_one_version_or_all_of_them_never_several_by_accident(catalogue: Registry) -> None:
    for weights in "abc":
        catalogue.adapters.add("pirate", facts(weights), tags=["speech"])
    with pytest.raises(InUseError, match="pirate@3"):
        catalogue.adapters.remove("pirate")
    assert [record.version for record in catalogue.adapters.remove("pirate@2")] == [2]
    assert [record.version for record in catalogue.adapters.versions("pirate")] == [1, 3]
    assert len(catalogue.adapters.remove("pirate", all_versions=True)) == 2
    assert catalogue.adapters.list() == ()
    with pytest.raises(NotFoundError):
        catalogue.adapters.remove("pirate")


def test_a_renamed_adapter_keeps_its_versions(catalogue: Registry) -> None:
    for weights in "ab":
        catalogue.adapters.add("pirate", facts(weights))
    catalogue.adapters.add("parrot", facts())
    assert [record.reference for record in catalogue.adapters.rename("pirate", "corsair")] == [
        "corsair@1",
        "corsair@2",
    ]
    with pytest.raises(AlreadyExistsError):
        catalogue.adapters.rename("corsair", "parrot")


def test_the_files_of_an_adapter_are_in_the_store_else_where_they_were_added(
    catalogue: Registry, tmp_path: Path
) -> None:
    source = tmp_path / "pirate.safetensors"
    source.write_bytes(b"weights")
    with catalogue.store.stage({"adapter_model.safetensors": source}) as staged:
        stored, _ = catalogue.adapters.add("stored", facts(), staged=staged)
    assert (catalogue.adapters.files(stored) / "adapter_model.safetensors").read_bytes() == b"weights"
    beside, _ = catalogue.adapters.add("beside", facts(), locations=[Location(kind="path", path=source)])
    assert catalogue.adapters.files(beside) == source
    source.unlink()
    with pytest.raises(NotFoundError, match="loratool add"):
        catalogue.adapters.files(beside)
    remote = catalogue.adapters.add_location("beside", Location(kind="hub", repo="me/pirate", revision="abc"))
    with pytest.raises(NotFoundError, match="loratool pull me/pirate"):
        catalogue.adapters.files(remote)


def test_several_calls_in_one_transaction_are_all_kept_or_none(catalogue: Registry) -> None:
    with catalogue.writing():
        catalogue.adapters.add("pirate", facts())
        catalogue.adapters.tag("pirate", "speech")
        assert catalogue.adapters.find("pirate").tags == ("speech",)
    with pytest.raises(ValueError, match="stop"), catalogue.writing():
        catalogue.adapters.add("parrot", facts())
        catalogue.adapters.remove("pirate")
        raise ValueError("stop")
    assert [(adapter.name, adapter.tags) for adapter in catalogue.adapters.list()] == [("pirate", ("speech",))]


def test_numbers_that_are_none_are_refused(catalogue: Registry) -> None:
    with pytest.raises(RegistryError, match="--alpha"):
        catalogue.adapters.add("pirate", facts(alpha=float("nan")))


def test_a_path_that_is_no_text_is_refused(catalogue: Registry) -> None:
    place = Location(kind="path", path=Path("/models/\udcff.safetensors"))
    with pytest.raises(RegistryError, match="UTF-8"):
        catalogue.adapters.add("pirate", facts(), locations=[place])
    with pytest.raises(RegistryError, match="UTF-8"):
        catalogue.bases.add("llama", "somewhere", path=Path("/models/\udcff"))
    assert catalogue.counts().versions == catalogue.counts().bases == 0
