"""Base models: their names, their content, and which are one model stored in several ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from catalogued import digest, facts

from registry import AlreadyExistsError, InUseError, ModelFacts, NotFoundError, Registry, RegistryError


def add_base(catalogue: Registry, name: str, variant_of: str | None = None) -> None:
    catalogue.bases.add(name, f"/models/{name}", fingerprint=digest(name), variant_of=variant_of)


def test_a_base_comes_back_as_it_was_added(catalogue: Registry, tmp_path: Path) -> None:
    added = catalogue.bases.add(
        "llama3-8b",
        "meta-llama/Llama-3-8B",
        path=tmp_path,
        revision="abc",
        fingerprint=digest("llama"),
        facts=ModelFacts(
            architecture="LlamaForCausalLM",
            model_type="llama",
            parameter_count=8_030_261_248,
            size_bytes=16_060_522_496,
            dtype="bfloat16",
        ),
    )
    found = catalogue.bases.find("llama3-8b")
    assert found == added == catalogue.bases.get("llama3-8b")
    assert (found.path, found.parameter_count, found.dtype) == (tmp_path, 8_030_261_248, "bfloat16")
    assert found.variant_of is None
    assert found.created_at.utcoffset() is not None
    assert catalogue.bases.list() == (found,)


def test_the_same_content_again_only_moves_the_base(catalogue: Registry, tmp_path: Path) -> None:
    facts = ModelFacts(dtype="bfloat16")
    first = catalogue.bases.add("llama", "/old", path=Path("/old"), fingerprint=digest("llama"), facts=facts)
    again = catalogue.bases.add("llama", str(tmp_path), path=tmp_path, fingerprint=digest("llama"))
    assert (again.id, again.created_at, again.dtype) == (first.id, first.created_at, "bfloat16")
    assert (again.path, again.source) == (tmp_path, str(tmp_path))


def test_other_content_under_a_taken_name_is_refused(catalogue: Registry) -> None:
    catalogue.bases.add("llama", "/old", fingerprint=digest("llama"))
    with pytest.raises(AlreadyExistsError, match="loratool base remove llama"):
        catalogue.bases.add("llama", "/old", fingerprint=digest("mistral"))
    assert catalogue.bases.find("llama").fingerprint == digest("llama")


def test_an_unknown_base_is_answered_with_the_nearest_names(catalogue: Registry) -> None:
    for name in ("llama3-8b", "llama3-70b", "mistral"):
        add_base(catalogue, name)
    with pytest.raises(NotFoundError, match="did you mean 'llama3-8b'") as raised:
        catalogue.bases.find("lama3-8b")
    assert raised.value.nearest[0] == "llama3-8b"
    assert catalogue.bases.get("lama3-8b") is None


def test_a_hub_base_learns_its_fingerprint_later(catalogue: Registry, tmp_path: Path) -> None:
    catalogue.bases.add("llama", "org/llama", revision="abc")
    record, _ = catalogue.adapters.add("pirate", facts(), base="llama")
    assert record.base_fingerprint is None
    base = catalogue.bases.update("llama", fingerprint=digest("llama"), path=tmp_path)
    assert (base.fingerprint, base.path) == (digest("llama"), tmp_path)
    assert catalogue.adapters.find("pirate").base_fingerprint == digest("llama")
    with pytest.raises(TypeError):
        catalogue.bases.update("llama", variant_of="other")


def test_variants_are_one_family_however_they_were_declared(catalogue: Registry) -> None:
    for name in ("full", "nf4", "fp16", "other"):
        add_base(catalogue, name)
    catalogue.bases.set_variant("nf4", "full")
    catalogue.bases.set_variant("fp16", "nf4")
    one = {digest("full"), digest("nf4"), digest("fp16")}
    for name in ("full", "nf4", "fp16"):
        assert catalogue.bases.family(digest(name)) == one
    assert catalogue.bases.find("fp16").variant_of == "full"
    assert catalogue.bases.same_family(digest("nf4"), digest("fp16"))
    assert not catalogue.bases.same_family(digest("nf4"), digest("other"))
    assert catalogue.bases.family(digest("unknown")) == {digest("unknown")}


def test_two_families_join_when_a_variant_of_one_is_declared_of_the_other(catalogue: Registry) -> None:
    for name, of in (("a", None), ("a2", "a"), ("b", None), ("b2", "b")):
        add_base(catalogue, name, variant_of=of)
    catalogue.bases.set_variant("b2", "a2")
    assert catalogue.bases.family(digest("b")) == {digest(name) for name in ("a", "a2", "b", "b2")}


def test_the_same_content_under_two_names_is_one_family(catalogue: Registry, tmp_path: Path) -> None:
    catalogue.bases.add("gone", "/gone", path=Path("/no/such/folder"), fingerprint=digest("llama"))
    catalogue.bases.add("here", str(tmp_path), path=tmp_path, fingerprint=digest("llama"))
    add_base(catalogue, "nf4", variant_of="here")
    add_base(catalogue, "fp16", variant_of="gone")
    assert [base.name for base in catalogue.bases.find_by_fingerprint(digest("llama"))] == ["here", "gone"]
    assert catalogue.bases.same_family(digest("nf4"), digest("fp16"))


def test_the_same_content_under_two_names_has_the_adapters_of_both(catalogue: Registry) -> None:
    for name in ("llama", "tiny", "mistral"):
        catalogue.bases.add(name, name, fingerprint=digest("mistral" if name == "mistral" else "llama"))
    for base in ("llama", "tiny", "mistral"):
        catalogue.adapters.add(f"of-{base}", facts(base), base=base)
    catalogue.adapters.add("of-the-content", facts("content", base_fingerprint=digest("llama")))
    both = ["of-llama", "of-the-content", "of-tiny"]
    for name in ("llama", "tiny"):
        assert [adapter.name for adapter in catalogue.adapters.list(base=name)] == both
    assert [adapter.name for adapter in catalogue.adapters.list(base="mistral")] == ["of-mistral"]
    # A variant of one of the names is a variant of both.
    catalogue.bases.add("nf4", "nf4", fingerprint=digest("nf4"), variant_of="tiny")
    catalogue.adapters.add("of-nf4", facts("nf4"), base="nf4")
    for name in ("llama", "tiny", "nf4"):
        assert {adapter.name for adapter in catalogue.adapters.list(base=name)} == {*both, "of-nf4"}


def test_a_base_says_under_which_other_names_its_content_is_catalogued(catalogue: Registry) -> None:
    assert catalogue.bases.add("llama", "/a", fingerprint=digest("llama")).same_as == ()
    assert catalogue.bases.add("tiny", "/b", fingerprint=digest("llama")).same_as == ("llama",)
    catalogue.bases.add("mistral", "/c", fingerprint=digest("mistral"))
    catalogue.bases.add("unknown", "owner/unknown")
    catalogue.bases.add("unseen", "owner/unseen")
    assert {base.name: base.same_as for base in catalogue.bases.list()} == {
        "llama": ("tiny",),
        "tiny": ("llama",),
        "mistral": (),
        "unknown": (),
        "unseen": (),
    }


def test_a_base_whose_content_has_another_name_leaves_its_adapters_to_that(catalogue: Registry) -> None:
    for name in ("llama", "tiny"):
        catalogue.bases.add(name, name, fingerprint=digest("llama"))
    catalogue.adapters.add("pirate", facts(), base="llama")
    catalogue.bases.remove("llama")
    assert catalogue.adapters.find("pirate").base == "tiny"
    with pytest.raises(InUseError):
        catalogue.bases.remove("tiny")


def test_a_base_is_no_variant_of_itself_or_of_what_is_unknown(catalogue: Registry) -> None:
    add_base(catalogue, "llama")
    with pytest.raises(RegistryError, match="itself"):
        catalogue.bases.set_variant("llama", "llama")
    with pytest.raises(NotFoundError):
        add_base(catalogue, "nf4", variant_of="lama")
    assert catalogue.bases.get("nf4") is None


def test_a_base_in_use_is_removed_only_by_force_and_its_adapters_keep_the_fingerprint(
    catalogue: Registry,
) -> None:
    add_base(catalogue, "llama")
    catalogue.adapters.add("pirate", facts(), base="llama")
    with pytest.raises(InUseError, match="'pirate'"):
        catalogue.bases.remove("llama")
    catalogue.bases.remove("llama", force=True)
    orphan = catalogue.adapters.find("pirate")
    assert (orphan.base, orphan.base_fingerprint) == (None, digest("llama"))
    add_base(catalogue, "llama-again")
    catalogue.bases.add("back", "/back", fingerprint=digest("llama"))
    assert catalogue.adapters.find("pirate").base == "back"


def test_variants_stay_one_family_when_their_root_is_removed(catalogue: Registry) -> None:
    for name, of in (("full", None), ("nf4", "full"), ("fp16", "full")):
        add_base(catalogue, name, variant_of=of)
    catalogue.bases.remove("full")
    assert catalogue.bases.same_family(digest("nf4"), digest("fp16"))
    assert not catalogue.bases.same_family(digest("nf4"), digest("full"))
