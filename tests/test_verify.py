"""Verify replays a merge, compares every byte, and names the first tensor or file that differs."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from tiny_models import Layout, digest, stored_in_file, stored_tensors

import loratool
from loratool.errors import CheckpointError, LoratoolError, NotFoundError, RestoreError, VerificationError
from loratool.merging import verify
from loratool.merging.arithmetic import Merge
from loratool.merging.manifest import read_manifest

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def merged(tmp_path: Path, tiny_models: TinyModels, tiny_adapters: TinyAdapters) -> Callable[..., Path]:
    """A merge of copies of a base and an adapter; they are `base` and `adapter` beside it."""

    def make(
        architecture: str = "llama", dtype: str = "bf16", layout: Layout = "sharded", *, seed: int = 1, **options: Any
    ) -> Path:
        base = shutil.copytree(tiny_models.folder(architecture, dtype, layout), tmp_path / "base")
        adapter = shutil.copytree(tiny_adapters.folder(architecture, seed=seed), tmp_path / "adapter")
        return loratool.merge([adapter], into=base, **({"out": tmp_path / "merged"} | options)).out

    return make


def flip_in(folder: Path, name: str, at: int = 3) -> None:
    """Flip one bit of one byte of a tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = stored_in_file(file)
        if name in tensors:
            content = bytearray(file.read_bytes())
            content[content.index(tensors[name].data) + at] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError(f"no {name} in {folder}")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "loratool.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def expect_verification_error(folder: Path, named: str) -> str:
    before = digest(folder)
    with pytest.raises(VerificationError) as raised:
        loratool.verify(folder)
    assert named in str(raised.value)
    assert digest(folder) == before
    return str(raised.value)


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "bf16"), ("gpt2", "fp16"), ("bert", "fp32")])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_merge_is_replayed_from_its_base(
    architecture: str, dtype: str, layout: Layout, merged: Callable[..., Path]
) -> None:
    folder = merged(architecture, dtype, layout)
    before = digest(folder.parent)
    result = loratool.verify(folder)
    assert (result.replayed, result.notes) == ("base", ())
    assert result.tensors == len(stored_tensors(folder))
    assert result.files == len([name for name in digest(folder) if not name.endswith(".safetensors")]) - 1
    assert digest(folder.parent) == before


def test_without_the_base_it_is_taken_out_in_memory_by_its_undo_file(merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    shutil.rmtree(folder.parent / "base")
    shutil.rmtree(folder.parent / "adapter")
    before = digest(folder.parent)
    assert loratool.verify(folder).replayed == "undo"
    assert digest(folder.parent) == before


def test_without_both_it_is_compared_only_and_that_is_said(merged: Callable[..., Path]) -> None:
    folder = merged()
    shutil.rmtree(folder.parent / "base")
    result = loratool.verify(folder)
    assert result.replayed == ""
    assert "neither its base nor an undo file" in result.notes[0]


def test_without_the_adapter_it_is_compared_only_and_that_is_said(merged: Callable[..., Path]) -> None:
    folder = merged()
    shutil.rmtree(folder.parent / "adapter")
    result = loratool.verify(folder)
    assert result.replayed == ""
    assert "adapter" in result.notes[0]


def test_the_adapter_beside_the_undo_file_serves_to_replay(merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    shutil.rmtree(folder.parent / "adapter")
    assert loratool.verify(folder).replayed == "base"


def test_a_catalogued_adapter_serves_to_replay(merged: Callable[..., Path]) -> None:
    folder = merged()
    loratool.add(folder.parent / "adapter")
    shutil.rmtree(folder.parent / "adapter")
    assert loratool.verify(folder).replayed == "base"


def test_a_merge_in_place_verifies(merged: Callable[..., Path]) -> None:
    folder = merged(in_place=True, out=None)
    assert loratool.verify(folder).replayed == "undo"


def test_a_merge_on_a_merge_verifies(merged: Callable[..., Path], tiny_adapters: TinyAdapters) -> None:
    folder = merged()
    second = loratool.merge(
        [(tiny_adapters.folder("llama", seed=2), 0.7), tiny_adapters.folder("llama", seed=3)],
        into=folder,
        out=folder.parent / "second",
        undo=True,
    ).out
    assert loratool.verify(second).replayed == "base"
    shutil.rmtree(folder)
    assert loratool.verify(second).replayed == "undo"
    loratool.merge([tiny_adapters.folder("llama", seed=4)], into=second, in_place=True)
    assert loratool.verify(second).replayed == "undo"


@pytest.mark.parametrize("name", [Q_PROJ, NORM, "lm_head.weight"])
@pytest.mark.parametrize("undo", [True, False])
def test_the_tensor_that_differs_is_named(name: str, undo: bool, merged: Callable[..., Path]) -> None:
    folder = merged(undo=undo)
    flip_in(folder, name)
    message = expect_verification_error(folder, f"'{name}'")
    assert "expected" in message


def test_of_several_tensors_the_first_by_name_is_named(merged: Callable[..., Path]) -> None:
    folder = merged()
    flip_in(folder, NORM)
    flip_in(folder, Q_PROJ)
    flip_in(folder, "model.layers.1.mlp.up_proj.weight")
    expect_verification_error(folder, f"'{Q_PROJ}'")


@pytest.mark.parametrize("at", [0, -1])
def test_the_first_and_the_last_byte_count(at: int, merged: Callable[..., Path]) -> None:
    folder = merged(layout="single")
    size = len(stored_tensors(folder)[Q_PROJ].data)
    flip_in(folder, Q_PROJ, at % size)
    expect_verification_error(folder, f"'{Q_PROJ}'")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_the_file_that_differs_is_named(name: str, merged: Callable[..., Path]) -> None:
    folder = merged()
    file = folder / name
    file.write_bytes(file.read_bytes() + b"\n")
    expect_verification_error(folder, f"'{name}'")


def test_a_file_that_is_missing_is_named(merged: Callable[..., Path]) -> None:
    folder = merged()
    (folder / "tokenizer.json").unlink()
    assert "missing" in expect_verification_error(folder, "'tokenizer.json'")


@pytest.mark.parametrize(
    "name",
    [
        "modeling_tiny.py",
        "model-00009-of-00009.safetensors",
        "pytorch_model.bin",
        "inside/weights.PT",
        "x.pth",
        "x.gguf",
    ],
)
def test_an_extra_file_that_would_be_loaded_is_named(name: str, merged: Callable[..., Path]) -> None:
    folder = merged()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert "in no record" in expect_verification_error(folder, f"'{name}'")


def test_code_that_came_with_the_base_is_not_extra(merged: Callable[..., Path], tiny_adapters: TinyAdapters) -> None:
    folder = merged()
    (folder / "modeling_tiny.py").write_text("x = 1")
    second = loratool.merge([tiny_adapters.folder("llama", seed=2)], into=folder, out=folder.parent / "second").out
    assert loratool.verify(second).notes == ()


def test_another_extra_file_is_noted(merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    (folder / "notes.md").write_text("mine")
    result = loratool.verify(folder)
    assert result.replayed == "base"
    assert [("'notes.md'" in note, "added" in note) for note in result.notes] == [(True, True)]


def test_a_tensor_that_is_missing_or_extra_is_named(merged: Callable[..., Path]) -> None:
    folder = merged(layout="single")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"stranger": tensors[NORM].clone()}, file, {"format": "pt"})
    expect_verification_error(folder, "'stranger'")
    save_file({name: tensor for name, tensor in tensors.items() if name != NORM}, file, {"format": "pt"})
    assert "missing" in expect_verification_error(folder, f"'{NORM}'")


def test_equal_bytes_of_another_shape_differ(merged: Callable[..., Path]) -> None:
    folder = merged(layout="single")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {Q_PROJ: tensors[Q_PROJ].reshape(-1, 32).contiguous()}, file, {"format": "pt"})
    with pytest.raises(VerificationError, match="shapes"):
        loratool.verify(folder)


def test_equal_tensors_in_other_shards_are_the_same_model(merged: Callable[..., Path]) -> None:
    folder = merged()
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert loratool.verify(folder).replayed == "base"


def test_a_manifest_with_forged_digests_is_found_out_by_the_replay(merged: Callable[..., Path]) -> None:
    """Bytes and manifest agree, and the merge does not give them."""
    folder = merged(undo=True)
    flip_in(folder, Q_PROJ)
    forge(folder)
    message = expect_verification_error(folder, f"'{Q_PROJ}'")
    assert "replayed" in message
    shutil.rmtree(folder.parent / "base")
    with pytest.raises(LoratoolError, match=r"q_proj"):
        loratool.verify(folder)


def forge(folder: Path) -> None:
    """Make the manifest agree with the tensors as they are now."""
    from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
    from loratool.checkpoint.model import Checkpoint

    checkpoint = Checkpoint.open(folder)
    digests = tensor_digests(checkpoint)

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"] = digests
        manifest["fingerprint"] = fingerprint(checkpoint.tensors, digests)
        for name in manifest["changed"]:
            manifest["changed"][name][1] = digests[name]

    edit_manifest(folder, change)


def test_another_weight_in_the_manifest_is_found_out_by_the_replay(merged: Callable[..., Path]) -> None:
    folder = merged()
    edit_manifest(folder, lambda manifest: manifest["adapters"][0].update(weight=0.5))
    expect_verification_error(folder, "'model.layers.0.mlp.down_proj.weight'")


class RoundsOtherwise(Merge):
    """Stands for the arithmetic of another torch."""

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        super().change(rows, parts)
        parts[0][0] ^= 1


@pytest.mark.parametrize("undo", [True, False])
def test_a_replay_that_differs_is_an_error_only_under_the_torch_that_merged(
    undo: bool, merged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged(undo=undo)
    monkeypatch.setattr(verify, "Merge", RoundsOtherwise)
    assert "replayed" in expect_verification_error(folder, "'model.layers.0.mlp.down_proj.weight'")
    edit_manifest(folder, lambda manifest: manifest["versions"].update(torch="2.0.0"))
    result = loratool.verify(folder)
    assert result.replayed == ("undo" if undo else "")
    (note,) = result.notes
    assert "another torch" in note
    assert "'model.layers.0.mlp.down_proj.weight'" in note
    assert "every byte is what the merge wrote" in note


@pytest.mark.parametrize("undo", [True, False])
def test_without_the_device_that_merged_it_is_not_replayed_from_the_base(
    undo: bool, merged: Callable[..., Path]
) -> None:
    folder = merged(undo=undo)
    edit_manifest(folder, lambda manifest: manifest["options"].update(device="cuda:99"))
    result = loratool.verify(folder)
    assert result.replayed == ("undo" if undo else "")
    assert "'cuda:99'" in result.notes[0]
    flip_in(folder, NORM)
    expect_verification_error(folder, f"'{NORM}'")


def test_the_manifest_says_whether_the_merge_was_in_place(merged: Callable[..., Path]) -> None:
    folder = merged(in_place=True, out=None)
    assert read_manifest(folder).in_place
    edit_manifest(folder, lambda manifest: manifest.pop("in_place"))
    assert not read_manifest(folder).in_place
    assert loratool.verify(folder).replayed == "undo"


def test_a_changed_base_is_not_taken_to_replay_from(merged: Callable[..., Path]) -> None:
    folder = merged()
    flip_in(folder.parent / "base", Q_PROJ)
    assert loratool.verify(folder).replayed == ""


def test_a_damaged_undo_file_is_reported(merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    shutil.rmtree(folder.parent / "base")
    (file,) = folder.glob("loratool-undo/*/undo.st")
    content = bytearray(file.read_bytes())
    content[-8:] = bytes(8)
    file.write_bytes(content)
    with pytest.raises(RestoreError):
        loratool.verify(folder)


def test_what_was_not_merged_cannot_be_verified(tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"loratool\.json"):
        loratool.verify(tiny_models.folder("llama"))
    with pytest.raises(LoratoolError, match="nowhere"):
        loratool.verify(tmp_path / "nowhere")
    with pytest.raises(LoratoolError):
        loratool.verify(tiny_models.folder("llama") / "model.safetensors")


def packed(content: bytes, behind: bytes = b"") -> str:
    return base64.b64encode(zstandard.compress(content) + behind).decode()


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no base": lambda m: m.pop("base"),
    "a base of text": lambda m: m.update(base="x"),
    "a short fingerprint": lambda m: m.update(fingerprint="abc"),
    "an upper-case fingerprint": lambda m: m.update(fingerprint="A" * 64),
    "changed as a list": lambda m: m.update(changed=[]),
    "changed without digests": lambda m: m["changed"].update({Q_PROJ: []}),
    "changed with one digest": lambda m: m["changed"].update({Q_PROJ: ["0" * 64]}),
    "changed that is no tensor": lambda m: m["changed"].update({"stranger": ["0" * 64, "0" * 64]}),
    "tensors as a number": lambda m: m.update(tensors=5),
    "no adapters": lambda m: m.update(adapters=None),
    "an adapter of text": lambda m: m.update(adapters=["x"]),
    "an infinite rank": lambda m: m["adapters"][0].update(rank=float("1e999")),
    "a weight of text": lambda m: m["adapters"][0].update(weight="heavy"),
    "options as text": lambda m: m.update(options="cpu"),
    "an undo folder outside": lambda m: m.update(undo="../undo"),
    "an undo folder at the root": lambda m: m.update(undo="/loratool-undo/0123456789ab"),
    "an undo folder with a line end": lambda m: m.update(undo="loratool-undo/0123456789ab\n"),
    "the model itself as undo folder": lambda m: m.update(undo="."),
    "a previous manifest of numbers": lambda m: m.update(previous=[1]),
    "files as a list": lambda m: m.update(files=["x"]),
    "a previous manifest as text": lambda m: m.update(previous="{}"),
    "a previous manifest not compressed": lambda m: m.update(previous=base64.b64encode(b"{}").decode()),
    "a previous manifest cut short": lambda m: m.update(previous=packed(b"{}" * 99)[:-8]),
    "a previous manifest with more behind": lambda m: m.update(previous=packed(b"{}", b"more")),
    "a previous manifest that swells": lambda m: m.update(previous=packed(bytes((64 << 20) + 1))),
    "sha256 of too many kept adapters": lambda m: m.update(undo_adapters=["0" * 64] * 2),
    "sha256 of kept adapters as a number": lambda m: m.update(undo_adapters=5),
    "a short sha256 of a kept adapter": lambda m: m.update(undo_adapters=["0"]),
    "in place as a number": lambda m: m.update(in_place=1),
    "another schema": lambda m: m.update(schema=99),
    "a schema of text": lambda m: m.update(schema="1"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused_everywhere(what: str, merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    file = folder / "loratool.json"
    manifest = json.loads(file.read_text())
    HOSTILE[what](manifest)
    file.write_text(json.dumps(manifest).replace("Infinity", "1e999"))
    before = digest(folder.parent)
    for command in (loratool.verify, loratool.unmerge, lambda path: loratool.unmerge(path, in_place=True)):
        with pytest.raises((CheckpointError, NotFoundError), match=r"loratool\.json"):
            command(folder)
        assert digest(folder.parent) == before


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "x" * 300, "a\0b", "a/" * 3000, "\ud800", ""])
def test_files_that_the_manifest_names_elsewhere_are_never_looked_at(name: str, merged: Callable[..., Path]) -> None:
    folder = merged(undo=True)
    (folder.parent / "outside").write_text("x")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: "0" * 64}))
    with pytest.raises(LoratoolError) as raised:
        loratool.verify(folder)
    assert "expected" not in str(raised.value), "it compared a file outside of the model"
    try:
        result = loratool.unmerge(folder)
    except LoratoolError:
        assert not (folder.parent / "merged-unmerged").exists()
    else:
        assert digest(result.out) == digest(folder.parent / "base")


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/proc/self", "\0", "x" * 5000, "", ".", "~root", "/dev/fd/0", "nowhere"]
)
def test_a_base_path_and_an_adapter_path_from_the_manifest_are_only_looked_at(
    path: str, merged: Callable[..., Path]
) -> None:
    folder = merged()

    def change(manifest: dict[str, Any]) -> None:
        manifest["base"]["path"] = path
        manifest["adapters"][0]["file"] = path

    edit_manifest(folder, change)
    assert loratool.verify(folder).replayed == ""
    with pytest.raises(RestoreError, match="not available"):
        loratool.unmerge(folder)
    with pytest.raises(LoratoolError):
        loratool.unmerge(folder, approximate=True)
    assert sorted(os.listdir(folder.parent)) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"kind": "merge"}', b'{"kind": "merge", "schema": 1}',
                                  b'{"kind":"merge","kind":"merge"}', b'{"x":' + b"[" * 100_000])  # fmt: skip
def test_a_damaged_manifest_is_refused(text: bytes, merged: Callable[..., Path]) -> None:
    folder = merged()
    (folder / "loratool.json").write_bytes(text)
    for command in (loratool.verify, loratool.unmerge):
        with pytest.raises(LoratoolError, match=r"loratool\.json"):
            command(folder)


def test_a_recorded_merge_is_found_by_its_folders_name(
    merged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged(out=tmp_path / "models" / "pirate é", undo=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert loratool.verify("pirate é").path == folder
    assert loratool.unmerge("pirate é").out == folder.with_name("pirate é-unmerged")
    assert not list(elsewhere.iterdir())
    for name in ("nowhere", "pirate", "models/pirate é", ".."):
        with pytest.raises((NotFoundError, CheckpointError)):
            loratool.verify(name)


def test_which_of_several_merges_of_one_name_is_meant_is_not_guessed(
    merged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = merged(out=tmp_path / "one" / "model")
    other = loratool.merge([tmp_path / "adapter"], into=tmp_path / "base", out=tmp_path / "other" / "model").out
    monkeypatch.chdir(tmp_path / "base")
    for command in (loratool.verify, loratool.unmerge):
        with pytest.raises(NotFoundError, match="several merged models") as raised:
            command("model")
        assert str(one) in str(raised.value)
        assert str(other) in str(raised.value)
    shutil.rmtree(one)
    one.write_text("no model")
    (tmp_path / "link").symlink_to(other.parent)
    loratool.merge([tmp_path / "adapter"], into=tmp_path / "base", out=tmp_path / "link" / "model", force=True)
    assert loratool.verify("model").path == other, "one folder, by two paths"
    loratool.base_add("model", tmp_path / "base")
    with pytest.raises(LoratoolError, match=r"base.*loratool\.json|no manifest|not merged"):
        loratool.verify("model")
    loratool.base_remove("model")
    shutil.rmtree(other)
    with pytest.raises(NotFoundError, match="no longer at"):
        loratool.verify("model")
