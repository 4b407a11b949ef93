"""Law 10: wherever a command takes an adapter or a base, it takes a catalogued name, a path or a Hub id."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hub_adapters import files_of, publish
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError, NotFoundError, PlacementError, WrongBaseError
from registry import RegistryError

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def llama(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A base in a folder called ``llama``."""
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "models" / "llama")


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters) -> Path:
    """An adapter of it, not to be changed."""
    return tiny_adapters.folder("llama")


@pytest.fixture
def unlike(llama: Path, tmp_path: Path) -> Path:
    """Another model in a folder of the same name."""
    return other_model(llama, tmp_path / "elsewhere" / "llama")


def other_model(llama: Path, folder: Path) -> Path:
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def names() -> list[str]:
    return [base.name for base in loratool.base_list()]


# An adapter's base is named by its folder


def test_a_base_that_is_not_catalogued_is_catalogued_by_its_folders_name(llama: Path, pirate: Path) -> None:
    added = loratool.add(pirate, name="pirate", base=llama)
    (base,) = loratool.base_list()
    assert (base.name, base.path) == ("llama", llama)
    assert (added.record.base, added.record.base_fingerprint) == ("llama", base.fingerprint)
    assert any("catalogued" in note and str(llama) in note and "'llama'" in note for note in added.notes)
    again = loratool.add(pirate, name="again", base=llama)
    assert (again.record.base, again.notes) == ("llama", ("it has the same weights as pirate@1",))
    assert loratool.base_list() == (base,)


def test_a_folder_means_the_base_that_is_catalogued_from_it_or_has_its_content(
    llama: Path, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("mine", llama)
    assert loratool.add(pirate, name="one", base=llama).record.base == "mine"
    copied = shutil.copytree(llama, tmp_path / "copy")
    assert loratool.add(pirate, name="two", base=copied).record.base == "mine"
    assert names() == ["mine"]


def test_another_model_in_a_folder_of_the_same_name_gets_a_name_of_its_own(
    llama: Path, unlike: Path, pirate: Path
) -> None:
    loratool.base_add("llama", llama)
    added = loratool.add(pirate, name="pirate", base=unlike)
    assert added.record.base == "llama-2"
    assert any("'llama-2'" in note and "'llama' is another model" in note for note in added.notes)
    assert names() == ["llama", "llama-2"]


def test_a_base_that_the_adapter_does_not_fit_is_not_catalogued(
    llama: Path, pirate: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(PlacementError):
        loratool.add(pirate, name="pirate", base=tiny_models.folder("gpt2", "bf16"))
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    tied = tmp_path / "tied"
    loratool.export("pirate", tied)
    other = other_model(llama, tmp_path / "other")
    with pytest.raises(WrongBaseError):
        loratool.add(tied, name="tied", base=other)
    assert names() == ["llama"]


def test_a_base_that_is_nowhere_is_refused(pirate: Path) -> None:
    with pytest.raises(RegistryError, match="nobody"):
        loratool.add(pirate, name="pirate", base="nobody")
    with pytest.raises(NotFoundError, match="nowhere"):
        loratool.add(pirate, name="pirate", base="./nowhere")
    assert names() == []


def test_a_hub_id_is_catalogued_by_its_headers(hub: HubStandIn, llama: Path, pirate: Path) -> None:
    hub.create("org/tiny").put(files_of(llama))
    added = loratool.add(pirate, name="pirate", base="org/tiny")
    (base,) = loratool.base_list()
    assert (base.name, base.source, base.path, added.record.base) == ("tiny", "org/tiny", None, "tiny")
    assert loratool.add(pirate, name="other", base="ORG/tiny").record.base == "tiny"
    publish(hub, "ada/pirate", pirate)
    assert loratool.pull("ada/pirate", name="third", base="org/tiny").record.base == "tiny"


def test_pull_ties_to_a_folder(hub: HubStandIn, llama: Path, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    pulled = loratool.pull("ada/pirate", base=llama)
    assert (pulled.record.base, names()) == ("llama", ["llama"])
    assert any(str(llama) in note for note in pulled.notes)


# A catalogued base is found by its folder and its Hub id


def test_every_command_on_a_catalogued_base_takes_its_folder(llama: Path, pirate: Path, tmp_path: Path) -> None:
    record = loratool.base_add("mine", llama)
    loratool.add(pirate, name="pirate", base="mine")
    copied = shutil.copytree(llama, tmp_path / "copy")
    assert loratool.base_show(llama).record == loratool.base_show(copied).record == record
    assert [adapter.name for adapter in loratool.base_show(llama).adapters] == ["pirate"]
    assert [adapter.name for adapter in loratool.list(base=llama)] == ["pirate"]
    assert [adapter.name for adapter in loratool.list(base=str(copied))] == ["pirate"]
    assert loratool.base_verify(llama) == record
    assert loratool.base_add("variant", copied, variant_of=llama).variant_of == "mine"
    assert loratool.base_remove(copied).name == "variant"
    assert loratool.base_remove(llama, force=True) == record


def test_a_catalogued_name_counts_before_a_folder_of_that_name(
    llama: Path, unlike: Path, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    monkeypatch.chdir(unlike.parent)
    assert loratool.base_show("llama").record.path == llama
    assert [adapter.name for adapter in loratool.list(base="llama")] == ["pirate"]
    with pytest.raises(NotFoundError, match="base add"):
        loratool.list(base="./llama")


def test_a_catalogued_base_is_found_by_its_hub_id(hub: HubStandIn, llama: Path, pirate: Path) -> None:
    hub.create("org/tiny").put(files_of(llama))
    record = loratool.base_add("mine", "org/tiny")
    loratool.add(pirate, name="pirate", base="mine")
    before = len(hub.asked)
    assert loratool.base_show("org/Tiny").record == record
    assert [adapter.name for adapter in loratool.list(base="org/tiny")] == ["pirate"]
    assert len(hub.asked) == before
    with pytest.raises(NotFoundError, match="org/other"):
        loratool.list(base="org/other")
    assert loratool.base_remove("org/tiny", force=True).name == "mine"


@pytest.mark.parametrize("base", ["nobody", "./nowhere", "org/nothing", ""])
def test_a_base_that_is_not_catalogued_is_refused_with_what_to_do(base: str) -> None:
    for call in (loratool.base_show, loratool.base_verify, loratool.base_remove):
        with pytest.raises((LoratoolError, RegistryError)):
            call(base)
    with pytest.raises((LoratoolError, RegistryError)):
        loratool.list(base=base)


def test_the_hub_is_searched_for_a_base_by_its_folder(hub: HubStandIn, llama: Path, pirate: Path) -> None:
    hub.create("org/tiny").put(files_of(llama))
    publish(hub, "ada/pirate", pirate, base_model="org/tiny")
    loratool.base_add("mine", llama, hub_id="org/tiny")
    assert loratool.hub_search(base=str(llama)) == loratool.hub_search(base="org/tiny")


# An adapter is found by its path and its Hub id


def test_every_command_on_an_adapter_takes_a_path(llama: Path, pirate: Path, tmp_path: Path) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    assert loratool.show(pirate).record.reference == "pirate@1"
    assert loratool.tag(pirate, ["speech"]).tags == ("speech",)
    assert loratool.export(pirate, tmp_path / "out") == tmp_path / "out"
    (cut,) = loratool.truncate(str(pirate), rank=2, out=tmp_path / "cut.safetensors")
    assert cut.record.rank == 2
    (removed,) = loratool.remove(tmp_path / "cut.safetensors")
    assert {each.name: getattr(removed, each.name) for each in fields(cut.record)} == {
        each.name: getattr(cut.record, each.name) for each in fields(cut.record)
    }
    assert [each.reference for each in loratool.list()] == ["pirate@1"]
    copy_with(pirate, tmp_path / "other", lora_alpha=3.0)
    with pytest.raises(NotFoundError, match="loratool add"):
        loratool.remove(tmp_path / "other")


def test_an_adapter_that_is_not_catalogued_is_shown_by_what_its_files_say(pirate: Path, tmp_path: Path) -> None:
    shown = loratool.show(pirate)
    assert shown.place == str(pirate / WEIGHTS)
    assert (shown.record.kind, shown.record.rank, shown.record.alpha) == ("lora", 4, 8.0)
    facts = json.loads(json.dumps(shown.to_json()))
    assert (facts["catalogued"], facts["version"], facts["sha256"]) == (False, None, shown.record.sha256)
    assert loratool.list() == ()
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(pirate / WEIGHTS), bare)
    with pytest.raises(LoratoolError, match="--alpha"):
        loratool.show(bare)
    assert loratool.show(bare, alpha=4).record.alpha == 4
    printed = CliRunner().invoke(cli, ["show", str(bare), "--alpha", "4", "--spectrum"], catch_exceptions=False)
    assert printed.exit_code == 0
    assert "not in the catalogue" in printed.stdout
    assert loratool.show(pirate).to_json().keys() == _catalogued_json(pirate).keys()


def _catalogued_json(pirate: Path) -> dict[str, object]:
    loratool.add(pirate, name="pirate")
    return loratool.show("pirate").to_json()


def test_an_adapter_on_the_hub_is_shown_and_cut_without_being_catalogued(
    hub: HubStandIn, pirate: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    assert loratool.show("ada/pirate").record.rank == 4
    (cut,) = loratool.truncate("ada/pirate", rank=2, out=tmp_path / "cut.safetensors")
    assert cut.record.rank == 2
    assert loratool.export("ada/pirate", tmp_path / "out") == tmp_path / "out"


def test_the_parent_of_an_adapter_is_named_with_its_sha256(pirate: Path, tmp_path: Path) -> None:
    parent = loratool.add(pirate, name="pirate").record
    loratool.truncate("pirate", rank=2, out=tmp_path / "cut.safetensors")
    facts = loratool.show("cut").to_json()
    assert (facts["parent"], facts["parent_sha256"]) == ("pirate@1", parent.sha256)
    assert facts["ancestors"][0]["parent_sha256"] == parent.sha256


# A merge needs no base where the adapter has one


def test_a_merge_goes_into_the_base_that_the_adapter_is_tied_to(llama: Path, pirate: Path, tmp_path: Path) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    assert loratool.merge(["pirate"], dry_run=True).base == "llama"
    done = CliRunner().invoke(cli, ["merge", "pirate"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (llama.with_name("llama-pirate") / "model.safetensors").is_file()
    loratool.export("pirate", tmp_path / "exported")
    shutil.rmtree(llama.with_name("llama-pirate"))
    assert loratool.merge([tmp_path / "exported"], dry_run=True).base == "llama"
    untied = copy_with(pirate, tmp_path / "untied", lora_alpha=3.0)
    assert loratool.merge([("pirate", 0.5), untied], dry_run=True, again=True).base == "llama"


def test_adapters_of_one_model_under_several_names_need_no_base_named(
    llama: Path, pirate: Path, tmp_path: Path
) -> None:
    nf4 = loratool.quantize(llama, out=tmp_path / "nf4").out
    loratool.base_add("llama", llama)
    loratool.base_add("again", shutil.copytree(llama, tmp_path / "again"))
    loratool.base_add("llama-nf4", nf4, variant_of="llama")
    loratool.add(pirate, name="one", base="llama")
    for place, name in enumerate(("again", "llama-nf4")):
        other = copy_with(pirate, tmp_path / f"other-{place}", lora_alpha=3.0 + place)
        loratool.add(other, name=f"of-{name}", base=name)
        assert loratool.merge(["one", f"of-{name}"], out=tmp_path / "out", dry_run=True, again=True).base == "llama"


def test_a_model_in_the_hubs_cache_is_called_by_its_repository(llama: Path, pirate: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny-llama" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(llama, snapshot)
    assert loratool.add(pirate, name="pirate", base=snapshot).record.base == "tiny-llama"


def test_a_base_is_found_by_the_hub_id_that_the_adapter_names(llama: Path, pirate: Path, tmp_path: Path) -> None:
    named = copy_with(pirate, tmp_path / "named", base_model_name_or_path="org/tiny")
    loratool.base_add("mine", llama, hub_id="org/tiny")
    assert loratool.merge([named], dry_run=True).base == "mine"


def test_a_merge_without_a_base_to_go_into_asks_for_one(llama: Path, unlike: Path, pirate: Path) -> None:
    loratool.add(pirate, name="untied")
    with pytest.raises(LoratoolError, match=r"'untied' is tied to no catalogued base; .*--into BASE"):
        loratool.merge(["untied"])
    loratool.add(pirate, name="one", base=llama)
    loratool.add(pirate, name="two", base=unlike, any_base=True)
    with pytest.raises(LoratoolError, match=r"'one@1' to 'llama'.*'two@1' to 'llama-2'.*--into BASE"):
        loratool.merge(["one", "two"])
