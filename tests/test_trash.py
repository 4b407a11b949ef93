"""`remove` and `restore`, as a user meets them: what came from an adapter is said, and what refers to it keeps making sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

import loratool
from loratool.cli import cli
from registry import InUseError, NotFoundError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def llama(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "bf16")


@pytest.fixture
def pirate(llama: Path, tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """The files of an adapter that is catalogued, and from which another one came."""
    loratool.base_add("llama", llama)
    adapter = tiny_adapters.folder("llama")
    loratool.add(adapter, name="pirate", base="llama", tags=["speech"])
    loratool.truncate("pirate", rank=2, svd=True, name="small", out=tmp_path / "small")
    return adapter


def stored(home: Path) -> int:
    return len(list((home / "store").rglob("*.safetensors")))


def test_removing_says_which_adapters_came_from_it_and_how_to_get_it_back(pirate: Path) -> None:
    said = command("remove", "pirate").output
    assert "Removed pirate@1" in said
    assert "children  small@1" in said
    assert "loratool restore pirate@1" in said
    assert command("restore", "pirate@1").output == "Restored pirate@1\n"
    assert loratool.show("pirate").record.tags == ("speech",)
    assert [edge.child for edge in loratool.show("pirate").descendants] == ["small@1"]


def test_json_of_remove_and_restore(pirate: Path) -> None:
    (removed,) = json.loads(command("remove", "pirate", "--json").output)
    assert (removed["name"], removed["children"], removed["tags"]) == ("pirate", ["small@1"], ["speech"])
    assert removed["kept_until"] > removed["created_at"]
    (listed,) = json.loads(command("restore", "--json").output)
    assert (listed["name"], listed["version"], listed["sha256"]) == ("pirate", 1, removed["sha256"])
    (restored,) = json.loads(command("restore", "pirate", "--json").output)
    assert (restored["name"], restored["was"]) == ("pirate", "pirate@1")
    assert json.loads(command("restore", "--json").output) == []


def test_the_trash_is_listed_and_counted_and_emptied(pirate: Path, home_of_its_own: Path) -> None:
    assert command("restore").output == "The trash is empty.\n"
    loratool.remove("pirate")
    assert "pirate" in command("restore").output
    assert "In the trash: 1 adapter" in command("doctor").output
    assert stored(home_of_its_own) == 2
    assert command("doctor", "--gc").exit_code == 0
    assert stored(home_of_its_own) == 2
    emptied = command("doctor", "--gc", "--trash-days", "0")
    assert "Emptied the trash of pirate@1" in emptied.output
    assert (emptied.exit_code, stored(home_of_its_own)) == (0, 1)
    with pytest.raises(NotFoundError, match="trash"):
        loratool.restore("pirate")


def test_removing_now_frees_at_once_and_children_of_what_goes_with_it_are_not_named(
    pirate: Path, tiny_adapters: TinyAdapters, home_of_its_own: Path
) -> None:
    loratool.add(tiny_adapters.folder("llama", seed=2), name="pirate")
    with pytest.raises(InUseError, match="--all"):
        loratool.remove("pirate", now=True)
    first, second = loratool.remove("pirate", all_versions=True, now=True)
    assert (first.children, first.kept_until, second.children) == (("small@1",), None, ())
    assert stored(home_of_its_own) == 1
    loratool.remove("small")
    assert stored(home_of_its_own) == 1
    assert [each.reference for each in loratool.remove("small", now=True)] == ["small@1"]
    assert stored(home_of_its_own) == 0


def test_an_adapter_is_removed_and_restored_by_its_files(pirate: Path) -> None:
    assert [each.reference for each in loratool.remove(pirate)] == ["pirate@1"]
    assert [each.record.reference for each in loratool.restore(pirate)] == ["pirate@1"]
    with pytest.raises(loratool.LoratoolError, match="is not in the trash"):
        loratool.restore(pirate)


def test_adding_a_removed_adapter_again_is_a_new_entry_under_its_old_number(pirate: Path) -> None:
    loratool.remove("pirate")
    added = loratool.add(pirate, name="pirate")
    assert (added.record.reference, added.new, added.record.tags) == ("pirate@1", True, ())
    assert json.loads(command("restore", "--json").output) == []


def test_a_command_that_is_given_a_removed_adapter_says_how_to_get_it_back(pirate: Path, tmp_path: Path) -> None:
    loratool.remove("pirate")
    for words in (
        ["show", "pirate"],
        ["tag", "pirate", "x"],
        ["remove", "pirate"],
        ["merge", "pirate", "--into", "llama"],
    ):
        done = command(*words)
        assert done.exit_code == 1
        assert "'loratool restore pirate@1' puts it back" in str(done.exception)


def test_merges_of_a_removed_adapter_are_verified_taken_out_and_shown(pirate: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pirate, tmp_path / "copy")
    plain = loratool.merge([copy], into="llama", out=tmp_path / "plain").out
    undoable = loratool.merge(["pirate"], into="llama", out=tmp_path / "undoable", undo=True).out
    shutil.rmtree(copy)
    loratool.remove("pirate")
    assert loratool.verify(plain).path == plain  # its files are in the trash and nowhere else
    merges = loratool.base_show("llama").merges
    assert [member.adapter for merge in merges for member in merge.adapters] == ["pirate@1", "pirate@1"]
    loratool.unmerge(undoable)
    assert loratool.doctor().findings == ()
    loratool.restore("pirate")
    assert {merge.output: merge.state for merge in loratool.show("pirate").merges} == {
        plain: "merged",
        undoable: "merged",
    }
