"""An adapter is merged into the same weights once: itself, what it was made of, and what was made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_adapters import merged_once_rounded
from tiny_models import assert_same_tensors, digest, stored_tensors

import loratool
from loratool.checkpoint import journal
from loratool.errors import AlreadyMergedError
from loratool.library import merge as merging
from loratool.merging.contents import contents_of
from loratool.merging.manifest import read_manifest

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "pirate")


@pytest.fixture
def terse(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters.folder("llama", seed=2), tmp_path / "terse")


@pytest.fixture
def merged(base: Path, pirate: Path, tmp_path: Path) -> Path:
    return loratool.merge([pirate], into=base, out=tmp_path / "merged").out


def refused(adapters: list[Any], into: Path, **options: Any) -> str:
    before = digest(into.parent)
    with pytest.raises(AlreadyMergedError) as raised:
        loratool.merge(adapters, into=into, **options)
    assert digest(into.parent) == before
    return str(raised.value)


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"in_place": True}, {"quantize": "nf4"}])
def test_it_is_not_merged_into_its_own_output(merged: Path, pirate: Path, options: dict[str, Any]) -> None:
    message = refused([pirate], merged, **options)
    assert f"'pirate' is in '{merged}' already, with weight 1; take it out with 'loratool unmerge {merged}'" in message
    assert "--again" in message


def test_nor_twice_in_place(base: Path, pirate: Path) -> None:
    loratool.merge([pirate], into=base, in_place=True)
    assert "--in-place'" in refused([pirate], base, in_place=True)
    refused([pirate], base)


def test_nor_with_another_weight(merged: Path, pirate: Path) -> None:
    refused([(pirate, 0.5)], merged)


def test_nor_through_other_merges(merged: Path, pirate: Path, terse: Path, tmp_path: Path) -> None:
    twice = loratool.merge([terse], into=merged, out=tmp_path / "twice").out
    assert [entry.name for entry in contents_of(read_manifest(twice))] == ["pirate", "terse"]
    for adapter in (pirate, terse):
        refused([adapter], twice)
    loratool.merge([terse], into=merged, in_place=True)
    for adapter in (pirate, terse):
        refused([adapter], merged)


def test_taken_out_it_may_be_merged_again(base: Path, merged: Path, pirate: Path, terse: Path, tmp_path: Path) -> None:
    twice = loratool.merge([terse], into=merged, out=tmp_path / "twice").out
    once = loratool.unmerge(twice, out=tmp_path / "once").out
    refused([pirate], once)
    assert loratool.merge([terse], into=once, dry_run=True).plan.targets
    loratool.merge([pirate], into=base, in_place=True)
    loratool.unmerge(base, in_place=True)
    again = loratool.merge([pirate], into=base, in_place=True).out
    assert_same_tensors(stored_tensors(again), stored_tensors(merged))


def test_again_adds_it_once_more(merged: Path, pirate: Path, tmp_path: Path) -> None:
    out = loratool.merge([pirate], into=merged, out=tmp_path / "out", again=True).out
    assert_same_tensors(stored_tensors(out), merged_once_rounded(stored_tensors(merged), [(pirate, 1.0)]))
    assert [entry.name for entry in contents_of(read_manifest(out))] == ["pirate"] * 2
    assert loratool.verify(out).replayed == "base"


@pytest.mark.parametrize("name", ["copy.safetensors", "copy"])
def test_a_copy_in_another_file_is_the_same_adapter(merged: Path, pirate: Path, name: str, tmp_path: Path) -> None:
    copy = loratool.export(pirate, tmp_path / name)
    if copy.is_dir():  # saved again with other metadata, so with another sha256
        save_file(load_file(copy / WEIGHTS), copy / WEIGHTS, {"format": "pt", "by": "me"})
    refused([copy], merged)


def test_a_dylora_is_the_same_at_another_rank(base: Path, pirate: Path, tmp_path: Path) -> None:
    (pirate / "loratool.json").write_text(json.dumps({"schema": 1, "kind": "dylora"}))
    merged = loratool.merge([f"{pirate}@rank=2"], into=base, out=tmp_path / "at-2").out
    refused([f"{pirate}@rank=3"], merged)
    refused([pirate], merged)


Made = Callable[[Path, Path, Path], Path]
MADE: dict[str, Made] = {
    "combined": lambda pirate, terse, out: loratool.combine([pirate, terse], "cat", out=out).out,
    "truncated": lambda pirate, terse, out: loratool.truncate(pirate, rank=2, out=out)[0].out,
    "truncated, then combined": lambda pirate, terse, out: (
        loratool.combine(
            [loratool.truncate(pirate, rank=2, out=out.with_name("cut.st"))[0].out, terse], "cat", out=out
        ).out
    ),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["catalogued", "by its file alone"])
def test_what_is_made_of_it_holds_it(
    how: str, elsewhere: bool, base: Path, merged: Path, pirate: Path, terse: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    child = MADE[how](pirate, terse, tmp_path / "child.st")
    if elsewhere and how != "truncated, then combined":  # a file names its own parents, and not theirs
        monkeypatch.setenv("LORATOOL_HOME", str(tmp_path_factory.mktemp("another-home")))
    assert "'child' is made of 'pirate', which is in" in refused([child], merged)
    of_child = loratool.merge([child], into=base, out=tmp_path / "of-child").out
    assert "'child', which is made of 'pirate', is in" in refused([pirate], of_child)
    assert "by the same command" in refused([pirate, child], base)


def test_two_that_are_made_of_one_hold_the_same(base: Path, pirate: Path, tmp_path: Path) -> None:
    few, more = (loratool.truncate(pirate, rank=rank, out=tmp_path / f"r{rank}.st")[0].out for rank in (1, 2))
    merged = loratool.merge([few], into=base, out=tmp_path / "of-few").out
    assert "'r1', which is made of the same adapter as 'r2', is in" in refused([more], merged)


def test_an_image_of_a_merged_model_holds_what_that_does(
    merged: Path, pirate: Path, terse: Path, tmp_path: Path
) -> None:
    image = loratool.quantize(merged, out=tmp_path / "image").out
    refused([pirate], image)
    of_both = loratool.merge([terse], into=merged, quantize="nf4", out=tmp_path / "of-both").out
    for adapter in (pirate, terse):
        refused([adapter], of_both)
    back = loratool.unmerge(of_both, out=tmp_path / "back").out
    refused([pirate], back)


def test_a_manifest_of_other_weights_is_not_believed(merged: Path, pirate: Path, tmp_path: Path) -> None:
    """As where another program merged into the folder, or copied the manifest to its own output."""
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    result = loratool.merge([pirate], into=merged, out=tmp_path / "out")
    assert any("has changed since its loratool.json was written" in note for note in result.notes)
    assert [entry.name for entry in contents_of(read_manifest(result.out))] == ["pirate"]


def test_a_single_file_of_a_merged_model_is_known_by_the_manifest_beside_it(merged: Path, pirate: Path) -> None:
    refused([pirate], merged / "model.safetensors")


# A merge in place that was killed after its commit ends merged, once.


def killed_before_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "recorded", die)


def killed_before_it_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_before_the_record(monkeypatch)
    monkeypatch.setattr(journal, "recover", lambda folder: None)


@pytest.mark.parametrize("kill", [killed_before_the_record, killed_before_it_is_carried_out])
@pytest.mark.parametrize("catalogued", [False, True])
def test_repeating_it_ends_in_the_merged_state_once(
    kill: Callable[[pytest.MonkeyPatch], None], catalogued: bool, base: Path, merged: Path, pirate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if catalogued:
        loratool.base_add("base", base)
        loratool.add(pirate, base="base")
    given = "pirate" if catalogued else pirate
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(KeyboardInterrupt):
            loratool.merge([given], into=base, in_place=True)
    done = loratool.merge([given], into=base, in_place=True)
    assert any("interrupted" in note for note in done.notes)
    assert_same_tensors(stored_tensors(base), stored_tensors(merged))
    assert done.output_fingerprint == read_manifest(base).fingerprint
    assert not (base / ".loratool-journal").exists()
    refused([given], base, in_place=True)  # it is recorded now, so a repetition is a second merge
    if catalogued:
        assert [merge.state for merge in loratool.show("pirate").merges if merge.output == base] == ["merged"]


def test_another_merge_is_no_repetition(base: Path, pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_before_the_record(patch)
        with pytest.raises(KeyboardInterrupt):
            loratool.merge([pirate], into=base, in_place=True)
    refused([(pirate, 0.5)], base, in_place=True)
