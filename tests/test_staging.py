"""Outputs and changes in place: what `--force` may replace, what an interrupted change asks for, what is made durable."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import digest

import loratool
from loratool.checkpoint import journal, staging
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_file, staged_folder
from loratool.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

JOURNAL = ".loratool-journal"
FOLDER, FILE, ADAPTER = OutputKind.MERGED_MODEL, OutputKind.ADAPTER_FILE, OutputKind.ADAPTER_FOLDER
STAGES = [partial(staged_folder, kind=FOLDER), partial(staged_file, kind=FILE)]


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16", "single"), tmp_path / "base")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


# What `--force` may replace.


def link(file: Path, target: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)


def write(file: Path, text: str = "mine") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a letter": (lambda out: write(out / "letter.txt"), "holds 'letter.txt'"),
    "the first of two": (lambda out: [write(out / name) for name in ("b.txt", "a.txt")], "holds 'a.txt'"),
    "a file below": (lambda out: write(out / "notes" / "deep" / "letter.txt"), "holds 'notes/deep/letter.txt'"),
    "weights below": (lambda out: write(out / "mine" / "x.safetensors"), "holds 'mine/x.safetensors'"),
    "a repository": (lambda out: write(out / ".git" / "HEAD"), "holds '.git/HEAD'"),
    "a link to a folder": (lambda out: link(out / "linked", out.parent / "base"), "holds 'linked'"),
    "a neighbour of the undo": (lambda out: write(out / "loratool-undo-mine" / "x"), "holds 'loratool-undo-mine/x'"),
    "an adapter's file": (lambda out: write(out / "adapter_config.json"), "holds 'adapter_config.json'"),
    "a manifest of a change in place": (lambda out: edit(out / "loratool.json", in_place=True), "changed in place"),
    "files that are no mapping": (lambda out: edit(out / "loratool.json", files=7), "holds "),
    "a manifest that is no JSON": (lambda out: write(out / "loratool.json", "{"), "loratool did not write"),
    "a manifest that is no text": (lambda out: (out / "loratool.json").write_bytes(b"\xff"), "did not write"),
    "a manifest that is a list": (lambda out: write(out / "loratool.json", "[]"), "did not write"),
    "a manifest that is deep": (lambda out: write(out / "loratool.json", "[" * 100_000), "did not write"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_force_keeps_a_folder_that_holds_more_than_the_manifest_accounts_for(
    what: str, base: Path, adapter: Path
) -> None:
    out = loratool.merge([adapter], into=base, out=base.parent / "out", undo=True).out
    change, named = FOREIGN[what]
    change(out)
    before = digest(base.parent)
    with pytest.raises(OutputError, match="--force does not replace it") as raised:
        loratool.merge([(adapter, 0.5)], into=base, out=out, force=True)
    assert named in str(raised.value)
    with pytest.raises(OutputError) as without_force:
        loratool.merge([(adapter, 0.5)], into=base, out=out)
    assert named in str(without_force.value) and "--force" not in str(without_force.value)
    assert digest(base.parent) == before


def test_force_replaces_a_merge_with_its_undo_and_the_configuration_as_the_user_changed_it(
    base: Path, adapter: Path
) -> None:
    out = loratool.merge([(adapter, 0.5)], into=base, out=base.parent / "out", undo=True).out
    write(out / "config.json", json.dumps(json.loads((out / "config.json").read_bytes()) | {"x": 1}))
    (out / "an empty folder").mkdir()
    loratool.merge([adapter], into=base, out=out, force=True)
    assert not (out / "loratool-undo").exists()
    loratool.verify(out)


def test_force_replaces_an_exported_adapter_and_nothing_beside_it(adapter: Path, tmp_path: Path) -> None:
    out = loratool.export(adapter, tmp_path / "out")
    loratool.export(adapter, out, force=True)
    for name in ("README.md", "optimizer.safetensors", "checkpoint/adapter_model.safetensors"):
        write(out / name)
        with pytest.raises(OutputError, match=f"holds '{name}'"):
            loratool.export(adapter, out, force=True)
        (out / name).unlink()


def test_a_file_put_into_the_output_while_it_is_replaced_is_kept(adapter: Path, tmp_path: Path) -> None:
    out = loratool.export(adapter, tmp_path / "out")
    before = digest(out)
    with pytest.raises(OutputError, match=r"holds 'letter\.txt'"), staged_folder(out, ADAPTER, force=True) as stage:
        write(stage / "new")
        write(out / "letter.txt")
    assert digest(out) == before | digest(out)
    assert (out / "letter.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_an_adapter_alone_among_safetensors_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = loratool.export(adapter, tmp_path / "out.safetensors")
    exported = digest(out)
    loratool.export(adapter, out, force=True)
    out.write_bytes(b"")
    loratool.export(adapter, out, force=True)
    assert digest(out) == exported
    of_another_tool = tmp_path / "kohya.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, of_another_tool, {"ss_network_dim": "4", "adapter_config": "{}"})
    for content in ((base / "model.safetensors").read_bytes(), of_another_tool.read_bytes(), b"mine"):
        out.write_bytes(content)
        with pytest.raises(OutputError, match="is a file that loratool did not write, so --force does not replace it"):
            loratool.export(adapter, out, force=True)
        assert out.read_bytes() == content


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.png", "pipe"])
def test_force_replaces_no_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match="is not a regular file"), staged_file(tmp_path / name, FILE, force=True):
        pass
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_force_replaces_a_picture_that_loratool_drew_and_none_of_the_users(
    suffix: str, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"out{suffix}"
    loratool.spectrum(adapter, plot=out)
    drawn = out.read_bytes()
    loratool.spectrum(adapter, plot=out, force=True)
    assert out.read_bytes() == drawn
    figure = matplotlib.figure.Figure()
    figure.savefig(out)
    mine = out.read_bytes()
    with pytest.raises(OutputError, match="did not write"):
        loratool.spectrum(adapter, plot=out, force=True)
    assert out.read_bytes() == mine


def test_a_file_put_in_place_of_the_output_while_it_is_replaced_is_kept(adapter: Path, tmp_path: Path) -> None:
    out = loratool.export(adapter, tmp_path / "out.st")
    with pytest.raises(OutputError, match="did not write"), staged_file(out, FILE, force=True) as stage:
        write(stage, "new")
        write(out)
    assert out.read_text() == "mine"


# A merge, an image, an adapter's folder and its file, a picture: each replaces its own kind alone.


@pytest.fixture
def outputs(base: Path, adapter: Path) -> dict[str, Path]:
    """One output of each kind."""
    folder = base.parent / "outputs"
    return {
        "a merged model": loratool.merge([adapter], into=base, out=folder / "merged").out,
        "a quantized model": loratool.quantize(base, out=folder / "image").out,
        "an adapter's folder": loratool.export(adapter, folder / "folder"),
        "an adapter's file": loratool.export(adapter, folder / "file.safetensors"),
    }


def test_an_output_is_replaced_by_its_own_kind_alone(outputs: dict[str, Path], base: Path, adapter: Path) -> None:
    commands: dict[str, Callable[[Path], object]] = {
        "a merged model": lambda out: loratool.merge([adapter], into=base, out=out, force=True),
        "a quantized model": lambda out: loratool.quantize(base, out=out, force=True),
        "an adapter's folder": lambda out: loratool.export(adapter, out, force=True),
    }
    before = digest(base.parent)
    for kind, command in commands.items():
        for other in sorted(outputs.keys() - {kind}):
            expected = (
                f"is a file, and the output is {kind}" if "file" in other else f"is {other}, and the output is {kind}"
            )
            if other == "an adapter's file" and kind != "a quantized model":
                continue  # by its name the output would be a file
            with pytest.raises(OutputError, match=re.escape(expected)):
                command(outputs[other])
            assert digest(base.parent) == before
        command(outputs[kind])


def test_a_folder_is_not_replaced_by_a_file(base: Path, adapter: Path) -> None:
    folder = loratool.export(adapter, base.parent / "out")
    folder = folder.rename(base.parent / "out.safetensors")
    with pytest.raises(OutputError, match="is a folder, and the output is an adapter's file, a file"):
        loratool.export(adapter, folder, force=True)
    assert (folder / "adapter_config.json").is_file()


# Which file an error is about.


@pytest.mark.parametrize("stage_at", STAGES)
def test_a_source_that_cannot_be_read_is_named_as_such(stage_at: Any, tmp_path: Path) -> None:
    """It often lies beside the output, since a merge goes beside its base."""
    for source in (tmp_path / "base" / "tokenizer.json", tmp_path / "out.json", Path("/nowhere/adapter.safetensors")):
        with pytest.raises(CheckpointError, match="cannot read") as raised, stage_at(tmp_path / "out"):
            source.stat()
        assert f"'{source}'" in str(raised.value)
        assert "choose another place" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write '.*/out'"), staged_folder(tmp_path / "out", FOLDER) as stage:
        (stage / "nowhere" / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"cannot write '.*/out'.*free some space"),
        staged_folder(tmp_path / "out", FOLDER),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"cannot write '.*/out'"),
        staged_folder(tmp_path / "file" / "new" / "out", FOLDER),
    ):
        pass


def test_a_source_that_cannot_be_read_during_a_change_in_place_is_named_as_such(base: Path) -> None:
    before = digest(base)
    for source in (base / "nowhere.json", base.parent / "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match="cannot read") as raised, journal.Journal(base):
            source.read_bytes()
        assert f"'{source}'" in str(raised.value)
    with pytest.raises(OutputError, match="in place"), journal.Journal(base) as change:
        (change.new / "nowhere" / "file").write_text("")
    assert digest(base) == before


# A change in place that was killed after its commit.


@pytest.fixture
def killed(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose change in place is committed and not carried out."""
    with monkeypatch.context() as patch:
        patch.setattr(journal, "recover", lambda folder: None)
        loratool.merge([adapter], into=base, in_place=True)
    assert (base / JOURNAL / "commit.json").is_file()
    return base


def shorten(file: Path) -> Callable[[], object]:
    whole = file.read_bytes()
    file.write_bytes(whole[:1_000])
    return lambda: file.write_bytes(whole)


def move_away(file: Path) -> Callable[[], object]:
    file.rename(file.parent.parent / "away")
    return lambda: (file.parent.parent / "away").rename(file)


def replace_by_link(file: Path) -> Callable[[], object]:
    back = move_away(file)
    file.symlink_to("../away")
    return lambda: (file.unlink(), back())


def give_second_name(file: Path) -> Callable[[], object]:
    os.link(file, file.parent.parent / "second")
    return (file.parent.parent / "second").unlink


def link_the_undo(file: Path) -> Callable[[], object]:
    (file.parent / "loratool-undo").symlink_to("nowhere")
    return (file.parent / "loratool-undo").unlink


OBSTACLES = {
    "a second name": (give_second_name, "has a second name; remove that and run again"),
    "a file that became shorter": (shorten, "has become shorter; put the whole file back and run again"),
    "a file that is gone": (move_away, "No such file or directory; fix that and run again"),
    "a link for a file": (replace_by_link, "is a link or not a file"),
    "a link for the undo": (link_the_undo, "is a link; move that away and run again"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_a_committed_change_that_meets_an_obstacle_says_which_and_is_finished_without_it(
    what: str, killed: Path, tmp_path: Path
) -> None:
    hinder, said = OBSTACLES[what]
    mend = hinder(killed / "model.safetensors")
    before = digest(killed / JOURNAL)
    with pytest.raises(CheckpointError) as raised:
        loratool.verify(killed)
    assert said in str(raised.value)
    assert "keep the journal" in str(raised.value)
    assert "remove it and check" not in str(raised.value)
    assert digest(killed / JOURNAL) == before
    mend()
    loratool.verify(killed)
    assert not (killed / JOURNAL).exists()


def test_an_error_of_the_disk_is_no_reason_to_remove_a_committed_change(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(killed / "model.safetensors"))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_checked", fails)
        with pytest.raises(CheckpointError, match="Input/output error") as raised:
            loratool.verify(killed)
    assert "model.safetensors" in str(raised.value)
    assert "remove it and check" not in str(raised.value)
    loratool.verify(killed)


# A power cut: a name lasts when its folder was synced while it was there.


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Every name that has been made durable so far."""
    names: set[Path] = set()

    def sync(folder: str | os.PathLike[str]) -> None:
        names.difference_update([name for name in names if name.parent == Path(folder)])
        names.update(Path(folder).iterdir())

    monkeypatch.setattr(staging, "sync_folder", sync)
    monkeypatch.setattr(journal, "sync_folder", sync)
    return names


def test_a_change_in_place_forgets_its_commit_only_when_every_name_lasts(
    killed: Path, durable: set[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting: list[set[Path]] = []
    unlink = os.unlink

    def forget(path: Any, **options: Any) -> None:
        if Path(path).name == "commit.json" and not options:
            lasting.append(set(durable))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", forget)
    journal.recover(killed)
    made = {killed / "loratool.json", *(killed / "loratool-undo").rglob("*"), killed / "loratool-undo"}
    assert len(made) > 4
    assert [made - names for names in lasting] == [set()]


def test_the_removal_of_one_undo_of_two_lasts_before_its_commit_is_forgotten(
    base: Path, adapter: Path, tiny_adapters: TinyAdapters, durable: set[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for weight in (0.5, 1.0):
        loratool.merge([(adapter, weight)], into=base, in_place=True, again=True)
    assert len(list((base / "loratool-undo").iterdir())) == 2
    durable.update((base / "loratool-undo").iterdir())
    loratool.unmerge(base, in_place=True)
    below = {name for name in durable if name.parent == base / "loratool-undo"}
    assert below == set((base / "loratool-undo").iterdir())


@pytest.mark.parametrize("stage_at", STAGES)
def test_the_folders_made_above_an_output_last(stage_at: Any, durable: set[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "er" / "out"
    with stage_at(out) as stage:
        write(stage / "file" if stage.is_dir() else stage)
    assert {out, *out.parents} - {tmp_path, *tmp_path.parents} <= durable
