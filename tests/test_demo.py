"""What the demo says at its end works when it is typed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("inside", [True, False])
def test_the_last_line_of_the_demo_makes_the_command_found(
    inside: bool, demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "project" / ".venv"
    venv.EnvBuilder(symlinks=True).create(environment)
    command = environment / "bin" / "loratool"
    command.write_text("#!/bin/sh\necho found\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "bin" / "python"))
    folder = tmp_path / "project" if inside else tmp_path / "project" / ".venv" / "lib"
    monkeypatch.chdir(folder)
    line = demo.how_to_find_loratool()
    assert not inside or line == ". .venv/bin/activate"
    done = subprocess.run(
        ["bash", "-c", f"{line} && loratool"], capture_output=True, text=True, cwd=folder, env={"PATH": os.defpath}
    )
    assert (done.stdout, done.stderr) == ("found\n", "")
    assert "how_to_find_loratool()" in DEMO.read_text().partition("def main")[2].partition("return 0")[0]
