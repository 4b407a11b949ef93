"""Other people's tools on what loratool writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_adapters import TinyAdapters
from tiny_models import TinyModels

import loratool


def test_deltalint_finds_the_adapter_in_the_merged_model(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama", r=8, lora_alpha=16)
    merged = loratool.merge([adapter], into=base, out=tmp_path / "merged").out
    finished = _deltalint(base, adapter, merged)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_deltalint_notices_a_model_without_the_adapter(tiny_models: TinyModels, tiny_adapters: TinyAdapters) -> None:
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama", r=8, lora_alpha=16)
    assert _deltalint(base, adapter, base).returncode != 0


def _deltalint(base: Path, adapter: Path, merged: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("deltalint")), "check"]
    command += ["--base", str(base), "--adapter", str(adapter), "--merged", str(merged)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
