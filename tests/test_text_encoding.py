"""Names of files that are no text, and locales that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_adapters import TinyAdapters
from tiny_models import TinyModels

import loratool
from loratool.errors import CheckpointError


def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_done(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """A manifest names what it was made from."""
    no_text = os.fsdecode(b"b\xff")
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama")
    other_base = shutil.copytree(base, tmp_path / no_text / "base")
    other_adapter = shutil.copytree(adapter, tmp_path / no_text / "adapter")
    for merge in ({"adapters": [adapter], "into": other_base}, {"adapters": [other_adapter], "into": base}):
        for dry_run in (True, False):
            with pytest.raises(CheckpointError, match="is not valid text"):
                loratool.merge(**merge, out=tmp_path / "out", dry_run=dry_run)
    with pytest.raises(CheckpointError, match="is not valid text"):
        loratool.quantize(other_base, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / no_text]


def test_what_is_written_is_utf_8_in_every_locale(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "Smöl"}
    (base / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "loratool", "quantize", base, "--out", tmp_path / "out"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, check=True, env=os.environ | ascii_only)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["_name_or_path"] == "Smöl"
