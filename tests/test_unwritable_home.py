"""A home that is read-only or on a full disk: what goes to elsewhere goes on, with a note; what only reads works."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from disks import fill, make_read_only, small_disk
from test_eval import tiny_tokenizer, with_tokenizer
from tiny_models import digest

import loratool
from loratool.formats.read import read_adapter
from loratool.hub.repository import HubFile
from loratool.library.resolving.hub_bases import header_cache
from loratool.library.training_runs.progress import SilentTraining
from registry import RegistryError, RegistryFullError, RegistryReadOnlyError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")
UNKNOWN = "the catalogue does not know of it"


@dataclass(frozen=True, slots=True)
class Case:
    """A base and an adapter, both catalogued, in a home in which nothing can be written any more."""

    base: Path
    adapter: Path
    error: type[RegistryError]


@pytest.fixture(params=["read-only", "full"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels,
         tiny_adapters: TinyAdapters) -> Iterator[Case]:  # fmt: skip
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "llama")
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.setenv("LORATOOL_HOME", str(disk / "home"))
        loratool.base_add("llama", base)
        loratool.add(tiny_adapters.folder("llama"), name="pirate", base="llama")
        if request.param == "full":
            fill(disk)
            # As full as it gets: the reserve is gone, too.
            (disk / "home" / "registry.reserve").unlink()
            fill(disk)
        else:
            make_read_only(disk)
        error = RegistryFullError if request.param == "full" else RegistryReadOnlyError
        yield Case(base, tiny_adapters.folder("llama"), error)


class InterruptedAt(SilentTraining):
    """Presses Ctrl-C in this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, report: Any) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def noted(result: Any) -> bool:
    """Whether exactly one of the result's notes says that the catalogue does not know of it."""
    return [UNKNOWN in note for note in result.notes].count(True) == 1


def test_a_merge_and_its_way_back_go_on(case: Case, tmp_path: Path) -> None:
    before = digest(case.base)
    merged = loratool.merge("pirate", into="llama", out=tmp_path / "merged", undo=True)
    assert noted(merged)
    assert loratool.verify(merged.out).replayed
    assert digest(loratool.unmerge(merged.out, out=tmp_path / "back").out) == before
    in_place = loratool.merge("pirate", into="llama", in_place=True)
    assert noted(in_place)
    assert noted(loratool.unmerge(case.base, in_place=True))
    assert digest(case.base) == before


def test_a_model_is_quantized(case: Case, tmp_path: Path) -> None:
    result = loratool.quantize("llama", out=tmp_path / "nf4")
    assert [note for note in result.notes if "not catalogued" in note]
    assert result.name is None
    assert loratool.verify(result.out).replayed


@pytest.mark.parametrize(
    "make",
    [
        lambda out: loratool.truncate("pirate", rank=1, out=out)[0],
        lambda out: loratool.combine([("pirate", 0.5)], "cat", out=out),
    ],
    ids=["truncate", "combine"],
)
def test_an_adapter_made_of_another_is_written_whole(make: Callable[[Path], Any], case: Case, tmp_path: Path) -> None:
    result = make(tmp_path / "made.safetensors")
    assert noted(result)
    made = read_adapter(result.out)
    assert (result.record.is_catalogued, result.record.reference) == (False, "made")
    assert (result.record.sha256, result.record.rank) == (made.sha256, made.rank)
    assert result.to_json()["version"] is None
    with pytest.raises(RegistryError, match="no adapter 'made'"):
        loratool.show("made")


def test_a_difference_is_extracted(case: Case, tmp_path: Path) -> None:
    tuned = loratool.merge("pirate", into="llama", out=tmp_path / "tuned").out
    result = loratool.extract(tuned, "llama", rank=2, out=tmp_path / "back.safetensors")
    assert noted(result)
    assert read_adapter(result.out).rank == 2


def test_what_only_reads_works(case: Case, tmp_path: Path) -> None:
    assert [adapter.name for adapter in loratool.list()] == ["pirate"]
    assert loratool.show("pirate").base is not None
    assert loratool.base_list()[0].name == "llama"
    assert loratool.doctor(deep=True).findings == ()
    assert loratool.merge("pirate", into="llama", dry_run=True).plan.targets
    assert read_adapter(loratool.export("pirate", tmp_path / "out")).rank == read_adapter(case.adapter).rank


def test_what_changes_the_catalogue_says_why_it_cannot(case: Case) -> None:
    for change in (
        lambda: loratool.add(case.adapter, name="again"),
        lambda: loratool.tag("pirate", ["speech"]),
        lambda: loratool.base_remove("llama", force=True),
    ):
        with pytest.raises(case.error, match=r"is full|cannot be written"):
            change()
    assert loratool.show("pirate").record.tags == ()


@pytest.mark.usefixtures("case")
def test_headers_from_the_hub_that_cannot_be_kept_are_no_error() -> None:
    cache, file = header_cache(), HubFile("model.safetensors", 8, sha256="0" * 64)
    cache.put(file, b"{}" * 10_000)
    assert cache.get(file) in (None, b"{}" * 10_000)


@pytest.mark.usefixtures("case")
def test_an_adapter_is_trained_and_an_interrupted_run_goes_on(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = with_tokenizer(tiny_models.folder("llama", "bf16"), tmp_path / "chat", tiny_tokenizer())
    data = tmp_path / "data.txt"
    data.write_text("the cat sat on a mat\n" * 8)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "cat.safetensors"
    with pytest.raises(KeyboardInterrupt, match=f"--resume --out {out}"):
        loratool.train(base, data, name="cat", out=out, rank=2, steps=3, device="cpu", progress=InterruptedAt(1))
    result = loratool.train(name="cat", resume=True, out=out)
    assert noted(result)
    assert not result.record.is_catalogued
    assert read_adapter(result.out).sha256 == result.record.sha256
    assert result.record.metrics == result.outcome.to_json()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cat.safetensors",
        "cat.train.jsonl",
        "cat.train.png",
    ]
