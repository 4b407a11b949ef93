"""The base that an adapter's files name against the one that it is put into, where no fingerprint decides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, save_kohya_dylora

import loratool
from loratool.library.checking.stated_base import is_other

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

COMMIT = "ab" * 20

SAME = [
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "meta-llama/Llama-3.1-8B"),
    ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
    ("meta-llama/Llama-3.1-8B@0e9e39f2", "meta-llama/Llama-3.1-8B"),
    ("/home/ada/models/Llama-3.1-8B/", "meta-llama/Llama-3.1-8B"),
    (r"C:\models\llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
    (f"/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/{COMMIT}", "meta-llama/Llama-3.1-8B"),
    ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistralai/Mistral-7B-v0.1"),
    ("Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", "unsloth/Qwen2.5-0.5B-Instruct"),
    ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b"),
    ("gpt2", "openai-community/gpt2"),
]
OTHER = [
    ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"),
    ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
    ("Qwen/Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-0.5B"),
    ("openai-community/gpt2-medium", "openai-community/gpt2"),
]
SAYS_NOTHING = [
    "model", "base", "/content/base_model", "checkpoint-500", "./output/final", f"/x/snapshots/{COMMIT}", "/mnt/model/", "7", "",
    "../base-bf16",
]  # fmt: skip


@pytest.mark.parametrize(("stated", "base"), SAME)
def test_one_model_under_two_spellings(stated: str, base: str) -> None:
    assert not is_other(stated, base, [])
    assert not is_other(stated, None, ["mine", base.rpartition("/")[2]])


@pytest.mark.parametrize(("stated", "base"), OTHER)
def test_two_models(stated: str, base: str) -> None:
    assert is_other(stated, base, [])
    assert is_other(stated, None, [base.rpartition("/")[2]])


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_names_that_say_nothing(name: str) -> None:
    assert not is_other(name, "meta-llama/Llama-3.1-8B", [])
    assert not is_other("meta-llama/Llama-3.1-8B-Instruct", None, [name])


@pytest.mark.parametrize("made_up", ["llama", "llama-3.1", "mine", "my-base", "work"])
def test_a_name_that_a_user_made_up_says_nothing(made_up: str) -> None:
    assert not is_other("meta-llama/Llama-3.1-8B-Instruct", None, [made_up])


def test_names_of_folders_tell_models_apart_by_words_that_do() -> None:
    assert is_other("/home/ada/tiny-instruct", None, ["tiny"]) and is_other("/home/ada/tiny", None, ["tiny-chat"])
    assert not is_other("/home/ada/tiny-copy", None, ["tiny"]) and not is_other("/home/ada/tiny-2", None, ["tiny-bf16"])


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "Tiny-1M")


def of(stated: str, tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return copy_with(tiny_adapters.folder("llama"), tmp_path / "pirate", base_model_name_or_path=stated)


def said(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if "seems to be another model" in note]


@pytest.mark.parametrize(
    ("stated", "is_said"), [("acme/Tiny-1M-Instruct", True), ("acme/tiny-1m-bnb-4bit", False), ("base", False)]
)
def test_add_and_merge_say_it(
    stated: str, is_said: bool, base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = of(stated, tiny_adapters, tmp_path)
    notes = loratool.merge(adapter, into=base, dry_run=True).notes
    assert bool(said(notes)) is is_said
    assert not is_said or f"names '{stated}' as its base, and 'Tiny-1M' seems" in said(notes)[0]
    assert bool(said(loratool.merge(adapter, into=base, out=tmp_path / "out").notes)) is is_said
    assert bool(said(loratool.add(adapter, base=base).notes)) is is_said


def test_the_hub_id_of_a_base_decides_whatever_its_folder_is_called(
    base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.base_add("mine", base, hub_id="acme/Tiny-1M-Instruct")
    adapter = of("acme/Tiny-1M-Instruct", tiny_adapters, tmp_path)
    assert not said(loratool.merge(adapter, into="mine", dry_run=True).notes)
    assert said(loratool.add(of_other(adapter, tmp_path), base="mine").notes)


def test_a_folder_that_tells_is_heard_beside_a_name_that_does_not(
    base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.base_add("mine", base)
    assert said(loratool.merge(of("acme/Tiny-1M-Instruct", tiny_adapters, tmp_path), into="mine", dry_run=True).notes)


def of_other(adapter: Path, tmp_path: Path) -> Path:
    return copy_with(adapter, tmp_path / "other", base_model_name_or_path="acme/Tiny-1M")


def test_a_fingerprint_decides_and_names_do_not(base: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = of("acme/Tiny-1M-Instruct", tiny_adapters, tmp_path)
    loratool.add(adapter, base=base)  # tied to it by now
    assert not said(loratool.merge("pirate", into=base, dry_run=True).notes)


def test_what_a_base_was_quantized_or_merged_from_is_its_name_too(
    base: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = of("acme/Tiny-1M", tiny_adapters, tmp_path)
    other = tiny_adapters.folder("llama", seed=5)
    image = loratool.quantize(base, out=tmp_path / "Small-1M").out
    merged = loratool.merge(other, into=base, out=tmp_path / "Tiny-1M-merged").out
    for model in (image, merged):
        assert not said(loratool.merge(adapter, into=model, dry_run=True).notes)


def test_kohyas_file_name_of_its_base_counts(tmp_path: Path, tiny_models: TinyModels) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "Tiny-1M")
    adapter = save_kohya_dylora(tmp_path / "k.safetensors", {"model.layers.0.self_attn.q_proj": (64, 64)}, r=4, alpha=4)
    assert not said(loratool.merge(adapter, into=base, dry_run=True).notes)  # 'model.safetensors' says nothing
    metadata = {"ss_network_module": "networks.dylora", "ss_network_dim": "4", "ss_network_alpha": "4", "ss_network_args": "{}",
                "ss_sd_model_name": "Tiny-1M-Instruct.safetensors"}  # fmt: skip
    save_file(load_file(adapter), tmp_path / "l.safetensors", metadata)
    assert said(loratool.merge(tmp_path / "l.safetensors", into=base, dry_run=True).notes)
