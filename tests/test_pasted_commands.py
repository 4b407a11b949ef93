"""A command that a message gives can be pasted; where a name cannot be shown as it is, the message says how to give it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import loratool
from loratool.cli import cli
from loratool.errors import to_paste
from registry.backups import put_back
from registry.names import to_paste as registry_to_paste

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

UNSHOWABLE = ["B-\x1b[31mred", "line\nbreak", "right\u202eleft", "bell\x07"]
PLAIN = ["B", "two words", "it's", "$HOME", "-rf", "~nobody", "PATH", "{0}", "é"]


def said(*words: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    return f"{done.output}{done.exception}"


@pytest.mark.parametrize("paste", [to_paste, registry_to_paste])
@pytest.mark.parametrize("name", PLAIN)
def test_a_path_in_a_command_is_the_one_that_the_shell_reads(paste: type(to_paste), name: str) -> None:  # type: ignore[valid-type]
    line = paste("printf %s PATH", name, "")
    read = subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
    assert read.removeprefix("./") == name


@pytest.mark.parametrize("paste", [to_paste, registry_to_paste])
@pytest.mark.parametrize("name", UNSHOWABLE)
def test_a_path_that_cannot_be_shown_is_in_no_command(paste: type(to_paste), name: str) -> None:  # type: ignore[valid-type]
    line = paste("loratool add PATH", name)
    assert line.startswith("'loratool add PATH' (")
    assert "tab completion" in line
    assert line.isprintable()


@pytest.mark.parametrize("name", UNSHOWABLE[:1])
def test_what_is_said_of_a_folder_that_cannot_be_shown_has_no_command_with_it(
    name: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tmp_path / name
    shutil.copytree(tiny_models.folder("llama", "bf16"), base)
    adapter = tiny_adapters.folder("llama")
    out = tmp_path / f"{name}-out"
    for words in (
        ("add", base),
        ("list", "--base", tmp_path / "nothing" / ".." / name),
        ("merge", adapter, "--into", base, "--out", out),
        ("merge", adapter, "--into", out, "--in-place"),
    ):
        message = said(*words)
        assert "Traceback" not in message
        commands = re.findall(r"loratool (?:base add|verify|unmerge|add) [^\n]*", message)
        assert "tab completion" in message or not commands
        assert not any("?" in command for command in commands)
    assert (out / "config.json").is_file()
    restored = put_back(tmp_path / name / "registry.db", tmp_path / name / "registry.backups" / "x.db")
    assert restored.isprintable()
    assert "?" not in restored


def test_the_command_for_a_model_in_a_folder_with_a_space_works(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "two words"))
    (command,) = re.findall(r"'(loratool base add .*)'", said("add", base))
    said(*shlex.split(command)[1:])
    assert [each.path for each in loratool.base_list()] == [base]
