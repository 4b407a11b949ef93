"""Dry runs: they work where the output exists, sum up, and list in natural order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import digest

import loratool
from loratool.errors import OutputError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


@pytest.fixture
def llama(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "llama")


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


def test_a_plan_is_made_although_the_output_exists_and_says_so(llama: Path, pirate: Path, tmp_path: Path) -> None:
    out = loratool.merge([pirate], into=llama, out=tmp_path / "out").out
    before = digest(out)
    planned = loratool.merge([pirate], into=llama, out=out, dry_run=True)
    assert len(planned.plan.targets) == 14
    assert any(str(out) in note and "exists already" in note and "--force" in note for note in planned.notes)
    assert not any(
        "exists" in note for note in loratool.merge([pirate], into=llama, out=out, dry_run=True, force=True).notes
    )
    with pytest.raises(OutputError, match="exists already"):
        loratool.merge([pirate], into=llama, out=out)
    assert digest(out) == before


def test_so_is_the_plan_of_a_quantization(llama: Path, tmp_path: Path) -> None:
    out = loratool.quantize(llama, out=tmp_path / "nf4").out
    planned = loratool.quantize(llama, out=out, dry_run=True)
    assert planned.plan.conversions
    assert any("exists already" in note for note in planned.notes)
