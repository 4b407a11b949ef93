"""What an adapter is called in the catalogue where nobody says, and whether it is a next version of what is called so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapters import copy_with, save_single_file

import loratool
from loratool.errors import AdapterError
from loratool.library.resolving.adapter_name import is_generic, name_from, name_on_hub

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Q = {"target_modules": ["q_proj"]}


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


@pytest.fixture
def place(pirate: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter at a path, by default one for the tiny Llama."""

    def put(path: str, adapter: Path = pirate) -> Path:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copytree(adapter, target)

    return put


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pirate/checkpoint-500", "pirate"),
        ("pirate/adapter_model", "pirate"),
        ("pirate/final", "pirate"),
        ("pirate/default", "pirate"),
        ("pirate/output", "pirate"),
        ("pirate/output/checkpoint-500/default", "pirate"),
        ("pirate/Final_Checkpoint", "pirate"),
        ("pirate/epoch3", "pirate"),
        ("pirate/12000", "pirate"),
        (f"pirate/{COMMIT}", "pirate"),
        (f"hub/models--ada--pirate-lora/snapshots/{COMMIT}", "pirate-lora"),
        (f"hub/models--ada--pirate-lora/snapshots/{COMMIT}/checkpoint-500", "pirate-lora"),
        (f"hub/models--ada--lora/snapshots/{COMMIT}", "ada-lora"),
        ("checkpoint-500/parrot", "parrot"),
    ],
)
def test_a_name_that_says_nothing_gives_way_to_that_of_the_folder_above_or_the_repository(
    path: str, name: str, place: Callable[..., Path]
) -> None:
    assert loratool.add(place(path)).record.name == name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "final.st"])
def test_so_does_a_files(name: str, pirate: Path, tmp_path: Path) -> None:
    (tmp_path / "parrot").mkdir()
    assert loratool.add(save_single_file(pirate, tmp_path / "parrot" / name)).record.name == "parrot"


def test_a_link_that_says_nothing_is_called_what_it_leads_to(place: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(place("pirate"))
    assert loratool.add(tmp_path / "latest").record.name == "pirate"


@pytest.mark.parametrize("stem", ["pirate", "llama3-8b", "checkpoint-pirate", "my-lora", "deadbeef", "lora-für-alle"])
def test_a_name_that_says_something_is_kept(stem: str) -> None:
    assert not is_generic(stem)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("ünï✓", "uni"), ("lora-für-alle", "lora-fur-alle"), ("Łódź straße", "Lodz-strasse"), ("ｐｉｒａｔｅ", "pirate"),
     ("海賊-lora-v2", "lora-v2"), ("São Paulo", "Sao-Paulo")],
)  # fmt: skip
def test_accents_are_left_out_of_a_default_name_and_their_letters_stay(stem: str, name: str) -> None:
    assert name_from(stem) == name


def test_where_no_folder_says_anything_the_name_is_of_the_base_and_the_kind(
    tiny_models: TinyModels, place: Callable[..., Path]
) -> None:
    assert loratool.add(place("data/final")).record.name == "llama-fp32-single-lora"  # its folder, as it names it
    loratool.base_add("tiny", tiny_models.folder("llama", "fp32"))
    assert loratool.add(place("data/output"), base="tiny").record.name == "tiny-lora"


def test_the_home_folder_names_no_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Callable[..., Path]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    assert loratool.add(place("ada/final")).record.name == "llama-fp32-single-lora"


def test_where_nothing_says_anything_a_name_is_asked_for(
    pirate: Path, place: Callable[..., Path], tmp_path: Path
) -> None:
    silent = copy_with(place("data/once"), tmp_path / "data" / "final", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match=r"'final' says nothing .*; give it a name with --name"):
        loratool.add(silent)
    assert loratool.list() == ()
    assert loratool.add(silent, name="pirate").record.name == "pirate"


def test_on_the_hub_it_is_the_last_word_that_says_something() -> None:
    assert name_on_hub("ada/pirate", []) == "pirate"
    assert name_on_hub("ada/pirate", ["checkpoint-500"]) == "pirate"
    assert name_on_hub("ada/pirate", ["parrot", "final"]) == "parrot"
    assert name_on_hub("ada/lora", ["final"]) == "ada-lora"


# Versions


def test_two_checkpoints_of_one_training_are_versions(tiny_adapters: TinyAdapters, place: Callable[..., Path]) -> None:
    assert loratool.add(place("run-7b/checkpoint-500")).record.reference == "run-7b@1"
    later = place("run-7b/checkpoint-1000", tiny_adapters.folder("llama", seed=2))
    assert loratool.add(later).record.reference == "run-7b@2"


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("qwen2", {}, "that one belongs to the base '.*llama.*', this one to the base '.*qwen2.*'"),
        ("llama", Q, r"that one targets .*k_proj.*, this one q_proj"),
    ],
)
def test_a_strangers_adapter_of_the_same_name_asks_for_another(
    architecture: str, options: dict[str, object], reason: str, place: Callable[..., Path], tiny_adapters: TinyAdapters
) -> None:
    loratool.add(place("mine/pirate"))
    theirs = place("theirs/pirate", tiny_adapters.folder(architecture, seed=5, **options))
    with pytest.raises(AdapterError, match=rf"'pirate' is catalogued already.*pirate@1: {reason}; .*--name"):
        loratool.add(theirs)
    assert [each.reference for each in loratool.list()] == ["pirate@1"]
    assert loratool.add(theirs, name="pirate").record.reference == "pirate@2"  # as it was said
    assert not loratool.add(theirs).new  # it is the very version


def test_the_fingerprints_of_the_bases_decide_where_they_are_known(
    tiny_models: TinyModels, place: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.base_add("tiny", tiny_models.folder("llama", "fp32"))
    loratool.add(place("mine/pirate"), base="tiny")
    elsewhere = copy_with(
        tiny_adapters.folder("llama", seed=2), tmp_path / "theirs" / "pirate", base_model_name_or_path="/moved/llama"
    )
    assert loratool.add(elsewhere, base="tiny").record.reference == "pirate@2"


def test_other_layers_are_another_base(place: Callable[..., Path], pirate: Path, tmp_path: Path) -> None:
    loratool.add(copy_with(place("once"), tmp_path / "mine" / "pirate", base_model_name_or_path=None))
    fewer = copy_with(place("twice"), tmp_path / "theirs" / "pirate", base_model_name_or_path=None)
    tensors = load_file(fewer / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}, fewer / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="it changes other layers"):
        loratool.add(fewer)


def test_what_came_from_a_version_is_one_whatever_it_targets(
    place: Callable[..., Path], tiny_adapters: TinyAdapters
) -> None:
    parent = loratool.add(place("mine/pirate")).record
    child = place("later/pirate", tiny_adapters.folder("llama", seed=5, **Q))
    lineage = {"operation": "retrain", "parents": [{"name": "pirate", "sha256": parent.sha256}]}
    (child / "loratool.json").write_text(json.dumps({"schema": 1, "kind": "lora", "lineage": lineage}))
    assert loratool.add(child).record.reference == "pirate@2"


def test_strangers_of_one_base_do_not_become_versions_by_a_name_made_of_it(
    place: Callable[..., Path], tiny_adapters: TinyAdapters
) -> None:
    loratool.add(place("data/final"))
    with pytest.raises(AdapterError, match=r"they share only the base and the kind, .*--name"):
        loratool.add(place("work/final", tiny_adapters.folder("llama", seed=2)))
    assert not loratool.add(place("work/output")).new


# The same weights


def test_the_same_weights_under_another_name_are_said(
    place: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.add(place("pirate"))
    again = loratool.add(place("parrot"))
    assert (again.new, again.record.reference) == (True, "parrot@1")
    assert "it has the same weights as pirate@1" in again.notes
    stronger = loratool.add(copy_with(tmp_path / "pirate", tmp_path / "stronger", lora_alpha=99))
    assert "it has the same weights as parrot@1, pirate@1, with another kind, alpha or scaling" in stronger.notes
    assert not any(
        "same weights" in note for note in loratool.add(tiny_adapters.folder("llama", seed=2), name="x").notes
    )


def test_the_same_base_under_another_name_is_said(tiny_models: TinyModels, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from loratool.cli import cli

    folder = tiny_models.folder("llama", "fp32")
    shutil.copytree(folder, tmp_path / "copy")
    first = CliRunner().invoke(cli, ["base", "add", "llama", str(folder)])
    again = CliRunner().invoke(cli, ["base", "add", "other", str(tmp_path / "copy")])
    assert "same content" not in first.output
    assert "the same content is already catalogued as 'llama'" in " ".join(again.output.split())


def test_what_is_made_of_an_adapter_is_no_version_of_a_stranger_by_its_outputs_name(
    tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.add(tiny_adapters.folder("llama", target_modules=["q_proj"]), name="mine")
    other = tiny_adapters.folder("llama", target_modules=["v_proj"])
    loratool.add(other, name="other")
    out = tmp_path / "mine.safetensors"
    for make in (
        lambda **options: loratool.truncate("other", rank=1, out=out, **options),
        lambda **options: loratool.combine(["other"], method="cat", out=out, **options),
    ):
        with pytest.raises(AdapterError, match="not a version of mine@1"):
            make()
        assert not out.exists() and [each.version for each in loratool.list() if each.name == "mine"] == [1]
    made = loratool.truncate("other", rank=1, out=out, name="mine")
    assert made[0].record.reference == "mine@2"
