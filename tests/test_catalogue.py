"""The catalogue through the library's functions: bases, variants, adapters, versions, exports, and the doctor."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, merge_by_peft, save_plain_adapter, save_single_file
from tiny_models import (
    as_torch,
    assert_same_tensors,
    digest,
    load,
    rewrite_tensors,
    save_plain_model,
    stored_in_file,
    stored_tensors,
)

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError, LoratoolError, NotFoundError, VerificationError, WrongBaseError
from loratool.formats.read import read_adapter
from loratool.training.recipe import Choices
from registry import AlreadyExistsError, InUseError, InvalidNameError, NotSureError, RegistryError
from registry import NotFoundError as NotCatalogued

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEIGHTS = "adapter_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def llama(tiny_models: TinyModels) -> Path:
    """A base model, not to be changed."""
    return tiny_models.folder("llama", "bf16")


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters) -> Path:
    """An adapter of it, not to be changed."""
    return tiny_adapters.folder("llama")


def other_values(base: Path, folder: Path, name: str = "model.norm.weight") -> Path:
    """A copy of a model in which one tensor differs."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# Bases


def test_a_base_is_added_listed_shown_verified_and_removed(llama: Path, pirate: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "llama")
    before = digest(base)
    record = loratool.base_add("llama", base)
    assert (record.name, record.path, record.architecture) == ("llama", base, "LlamaForCausalLM")
    assert (record.model_type, record.dtype) == ("llama", "bf16")
    tensors = stored_tensors(base)
    assert record.size_bytes == sum(len(tensor.data) for tensor in tensors.values())
    assert record.parameter_count == sum(as_torch(tensor).numel() for tensor in tensors.values())
    loratool.add(pirate, name="pirate", base="llama")
    assert loratool.base_list() == (record,)
    shown = loratool.base_show("llama")
    assert (shown.record, [adapter.name for adapter in shown.adapters], shown.merges) == (record, ["pirate"], ())
    assert loratool.base_verify("llama") == record
    with pytest.raises(InUseError, match="pirate"):
        loratool.base_remove("llama")
    assert loratool.base_remove("llama", force=True) == record
    assert loratool.base_list() == ()
    assert loratool.show("pirate").record.base_fingerprint == record.fingerprint
    assert digest(base) == before


def test_a_base_that_is_added_again_gets_its_adapters_back(llama: Path, pirate: Path) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    loratool.base_remove("llama", force=True)
    assert loratool.show("pirate").record.base is None
    loratool.base_add("alpaca", llama)
    assert loratool.show("pirate").record.base == "alpaca"


def test_the_fingerprint_does_not_depend_on_shards_names_of_files_or_place(
    tiny_models: TinyModels, llama: Path, tmp_path: Path
) -> None:
    known = loratool.base_add("single", llama).fingerprint
    sharded = shutil.copytree(tiny_models.folder("llama", "bf16", "sharded"), tmp_path / "sharded")
    (sharded / "tokenizer.json").unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert loratool.base_add("sharded", sharded).fingerprint == known
    assert loratool.base_add("file", llama / "model.safetensors").fingerprint == known


def test_a_changed_byte_changes_the_fingerprint_and_verify_names_the_base(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "llama")
    known = loratool.base_add("llama", base).fingerprint
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(VerificationError, match="llama"):
        loratool.base_verify("llama")
    assert loratool.base_add("other", base).fingerprint != known
    with pytest.raises(AlreadyExistsError, match="other content"):
        loratool.base_add("llama", base)


def test_a_base_that_is_gone_is_said_to_be_gone_and_may_be_added_from_elsewhere(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "here")
    first = loratool.base_add("llama", base)
    shutil.move(base, tmp_path / "there")
    with pytest.raises(VerificationError, match="llama"):
        loratool.base_verify("llama")
    assert [(finding.kind, finding.subject) for finding in loratool.doctor().findings] == [("base-missing", "llama")]
    moved = loratool.base_add("llama", tmp_path / "there")
    assert (moved.path, moved.fingerprint) == (tmp_path / "there", first.fingerprint)
    assert loratool.doctor().findings == ()
    assert loratool.base_verify("llama") == moved


@pytest.mark.parametrize("name", ["/", "..", "a/b", "a\x1b[31mb", "a" * 97, "", "-x", "a@1"])
def test_a_name_that_is_none_is_refused_before_anything_is_read(name: str, home_of_its_own: Path) -> None:
    with pytest.raises(InvalidNameError):
        loratool.base_add(name, "/nowhere")
    assert not list(home_of_its_own.iterdir())


@pytest.mark.parametrize("source", ["", "nowhere", "./no/where", "a\x00b", "x" * 5_000, "/etc/passwd/x"])
def test_a_base_that_is_nowhere_is_refused(source: str) -> None:
    with pytest.raises(NotFoundError):
        loratool.base_add("llama", source)
    assert loratool.base_list() == ()


def test_an_adapter_is_no_base(pirate: Path) -> None:
    with pytest.raises(LoratoolError, match="loratool add"):
        loratool.base_add("pirate", pirate)
    assert loratool.base_list() == ()


def test_a_pickled_model_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(LoratoolError, match=r"is a pickle.*save_pretrained"):
        loratool.base_add("old", tmp_path)


# Variants


def stored_otherwise(base: Path, folder: Path) -> Path:
    """The same model with its matrices in fp32; its norms are stored alike."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    wider = {name: tensor.float() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    save_file(wider, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_same_model_stored_otherwise_is_taken_as_a_variant_and_shares_its_adapters(
    llama: Path, pirate: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    root = loratool.base_add("llama", llama)
    variant = loratool.base_add("wide", stored_otherwise(llama, tmp_path / "wide"), variant_of="llama")
    assert variant.variant_of == "llama"
    assert variant.fingerprint != root.fingerprint
    loratool.base_add("shards", tiny_models.folder("llama", "bf16", "sharded"), variant_of="llama")
    loratool.add(pirate, name="pirate", base="llama")
    assert [adapter.name for adapter in loratool.list(base="wide")] == ["pirate"]
    result = loratool.merge(["pirate"], into="wide", out=tmp_path / "out")
    assert result.base_fingerprint == variant.fingerprint


REFUSED_VARIANTS: dict[str, str] = {
    "other values": "other values",
    "a tensor more": "only one of them",
    "a tensor less": "only one of them",
    "another shape": "is not a variant",
    "another shape in another type": "is not a variant",
}


@pytest.mark.parametrize("case", REFUSED_VARIANTS)
def test_another_model_is_no_variant(case: str, llama: Path, tmp_path: Path) -> None:
    loratool.base_add("llama", llama)
    other = shutil.copytree(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    match case:
        case "other values":
            tensors["model.norm.weight"] += 1
        case "a tensor more":
            tensors["model.extra.weight"] = torch.ones(3)
        case "a tensor less":
            del tensors["model.norm.weight"]
        case "another shape":
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
        case _:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].float()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongBaseError, match=REFUSED_VARIANTS[case]):
        loratool.base_add("other", other, variant_of="llama")
    assert [record.name for record in loratool.base_list()] == ["llama"]


def test_a_variant_of_a_base_that_is_not_there_is_refused(llama: Path) -> None:
    with pytest.raises(NotCatalogued):
        loratool.base_add("wide", llama, variant_of="nobody")
    assert loratool.base_list() == ()


# Adapters


def test_an_adapter_is_added_listed_shown_tagged_and_removed(llama: Path, pirate: Path, home_of_its_own: Path) -> None:
    before = digest(pirate)
    base = loratool.base_add("llama", llama)
    added = loratool.add(pirate, name="pirate", base="llama", tags=["speech"])
    record = added.record
    assert (added.new, added.notes) == (True, ())
    assert (record.reference, record.kind, record.rank, record.alpha, record.scaling) == (
        "pirate@1",
        "lora",
        4,
        8.0,
        2.0,
    )
    assert (record.base, record.base_fingerprint, record.tags) == ("llama", base.fingerprint, ("speech",))
    assert record.sha256 == before[WEIGHTS]
    assert record.size_bytes == (pirate / WEIGHTS).stat().st_size
    assert record.parameter_count == sum(tensor.numel() for tensor in load_file(pirate / WEIGHTS).values())
    assert record.ranks == dict.fromkeys(read_adapter(pirate).ranked, 4)
    assert [(found.name, found.version) for found in loratool.list()] == [("pirate", 1)]
    assert [found.name for found in loratool.list(base="llama", kind="lora", tag="speech", sort="rank")] == ["pirate"]
    assert loratool.list(tag="other") == loratool.list(kind="dora") == ()
    assert loratool.show("pirate").record == loratool.show(pirate).record == record
    assert loratool.tag("pirate@1", ["demo", "speech"]).tags == ("demo", "speech")
    assert loratool.tag("pirate", ["speech"], remove=True).tags == ("demo",)
    (removed,) = loratool.remove("pirate", now=True)
    assert removed.reference == "pirate@1"
    assert loratool.list() == ()
    assert not list((home_of_its_own / "store").rglob("*.safetensors"))
    assert digest(pirate) == before


def test_the_catalogue_keeps_its_own_copy(llama: Path, pirate: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pirate, tmp_path / "copy")
    loratool.add(copy, name="pirate")
    shutil.rmtree(copy)
    loratool.export("pirate", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (pirate / WEIGHTS).read_bytes()
    loratool.merge(["pirate"], into=llama, out=tmp_path / "merged")
    assert_same_tensors(
        stored_tensors(tmp_path / "merged"), merge_by_peft(load(llama, "llama"), pirate, tmp_path / "peft")
    )


def test_the_same_name_with_other_content_is_the_next_version(
    pirate: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    first = loratool.add(pirate, name="pirate")
    again = loratool.add(pirate, name="pirate", tags=["known"])
    assert (first.new, again.new, again.record.version, again.record.tags) == (True, False, 1, ("known",))
    other = tiny_adapters.folder("llama", seed=2)
    assert loratool.add(other, name="pirate").record.version == 2
    stronger = copy_with(pirate, tmp_path / "stronger", lora_alpha=16)
    assert loratool.add(stronger, name="pirate").record.version == 3
    assert loratool.show("pirate").record.version == 3
    assert loratool.show("pirate@1").record.sha256 == first.record.sha256
    assert [record.version for record in loratool.show("pirate@2").versions] == [1, 2, 3]
    with pytest.raises(InUseError, match="--all"):
        loratool.remove("pirate")
    assert [record.reference for record in loratool.remove("pirate@2")] == ["pirate@2"]
    assert [record.reference for record in loratool.remove("pirate", all_versions=True)] == ["pirate@1", "pirate@3"]


def test_a_version_is_merged_as_it_was(llama: Path, pirate: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    loratool.add(pirate, name="pirate")
    loratool.add(tiny_adapters.folder("llama", seed=2), name="pirate")
    loratool.merge(["pirate@1"], into=llama, out=tmp_path / "named")
    loratool.merge([pirate], into=llama, out=tmp_path / "direct")
    assert stored_tensors(tmp_path / "named") == stored_tensors(tmp_path / "direct")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my adapter (v2)", "my-adapter-v2"),
        ("..x", "x"),
        ("é-pirate", "e-pirate"),
        ("海-pirate", "pirate"),
        ("-" * 4 + "a" * 120, "a" * 96),
    ],
)
def test_a_name_is_made_of_the_folders(path: str, name: str, pirate: Path, tmp_path: Path) -> None:
    assert loratool.add(shutil.copytree(pirate, tmp_path / path)).record.name == name


def test_a_folder_of_whose_name_nothing_is_left_needs_a_name(pirate: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pirate, tmp_path / "海賊")
    with pytest.raises(AdapterError, match="--name"):
        loratool.add(copy)
    assert loratool.add(copy, name="pirate").record.name == "pirate"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factors", ["fp32", "fp16", "bf16"])
def test_an_adapter_that_is_not_finite_is_refused(
    value: float, factors: str, tiny_adapters: TinyAdapters, tmp_path: Path, home_of_its_own: Path
) -> None:
    copy = shutil.copytree(tiny_adapters.folder("llama", factors=factors), tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][-1, -1] = value
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or infinity") as raised:
        loratool.add(copy)
    assert name in str(raised.value)
    assert loratool.list() == ()
    assert not list(home_of_its_own.rglob("*.safetensors"))


# To which base an adapter belongs


def test_an_adapter_that_does_not_fit_the_base_it_is_given_is_refused(
    llama: Path, tiny_adapters: TinyAdapters, tiny_models: TinyModels
) -> None:
    loratool.base_add("llama", llama)
    with pytest.raises(LoratoolError, match="c_attn"):
        loratool.add(tiny_adapters.folder("gpt2"), base="llama")
    with pytest.raises(NotCatalogued, match="llama"):
        loratool.add(tiny_adapters.folder("llama"), base="lama")
    assert loratool.list() == ()


def test_an_adapter_is_tied_by_the_fingerprint_that_it_records(llama: Path, pirate: Path, tmp_path: Path) -> None:
    base = loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    for out in ("pirate.st", "pirate-folder"):
        loratool.export("pirate", tmp_path / out)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    unknown = loratool.add(tmp_path / "pirate.st", name="early", registry=elsewhere)
    assert (unknown.record.base, unknown.record.base_fingerprint) == (None, base.fingerprint)
    assert "base add" in unknown.notes[0]
    loratool.base_add("somewhere", llama, registry=elsewhere)
    assert loratool.show("early", registry=elsewhere).record.base == "somewhere"
    for out in ("pirate.st", "pirate-folder"):
        assert loratool.add(tmp_path / out, name="late", registry=elsewhere).record.base == "somewhere"


def test_an_adapter_that_records_another_base_is_refused_for_this_one(
    llama: Path, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("llama", llama)
    loratool.base_add("other", other_values(llama, tmp_path / "other"))
    loratool.add(pirate, name="pirate", base="llama")
    loratool.export("pirate", tmp_path / "pirate.st")
    with pytest.raises(WrongBaseError, match="another base"):
        loratool.add(tmp_path / "pirate.st", base="other")
    with pytest.raises(WrongBaseError, match="'other' is another model"):
        loratool.merge(["pirate"], into="other", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert loratool.merge(["pirate"], into="other", out=tmp_path / "out", any_base=True).notes


def test_an_adapter_that_is_tied_to_a_base_is_tied_to_another_with_any_base_only(
    llama: Path, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("llama", llama)
    loratool.base_add("other", other_values(llama, tmp_path / "other"))
    loratool.add(pirate, name="pirate", base="llama")
    for name in ("pirate", "elsewhere"):
        with pytest.raises(WrongBaseError, match=r"tied to 'llama', as pirate@1.*--any-base"):
            loratool.add(pirate, name=name, base="other")
    assert loratool.show("pirate").record.base == "llama"
    moved = loratool.add(pirate, name="pirate", base="other", any_base=True)
    assert (moved.new, moved.record.base) == (False, "other")
    assert any("--any-base" in note for note in moved.notes)
    assert not any("tied to no base" in note for note in loratool.add(pirate, name="pirate").notes)
    assert loratool.show("pirate").record.base == "other"


def test_what_a_file_records_of_its_base_does_not_undo_any_base(llama: Path, pirate: Path, tmp_path: Path) -> None:
    loratool.base_add("llama", llama)
    loratool.base_add("other", other_values(llama, tmp_path / "other"))
    loratool.add(pirate, name="pirate", base="llama")
    file = loratool.export("pirate", tmp_path / "pirate.st")
    loratool.remove("pirate")
    with pytest.raises(WrongBaseError, match="--any-base"):
        loratool.add(file, base="other")
    loratool.add(file, base="other", any_base=True)
    assert loratool.add(file).record.base == "other"
    assert loratool.merge(["pirate"], into="other", out=tmp_path / "out").notes == ()


def test_an_adapter_without_a_base_says_how_to_give_it_one(pirate: Path) -> None:
    (note,) = loratool.add(pirate, name="pirate").notes
    assert "--base" in note


def test_an_adapter_that_was_tied_to_a_base_stays_so_when_it_is_added_again_without_one(
    llama: Path, pirate: Path
) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    again = loratool.add(pirate, name="pirate", tags=["more"])
    assert (again.new, again.notes, again.record.base, again.record.tags) == (False, (), "llama", ("more",))


# From the Hub's cache


@pytest.fixture
def hub(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds the model ``owner/tiny-llama`` as huggingface_hub lays it out: links into blobs."""
    cache = tmp_path / "hf" / "hub"
    repository = cache / "models--owner--tiny-llama"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, sha256 in digest(llama).items():
        shutil.copyfile(llama / name, repository / "blobs" / sha256)
        (snapshot / name).symlink_to(Path("../../blobs") / sha256)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_a_base_is_added_by_its_hub_id_and_its_adapters_find_it(
    hub: Path, llama: Path, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = loratool.base_add("llama", "owner/tiny-llama")
    assert (record.source, record.revision) == ("owner/tiny-llama", COMMIT)
    assert record.path is not None and record.path.name == COMMIT
    assert record.fingerprint == loratool.base_add("local", llama).fingerprint
    assert loratool.base_add("exact", f"owner/tiny-llama@{COMMIT}").revision == COMMIT
    named = copy_with(pirate, tmp_path / "named", base_model_name_or_path="owner/tiny-llama")
    added = loratool.add(named, name="pirate")
    assert added.record.base in {"llama", "exact"}
    assert "owner/tiny-llama" in added.notes[0]
    monkeypatch.chdir(tmp_path)
    before = digest(hub)
    result = loratool.merge([pirate], into="owner/tiny-llama")
    assert result.out.parent == tmp_path
    assert not any(path.is_symlink() for path in result.out.rglob("*"))
    assert_same_tensors(stored_tensors(result.out), merge_by_peft(load(llama, "llama"), pirate, tmp_path / "peft"))
    assert digest(hub) == before


def test_the_cache_is_found_by_the_hubs_own_variables(hub: Path, home_of_its_own: Path) -> None:
    command = [sys.executable, "-m", "loratool", "base", "add", "llama", "owner/tiny-llama", "--json"]
    variables = {**os.environ, "HF_HOME": str(hub.parent), "HF_HUB_OFFLINE": "1"}
    variables = {
        name: value for name, value in variables.items() if name not in {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == COMMIT


def test_in_place_work_on_the_hubs_cache_is_refused(hub: Path, pirate: Path) -> None:
    loratool.base_add("llama", "owner/tiny-llama")
    before = digest(hub)
    for into in ("llama", "owner/tiny-llama", hub / "models--owner--tiny-llama" / "snapshots" / COMMIT):
        with pytest.raises(LoratoolError, match="link"):
            loratool.merge([pirate], into=into, in_place=True)
    assert digest(hub) == before


@pytest.mark.parametrize("source", ["owner/other", "owner/tiny-llama@nowhere", "nobody/nothing"])
def test_what_the_cache_lacks_is_refused_with_advice(source: str, hub: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no folder .* as a Hub id"):
        loratool.base_add("llama", source)


# Exports


def delta_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, as PEFT computes it."""
    model = peft.PeftModel.from_pretrained(load(base, "llama"), adapter).base_model.model
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def test_an_exported_folder_is_what_peft_loads_with_the_same_delta(llama: Path, pirate: Path, tmp_path: Path) -> None:
    save_single_file(pirate, tmp_path / "single.st")

    def bare(key: str) -> str:
        return key.removeprefix("base_model.model.").replace(".weight", ".default.weight")

    renamed = copy_with(pirate, tmp_path / "renamed", bare)
    expected = delta_by_peft(llama, pirate)
    assert len(expected) == 14
    for number, source in enumerate((pirate, tmp_path / "single.st", renamed)):
        loratool.add(source, name="pirate", base=None)
        out = loratool.export("pirate", tmp_path / f"out-{number}")
        found = delta_by_peft(llama, out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bare_file_is_exported_as_a_folder_that_says_its_alpha(llama: Path, pirate: Path, tmp_path: Path) -> None:
    save_file(load_file(pirate / WEIGHTS), tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match="--alpha"):
        loratool.add(tmp_path / "bare.safetensors")
    loratool.add(tmp_path / "bare.safetensors", alpha=8)
    expected = delta_by_peft(llama, pirate)
    for number, name in enumerate(("bare", tmp_path / "bare.safetensors")):
        out = loratool.export(name, tmp_path / f"out-{number}", alpha=8 if number else None)
        found = delta_by_peft(llama, out)
        assert all(torch.equal(found[module], expected[module]) for module in expected)


def test_a_single_file_export_keeps_configuration_and_facts(llama: Path, pirate: Path, tmp_path: Path) -> None:
    base = loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    loratool.export("pirate", tmp_path / "pirate.st")
    loratool.export(tmp_path / "pirate.st", tmp_path / "folder")
    loratool.export(tmp_path / "folder", tmp_path / "again.st")
    assert (tmp_path / "pirate.st").read_bytes() == (tmp_path / "again.st").read_bytes()
    config = json.loads((pirate / "adapter_config.json").read_text())
    facts = {"schema": 1, "kind": "lora", "base_fingerprint": base.fingerprint}
    for path in ("pirate.st", "folder"):
        adapter = read_adapter(tmp_path / path)
        assert dict(adapter.config) == config
        assert dict(adapter.facts) == facts
    assert stored_in_file(tmp_path / "pirate.st") == stored_in_file(pirate / WEIGHTS)


def test_an_export_keeps_the_sha256_where_the_names_are_pefts_already(pirate: Path, tmp_path: Path) -> None:
    record = loratool.add(pirate, name="pirate").record
    loratool.export("pirate", tmp_path / "out")
    assert digest(tmp_path / "out")[WEIGHTS] == record.sha256 == digest(pirate)[WEIGHTS]
    assert loratool.show(tmp_path / "out").record == record


def test_an_export_onto_something_else_is_refused(pirate: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    before = digest(tmp_path)
    for force in (False, True):
        with pytest.raises(LoratoolError):
            loratool.export(pirate, tmp_path / "mine", force=force)
    with pytest.raises(LoratoolError, match="empty"):
        loratool.export(pirate, "")
    assert digest(tmp_path) == before


# The doctor


def test_the_doctor_finds_files_that_are_gone_and_is_silent_when_they_are_back(
    llama: Path, pirate: Path, home_of_its_own: Path
) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    assert loratool.doctor(deep=True).findings == ()
    (weights,) = home_of_its_own.rglob("*.safetensors")
    shutil.rmtree(weights.parent)
    assert [(found.kind, found.subject) for found in loratool.doctor().findings] == [
        ("adapter-files-missing", "pirate@1")
    ]
    with pytest.raises(RegistryError, match="loratool add"):
        loratool.export("pirate", home_of_its_own / "out")
    assert not loratool.add(pirate, name="pirate").new
    assert loratool.doctor(deep=True).findings == ()


def test_the_doctor_reads_every_stored_byte_when_asked(pirate: Path, home_of_its_own: Path) -> None:
    loratool.add(pirate, name="pirate")
    (weights,) = home_of_its_own.rglob("*.safetensors")
    weights.chmod(0o644)
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert loratool.doctor().findings == ()
    assert [found.kind for found in loratool.doctor(deep=True).findings] == ["store-damaged"]


def test_the_doctor_frees_what_nothing_names_and_nothing_else(pirate: Path, home_of_its_own: Path) -> None:
    loratool.add(pirate, name="pirate")
    (weights,) = home_of_its_own.rglob("*.safetensors")
    orphan = weights.parent.parent.with_name("ff") / ("f" * 64)
    shutil.copytree(weights.parent, orphan)
    (found,) = loratool.doctor().findings
    assert found.kind == "store-orphan"
    assert "was lost" not in found.message
    assert orphan.exists()
    result = loratool.doctor(gc=True)
    assert result.findings == ()
    assert result.freed is not None
    assert (result.freed.entries, result.freed.size_bytes > 0) == (1, True)
    assert not orphan.exists()
    assert weights.exists()
    assert (result.counts.adapters, result.counts.versions, result.counts.bases) == (1, 1, 0)


def test_the_doctor_finds_a_merge_that_is_gone(llama: Path, pirate: Path, tmp_path: Path) -> None:
    result = loratool.merge([pirate], into=llama, out=tmp_path / "out", undo=True)
    assert loratool.doctor().findings == ()
    assert result.undo_file is not None
    result.undo_file.rename(tmp_path / "elsewhere")
    assert [found.kind for found in loratool.doctor().findings] == ["undo-file-missing"]
    shutil.rmtree(result.out)
    (found,) = loratool.doctor().findings
    assert found.kind == "merge-output-missing"
    assert str(result.out) in found.message


def test_the_doctor_notes_what_is_gone_and_is_content_then(llama: Path, pirate: Path, tmp_path: Path) -> None:
    loratool.add(pirate, name="pirate")
    kept, without, deleted = (
        loratool.merge(["pirate"], into=llama, out=tmp_path / name, undo=True)
        for name in ("kept", "without", "deleted")
    )
    assert without.undo_file is not None
    without.undo_file.unlink()
    shutil.rmtree(deleted.out)
    assert len(loratool.doctor().findings) == 2
    result = loratool.doctor(gc=True)
    assert result.freed is not None
    assert (result.findings, result.freed.merges, result.freed.entries) == ((), 2, 0)
    states = {merge.output.name: (merge.state, merge.undo_file) for merge in loratool.show("pirate").merges}
    assert states == {
        "kept": ("merged", kept.undo_file),
        "without": ("merged", None),
        "deleted": ("gone", deleted.undo_file),
    }
    again = loratool.doctor(gc=True).freed
    assert again is not None
    assert again.merges == 0
    loratool.merge(["pirate"], into=llama, out=deleted.out)
    states_of = [merge.state for merge in loratool.show("pirate").merges]
    assert sorted(states_of) == ["merged", "merged", "merged", "replaced"]


def test_a_merge_on_a_disk_that_was_away_is_there_again(llama: Path, pirate: Path, tmp_path: Path) -> None:
    out = loratool.merge([pirate], into=llama, out=tmp_path / "drive" / "model").out
    (tmp_path / "drive").rename(tmp_path / "away")
    freed = loratool.doctor(gc=True).freed
    assert freed is not None and freed.merges == 1
    with pytest.raises(NotFoundError, match="no longer at"):
        loratool.verify("model")
    (tmp_path / "away").rename(tmp_path / "drive")
    assert loratool.verify("model").path == out
    freed = loratool.doctor(gc=True).freed
    assert freed is not None and freed.merges == 1
    shutil.rmtree(out)
    assert [found.kind for found in loratool.doctor().findings] == ["merge-output-missing"]


def test_a_place_that_cannot_be_looked_at_is_not_gone(llama: Path, pirate: Path, tmp_path: Path) -> None:
    out = loratool.merge([pirate], into=llama, out=tmp_path / "drive" / "model").out
    shutil.rmtree(out.parent)
    out.parent.symlink_to(out.parent)
    result = loratool.doctor(gc=True)
    assert (result.findings, result.freed and result.freed.merges) == ((), 0)


def test_catalogues_that_share_a_store_do_not_free_each_others_files(
    pirate: Path, home_of_its_own: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'team.db'}"

    def stored() -> int:
        return len(list(home_of_its_own.rglob("*.safetensors")))

    other = shutil.copytree(pirate, tmp_path / "other")
    (other / "README.md").write_text("beside it")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    loratool.add(pirate, name="pirate")
    loratool.add(pirate, name="pirate", registry=url)
    loratool.add(other, name="other", registry=url)
    assert stored() == 2
    for registry in (None, url, f"sqlite:///{tmp_path / 'empty.db'}"):
        result = loratool.doctor(gc=True, registry=registry)
        assert (result.findings, stored()) == ((), 2)
        assert result.freed is not None
        assert any(str(tmp_path / "team.db") in each or "registry.db" in each for each in result.freed.shared_with)
    loratool.remove("pirate", now=True)
    assert stored() == 2
    assert loratool.show("pirate", registry=url).record.name == "pirate"
    assert loratool.doctor(registry=url, deep=True).findings == ()
    loratool.add(other, name="other")
    for file in tmp_path.glob("team.db*"):
        file.unlink()
    with pytest.raises(NotSureError, match="free pirate@1"):
        loratool.doctor(gc=True)
    result = loratool.doctor(gc=True, yes=True)
    assert result.freed is not None
    assert (result.freed.entries, result.freed.shared_with, stored()) == (1, (), 1)


def test_the_doctor_of_a_lost_catalogue_does_not_first_advise_to_free_its_adapters(
    pirate: Path, home_of_its_own: Path
) -> None:
    loratool.add(pirate, name="pirate")
    for file in home_of_its_own.glob("registry.db*"):
        file.unlink()
    (found,) = loratool.doctor().findings
    assert found.kind == "store-orphan"
    assert found.path is not None
    assert re.search(r"has lost pirate@1, whose files .*'loratool doctor --rebuild'", found.message)
    assert "--gc" not in found.message
    assert loratool.add(found.path, name="pirate").record.reference == "pirate@1"
    assert loratool.doctor().findings == ()


# Registries elsewhere


def test_any_url_holds_a_catalogue_of_its_own(
    llama: Path, pirate: Path, tmp_path: Path, home_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'team.db'}"
    loratool.base_add("llama", llama, registry=url)
    loratool.add(pirate, name="pirate", base="llama", registry=url)
    result = loratool.merge(["pirate"], into="llama", out=tmp_path / "out", registry=url)
    loratool.verify(result.out, registry=url)
    assert [merge.output for merge in loratool.show("pirate", registry=url).merges] == [tmp_path / "out"]
    assert (tmp_path / "team.db").is_file()
    assert not (home_of_its_own / "registry.db").exists()
    assert loratool.list() == ()
    monkeypatch.setenv("LORATOOL_REGISTRY", url)
    assert [found.base for found in loratool.list()] == ["llama"]


# What the catalogue knows of merges


def test_a_merge_of_a_catalogued_adapter_is_told_by_its_name_and_not_by_its_place_in_the_store(
    pirate: Path, tiny_models: TinyModels, llama: Path
) -> None:
    loratool.add(pirate, name="pirate")
    (note,) = loratool.merge(["pirate"], into=llama, dry_run=True).notes
    assert "'pirate'" in note
    with pytest.raises(LoratoolError, match="'pirate'"):
        loratool.merge(["pirate"], into=tiny_models.folder("gpt2", "bf16"), dry_run=True)


@pytest.mark.parametrize(
    "otherwise",
    [{"use_rslora": True}, {"lora_alpha": 3}, {"alpha_pattern": {"q_proj": 5}}],
    ids=lambda otherwise: next(iter(otherwise)),
)
def test_the_same_weights_under_another_configuration_are_another_adapter(
    otherwise: dict[str, object], llama: Path, pirate: Path, tmp_path: Path
) -> None:
    """They act otherwise: they are not merged, shown, verified or taken out as the one that is catalogued."""
    other, base = shutil.copytree(pirate, tmp_path / "other"), shutil.copytree(llama, tmp_path / "base")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | otherwise))
    loratool.add(pirate, name="pirate")
    with pytest.raises(NotFoundError, match="it has the weights of pirate@1, but a different configuration"):
        loratool.tag(other, ["x"])
    assert loratool.show(other).place == str(other / WEIGHTS)
    result = loratool.merge([other], into=base, out=tmp_path / "merged")
    assert str(other) in result.adapters[0].adapter
    assert loratool.show("pirate").merges == ()
    assert loratool.verify(result.out).replayed == "base"
    added = loratool.add(other, name="pirate")
    assert (added.record.reference, added.new) == ("pirate@2", True)
    loratool.add(pirate, name="newest")
    assert loratool.show(other).record.reference == "pirate@2"
    assert loratool.show(pirate).record.reference == "newest@1"
    shutil.rmtree(base)
    shutil.rmtree(other)
    back = loratool.unmerge(result.out, out=tmp_path / "back", approximate=True).out
    off = {
        name: (as_torch(tensor).float() - as_torch(stored_tensors(llama)[name]).float()).abs().max()
        for name, tensor in stored_tensors(back).items()
    }
    assert max(off.values()) < 2e-3


def test_an_adapter_whose_copy_in_the_catalogue_is_gone_is_found_where_it_was(
    llama: Path, pirate: Path, tmp_path: Path, home_of_its_own: Path
) -> None:
    out = loratool.merge([pirate], into=llama, out=tmp_path / "merged").out
    loratool.add(pirate, name="pirate")
    shutil.rmtree(home_of_its_own / "store")
    assert loratool.verify(out).replayed == "base"


def test_weights_that_are_catalogued_are_not_shown_where_their_configuration_is_damaged(
    pirate: Path, tmp_path: Path
) -> None:
    loratool.add(pirate, name="pirate")
    damaged = shutil.copytree(pirate, tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json.*JSON"):
        loratool.show(damaged)


def test_a_bare_file_is_shown_as_it_was_catalogued(pirate: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(pirate / WEIGHTS), bare)
    loratool.add(bare, name="four", alpha=4)
    loratool.add(bare, name="five", alpha=5)
    assert loratool.show(bare).record.name == "five"  # the newest


def test_an_in_place_merge_and_its_unmerge_are_recorded(llama: Path, pirate: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    loratool.add(pirate, name="pirate")
    loratool.merge(["pirate"], into=model, in_place=True)
    assert [(merge.output, merge.state) for merge in loratool.show("pirate").merges] == [(model, "merged")]
    loratool.unmerge(model, in_place=True)
    assert [(merge.output, merge.state) for merge in loratool.show("pirate").merges] == [(model, "unmerged")]


# The library


ALIASES = {"evaluate": "eval", "list_adapters": "list"}
"""Under these names a star import brings the functions whose own names are Python's."""

FUNCTIONS = sorted({ALIASES.get(name, name) for name in loratool.__all__} - {"LoratoolError"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_documents_each_of_its_parameters(name: str) -> None:
    function = getattr(loratool, name)
    text = inspect.getdoc(function) or ""
    assert text.split("\n")[0].endswith((".", "rounded once."))
    assert "Raises:" in text
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +{parameter}: \S", arguments, re.MULTILINE), f"{name}({parameter})"


def commands(group: click.Group = cli, words: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command by the name of its function: ``base add`` is ``base_add``."""
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        below = commands(command, (*words, name)) if isinstance(command, click.Group) else None
        found |= {"_".join((*words, name)): command} if below is None else below
    return found


OPTIONS = {"show": ("with_spectrum", "spectrum"), "verify": ("delivery", "verify_delivery")}
"""Options of commands that call public functions of their own, as `show --spectrum` does: each with its function."""


def test_every_command_is_one_function_with_the_same_name_and_the_same_words() -> None:
    known = commands()
    assert sorted([*known, *(function for _, function in OPTIONS.values())]) == FUNCTIONS
    for name, command in known.items():
        words = {str(parameter.name) for parameter in command.params} - {"as_json", "help", "verbose"}
        parameters = set(inspect.signature(getattr(loratool, name)).parameters)
        if name in OPTIONS:
            option, function = OPTIONS[name]
            words -= {option}
            parameters |= set(inspect.signature(getattr(loratool, function)).parameters)
        if name == "train":
            parameters = parameters - {"choices"} | set(Choices.__annotations__)
        if name == "push":  # who is asked on a terminal, and is not with --yes
            words -= {"yes"}
            parameters -= {"confirm"}
        assert words <= parameters, name
        assert parameters - words <= {"registry", "progress"}, name


def test_a_name_that_the_library_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        _ = loratool.frobnicate


def test_a_star_import_hides_nothing_of_pythons_own() -> None:
    namespace: dict[str, Any] = {}
    exec("from loratool import *", namespace)
    brought = namespace.keys() - {"__builtins__"}
    assert brought == set(loratool.__all__)
    assert not brought & set(dir(builtins))
    for alias, name in ALIASES.items():
        assert namespace[alias] is getattr(loratool, name)


def test_dir_shows_the_functions_before_they_are_imported() -> None:
    program = "import loratool, sys; print(*dir(loratool)); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    shown = set(done.stdout.split())
    assert {*FUNCTIONS, *ALIASES, "LoratoolError"} <= shown
    assert not shown & {"Any", "Final", "TYPE_CHECKING", "import_module"}


def test_a_result_is_what_json_can_hold(llama: Path, pirate: Path, tmp_path: Path) -> None:
    loratool.base_add("llama", llama)
    loratool.add(pirate, name="pirate", base="llama")
    merged = loratool.merge(["pirate"], into="llama", out=tmp_path / "out")
    results: list[Any] = [
        merged,
        loratool.verify(merged.out),
        loratool.unmerge(merged.out),
        loratool.show("pirate"),
        loratool.base_show("llama"),
    ]
    for result in results:
        value = result.to_json()
        assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_a_base_of_another_prefix_and_its_adapter_are_one_model(llama: Path, pirate: Path, tmp_path: Path) -> None:
    """What `--base` checks is whether the adapter lands, not whether the names are equal."""
    base = shutil.copytree(llama, tmp_path / "base")
    rewrite_tensors(base, lambda name: re.sub(r"^model\.", "model.language_model.", name))
    loratool.base_add("around", base)
    assert loratool.add(pirate, name="pirate", base="around").record.base == "around"


def test_a_base_whose_files_are_away_is_taken_at_its_word(llama: Path, pirate: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    loratool.base_add("llama", base)
    shutil.rmtree(base)
    assert loratool.add(pirate, name="pirate", base="llama").record.base == "llama"
    with pytest.raises(NotFoundError, match="loratool base add llama"):
        loratool.merge(["pirate"], into="llama", out=tmp_path / "out")


def test_a_model_without_a_configuration_is_a_base_too(tmp_path: Path) -> None:
    base = save_plain_model(tmp_path / "plain", {"layers.0.q_proj.weight": torch.ones(24, 16)})
    (base / "config.json").unlink()
    record = loratool.base_add("plain", base)
    assert (record.architecture, record.model_type, record.parameter_count, record.dtype) == (None, None, 384, "fp32")
    adapter = save_plain_adapter(tmp_path / "adapter", {"layers.0.q_proj": (24, 16)})
    assert loratool.add(adapter, base="plain").record.base == "plain"
