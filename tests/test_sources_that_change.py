"""What is made of a file that changes while it is read: nothing, and the error says which file it was."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import digest

import loratool
from loratool.checkpoint.fingerprint import DigestCache, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, LoratoolError
from loratool.library.reporting.progress import Silent

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


def replace(file: Path) -> None:
    """Put another file of the same size and times in its place, as a download does."""
    other, status = file.with_suffix(".other"), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


def write(file: Path) -> None:
    """Write one byte, and put the times back."""
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {"replaced": replace, "written": write, "removed": Path.unlink}


class Meanwhile(Silent):
    """Progress that changes a file when the first bytes of a step are done."""

    def __init__(self, step: str, act: Callable[[], None]) -> None:
        self.step, self.act, self.now, self.done = step, act, "", False

    def begin(self, label: str, total: int) -> None:
        self.now = label

    def advance(self, count: int) -> None:
        if self.now.startswith(self.step) and not self.done:
            self.done = True
            self.act()


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.folder("llama", "bf16", "sharded"), tmp_path / "base"))


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "pirate"))


def shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[-1]


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("what", ["a shard", "the configuration", "another file", "the adapter", "its configuration"])
def test_a_merge_of_files_that_change_meanwhile_leaves_nothing(
    what: str, how: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    file = {
        "a shard": shard(base),
        "the configuration": base / "config.json",
        "another file": base / "generation_config.json",
        "the adapter": adapter / "adapter_model.safetensors",
        "its configuration": adapter / "adapter_config.json",
    }[what]
    before = {path.name for path in tmp_path.iterdir()}
    watcher = Meanwhile("merging", lambda: CHANGES[how](file))
    with pytest.raises(LoratoolError) as raised:
        loratool.merge([adapter], into=base, out=tmp_path / "out", progress=watcher)
    assert watcher.done and file.name in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("how", ["replaced", "written"])
@pytest.mark.parametrize("what", ["a shard", "the adapter"])
def test_a_merge_in_place_of_files_that_change_meanwhile_changes_nothing(
    what: str, how: str, base: Path, adapter: Path
) -> None:
    file = shard(base) if what == "a shard" else adapter / "adapter_model.safetensors"
    seen: dict[str, str] = {}

    def act() -> None:
        CHANGES[how](file)
        seen.update({name: value for name, value in digest(base).items() if ".loratool-journal" not in name})

    with pytest.raises(LoratoolError, match="replaced or written while it was read"):
        loratool.merge([adapter], into=base, in_place=True, progress=Meanwhile("merging", act))
    assert digest(base) == seen


def test_every_command_that_makes_something_of_a_model_refuses_one_that_changes_meanwhile(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loratool.merge([adapter], into=base, out=tmp_path / "merged", undo=True)
    commands: dict[str, tuple[str, Path, Callable[[Silent, Path], object]]] = {
        "quantize": ("quantizing", base, lambda watcher, out: loratool.quantize(base, out=out, progress=watcher)),
        "dequantize": ("merging", tmp_path / "nf4", lambda watcher, out: loratool.merge(
            [adapter], into=tmp_path / "nf4", dequantize=True, out=out, any_base=True, progress=watcher)),
        "extract": ("extracting", base, lambda watcher, out: loratool.extract(
            tmp_path / "merged", base, out=out, rank=2, progress=watcher)),
        "unmerge": ("unmerging", tmp_path / "merged", lambda watcher, out: loratool.unmerge(
            tmp_path / "merged", out=out, progress=watcher)),
    }  # fmt: skip
    loratool.quantize(base, out=tmp_path / "nf4")
    for command, (step, folder, run) in commands.items():
        kept = shutil.copytree(folder, tmp_path / "kept")
        before = {path.name for path in tmp_path.iterdir()}
        watcher = Meanwhile(step, lambda folder=folder: replace(shard(folder)))  # type: ignore[misc]
        try:
            run(watcher, tmp_path / f"{command}-out")
        except LoratoolError as error:
            assert re.search("replaced or written while it was read|has changed since the merge", str(error)), command
        else:
            pytest.fail(f"{command} made something of it")
        assert watcher.done, command
        assert {path.name for path in tmp_path.iterdir()} == before
        shutil.rmtree(folder)
        kept.rename(folder)


def test_a_base_that_changes_during_a_replay_is_called_changed_and_not_wrong(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    loratool.merge([adapter], into=base, out=tmp_path / "merged")
    with pytest.raises(CheckpointError, match="replaced or written while it was read"):
        loratool.verify(tmp_path / "merged", progress=Meanwhile("replaying", lambda: replace(shard(base))))


@pytest.mark.parametrize("command", ["export", "truncate", "combine"])
def test_an_adapter_made_of_one_that_changes_meanwhile_is_not_written(
    command: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratool.formats.write as writing

    file, write_header = adapter / "adapter_model.safetensors", writing.header_bytes

    def header_bytes(*arguments: object) -> bytes:
        replace(file)
        return write_header(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "header_bytes", header_bytes)
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match="replaced or written while it was read"):
        if command == "export":
            loratool.export(adapter, out)
        elif command == "truncate":
            loratool.truncate(adapter, rank=1, out=out)
        else:
            loratool.combine([(adapter, 0.5)], method="cat", out=out)
    assert not out.exists()


def test_digests_are_not_kept_of_a_file_that_was_written_and_given_its_old_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.checkpoint.fingerprint.RACE_SECONDS", -1.0)  # kept although it is new
    cache, file = DigestCache(tmp_path / "digests"), shard(base)
    long_ago = 10**18
    for each in base.iterdir():
        os.utime(each, ns=(long_ago, long_ago))
    first = tensor_digests(Checkpoint.open(base), cache)
    write(file)
    assert file.stat().st_mtime_ns == long_ago
    assert tensor_digests(Checkpoint.open(base), cache) != first
