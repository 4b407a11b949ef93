"""Folders that hold no adapter themselves say where adapters are and what to type; adapters in shards are adapters."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import assert_same_tensors, stored_tensors

import loratool
from loratool.cli import main
from loratool.errors import AdapterError, ElsewhereError, LoratoolError
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEIGHTS = "adapter_model.safetensors"
INDEX = WEIGHTS + ".index.json"


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Type ``loratool WORDS...`` in the test's folder; what it prints as an error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["loratool", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 1
        return capsys.readouterr().err

    return call


def test_a_folder_above_names_the_folders_of_adapters_in_natural_order(pirate: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-2390", "checkpoint-500", "deeper/still/default"):
        shutil.copytree(pirate, tmp_path / "run" / name)
    (tmp_path / "run" / ".cache").mkdir()
    with pytest.raises(
        ElsewhereError, match="'checkpoint-500', 'checkpoint-2390' and 'deeper/still/default'"
    ) as raised:
        read_adapter(tmp_path / "run")
    assert "holds no adapter itself" in str(raised.value)
    assert [place.name for place in raised.value.places] == ["checkpoint-500", "checkpoint-2390", "default"]
    for place in raised.value.places:
        assert read_adapter(place).rank == 4


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["add", "run", "--tag", "speech"], ["loratool add run/a --tag speech", "loratool add run/b --tag speech"]),
        (["show", "run/"], ["loratool show run/a", "loratool show run/b"]),
        (["merge", "./run=0.5", "--into", "B"], ["loratool merge run/a=0.5 --into B", "loratool merge run/b=0.5 --into B"]),
        (["export", "run", "--out=x"], ["loratool export run/a --out=x", "loratool export run/b --out=x"]),
    ],
)  # fmt: skip
def test_the_command_to_type_is_shown(
    words: list[str],
    instead: list[str],
    typed: Callable[..., str],
    pirate: Path,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        shutil.copytree(pirate, tmp_path / "run" / name)
    (tmp_path / "B").symlink_to(tiny_models.folder("llama"))
    lines = typed(*words).splitlines()
    assert lines[0].startswith(
        "Error: 'run' holds no adapter itself, but the folders 'a' and 'b' in it do; give one of them"
    )
    assert [line.strip() for line in lines[1:]] == instead


def test_of_many_checkpoints_the_last_are_shown_and_names_are_quoted(
    typed: Callable[..., str], pirate: Path, tmp_path: Path
) -> None:
    for number in (100, 200, 1000, 300):
        shutil.copytree(pirate, tmp_path / "my run" / f"checkpoint-{number}")
    shown = [line.strip() for line in typed("show", "my run").splitlines()[1:]]
    assert shown == [f"loratool show 'my run/checkpoint-{number}'" for number in (200, 300, 1000)]


def test_several_files_are_named_with_their_commands(typed: Callable[..., str], pirate: Path, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for name in ("a", "b"):
        shutil.copyfile(pirate / WEIGHTS, tmp_path / "loras" / f"{name}.safetensors")
    assert typed("show", "loras").splitlines()[1:] == [
        "  loratool show loras/a.safetensors",
        "  loratool show loras/b.safetensors",
    ]


def test_a_folder_without_any_is_said_to_hold_none(typed: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (error,) = typed("add", "empty").splitlines()
    assert "'empty' holds no adapter: there is no adapter_model.safetensors" in error


def test_a_tree_of_many_files_is_answered(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / "wide" / f"{number}").mkdir(parents=True)
        for file in range(50):
            (tmp_path / "wide" / f"{number}" / f"{file}.txt").touch()
    (tmp_path / "wide" / "0" / "up").symlink_to(tmp_path / "wide")
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter(tmp_path / "wide")


# Shards


@pytest.fixture
def sharded(pirate: Path, tmp_path: Path) -> Path:
    """The adapter in three shards under an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    content = load_file(pirate / WEIGHTS)
    names = sorted(content)
    index = {}
    for number in range(3):
        file = f"adapter_model-{number + 1:05d}-of-00003.safetensors"
        part = names[number::3]
        save_file({name: content[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copyfile(pirate / "adapter_config.json", folder / "adapter_config.json")
    return folder


def test_shards_are_catalogued_as_one_file_shown_exported_and_merged(
    sharded: Path, pirate: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    added = loratool.add(sharded)
    assert (added.record.name, added.record.rank) == ("sharded", 4)
    assert not loratool.add(sharded).new
    assert loratool.show(sharded).record.reference == loratool.show(sharded / INDEX).record.reference == "sharded@1"
    for name in ("sharded", sharded):
        exported = loratool.export(name, tmp_path / "out", force=True)
        theirs, ours = load_file(pirate / WEIGHTS), load_file(exported / WEIGHTS)
        assert theirs.keys() == ours.keys()
        assert all((theirs[key] == ours[key]).all() for key in theirs)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == added.record.size_bytes
    whole = loratool.merge(pirate, into=base, out=tmp_path / "whole")
    for name in ("sharded", sharded):
        merged = loratool.merge(name, into=base, out=tmp_path / "merged", force=True)
        assert_same_tensors(stored_tensors(merged.out), stored_tensors(whole.out))
        assert loratool.verify(merged.out).replayed
    copy = shutil.copytree(base, tmp_path / "copy")
    loratool.merge(sharded, into=copy, in_place=True)
    loratool.unmerge(copy, in_place=True)
    assert_same_tensors(stored_tensors(copy), stored_tensors(base))
    assert loratool.remove(sharded)[0].reference == "sharded@1"


def test_other_bytes_in_a_shard_are_another_adapter(sharded: Path) -> None:
    loratool.add(sharded)
    shard = sharded / "adapter_model-00002-of-00003.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert loratool.add(sharded).record.reference == "sharded@2"


def change_map(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first(names: dict[str, Any]) -> str:
    return sorted(names)[0]


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard in another folder": (
        lambda folder: change_map(folder, lambda names: names.update({first(names): "../x.safetensors"})), "own folder"
    ),
    "a shard by its whole path": (
        lambda folder: change_map(folder, lambda names: names.update({first(names): "/etc/x.safetensors"})), "own folder"
    ),
    "a shard that is a number": (
        lambda folder: change_map(folder, lambda names: names.update({first(names): 3})), "own folder"
    ),
    "a shard that is missing": (
        lambda folder: (folder / "adapter_model-00002-of-00003.safetensors").unlink(), "00002-of-00003"
    ),
    "a shard that is a folder": (
        lambda folder: (
            (folder / "adapter_model-00002-of-00003.safetensors").unlink(),
            (folder / "adapter_model-00002-of-00003.safetensors").mkdir(),
        ),
        "00002-of-00003",
    ),
    "a shard that is a FIFO": (
        lambda folder: (
            (folder / "adapter_model-00002-of-00003.safetensors").unlink(),
            os.mkfifo(folder / "adapter_model-00002-of-00003.safetensors"),
        ),
        "00002-of-00003",
    ),
    "a tensor in another shard than said": (
        lambda folder: change_map(
            folder, lambda names: names.update({first(names): "adapter_model-00002-of-00003.safetensors"})
        ),
        "lora_",
    ),
    "a tensor that no shard has": (
        lambda folder: change_map(
            folder, lambda names: names.update({"base_model.model.x.lora_A.weight": "adapter_model-00001-of-00003.safetensors"})
        ),
        "x.lora_A",
    ),
    "a tensor in two shards": (
        lambda folder: save_file(
            load_file(folder / "adapter_model-00001-of-00003.safetensors")
            | load_file(folder / "adapter_model-00002-of-00003.safetensors"),
            folder / "adapter_model-00002-of-00003.safetensors",
        ),
        "lora_",
    ),
    "a name twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'), "twice"
    ),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "not an object"),
    "an index that is a FIFO": (lambda folder: ((folder / INDEX).unlink(), os.mkfifo(folder / INDEX)), "adapter_model"),
    "a damaged shard": (
        lambda folder: (folder / "adapter_model-00002-of-00003.safetensors").write_bytes(b"<html>"), "web page"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_an_index_that_lies_is_refused_with_what_is_wrong(what: str, sharded: Path) -> None:
    damage, named = HOSTILE[what]
    damage(sharded)
    with pytest.raises(LoratoolError, match=named) as raised:
        loratool.add(sharded)
    assert ";" in str(raised.value)
    assert loratool.list() == ()


def test_a_tensor_that_the_index_leaves_out_is_read_all_the_same(sharded: Path, pirate: Path) -> None:
    """transformers reads every tensor of a shard that it opens."""
    change_map(sharded, lambda names: names.pop(first(names)))
    assert read_adapter(sharded).ranks == read_adapter(pirate).ranks


@pytest.mark.parametrize("with_config", [True, False])
def test_shards_without_their_index_are_said_to_lack_it(sharded: Path, with_config: bool) -> None:
    (sharded / INDEX).unlink()
    if not with_config:
        (sharded / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds 3 shards .* no index of them; get their"):
        read_adapter(sharded)


def test_a_shard_alone_leads_to_its_folder(sharded: Path, typed: Callable[..., str]) -> None:
    lines = typed("add", str(sharded / "adapter_model-00001-of-00003.safetensors")).splitlines()
    assert "one shard of an adapter" in lines[0]
    assert lines[1].strip() == f"loratool add {sharded}"


def test_a_circle_of_links_below_a_folder_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "loop").symlink_to("loop")
    with pytest.raises(AdapterError, match="holds no adapter"):
        loratool.add(tmp_path)
