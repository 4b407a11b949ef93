"""Weights that were trained with an adapter and lie beside it: said, and never left out of a merge in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_models import assert_same_tensors, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

EXTRAS = (
    "non_lora_trainables.bin", "non_lora_state_dict.bin", "trainable_params.bin", "new_embeddings.safetensors",
    "mm_projector.bin", "head_config.json", "pytorch_model_head.bin", "value_head.bin", "pytorch_model.bin",
    "2_Dense/model.safetensors",
)  # fmt: skip
NO_EXTRAS = ("training_args.bin", "optimizer.pt", "README.md", "rng_state.pth", "checkpoint-5/non_lora_trainables.bin")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "pirate")


def put(name: str, folder: Path) -> None:
    """Put a file of this name beside an adapter; a pickle only in name, since nothing opens it."""
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"weight": torch.ones(2, 3)}, folder / name)
    else:
        (folder / name).write_text("{}")


@pytest.mark.parametrize("name", EXTRAS)
def test_it_is_said_and_a_merge_does_not_leave_it_out_in_silence(
    name: str, adapter: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    put(name, adapter)
    base = tiny_models.folder("llama", "bf16")
    added = loratool.add(adapter)
    assert any(name in note for note in added.notes)
    for reference in (adapter, "pirate"):  # the catalogue's copy has not got the file, and says so all the same
        assert loratool.show(reference).to_json()["trained_beside"] == [name]
        with pytest.raises(AdapterError, match=rf"'{name}'.*--without-extras"):
            loratool.merge(reference, into=base, out=tmp_path / "out")
        with pytest.raises(AdapterError, match="--without-extras"):
            loratool.merge(reference, into=base, out=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", without_extras=True, undo=True)
    assert any(name in note for note in merged.notes)
    shutil.rmtree(adapter)
    back = loratool.unmerge(merged.out, out=tmp_path / "back")
    assert_same_tensors(stored_tensors(back.out), stored_tensors(base))


@pytest.mark.parametrize("name", NO_EXTRAS)
def test_what_a_training_leaves_is_no_such_thing(
    name: str, adapter: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    put(name, adapter)
    assert loratool.show(adapter).trained_beside == ()
    loratool.merge(adapter, into=tiny_models.folder("llama", "bf16"), out=tmp_path / "out")


def test_a_model_in_the_folder_is_the_base_and_no_head(adapter: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(base / name, adapter / name)
    assert loratool.show(adapter).trained_beside == ()


def test_what_lies_beside_a_single_file_is_not_its(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    loratool.export(adapter, tmp_path / "loose" / "pirate.st")
    put("mm_projector.bin", tmp_path / "loose")
    assert loratool.show(tmp_path / "loose" / "pirate.st").trained_beside == ()


def test_what_is_made_of_it_says_so_too(adapter: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    put("value_head.bin", adapter)
    loratool.truncate(adapter, rank=2, out=tmp_path / "small.st")
    loratool.export(adapter, tmp_path / "copy")
    for made in (tmp_path / "small.st", tmp_path / "copy"):
        with pytest.raises(AdapterError, match="value_head"):
            loratool.merge(made, into=tiny_models.folder("llama", "bf16"), out=tmp_path / "out")


def test_one_from_the_hub_says_what_was_not_downloaded(hub: HubStandIn, adapter: Path, tiny_models: TinyModels) -> None:
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    hub.create("someone/vision-lora").put(files | {"non_lora_trainables.bin": b"pickled"})
    pulled = loratool.pull("someone/vision-lora", name="vision")
    assert any("non_lora_trainables.bin" in note for note in pulled.notes)
    assert loratool.show("vision").trained_beside == ("non_lora_trainables.bin",)
    with pytest.raises(AdapterError, match="non_lora_trainables"):
        loratool.merge("vision", into=tiny_models.folder("llama", "bf16"), dry_run=True)


def test_the_card_and_the_command_say_it(adapter: Path, tiny_models: TinyModels) -> None:
    put("mm_projector.bin", adapter)
    run = CliRunner().invoke
    assert "mm_projector.bin" in run(cli, ["show", str(adapter)]).output
    base = str(tiny_models.folder("llama", "bf16"))
    refused = run(cli, ["merge", str(adapter), "--into", base, "--dry-run"])
    assert refused.exit_code == 1 and "--without-extras" in str(refused.exception)
    assert run(cli, ["merge", str(adapter), "--into", base, "--dry-run", "--without-extras"]).exit_code == 0


@pytest.mark.parametrize("recorded", ["x", 3, [3], [""], {"a": 1}, [["a"]], ["x" * 300]])
def test_a_record_that_is_none_is_passed_over(recorded: object, adapter: Path) -> None:
    facts = {"schema": 1, "kind": "lora", "trained_beside": recorded}
    (adapter / "loratool.json").write_text(json.dumps(facts))
    assert loratool.show(adapter).trained_beside == ()
