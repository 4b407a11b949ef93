"""A catalogue that was lost, as a user meets it: every command says so, nothing is freed by mistake, and it is made again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from terminals import terminal

import loratool
from registry import NotSureError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


def loratool_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "loratool", *words], capture_output=True, text=True)


@pytest.fixture
def lost(tiny_models: TinyModels, tiny_adapters: TinyAdapters, home_of_its_own: Path, tmp_path: Path) -> Path:
    """A home whose catalogue knew a base, an adapter with a tag, and one that was made from it, and is gone."""
    loratool.base_add("llama", tiny_models.folder("llama", "bf16"))
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="llama", tags=["speech"])
    loratool.truncate("pirate", rank=2, svd=True, name="small", out=tmp_path / "small")
    for file in home_of_its_own.glob("registry.db*"):
        file.unlink()
    return home_of_its_own


def stored(home: Path) -> int:
    return len(list((home / "store").rglob("*.safetensors")))


def test_a_lost_catalogue_is_made_again_with_its_family(lost: Path) -> None:
    done = loratool_command("doctor", "--rebuild", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert (said["rebuilt"], said["rebuilt_bases"], said["not_rebuilt"]) == (["pirate@1", "small@1"], ["llama"], [])
    shown = loratool.show("small")
    assert (shown.record.base, [edge.parent for edge in shown.ancestors]) == ("llama", ["pirate@1"])
    assert loratool.show("pirate").record.tags == ("speech",)
    assert loratool.doctor(deep=True).findings == ()
    again = loratool_command("doctor", "--rebuild")
    assert (again.returncode, "Restored nothing" in again.stdout) == (0, True)


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["base", "list"], ["show", "pirate"], ["tag", "pirate", "x"]]
)
def test_every_command_that_reads_an_empty_catalogue_says_that_the_store_is_full(lost: Path, words: list[str]) -> None:
    done = loratool_command(*words)
    notes = [line for line in done.stderr.splitlines() if "is empty, but the store beside it holds 2 adapters" in line]
    assert len(notes) == 1
    assert "'loratool doctor --rebuild'" in notes[0]
    assert "is empty, but" not in done.stdout


def test_nothing_is_freed_after_a_loss_unless_it_is_meant(lost: Path, tiny_adapters: TinyAdapters) -> None:
    loratool.add(tiny_adapters.folder("llama", seed=5), name="single")
    done = loratool_command("doctor", "--gc")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pirate@1, small@1" in done.stderr and "--rebuild" in done.stderr and "--yes" in done.stderr
    with pytest.raises(NotSureError):
        loratool.doctor(gc=True)
    assert stored(lost) == 3
    assert loratool_command("doctor", "--gc", "--yes").returncode == 0
    assert stored(lost) == 1


def test_on_a_terminal_it_is_asked_whether_it_is_meant(lost: Path) -> None:
    assert "Free it for good?" in terminal("doctor", "--gc", typed="n\n", status=1)
    assert stored(lost) == 2
    assert "All is well." in terminal("doctor", "--gc", typed="y\n")
    assert stored(lost) == 0


def test_what_a_rebuild_cannot_name_is_said_with_the_way_on(lost: Path) -> None:
    (entry,) = [
        path.parent for path in lost.rglob("*.safetensors") if "small" in Path(f"{path.parent}.json").read_text()
    ][:1]
    Path(f"{entry}.json").unlink()
    done = loratool_command("doctor", "--rebuild")
    assert done.returncode == 1
    assert f"loratool add {entry} --name NAME" in done.stdout.replace("\n", "")
    assert loratool.add(entry, name="small").record.reference == "small@1"
    assert loratool_command("doctor", "--rebuild").returncode == 0


def test_the_doctor_names_the_newest_backup_and_how_to_put_it_back(
    tiny_adapters: TinyAdapters, home_of_its_own: Path
) -> None:
    for name in ("pirate", "parrot"):
        loratool.add(tiny_adapters.folder("llama"), name=name)
    (backup,) = loratool.doctor().backups
    shutil.copyfile("/dev/null", home_of_its_own / "registry.db")
    done = loratool_command("doctor")
    assert str(backup.path) in done.stdout
    way = next(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("mv "))
    subprocess.run(way, shell=True, check=True)
    assert [record.name for record in loratool.list()] == ["pirate"]
